"""Runs a job of the quality benchmark with kvpress, in kvpress's own environment.

    python kvpress_run.py JOB.json [--check]

Each prompt is prefilled once, uncompressed. Then each press compresses a copy of that cache through
its own `forward_hook`, with what the hook saw in the prefill, and one forward pass forces the
continuation over it: true positions, causal among themselves. One JSON record a line goes to
stdout. Imports nothing of this project, so that it needs nothing but kvpress's environment.

AdaKV does not remove keys in kvpress: its attention patch replaces each head's unwanted keys by
ones that no query attends to. It holds the whole cache, so its `kept` is nominal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PRESSES = (
    "snapkv",
    "streaming",
    "keydiff",
    "expected",
    "adakv-snapkv",
    "adakv-expected",
    "tova",
)
# SnapKVPress's default, needed here because it must be smaller for a short prompt.
WINDOW = 64
# ExpectedAttentionPress under AdaKV, as kvpress's own evaluation has it.
EPSILON = 1e-2
# Two ways to one result: float32 sums in another order.
TOLERANCE = 1e-3

Record = dict[str, Any]


class JobError(ValueError):
    """The job cannot be run; the message says why."""


def compression_ratio(length: int, kept: int) -> float:
    """Returns the ratio for which kvpress's `int(length * (1 - ratio))` is `kept`. The half token
    keeps that truncation away from the next lower number."""
    if kept < 1:
        raise JobError(f"kept is {kept}, it must be at least 1 token")
    return 0.0 if kept >= length else 1 - (kept + 0.5) / length


def window(length: int, kept: int) -> int:
    """SnapKV's observation window: the default, unless the prompt or what is kept is shorter."""
    return min(WINDOW, length - 1, kept)


def scored_steps(forced: list[int], scored: list[bool]) -> list[int]:
    """Indices into `forced` of the scored tokens."""
    if len(forced) != len(scored):
        raise JobError(f"{len(forced)} forced tokens but {len(scored)} marks of scored ones")
    if not any(scored):
        raise JobError("no forced token is scored")
    if scored[0]:
        raise JobError(
            "the first forced token is scored, but it comes from the uncompressed prompt"
        )
    return [i for i, wanted in enumerate(scored) if wanted]


def measure(logits: Tensor, gold: Tensor, full: Tensor | None = None) -> Record:
    """Compares `logits` `[n, vocab]` with the tokens `gold` `[n]`, and with the log-probabilities
    `full` `[n, vocab]` of the uncompressed run. NLL and KL in nats, averaged over tokens."""
    logp = logits.float().log_softmax(-1)
    top = logp.argmax(-1)
    correct = top == gold
    result: Record = {
        "nll": -logp.gather(1, gold[:, None]).mean().item(),
        "token_accuracy": correct.float().mean().item(),
        "exact": int(correct.all()),
        "n_scored": len(gold),
    }
    if full is not None:
        result["agreement"] = (top == full.argmax(-1)).float().mean().item()
        result["kl"] = (full.exp() * (full - logp)).double().sum(-1).mean().item()
    return result


def make_press(name: str, length: int, kept: int) -> Any:
    """Returns the press with its defaults, set to keep `kept` of `length` tokens."""
    import kvpress

    ratio = compression_ratio(length, kept)
    if name == "adakv-snapkv":
        return kvpress.AdaKVPress(make_press("snapkv", length, kept))
    if name == "adakv-expected":
        return kvpress.AdaKVPress(
            kvpress.ExpectedAttentionPress(compression_ratio=ratio, epsilon=EPSILON)
        )
    if name == "snapkv":
        return kvpress.SnapKVPress(compression_ratio=ratio, window_size=window(length, kept))
    simple = {
        "streaming": kvpress.StreamingLLMPress,
        "keydiff": kvpress.KeyDiffPress,
        "expected": kvpress.ExpectedAttentionPress,
        "tova": kvpress.TOVAPress,
    }
    return simple[name](compression_ratio=ratio)


class Prefill:
    """One uncompressed prefill: its cache, and what each attention layer's hook saw."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        from transformers import DynamicCache

        self.model, self.length = model, len(prompt)
        self.cache = DynamicCache()
        self.layers = [layer.self_attn for layer in model.model.layers]
        self._seen: list[dict[str, Any]] = []

        def see(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self._seen.append(kwargs)

        hooks = []
        for layer in self.layers:
            layer.rotary_emb = model.model.rotary_emb  # as `with press(model)` does
            hooks.append(layer.register_forward_hook(see, with_kwargs=True))
        try:
            self._unmask()
            model.model(input_ids=torch.tensor([prompt]), past_key_values=self.cache)
        finally:
            for hook in hooks:
                hook.remove()

    def _unmask(self) -> None:
        for layer in self.layers:
            layer.masked_key_indices = None

    def copy(self) -> Any:
        """Returns a copy of the uncompressed cache."""
        from transformers import DynamicCache

        self._unmask()
        copy = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            copy.update(layer.keys, layer.values, index)  # concatenates, hence copies
        return copy

    def compressed(self, press: Any, kept: int) -> Any:
        """Returns a copy of the cache, compressed by `press`. AdaKV's masks are left on the
        layers."""
        cache = self.copy()
        press.post_init_from_model(self.model)
        for layer, kwargs in zip(self.layers, self._seen, strict=True):
            press.forward_hook(layer, [], {**kwargs, "past_key_values": cache}, [None, None])
        self._check_size(cache, press, min(kept, self.length))
        return cache

    def _check_size(self, cache: Any, press: Any, kept: int) -> None:
        masks = type(press).__name__ == "AdaKVPress"
        for layer, held in zip(self.layers, cache.layers, strict=True):
            heads, length = held.keys.shape[1:3]
            masked = len(layer.masked_key_indices[2]) if layer.masked_key_indices else 0
            assert masked == (heads * (self.length - kept) if masks else 0), masked
            assert length == (self.length if masks else kept), length


def forced_states(model: Any, cache: Any, start: int, forced: list[int], at_once: int) -> Tensor:
    """Forces `forced` over `cache`, `at_once` tokens a pass, at positions from `start` on: hidden
    states `[n - 1, hidden]`, the i-th of which predicts token i + 1."""
    states = []
    tokens = torch.tensor([forced[:-1]])
    positions = torch.arange(start, start + len(forced) - 1)[None]
    for part, where in zip(tokens.split(at_once, 1), positions.split(at_once, 1), strict=True):
        out = model.model(input_ids=part, past_key_values=cache, position_ids=where)
        states.append(out.last_hidden_state[0])
    return torch.cat(states)


def run(job: dict[str, Any], check: bool) -> Iterator[Record]:
    """Yields the records of a job. Raises JobError for one that cannot be run."""
    presses = job.get("presses", ())
    if not presses or set(presses) - set(PRESSES):
        raise JobError(f"the presses are {list(presses)}; choose from {', '.join(PRESSES)}")
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    from transformers import AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    for item in job["items"]:
        for mode, parts in item["modes"].items():
            head = {"task": item["task"], "index": item["index"], "mode": mode}
            for record in run_mode(model, presses, parts, check):
                yield {**head, **record}


def run_mode(
    model: Any, presses: list[str], parts: dict[str, Any], check: bool
) -> Iterator[Record]:
    """Yields the records of one item in one mode, the uncompressed one first."""
    prompt, forced = parts["prompt"], parts["forced"]
    steps = scored_steps(forced, parts["scored"])
    gold = torch.tensor([forced[s] for s in steps])
    before = torch.tensor([s - 1 for s in steps])

    def logits(cache: Any, at_once: int = len(forced)) -> Tensor:
        states = forced_states(model, cache, len(prompt), forced, at_once)
        return model.lm_head(states[before])

    started = time.process_time()

    def seconds() -> dict[str, float]:
        nonlocal started
        taken, started = time.process_time() - started, time.process_time()
        return {"cpu_s": round(taken, 3)}

    prefill = Prefill(model, prompt)
    full = logits(prefill.copy()).float().log_softmax(-1)
    held = {"budget": None, "kept": len(prompt)}
    yield {"policy": "kvpress/full", **held, **measure(full, gold), **seconds()}
    for name in presses:
        for budget, kept in parts["kept"].items():
            press = make_press(name, len(prompt), kept)
            result = measure(logits(prefill.compressed(press, kept)), gold, full)
            held = {"budget": budget, "kept": min(kept, len(prompt))}
            yield {"policy": f"kvpress/{name}", **held, **result, **seconds()}
            if check:
                cross_check(model, press, prompt, logits, gold, result["nll"], f"{name} {budget}")
                seconds()


def cross_check(
    model: Any, press: Any, prompt: list[int], logits: Any, gold: Tensor, nll: float, what: str
) -> None:
    """Does the same the official way: `with press(model)` around a prefill of its own, then one
    token a pass. Raises RuntimeError if its NLL is another."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
    official = measure(logits(cache, 1), gold)["nll"]
    print(f"check {what}: NLL {nll:.5f}, official {official:.5f}", file=sys.stderr, flush=True)
    if abs(nll - official) > TOLERANCE:
        raise RuntimeError(f"{what}: NLL is {nll:.5f} here and {official:.5f} the official way")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("job", help="JSON file")
    parser.add_argument("--check", action="store_true", help="also run each press officially")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Records get stdout for themselves; what libraries print there goes to stderr.
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        with open(args.job) as file:
            job = json.load(file)
        for record in run(job, args.check):
            print(json.dumps(record), file=records, flush=True)
    except (JobError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
