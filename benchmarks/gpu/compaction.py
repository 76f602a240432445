"""What a compaction asks of a device: launches, copies from the host, and waits for the device.

Counted without a device, for a request of a model with a few layers and with more: what each layer
adds, and what a compaction takes whatever their number. Triton must be importable.

    PYTHONPATH=$(scripts/triton.sh):. python -m benchmarks.gpu.compaction [--quick] [--json FILE]
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu import asked
from benchmarks.report import Run, arguments, interruptible
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.points import POINTS
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.config import RequestParams, Settings
from vllm_kvcrush.engine.commands import Compact
from vllm_kvcrush.engine.worker.allowed import region_codecs
from vllm_kvcrush.engine.worker.backends.triton import TritonCacheLayer, TritonCacheLayers
from vllm_kvcrush.engine.worker.directory import ResidentDirectory
from vllm_kvcrush.engine.worker.move import Move
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

# Of a model of 8 billion parameters.
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 32
LAYERS = (8, 32)
TOKENS = 4096
# Budgets by policy. In the first of them all tokens fit, so that nothing is chosen.
BUDGETS = {
    "int8": 0.75, "int4": 0.35, "tc4": 0.35, "auto": 0.35, "kvcrush": 0.25, "snapkv": 0.25,
    "mikv": 0.35, "adakv": 0.25, "keepkv": 0.25,
}  # fmt: skip
STAGES = ("first", "next")  # of raw tokens, and of pages that are there and raw ones
COUNTED = ("kernels", "operations", "uploads", "waits")


class Counts(NamedTuple):
    """What one compaction asked."""

    policy: str
    layers: int
    stage: str
    asked: asked.Asked


@functools.cache
def tables() -> dict[str, Tables]:
    """Returns tables of the fitted codecs for random keys, of one layer, whose like all have."""
    rope = Rope(1e4 ** (-torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE))
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, KV_HEADS, 400, HEAD_SIZE)
    keys, queries = torch.randn(shape, generator=generator, dtype=torch.float64)
    measured = Statistics.of(keys, queries)
    return {point.name: fit(measured, point, rope, 512, even=True) for point in POINTS}


class Model:
    """Layers of a cache on the device, and what a server with a policy knows."""

    def __init__(self, policy: str, layers: int) -> None:
        page_bytes = BLOCK_SIZE * 2 * HEAD_SIZE * 2
        own: dict[str, LayerTable] = {}
        rooms = {}
        for codec, t in tables().items():
            angles = Angles(t.rope, 2 * TOKENS)
            own[codec] = LayerTable(t, 0, range(KV_HEADS), page_bytes, HEAD_SIZE, angles)
            found = Counter(section.capacity for section in own[codec].sections)
            rooms[codec] = (tuple((room, layers * n) for room, n in found.items()),)
        self.settings = Settings(
            policy=policy, allow=(policy,), page=(HEAD_SIZE, HEAD_SIZE, 2), fitted=rooms
        )
        self.blocks = 3 * TOKENS // BLOCK_SIZE
        shape = (self.blocks, layers, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        pool = torch.zeros(shape, dtype=torch.bfloat16, device=asked.DEVICE)
        wanted = {c: own[c] for c in region_codecs(self.settings) if c in own}
        self.layers = [
            TritonCacheLayer(
                types.SimpleNamespace(kv_cache=pool[:, i], impl=asked.impl(HEADS, HEAD_SIZE)),
                layers, wanted,
            )
            for i in range(layers)
        ]  # fmt: skip
        self.together = TritonCacheLayers(self.layers)
        self.directory = ResidentDirectory(
            2, layers, KV_HEADS, self.blocks, self.settings, asked.DEVICE
        )


def count(policy: str, layers: int, budget: float) -> Iterator[Counts]:
    """Counts what the first and the second compaction of a request ask."""
    with asked.counted() as found:
        model = Model(policy, layers)
        settings = model.settings
        plan = settings.plan(RequestParams(policy, budget), TOKENS, BLOCK_SIZE)
        state = WorkerRequest(policy, settings.build(policy), plan)
        free = list(range(model.blocks))
        region: tuple[int, ...] = ()
        held, computed = TOKENS, TOKENS
        tail = tuple(free.pop() for _ in range(TOKENS // BLOCK_SIZE))
        for stage in STAGES:
            shape = plan.shape(computed, held)
            raw = len(tail) - -(-shape.tail_tokens // BLOCK_SIZE)
            source, tail = (*region, *tail[:raw]), tail[raw:]
            target = tuple(free.pop() for _ in range(shape.compressed))
            command = Compact(
                "request", computed, source, len(region), target, tail, shape.tail_tokens, 0
            )
            found.forget()
            compacted(model, command, state)
            yield Counts(policy, layers, stage, found.copy())
            region, state.blocks = target, len(target)
            held = len(region) * BLOCK_SIZE + shape.tail_tokens + plan.decode_interval
            computed += plan.decode_interval
            tail += tuple(free.pop() for _ in range(plan.decode_interval // BLOCK_SIZE))


def compacted(model: Model, command: Compact, state: WorkerRequest) -> None:
    """Runs a compaction as a worker does."""

    def failed(why: Exception) -> None:
        raise why

    move = Move(command, state, model.layers, BLOCK_SIZE, None, {}, failed, None, model.together)
    if move.scores and "queries" in state.needs:
        shape = (len(model.layers), HEADS, model.settings.window, HEAD_SIZE)
        move.queries = torch.zeros(shape, dtype=torch.bfloat16, device=asked.DEVICE)
    move.run()
    state.region = move.target if state.owns_pages else None
    state.kept_state, state.positions = move.kept_state, move.positions
    state.layer_state, state.finer = move.layer_state, move.finer
    if state.region is not None:
        model.directory.write(0, state.region)
        state.region.uploaded = None


def main() -> None:
    args = arguments(__doc__).parse_args()
    run = Run("compaction", args)
    few, many = LAYERS
    for policy, budget in list(BUDGETS.items())[: 2 if args.quick else None]:
        both = [list(count(policy, layers, budget)) for layers in LAYERS]
        for small, large in zip(*both, strict=True):
            for name, n in large.asked.totals.items():
                each = (n - small.asked.totals[name]) / (many - few)
                run.add(
                    "asked", n, "times", policy=policy, context=TOKENS, task=name,
                    mode=f"{large.stage},layers={many},each={each:g}",
                )  # fmt: skip
            each = large.asked.totals
            print(
                f"{policy}, {large.stage}, {many} layers: {each}; {few} layers: "
                f"{small.asked.totals}"
            )
    run.finish()


if __name__ == "__main__":
    with interruptible("compaction"):
        main()
