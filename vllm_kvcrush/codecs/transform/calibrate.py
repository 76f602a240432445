"""Calibration: takes statistics of a model's keys, and of what errors in them would cost, on some
text, and writes transform tables, and what each codec loses with them on other text.

It runs the model in transformers, on the CPU, in float32. It knows no model type: queries and keys
are taken where attention gets them, and RoPE is undone after a check that it is the one that the
configuration describes. What errors cost is taken from gradients: after the prefill of a context,
further tokens attend to its keys as leaves of a graph, as they would attend to a compressed cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush import paths
from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.codecs.transform import losses
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform import texts as package_texts
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.points import POINTS, OperatingPoint, TablesError, horizon
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import ModelShape, model_config

# Tokens of an excerpt's context, tokens that then attend to it, and number of excerpts.
CONTEXT, QUESTION, EXCERPTS = 1536, 512, 4
# More tokens than this change nothing that can be measured.
MOST_TOKENS = 4096
FEWEST_TOKENS = 512
# The same of the excerpts on which losses are measured.
HELD_OUT = 1024, 256, 4

# Openings of the model's own samples: prose, code, tables, numbers, markup, a chat.
OPENINGS = (
    "",
    "The ",
    "def ",
    "# ",
    "1. ",
    "Dear ",
    "Question: ",
    "| Name | Number |\n|---|---|\n| ",
    "In 19",
    '{"',
    "import ",
    "<p>",
    "The numbers are 48213, 90715, ",
    "Name: ",
    "Chapter 1\n",
    "- ",
)
# Twice as many samples of half the length take half the time: a step costs the same for all.
SAMPLES = 2 * len(OPENINGS)
SAMPLE_TOKENS = 112


class Probe:
    """A model in transformers, of which queries, keys, values and gradients can be read.

    Raises TablesError for a model that transform coding does not fit.

    Args:
        path: the model's directory, or its name if it is in the local Hugging Face cache.
    """

    ATTENTION = "kvcrush_calibration"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        folder = _folder(path)
        self.config = model_config(folder)
        self.model = ModelShape.from_config(self.config, folder.resolve().name)
        self.rope = Rope.from_config(self.config)
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None
        self._past: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        AttentionInterface.register(self.ATTENTION, self.attention)
        AttentionMaskInterface.register(self.ATTENTION, sdpa_mask)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=self.ATTENTION,
                local_files_only=True,
            )
        except Exception as error:  # a file, a type, or quantised weights may be at fault
            raise TablesError(_unloadable(folder, self.config, error)) from error
        self.network = network.eval()
        self.network.requires_grad_(False)  # only keys and values get gradients
        self._verify()

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> Any:
        """Computes transformers' own attention. It also notes its inputs while `prefill` runs, and
        attends to given keys and values as well while `log_probabilities` runs."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self._past is not None:
            keys, values, kept, bias = self._past
            layer, m, n = module.layer_idx, query.shape[2], keys.shape[2]
            key = torch.cat([keys[layer][None], key], 2)
            value = torch.cat([values[layer][None], value], 2)
            mask = torch.ones(len(keys[layer]), m, n + m, dtype=torch.bool).tril(n)
            if kept is not None:
                mask[..., :n] &= kept[layer][:, None]
            groups = query.shape[1] // key.shape[1]
            if bias is not None:
                hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
                hidden[..., :n] += bias[layer][:, None]
                mask = hidden
            mask = mask.repeat_interleave(groups, 0)[None]
        if self._layers is not None:
            self._layers[module.layer_idx] = query[0], key[0], value[0]
        return sdpa_attention_forward(module, query, key, value, mask, **rest)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries [L, Hq, n, D] and keys [L, H, n, D], both with RoPE, and values
        [L, H, n, Dv] of tokens, the first of which has position `start`."""
        layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._layers = layers
        places = torch.arange(start, start + len(tokens))[None]
        ids = torch.tensor([list(tokens)])
        self.network.base_model(input_ids=ids, position_ids=places, use_cache=False)
        self._layers = None
        if sorted(layers) != list(range(self.model.layers)):
            raise TablesError(
                f"{self.model.name} has layers without plain attention: use int8 or int4."
            )
        q, k, v = (torch.stack([layers[i][part] for i in sorted(layers)]) for part in range(3))
        return q, k, v

    def log_probabilities(
        self,
        keys: Tensor,
        values: Tensor,
        start: int,
        tokens: Sequence[int],
        kept: Tensor | None = None,
        log_bias: Tensor | None = None,
    ) -> Tensor:
        """Returns log-probabilities [m, vocabulary] after each of m tokens that attend to a cache
        and, causally, to one another.

        Args:
            keys, values: the cache, [L, H, n, D] with RoPE and [L, H, n, Dv].
            start: position of the first token.
            tokens: m token ids.
            kept: bool [L, H, n]; the cache's other tokens are hidden.
            log_bias: [L, H, n], added to the logits of the cache's tokens, or None.
        """
        past = keys, values, kept, log_bias
        self._past, places = past, torch.arange(start, start + len(tokens))
        try:
            logits = self.network(
                input_ids=torch.tensor([list(tokens)]),
                position_ids=places[None],
                use_cache=False,
            ).logits[0]
        finally:
            self._past = None
        return logits.log_softmax(-1)

    def gradients(
        self, keys: Tensor, values: Tensor, tokens: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients [L, H, n, D] and [L, H, n, Dv] of a log-likelihood with respect to
        keys and values. After each of `tokens` it is the log-likelihood of a token drawn from the
        model's own distribution: the gradients' second moment is Fisher information then, which
        the text's own likelihood gives only where the model is right."""
        # Tensors that were made in inference mode cannot be part of a graph.
        keys, values = keys.clone().requires_grad_(), values.clone().requires_grad_()
        logp = self.log_probabilities(keys, values, keys.shape[2], tokens)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        key_gradients, value_gradients = torch.autograd.grad(
            logp.gather(1, drawn).sum(), (keys, values)
        )
        return key_gradients, value_gradients

    def _verify(self) -> None:
        # Rotary embeddings see distances only: moving all positions rotates every layer's keys by
        # the same angles and changes nothing else. This finds other pairings of channels, layers
        # without RoPE, and temperatures that depend on the position.
        tokens = torch.randint(self.model.vocabulary // 2, (24,), generator=_generator()).tolist()
        far = 1009
        _, near_keys, _ = self.prefill(tokens)
        _, far_keys, _ = self.prefill(tokens, far)
        turned = self.rope.rotate(near_keys, torch.full((len(tokens),), far))
        error = (turned - far_keys).norm() / far_keys.norm()
        if not error < 1e-2:
            raise TablesError(
                f"the rotary embedding of {self.model.name} is not the one that its configuration "
                "describes to vllm-kvcrush: use int8 or int4."
            )

    @torch.inference_mode()
    def samples(self, progress: Callable[..., Any]) -> list[list[int]]:
        """Returns texts that the model writes at temperature 1 after OPENINGS, as token ids; they
        are the same in every run."""
        from transformers import DynamicCache

        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        first = 0 if start is None else start
        heads = [self.tokenizer.encode(s, add_special_tokens=False) for s in OPENINGS]
        heads *= SAMPLES // len(OPENINGS)
        cache, generator = DynamicCache(), _generator()
        ids = torch.full((len(heads), 1), first)
        stop = self.tokenizer.eos_token_id
        for i in progress(range(SAMPLE_TOKENS - 1), "writing text"):
            logits = self.network(
                input_ids=ids[:, -1:], past_key_values=cache, use_cache=True
            ).logits[:, -1]
            if stop is not None:
                logits[:, stop] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            for row, head in enumerate(heads):
                if i < len(head):
                    new[row, 0] = head[i]
            ids = torch.cat([ids, new], 1)
        return [list(map(int, row)) for row in ids]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def excerpts(tokens: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Returns pairs of a context and a question over it. Contexts are spread over the tokens; half
    of a question goes on with the text, half repeats a part of the context, as questions and
    answers do."""
    n = len(tokens)
    question = min(QUESTION, n // 4)
    size = min(CONTEXT, n - question)
    last, generator = n - size - question // 2, _generator()
    found = []
    for start in range(0, last + 1, max(1, last // (EXCERPTS - 1))) if last else [0]:
        context, ahead = tokens[start : start + size], tokens[start + size :][: question // 2]
        again = int(torch.randint(size - question // 2 + 1, (), generator=generator))
        found.append((list(context), [*ahead, *context[again : again + question // 2]]))
    return found[:EXCERPTS]


def take_statistics(
    probe: Probe,
    texts: Iterable[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[..., Any],
) -> Statistics:
    """Returns moments over the tokens of all contexts, except each one's first SINKS.

    Args:
        texts: pairs of a context and a question, as `excerpts` gives them.
        progress: as in `calibrate`.
    """
    total: Statistics | None = None
    count, generator = 0, _generator()
    for context, question in progress(list(texts), "taking statistics"):
        positions = torch.arange(len(context))
        q, k, v = probe.prefill(context)
        g, v_g = probe.gradients(k, v, question, generator)
        q, k, g = (probe.rope.rotate(x, -positions)[:, :, SINKS:] for x in (q, k, g))
        values = v[:, :, SINKS:], v_g[:, :, SINKS:]
        new, more = Statistics.of(k, q, g, values), len(context) - SINKS
        total = new if total is None else total.merged(new, count, more)
        count += more
    assert total is not None
    return total


def _plain(iterable: Iterable[Any], label: str) -> Iterable[Any]:
    return iterable


def bar(iterable: Iterable[Any], label: str) -> Iterable[Any]:
    """Returns the iterable with a progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(iterable, desc=label, dynamic_ncols=True)


def output_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where the tables of a model belong, given its directory or its name. Raises
    TablesError."""
    place = transform_tables.default_path(model_config(_folder(path)))
    if place is None:
        raise TablesError(
            "there is no home directory to keep tables in: name a file with --out, and give it to "
            "the server as --kv-policy-config.tables."
        )
    return place


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    try:
        return paths.model_folder(path)
    except paths.ModelNotHere as error:
        raise TablesError(str(error)) from None


def _unloadable(folder: pathlib.Path, config: Any, error: Exception) -> str:
    quantised = config.get("quantization_config")
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
    why = str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__
    if kind:
        return (
            f"{folder} has {kind} weights, which transformers does not load here ({why}): "
            "calibrate the model that they were made from, whose tables serve both."
        )
    return f"{folder} does not load in transformers ({why})."


def read(text: str | os.PathLike[str] | None) -> str | None:
    """Returns the content of a UTF-8 file, or None without one. Raises TablesError."""
    if text is None:
        return None
    try:
        return pathlib.Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise TablesError(f"{text} cannot be read as UTF-8 text: {error}.") from None


def tokens_of(
    probe: Probe,
    content: str | None,
    text: str | os.PathLike[str] | None,
    progress: Callable[..., Any],
) -> list[int]:
    """Returns the token ids of a file's content, or of the model's own samples. Raises TablesError
    for a file that is too short."""
    if content is None:
        return [token for sample in probe.samples(progress) for token in sample]
    tokens = probe.tokenizer.encode(content, add_special_tokens=False)[:MOST_TOKENS]
    if len(tokens) < FEWEST_TOKENS:
        raise TablesError(f"{text} has only {len(tokens)} tokens: give at least {FEWEST_TOKENS}.")
    return list(tokens)


def probed(
    path: str | os.PathLike[str],
    text: str | os.PathLike[str] | None,
    progress: Callable[..., Any],
) -> tuple[Probe, list[int], str]:
    """Returns a model, the tokens to measure on it, and their digest. Arguments are those of
    `calibrate`; raises TablesError."""
    content = read(text)  # before the model, which may take minutes to load
    probe = Probe(path)
    tokens = tokens_of(probe, content, text, progress)
    return probe, tokens, hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def held_out(
    probe: Probe, content: str | None, text: str | os.PathLike[str] | None
) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Returns pairs of a context and a question over it that tables are not fitted to, and a name
    for them: the rest of a file that is long enough, or else descriptions of packages."""
    context, question, count = HELD_OUT
    if content is not None:
        ids = probe.tokenizer.encode(content, add_special_tokens=False)[MOST_TOKENS:]
        if len(ids) >= context + question:
            rest = probe.tokenizer.decode(ids)
            return _excerpts(probe, [rest]), f"{count} excerpts of {pathlib.Path(str(text)).name}"
    names = " and ".join(package_texts.PACKAGES)
    return _excerpts(probe, package_texts.held_out()), f"{count} excerpts of READMEs of {names}"


def _excerpts(probe: Probe, held: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    def encode(body: str) -> list[int]:
        return list(probe.tokenizer.encode(body, add_special_tokens=False))

    return package_texts.excerpts(held, encode, *HELD_OUT)


def calibrate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str] | None = None,
    points: Sequence[OperatingPoint] = POINTS,
    progress: Callable[..., Any] = _plain,
) -> ModelShape:
    """Writes the tables of a model and returns the model's shape. Raises TablesError.

    Args:
        path: as in `Probe`.
        out: the file to write.
        text: a UTF-8 file to calibrate on; without one, the model's own samples are used.
        points: the operating points to fit tables for.
        progress: called with an iterable and a label, as `bar`; returns the iterable.
    """
    content = read(text)  # before the model, which may take minutes to load
    probe = Probe(path)
    tokens = tokens_of(probe, content, text, progress)
    texts = excerpts(tokens)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    statistics = take_statistics(probe, texts, progress)
    far = horizon(probe.config)
    tables = [
        fit(statistics, point, probe.rope, far) for point in progress(points, "fitting tables")
    ]
    held, about = held_out(probe, content, text)
    by_name = {t.point.name: t for t in tables}
    found = losses.measure(probe, held, by_name, about, progress)
    transform_tables.save(out, probe.model, tables, digest, found)
    return probe.model
