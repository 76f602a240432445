"""What `vllm-kvcrush plan` counts: how much KV a request takes, raw and compressed, and how many
requests fit. Pure arithmetic without torch.

It counts what the scheduler allocates: whole blocks in all layers, over all tensor-parallel ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_kvcrush import gate, paths
from vllm_kvcrush.config import NONE, RequestParams, Settings
from vllm_kvcrush.plan import Plan, cdiv, expected

# Times less memory for which the expected loss is told.
RATIOS = (4, 8, 12)
_ITEMSIZE = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


class PlanError(ValueError):
    """A model or size cannot be counted with; the message is one sentence for a user."""


@dataclass(frozen=True)
class KVShape:
    """What the size of a model's KV cache depends on.

    Attributes:
        layers: number of layers with a KV cache.
        kv_heads: number of KV heads of a layer.
        head_size: channels of a head, the same for keys and values.
        itemsize: bytes of one channel.
        dtype: name of the KV cache's type.
    """

    layers: int
    kv_heads: int
    head_size: int
    itemsize: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Returns the bytes of one raw token's KV in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.itemsize

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str = "auto") -> KVShape:
        """Returns the shape of the KV cache of a model.

        Args:
            config: content of the model's config.json.
            dtype: the KV cache's type as `--dtype` names it.

        Raises:
            PlanError: the configuration or the type is not one that can be counted with.
        """

        def whole(name: str, *instead: str) -> int:
            for key in (name, *instead):
                value = config.get(key)
                if value is not None:
                    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                        raise PlanError(
                            f"{key}={value!r} in the model's configuration is not a positive "
                            "whole number."
                        )
                    return value
            raise PlanError(
                f"The model's configuration has no {name}: it is not one of a text model with "
                "plain attention."
            )

        whole("num_attention_heads")
        head_size = whole("head_dim") if config.get("head_dim") is not None else None
        if head_size is None:
            whole("hidden_size")
            head_size = gate.head_size(config)
        assert head_size is not None
        name = dtype
        if dtype == "auto":
            name = str(config.get("torch_dtype") or config.get("dtype") or "float32")
            name = name.removeprefix("torch.")
            if name == "float32":
                name = "bfloat16"  # vLLM's "auto" runs 32-bit checkpoints in 16 bits
        if name not in _ITEMSIZE:
            known = ", ".join(("auto", *_ITEMSIZE))
            raise PlanError(f"--dtype {name} is not a KV cache type here: give one of {known}.")
        return cls(
            layers=whole("num_hidden_layers"),
            kv_heads=whole("num_key_value_heads", "num_attention_heads"),
            head_size=head_size,
            itemsize=_ITEMSIZE[name],
            dtype=name,
        )


def read_config(path: str) -> dict[str, Any]:
    """Returns the content of a config.json, given its path, its directory, or the name of a model
    in the local Hugging Face cache. Raises PlanError."""
    try:
        file = paths.expanded(path)
        if not file.is_file():
            file = paths.model_folder(path) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except paths.ModelNotHere as error:
        raise PlanError(str(error)) from None
    except OSError:
        raise PlanError(
            f"{path} has no config.json: give a model's directory or its config.json."
        ) from None
    except ValueError as error:
        raise PlanError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise PlanError(f"{file} is not a model's configuration: it holds no JSON object.")
    return config


def check(path: str, config: Mapping[str, Any], dtype: str, block_size: int, longest: int) -> None:
    """Raises PlanError for a model that a server would refuse at start-up.

    Args:
        path: the model's path, for the message.
        config: content of its config.json.
        dtype: the KV cache's type.
        block_size: tokens of a block.
        longest: longest context, in tokens.
    """
    if found := gate.refusals(gate.described(config, dtype, block_size, longest)):
        raise PlanError(f"{path} cannot be served with --kv-policy: it has {'; '.join(found)}.")


def with_page(settings: Settings, path: str, model: KVShape, block_size: int) -> Settings:
    """Returns the settings with the sizes that the model's pages have, and with the tokens that
    they hold by its transform tables if the policy uses any. Raises ConfigError and
    PlanError."""
    page = (model.head_size, model.head_size, model.itemsize)
    if not settings.needs_tables and settings.tables is None:
        return replace(settings, page=page)
    from vllm_kvcrush.codecs.transform.points import TablesError
    from vllm_kvcrush.codecs.transform.tables import model_config

    try:
        described = model_config(paths.model_folder(path))
    except TablesError as error:
        raise PlanError(str(error)) from None
    return settings.with_tables(described, page, block_size)[0]


@dataclass(frozen=True)
class Row:
    """One request of a context length. Blocks are vLLM's; bytes are of KV.

    Attributes:
        context: tokens of the prompt and the output together.
        prompt: tokens of the prompt.
        raw_blocks, raw_bytes: held at the end without compression.
        blocks, bytes: held at the end with compression.
        prompt_bound: most blocks held at any time during prefill.
        bound: most blocks held at any time, which admission counts on.
        decode_bound: most blocks held after prefill.
        compactions: how often the request is compacted.
        fits_raw, fits: how many requests a pool holds at once, all at their largest; None without
            a pool.
        fits_decoding: how many it holds with one in prefill and the others decoding; None without
            a pool.
    """

    context: int
    prompt: int
    raw_blocks: int
    raw_bytes: int
    blocks: int
    bytes: int
    prompt_bound: int
    bound: int
    decode_bound: int
    compactions: int
    fits_raw: int | None
    fits: int | None
    fits_decoding: int | None

    def to_dict(self) -> dict[str, int | None]:
        """Returns the fields by name, for JSON."""
        return asdict(self)


def walk(plan: Plan, length: int) -> tuple[int, int]:
    """Returns how many slots a request of `length` tokens holds at its end, and how often it was
    compacted until then."""
    n = held = compactions = 0
    for each in plan.compactions(length):
        n = each.n
        held = each.shape.compressed * plan.block_size + each.shape.tail_tokens
        compactions += 1
    return held + length - n, compactions


def row(
    model: KVShape,
    settings: Settings,
    context: int,
    output: int,
    block_size: int,
    pool_bytes: int | None = None,
) -> Row:
    """Returns the row of one request.

    Args:
        context: tokens of the prompt and the output together.
        output: how many of them are generated.
        block_size: tokens of a block.
        pool_bytes: size of the KV cache, or None.

    Raises:
        PlanError: the context leaves no prompt.
    """
    prompt = context - output
    if prompt < 1:
        raise PlanError(
            f"--context {context} leaves no prompt beside --output-tokens {output}: "
            "raise the one or lower the other."
        )
    plan = settings.plan(RequestParams(settings.policy, settings.budget), prompt, block_size)
    held, compactions = walk(plan, context)
    block_bytes = model.token_bytes * block_size
    raw_blocks, blocks, bound = (
        cdiv(context, block_size),
        cdiv(held, block_size),
        plan.bound(context),
    )
    growth = cdiv(min(plan.decode_interval, output), block_size)
    decode_bound = plan.blocks(context) + growth if compactions else raw_blocks
    if prompt < plan.min_tokens:  # such a request is raw when decoding begins
        decode_bound = bound
    decode_bound = min(bound, decode_bound)
    # vLLM needs one block of the pool, the null block.
    pool = None if pool_bytes is None else max(0, pool_bytes // block_bytes - 1)
    return Row(
        context=context,
        prompt=prompt,
        raw_blocks=raw_blocks,
        raw_bytes=raw_blocks * block_bytes,
        blocks=blocks,
        bytes=blocks * block_bytes,
        prompt_bound=plan.bound(prompt),
        bound=bound,
        decode_bound=decode_bound,
        compactions=compactions,
        fits_raw=None if pool is None else pool // raw_blocks,
        fits=None if pool is None else pool // bound,
        fits_decoding=(None if pool is None else max(0, (pool - bound) // decode_bound + 1)),
    )


@dataclass(frozen=True)
class Expected:
    """What a policy is expected to lose on long contexts.

    Attributes:
        ratio: how much less memory than raw KV it takes.
        loss: expected loss, in nats a later token; None if tokens would be evicted, which is not
            predicted.
        parts: by codec, percent of the tokens.
    """

    ratio: int
    loss: float | None
    parts: dict[str, int]

    def __str__(self) -> str:
        if self.loss is None:
            return f"{self.ratio}×: evicts"
        parts = " + ".join(f"{codec} {share} %" for codec, share in self.parts.items())
        return f"{self.ratio}×: {self.loss:.4f} ({parts})"


def expectations(settings: Settings, block_size: int) -> list[Expected]:
    """Returns what the default policy is expected to lose, empty if it was not measured.

    Args:
        settings: with the model's pages, as `with_page` gives them.
        block_size: tokens of a block.
    """
    stored = None if settings.policy == NONE else settings.storage(settings.policy)
    if stored is None or (len(stored.codecs) > 1 and not stored.least_loss):
        return []
    packings = [
        replace(packing, loss=settings.losses.get(packing.codec))
        for packing in settings.packings(settings.policy, block_size)
    ]
    if not packings or any(packing.loss is None for packing in packings):
        return []
    if settings.tables is not None and len(packings) > 1:
        return _by_head(settings, block_size, [packing.codec for packing in packings])
    found = []
    for ratio in RATIOS:
        own = expected(packings, block_size, 1 / ratio)
        loss, parts = (None, ()) if own is None else own
        found.append(Expected(ratio, loss, {part.codec: part.tokens for part in parts}))
    return found


def _by_head(settings: Settings, block_size: int, codecs: list[str]) -> list[Expected]:
    """Returns what is expected to be lost where the tables say what each layer and head loses in
    which codec: then each gets its own; see `engine.worker.allocation`."""
    import numpy as np

    from vllm_kvcrush.codecs.transform.tables import summary
    from vllm_kvcrush.engine.worker.allocation import least_loss_codecs

    assert settings.tables is not None and settings.page is not None
    about = summary(settings.tables, block_size, settings.page[2])
    assert about.losses is not None
    losses = np.stack([about.losses.loss[codec].numpy() for codec in codecs])
    rooms = np.stack([about.rooms[codec].numpy() for codec in codecs])
    blocks, found = 4096, []
    for ratio in RATIOS:
        total = blocks // ratio * losses[0].size
        choice = least_loss_codecs(losses, -(-blocks * block_size // rooms), total)
        if choice is None:
            found.append(Expected(ratio, None, {}))
            continue
        loss = float(np.take_along_axis(losses, choice[None], 0).sum())
        heads = np.bincount(choice.ravel(), minlength=len(codecs))
        shares = np.rint(100 * heads / choice.size).astype(int).tolist()
        parts = {codec: n for codec, n in zip(codecs, shares, strict=True) if n}
        found.append(Expected(ratio, loss, parts))
    return found


def losses_of(settings: Settings) -> str | None:
    """Returns the text that the losses were measured on, or None without a file that says it."""
    if settings.tables is None:
        return None
    from vllm_kvcrush.codecs.transform.tables import load_losses

    found = load_losses(settings.tables)
    return None if found is None else found.text


def parse_bytes(text: str) -> int:
    """Returns the bytes that a size such as 8GiB, 512MB or 1000000 means. Raises PlanError."""
    powers = {"": 1}
    for power, letter in enumerate("kmgt", start=1):
        powers |= {letter + "ib": 1024**power, letter + "b": 1000**power, letter: 1024**power}
    word = text.strip().lower()
    number = word.rstrip("kmgtib ")
    unit = word[len(number) :].strip()
    try:
        size = int(float(number) * powers["" if unit == "b" else unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise PlanError(f"--pool-bytes {text} is not a size: give for example 8GiB.")
    return size


def show_bytes(size: int) -> str:
    """Returns a size with three digits and a binary unit."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
