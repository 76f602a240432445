"""Host time of a decode step's attention metadata, for requests with compressed pages.

What a step costs that builds the directory of its batch anew, as this project did before it kept
one on the device; what it costs now; what it costs for requests without compressed pages; and what
is written at a compaction. Layers, heads and tokens are those of a large model; tensors are the
CPU's, so copies to a device are not in it, and no kernel runs. Triton must be importable.

    PYTHONPATH=$(scripts/triton.sh):. python -m benchmarks.gpu.directory [--quick] [--json FILE]
"""

from __future__ import annotations

import itertools
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.report import Run, arguments, interruptible

LAYERS, HEADS, HEAD_SIZE, ITEMSIZE = 80, 8, 128, 2
BLOCK_SIZES = (16, 128)  # what vLLM has on GPUs where nobody says otherwise, and larger ones
TOKENS = 32_768
CODEC = "int4"
CPU = torch.device("cpu")


@dataclass
class Pages:
    """The pages of a layer."""

    num_blocks: int
    page_bytes: int
    room: int
    kv_heads: int = HEADS
    block_pages: int = LAYERS * HEADS

    def capacity(self, codec: str, head: int = 0) -> int:
        return self.room


def seconds(call: Callable[[], Any], least: float) -> dict[str, float]:
    """Returns the median and quartiles of the times of single calls, for `least` seconds and three
    calls at least."""
    found: list[float] = []
    while len(found) < 3 or sum(found) < least:
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    low, value, high = np.quantile(found, [0.25, 0.5, 0.75]).tolist()
    return {"value": value, "low": low, "high": high, "n": len(found)}


def measure(
    requests: int, block_size: int, tokens: int, least: float
) -> dict[str, dict[str, float]]:
    """Times of each way to make the metadata of a step, by its name."""
    import vllm.v1.worker.cpu.shm  # noqa: F401 (lets its buffers do without pinned memory)

    from vllm_kvcrush.codecs import CODECS
    from vllm_kvcrush.config import Settings
    from vllm_kvcrush.engine.worker.backends.triton import KVCrushTritonMetadataBuilder
    from vllm_kvcrush.engine.worker.directory import ResidentDirectory
    from vllm_kvcrush.engine.worker.region import Region, joined
    from vllm_kvcrush.ops.triton.cache import Directory

    page_bytes = block_size * 2 * HEAD_SIZE * ITEMSIZE
    room = CODECS[CODEC].capacity(page_bytes, HEAD_SIZE, HEAD_SIZE, ITEMSIZE)
    each, tail = -(-tokens // room), 9
    own = each + tail
    pages = Pages(requests * own + 1, page_bytes, room)
    counts = np.full((1, LAYERS, HEADS), tokens)
    first = [1 + i * own for i in range(requests)]
    regions = [
        Region.of(range(at, at + each), [CODEC], counts, [pages] * LAYERS)[0] for at in first
    ]
    settings = Settings(policy=CODEC, allow=(CODEC,))
    directory = ResidentDirectory(requests, LAYERS, HEADS, pages.num_blocks, settings, CPU)
    for state, region in enumerate(regions):
        directory.write(state, region)
        region.uploaded = None
    directory.layers[0].blocks.fill_(each)
    spec = types.SimpleNamespace(block_size=block_size)
    builder = KVCrushTritonMetadataBuilder(spec, [], None, CPU)
    builder.directory, builder.states = directory, torch.arange(requests, dtype=torch.int32)
    table = torch.zeros(requests, 131_072 // block_size, dtype=torch.int32)
    common = types.SimpleNamespace(
        num_reqs=requests,
        seq_lens=torch.full((requests,), own * block_size, dtype=torch.int32),
        block_table_tensor=table,
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32),
        max_query_len=1,
        num_actual_tokens=requests,
        slot_mapping=torch.zeros(requests, dtype=torch.int64),
    )

    def rebuilt() -> Any:
        both = joined(regions)
        made = Directory.of(
            both.begin.flatten(0, 1), both.end.flatten(0, 1), both.page, both.count, both.codec,
            both.bias, both.log_bias,
        )  # fmt: skip
        columns = torch.arange(table.shape[1]) + both.blocks.unsqueeze(1)
        tails = table.gather(1, columns.clamp_(max=table.shape[1] - 1))
        return made, tails, common.seq_lens - both.blocks * block_size

    def resident() -> Any:
        builder.paged = True
        return builder.build(0, common)

    def plain() -> Any:
        builder.paged = False
        return builder.build(0, common)

    def written() -> None:
        regions[0].uploaded = None
        directory.write(0, regions[0])

    ways = (rebuilt, resident, plain, written)
    return {way.__name__: seconds(way, least) for way in ways}


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    tokens, least = (4096, 0.2) if args.quick else (TOKENS, 1.0)
    run = Run("directory", args)
    print(f"{LAYERS} layers, {HEADS} KV heads of {HEAD_SIZE}, {tokens} tokens in {CODEC} each\n")
    for size, requests in itertools.product(BLOCK_SIZES, (16, 64)):
        mode = f"block_size={size},requests={requests}"
        case = requests, size, tokens, least
        found = run.step(mode, lambda case=case: measure(*case))
        for way, times in found.items():
            run.add(
                "host_s", times["value"], "s", n=int(times["n"]), policy=CODEC, codec=CODEC,
                context=tokens, task="metadata", mode=f"{mode},{way}", low=times["low"],
                high=times["high"],
            )  # fmt: skip
            print(f"blocks of {size}, {requests} requests, {way}: {times['value'] * 1e3:.3f} ms")
    run.finish()


if __name__ == "__main__":
    with interruptible("directory"):
        main()
