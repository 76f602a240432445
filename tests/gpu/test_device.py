"""What an interpreter cannot show: graphs, repeated launches, pages past 2^31 bytes.

In the interpreter a replay is the launch itself.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from tests.gpu.cache import Cache
from tests.gpu.test_attention import TOLERANCE
from vllm_kvcrush.codecs import reference
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.store import store
from vllm_kvcrush.ops.triton.tap import tap


def captured(call: Callable[[], None], mode: str) -> Callable[[], None]:
    """Returns a function that replays the call's launches; in the interpreter, which has no graphs,
    the call itself."""
    if mode == "interpreter":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize("parts", [1, 4])
def test_a_graph_follows_lengths(draw: random.Random, device: str, mode: str, parts: int) -> None:
    """Store and attention are captured once; then tokens arrive one by one, as in decoding."""
    dtype = torch.float16
    cache = Cache(draw, device, 4, 64, 64, dtype, kv_heads=1, block_size=16)
    layer = cache.layer
    cache.put(["int8", "int4"], 13, [layer.capacity("int8"), 5])
    batch = cache.batch([1])
    batch.table[0, 2] = spare = cache.free.pop()  # behind the pages' block
    query = torch.empty(1, 4, 64, dtype=dtype, device=device)
    key, value = torch.zeros(2, 1, 1, 64, dtype=dtype, device=device)
    slot = torch.full((1,), -1, dtype=torch.int64, device=device)
    out = torch.empty(1, 4, 64, device=device)

    def step() -> None:
        store(layer, key, value, slot)
        attention(layer, batch, query, out, parts=parts)

    replay = captured(step, mode)
    keys, values, length = cache.keys[0][0], cache.values[0][0], cache.lengths[0]
    blocks = [*cache.tails[0], spare]
    for _ in range(5):
        new = torch.randn(3, 1, 1, 64).to(dtype)
        asked = torch.randn(1, 4, 64).to(dtype)
        query.copy_(asked)
        key.copy_(new[0])
        value.copy_(new[1])
        slot.fill_(blocks[length // 16] * 16 + length % 16)
        length += 1
        batch.length.fill_(16 + length)
        replay()
        keys, values = (
            torch.cat([keys, new[0, 0].double()]),
            torch.cat([values, new[1, 0].double()]),
        )
        want, _ = reference.attention(asked, [keys], [values], layer.scale, length)
        error = (out.cpu() - want).abs().max() / values.abs().max()
        assert error <= TOLERANCE[dtype], f"{length} tokens in the tail: {error}"


@pytest.mark.parametrize("parts", [1, 4])
def test_a_graph_follows_its_directory(
    draw: random.Random, device: str, mode: str, parts: int
) -> None:
    """One capture of attention, and of keeping its query; then the row of the batch is another
    request's, with other pages, and one's that has none any more."""
    dtype, size = torch.float16, 64
    cache = Cache(draw, device, 4, size, size, dtype, kv_heads=1, block_size=16)
    layer = cache.layer
    cache.put(["int8", "int4"], 13, [layer.capacity("int8"), 5])
    cache.put(["int4"], 30, [layer.capacity("int4")])
    both = cache.batch([1, 1])
    directory = both.directory
    assert directory is not None
    batch = dataclasses.replace(
        both,
        query_start=both.query_start[:2].clone(),
        length=both.length[:1].clone(),
        table=both.table[:1].clone(),
        states=torch.full((1,), -1, dtype=torch.int32, device=device),
    )
    query = torch.empty(1, 4, size, dtype=dtype, device=device)
    out = torch.empty(1, 4, size, device=device)
    ring = torch.zeros(6, 4, size, dtype=dtype, device=device)
    place = torch.full((1,), -1, dtype=torch.int32, device=device)

    def step() -> None:
        tap(ring, query, place)
        attention(layer, batch, query, out, parts=parts)

    replay = captured(step, mode)
    want_ring = torch.zeros(6, 4, size, dtype=dtype)
    for state, has_pages, kept in ((0, True, 3), (1, True, -1), (0, True, 5), (1, False, 0)):
        tail = cache.lengths[state]
        keys, values = cache.keys[state][0], cache.values[state][0]
        if not has_pages:
            directory.blocks[state] = 0
            keys, values = keys[-tail:], values[-tail:]
        row = [*([0] if has_pages else []), *cache.tails[state]]
        batch.table[0, : len(row)] = torch.tensor(row, dtype=torch.int32, device=device)
        batch.length.fill_(tail + 16 * has_pages)
        batch.states.fill_(state)
        place.fill_(kept)
        asked = torch.randn(1, 4, size).to(dtype)
        query.copy_(asked)
        replay()
        want, _ = reference.attention(asked, [keys], [values], layer.scale, tail)
        error = (out.cpu() - want).abs().max() / values.abs().max()
        assert error <= TOLERANCE[dtype], f"state {state}: {error}"
        if kept >= 0:
            want_ring[kept] = asked[0]
        assert torch.equal(ring.cpu(), want_ring)


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_launch_gives_the_same_again(
    draw: random.Random, device: str, mode: str, codec: str
) -> None:
    """Races between warps show as results that differ."""
    cache = Cache(draw, device, 4, 128, 128, torch.float16, kv_heads=1, block_size=64)
    cache.put([codec] * 2, 70)
    batch = cache.batch([1])
    query = torch.randn(1, 4, 128).half().to(device)
    first, out = (torch.empty(1, 4, 128, device=device) for _ in range(2))
    attention(cache.layer, batch, query, first, parts=4)
    for _ in range(2 if mode == "interpreter" else 200):
        attention(cache.layer, batch, query, out, parts=4)
        assert torch.equal(out, first)


def test_pages_far_into_the_pool(draw: random.Random, device: str, mode: str) -> None:
    """Byte offsets are beyond 2^32, as in all but small pools."""
    if mode == "interpreter":
        pytest.skip("needs a device's memory")
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    page_bytes = 128 * 256 * 2
    cache = Cache(
        draw, device, 4, 128, 128, torch.bfloat16, kv_heads=1, block_size=128, layers=1,
        blocks=5 * 2**30 // page_bytes,
    )  # fmt: skip
    cache.free.sort()  # the last ones are taken first
    for codec in ("raw", "int8", "int4"):
        cache.put([codec] * 2, 130)
    cache.check([1, 1, 1], TOLERANCE[torch.bfloat16], parts=4)
