"""A process that measures one case after the other; the parent outlives what a kernel breaks.

python -m benchmarks.gpu_device.worker cuda|cpu    (driven by `benchmarks.overhead.child.Child`)
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.model import token_bytes
from benchmarks.gpu_device import machine
from benchmarks.gpu_device.caches import Cache, target
from benchmarks.gpu_device.cases import FLASH, SHAPES, Case
from benchmarks.gpu_device.flash import Flash, Unavailable
from benchmarks.gpu_device.timing import Burst, Call, Copy, Product, eager, graph
from benchmarks.overhead.child import serve
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.scores import window_scores
from vllm_kvcrush.ops.triton.store import store

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
CHECKED_ROWS = 16
CHECKED_CONTEXT = 40_000  # beyond, the oracle's own float32 copies would not fit small devices
TRIES = 3


class Job:
    """One candidate of one case.

    Attributes:
        calls: one a layer.
        bytes: that one call must move at least; flops: that it must do.
        check: relative error against float32 attention, or None.
        version: of FlashAttention, if it is that.
    """

    def __init__(self, case: Case, name: str, dtype: torch.dtype, working_set: int):
        self.case, self.name, self.dtype = case, name, dtype
        self.flops: float = 0
        self.version: int | None = None
        self.check: Callable[[], float] | None = None
        _, self.kv_heads, self.size = SHAPES[case.shape]
        if name == FLASH:
            flash = Flash(case, dtype, DEVICE, working_set)
            self.version, self.calls = flash.version, flash.calls()
            self.bytes = case.batch * case.context * self._row()
            self.check = functools.partial(
                self._check, flash.query, flash.out, flash.tokens, self.calls[0]
            )
            self._products()
            return
        # Room for what encode and compact write, in any codec.
        spare = -(-case.context // case.block_size) if case.task in ("encode", "compact") else 0
        source = "raw" if case.task in ("encode", "compact") else name
        self.cache = Cache(case, source, dtype, DEVICE, working_set, spare)
        self.calls = getattr(self, f"_{case.task}")()

    def _row(self) -> float:
        """Bytes of a raw token over all KV heads."""
        return self.kv_heads * 2 * self.size * self.dtype.itemsize

    def _held_bytes(self) -> float:
        cache = self.cache
        packed = token_bytes(cache.codec, cache.layers[0].geometry) * self.kv_heads
        return self.case.batch * (cache.paged * packed + cache.tail * self._row())

    def _products(self) -> None:
        case = self.case
        seen = case.batch * case.rows * (case.context - (case.rows - 1) / 2)
        self.flops = 4.0 * seen * SHAPES[case.shape][0] * self.size

    def _attention(self) -> list[Call]:
        rows, heads = self.case.batch * self.case.rows, SHAPES[self.case.shape][0]
        query = torch.randn(rows, heads, self.size, device=DEVICE).to(self.dtype)
        out = torch.empty_like(query)
        self.bytes = self._held_bytes()
        self._products()
        cache = self.cache
        calls = [
            functools.partial(attention, layer, batch, query, out)
            for layer, batch in zip(cache.layers, cache.batches, strict=True)
        ]
        tokens = functools.partial(cache.tokens, cache.layers[0])
        self.check = functools.partial(self._check, query, out, tokens, calls[0])
        return list(calls)

    _decode = _prefill = _attention

    def _store(self) -> list[Call]:
        case, cache = self.case, self.cache
        rows = case.batch * case.rows
        key, value = (
            torch.randn(rows, self.kv_heads, self.size, device=DEVICE).to(self.dtype)
            for _ in range(2)
        )
        place = torch.arange(case.rows)
        blocks = cache.table[:, place // case.block_size] * case.block_size
        slots = (blocks + place % case.block_size).flatten().to(DEVICE)
        self.bytes = 2 * rows * self._row()
        return [functools.partial(store, layer, key, value, slots) for layer in cache.layers]

    def _slots(self) -> Tensor:
        return torch.arange(self.case.context, device=DEVICE).repeat(self.kv_heads, 1)

    def _scratch(self) -> float:
        """Bytes of all tokens in the float32 buffer between gathering and encoding."""
        return self.case.context * self.kv_heads * 2 * self.size * 4.0

    def _written(self) -> float:
        codec = token_bytes(self.name, self.cache.layers[0].geometry)
        return self.case.context * self.kv_heads * codec

    def _gather(self) -> list[Call]:
        slots = self._slots()
        self.bytes = self._held_bytes() + self._scratch()

        def call(layer: Any, source: Any) -> None:
            compaction.gather(layer, source, slots, positions=True)

        return [functools.partial(call, x, self.cache.source(x, 0)) for x in self.cache.layers]

    def _encode(self) -> list[Call]:
        cache, tokens = self.cache, self.case.context
        key, value = (torch.randn(self.kv_heads, tokens, self.size, device=DEVICE) for _ in "kv")
        where = torch.arange(tokens, dtype=torch.int32, device=DEVICE).repeat(self.kv_heads, 1)
        self.bytes = self._scratch() + self._written()
        calls = []
        for layer in cache.layers:
            to = target(layer, cache.spare, self.name, tokens, DEVICE)
            calls.append(functools.partial(compaction.encode, layer, to, key, value, where))
        return list(calls)

    def _compact(self) -> list[Call]:
        cache, slots = self.cache, self._slots()
        # What it must move; the float32 buffer in between is the kernels' own.
        self.bytes = self._held_bytes() + self._written()
        calls = []
        for layer in cache.layers:
            to = target(layer, cache.spare, self.name, self.case.context, DEVICE)
            calls.append(
                functools.partial(compaction.compact, layer, cache.source(layer, 0), slots, to)
            )
        return list(calls)

    def _scores(self) -> list[Call]:
        case, heads = self.case, SHAPES[self.case.shape][0]
        query = torch.randn(heads, case.rows, self.size, device=DEVICE).to(self.dtype)
        self.bytes = self._held_bytes() / 2  # keys, once

        def call(layer: Any, source: Any) -> None:
            window_scores(layer, source, query, case.context)

        return [functools.partial(call, x, self.cache.source(x, 0)) for x in self.cache.layers]

    def _check(
        self, query: Tensor, out: Tensor, tokens: Callable[[int], tuple[Tensor, Tensor]], call: Call
    ) -> float:
        """Returns the largest error of the last rows of the first and the last sequence, over the
        largest value: that of a benchmark's sizes, which the tests do not have."""
        case, worst = self.case, 0.0
        out.fill_(torch.nan)
        call()
        for seq in {0, case.batch - 1}:
            key, value = tokens(seq)
            last = min(case.rows, CHECKED_ROWS)
            rows = slice((seq + 1) * case.rows - last, (seq + 1) * case.rows)
            q = query[rows].float().transpose(0, 1)  # [heads, last, size]
            group = len(q) // len(key)
            q = q.reshape(len(key), group, last, -1) * self.size**-0.5
            logits = torch.einsum("hgrd,hnd->hgrn", q, key)
            n = torch.arange(case.context, device=q.device)
            seen = case.context - last + torch.arange(last, device=q.device)
            logits.masked_fill_(n > seen[:, None], -torch.inf)
            want = torch.einsum("hgrn,hnd->hgrd", logits.softmax(-1), value).flatten(0, 1)
            error = (out[rows].float().transpose(0, 1) - want).abs().max() / value.abs().max()
            worst = max(worst, float(error)) if error == error else float("inf")
        return worst


def prepare(job: Job, seconds: float) -> dict[str, Any]:
    """Checks a candidate and makes its bursts: {"error", "bytes", "flops", "bursts", "notes"}."""
    found: dict[str, Any] = {"bytes": job.bytes, "flops": job.flops, "notes": [], "error": None}
    if job.check is not None and job.case.context <= CHECKED_CONTEXT:
        found["error"] = job.check()
    run = eager(job.calls)
    for _ in range(TRIES if DEVICE == "cuda" else 0):  # compiles, and fills the allocator's lists
        run()
    launches = len(job.calls)
    mode = "eager" if DEVICE == "cuda" else "interpreter"
    found["bursts"] = {mode: Burst(run, launches, seconds, DEVICE)}
    if DEVICE == "cuda":
        try:
            found["bursts"]["graph"] = Burst(graph(job.calls), launches, seconds, DEVICE)
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises where the device's context is lost
            found["notes"].append(f"no graph: {str(error).splitlines()[0]}")
    found["version"] = job.version
    return found


def measure(case: dict[str, Any], rounds: int, seconds: float, working_set: int) -> dict[str, Any]:
    """Measures a case's candidates and the device's limits in turn.

    Args:
        case: `Case.job()`.
        rounds: bursts of everything.
        seconds: of a burst.
        working_set: bytes over which a candidate's calls are spread.

    Returns:
        {"candidates": {name: {"bytes", "flops", "error", "notes", "version", "seconds": {mode: [a
        round]}}}, "missing": {name: why}, "copy": [bytes/s], "product": [operations/s]}.
    """
    it = Case(**{**case, "candidates": tuple(case["candidates"])})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    missing: dict[str, str] = {}
    ready: dict[str, dict[str, Any]] = {}
    for name in it.candidates:
        try:
            ready[name] = prepare(Job(it, name, dtype, working_set), seconds)
        except Unavailable as error:
            missing[name] = str(error)
        except torch.OutOfMemoryError:
            missing[name] = "does not fit the device's memory"
        except Exception as error:
            if DEVICE == "cuda":
                torch.cuda.synchronize()  # raises where the device's context is lost
            missing[name] = f"{type(error).__name__}: {str(error)[:1000]}"
    cuda = DEVICE == "cuda"
    copy = Copy(2**29 if cuda else 2**20, DEVICE)
    product = Product(4096 if cuda else 64, dtype, DEVICE)
    limits = {x: Burst(x, 1, seconds, DEVICE) for x in (copy, product)}
    times: dict[str, dict[str, list[float]]] = {
        name: {mode: [] for mode in found["bursts"]} for name, found in ready.items()
    }
    rates: dict[Any, list[float]] = {x: [] for x in limits}
    for _ in range(rounds):
        for name, found in ready.items():
            for mode, burst in found["bursts"].items():
                times[name][mode].append(burst())
        for limit, burst in limits.items():
            rates[limit].append(burst())
    result = {
        "candidates": {
            name: {
                **{k: v for k, v in found.items() if k != "bursts"},
                "seconds": times[name],
            }
            for name, found in ready.items()
        },
        "missing": missing,
        "copy": [copy.bytes / s for s in rates[copy]],
        "product": [product.flops / s for s in rates[product]],
    }
    ready.clear()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return result


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the function that `job["kind"]` names with its other entries."""
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"facts": machine.facts, "measure": measure}
    return kinds[job.pop("kind")](**job)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(handle)
