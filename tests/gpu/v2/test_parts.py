"""The runner's parts alone."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch

from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker.backends.stock import StockCacheLayer
from vllm_kvcrush.engine.worker.backends.triton import (
    KVCrushTritonMetadataBuilder,
    TritonCacheLayer,
)
from vllm_kvcrush.engine.worker.directory import ResidentDirectory
from vllm_kvcrush.engine.worker.queries import QueryRing
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.shift import shift
from vllm_kvcrush.plan import Part


@pytest.mark.parametrize("rows", [[1, 1, 1], [5, 1, 1100], [7]])
def test_shift(rows: list[int]) -> None:
    states = random.sample(range(6), len(rows))
    slot_shift = torch.randint(0, 90, (6,), dtype=torch.int32)
    computed = torch.randint(100, 200, (len(rows),))
    start = torch.tensor([0, *rows]).cumsum(0).int()
    positions = torch.cat([c + torch.arange(n) for c, n in zip(computed, rows, strict=True)])
    lengths = torch.full((6,), 77, dtype=torch.int32)
    slots = torch.full((len(positions) + 4,), -77)
    seq_lens = (computed + torch.tensor(rows)).int()
    index = torch.tensor(states)
    if len(rows) == 3:
        index[1] = -1  # a row of nobody
    own = torch.full((6,), 77, dtype=torch.int32)
    places = torch.full((len(positions) + 1500,), 77, dtype=torch.int32)
    observed = torch.tensor([random.randrange(min(n, 7) + 1) for n in rows] + [5]).int()
    shift(
        lengths, slots, own, places, seq_lens, positions, index, start, slot_shift, observed, 7
    )  # fmt: skip
    assert torch.equal(own[: len(rows)], index.int()) and (own[len(rows) :] == -1).all()
    kept = torch.full_like(places, -1)
    for i, (state, count) in enumerate(zip(index.tolist(), observed.tolist(), strict=False)):
        newest = torch.arange(int(start[i + 1]) - count, int(start[i + 1]))
        if state >= 0:
            kept[newest] = (state * 7 + positions[newest] % 7).int()
    assert torch.equal(places, kept)
    gone = torch.where(index >= 0, slot_shift[index], 0)
    assert torch.equal(lengths[: len(rows)], seq_lens - gone)
    assert (lengths[len(rows) :] == 0).all()
    want = positions - gone.long().repeat_interleave(torch.tensor(rows))
    assert torch.equal(slots[: len(want)], want)
    assert (slots[len(want) :] == -77).all()


def test_the_last_queries_of_each_request() -> None:
    """Over steps of several rows, of which only the newest have a place; rows may be strided."""
    heads, size, window, states = 3, 24, 5, 4
    impls = [types.SimpleNamespace(num_heads=heads, head_size=size) for _ in range(2)]
    for impl in impls:
        impl.forward = lambda layer, query, *_: query
    layers = [types.SimpleNamespace(impl=impl) for impl in impls]
    places = torch.full((40,), -1, dtype=torch.int32)
    ring = QueryRing(layers, states, window, places, torch.float32)
    at = ring.kept.data_ptr()
    asked: dict[int, list[torch.Tensor]] = {1: [], 3: []}
    for rows in ({1: 7, 3: 2}, {3: 4}, {1: 1, 3: 1}, {1: 1}):
        places.fill_(-1)
        total, first = sum(rows.values()), 0
        query = torch.randn(2, total, heads + 2, size)
        for state, count in rows.items():
            for row in range(first, first + count):
                asked[state].append(query[:, row, :heads])
            for row in range(max(first, first + count - window), first + count):
                position = len(asked[state]) - (first + count - row)
                places[row] = state * window + position % window
            first += count
        for own, impl in zip(query, impls, strict=True):
            assert torch.equal(impl.forward(None, own[:, :heads], None), own[:, :heads])
    for state, own in asked.items():
        want = torch.stack(own[-window:], 2)
        assert torch.equal(ring.last(state, len(own)), want)
    assert ring.kept.data_ptr() == at and not ring.kept[:, :window].any()


@pytest.mark.parametrize("order", ["BHN", "BNH", "HBN"])
def test_raw_pages_in_any_layout(order: str) -> None:
    """Survivors of a request are moved, in place too, whatever the strides, and nothing else
    changes."""
    blocks, heads, size, k_size, layers = 9, 3, 4, 5, 2
    axes = [order.index(axis) for axis in "BHN"]
    sizes = dict(zip("BHN", (blocks, heads, size), strict=True))
    storage = torch.randn(*[sizes[axis] for axis in order], 2 * k_size)
    cache = storage.permute(*axes, 3)
    assert cache.shape == (blocks, heads, size, 2 * k_size)
    impl = types.SimpleNamespace(head_size=k_size, scale=0.5)
    layer = StockCacheLayer(types.SimpleNamespace(kv_cache=cache, impl=impl), layers, {})
    before = cache.clone()
    source, held = [7, 2, 5, 8], 14
    tail = torch.tensor(source, dtype=torch.int32)
    table = layer.source(None, tail, held, 0)

    def tokens(table: list[int], content: torch.Tensor) -> torch.Tensor:
        return torch.cat([content[block] for block in table], 1)  # [heads, slots, 2 * k_size]

    keys_values = tokens(source, before)[:, :held]
    seen = layer.held(table, [held] * heads)
    assert torch.equal(torch.cat([seen.keys, seen.values], -1), keys_values)
    # Six survivors of each head, into two blocks, one of them a source.
    kept = torch.stack([torch.randperm(12)[:6].sort().values for _ in range(heads)])
    counts = np.full((1, layers, heads), 6)
    target, _ = Region.of([2, 4], ["raw"], counts, [layer.pages] * layers, source)
    layer.compact(table, kept, [6] * heads, target)
    want = keys_values.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2 * k_size))
    assert torch.equal(tokens([2, 4], cache)[:, :6], want)
    untouched = [b for b in range(blocks) if b not in (2, 4)]
    assert torch.equal(cache[untouched], before[untouched])
    assert torch.equal(cache[4, :, 2:], before[4, :, 2:])


LAYERS, HEADS, GROUP, SIZE, BLOCK = 2, 2, 2, 32, 16


def pool_of(blocks: int) -> tuple[torch.Tensor, list[TritonCacheLayer]]:
    """Returns a cache in vLLM's layout BLHNC, NaN where nothing was written, and its layers."""
    pool = torch.full((blocks, LAYERS, HEADS, BLOCK, 2 * SIZE), torch.nan)
    layers = []
    for i in range(LAYERS):
        impl = types.SimpleNamespace(head_size=SIZE, scale=SIZE**-0.5, num_heads=GROUP * HEADS)
        attention = types.SimpleNamespace(kv_cache=pool[:, i], impl=impl)
        layers.append(TritonCacheLayer(attention, LAYERS, {}))
        assert layers[i].index == impl.index == i
    return pool, layers


def test_compactions_on_triton_pages() -> None:
    """A request has three compactions: into its own pages, into shared ones in two codecs, and into
    parts that are chosen by importance. Then attention over the result is checked."""
    pool, layers = pool_of(30)
    n, tail_blocks = 150, [3, 9, 4, 20, 11, 12, 13, 14, 15, 16]
    key, value = torch.randn(2, LAYERS, HEADS, n, SIZE).unbind()
    for i, block in enumerate(tail_blocks):
        part = slice(i * BLOCK, min(n, (i + 1) * BLOCK))
        content = torch.cat([key[:, :, part], value[:, :, part]], -1)
        pool[block, :, :, : content.shape[2]] = content

    def step(
        region: Region | None,
        held: list[list[int]],
        tail: list[int],
        tail_tokens: int,
        target: list[int],
        parts: list[Part],
        choices: list[torch.Tensor],
    ) -> tuple[Region, list[list[int]]]:
        """Runs and checks one compaction.

        Args:
            held: positions of all slots, by head.
            choices: slots of each part, by head.
        """
        new, order = Region.of(
            target,
            [part.codec for part in parts],
            np.array([[[part.tokens] * HEADS] * LAYERS for part in parts]),
            [layer.pages for layer in layers],
            tail,
            region,
        )
        table = torch.tensor(tail, dtype=torch.int32)
        for i in order:
            layer = layers[i]
            source = layer.source(region, table, tail_tokens, n - tail_tokens)
            slots = [len(own) for own in held]
            if region is not None:
                assert layer.positions(source, slots).tolist() == held
            seen = layer.held(source, slots)
            for head in range(HEADS):
                torch.testing.assert_close(
                    seen.keys[head], key[i, head, held[head]], rtol=0, atol=0.3
                )
                torch.testing.assert_close(
                    seen.values[head], value[i, head, held[head]], rtol=0, atol=0.7
                )
            chosen = torch.cat(choices, 1)
            layer.compact(source, chosen, [chosen.shape[1]] * HEADS, new)
        return new, [
            [held[head][s] for choice in choices for s in choice[head].tolist()]
            for head in range(HEADS)
        ]

    # 128 tokens in int8, of which 96 may stay.
    every = [list(range(n))] * HEADS
    kept = torch.stack([torch.randperm(128)[:96].sort().values for _ in range(HEADS)])
    room = layers[0].pages.capacity("int8")
    first, at = step(
        None, every, tail_blocks, n, [1, 2, 5, 6][: -(-96 // room)], [Part("int8", 96)], [kept]
    )
    tail, rest = tail_blocks[8:], list(range(128, n))
    # All of them: the newest 40 in int8, the others in int4; a target is a source.
    both = [Part("int4", 56), Part("int8", 40)]
    all_slots = torch.arange(96).expand(HEADS, -1)
    second, at = step(first, [a + rest for a in at], tail, len(rest), [2, 7, 8], both, [all_slots])
    assert at == [a[:96] for a in at]
    # The finer part is chosen by importance: its slots ascend in position, and so do the others'.
    by_head = [torch.randperm(96) for _ in range(HEADS)]
    finer = torch.stack([order[:30].sort().values for order in by_head])
    coarser = torch.stack([order[30:90].sort().values for order in by_head])
    parts = [Part("int8", 30), Part("int4", 60)]
    third, at = step(
        second, [a + rest for a in at], tail, len(rest), [8, 17, 18], parts, [finer, coarser]
    )
    check_attention(layers, third, [a + rest for a in at], tail, len(rest), key, value)


def test_biases_reach_the_kernels() -> None:
    """The kernels read a layer's own part of a region's log biases, and scores follow from them."""
    _, layers = pool_of(12)
    pages = [layer.pages for layer in layers]
    region, _ = Region.of([1, 2, 3], ["int8"], np.full((1, LAYERS, HEADS), 30), pages, [4, 5])
    region.open_biases()
    assert region.log_bias is not None
    region.log_bias.normal_()
    tail = torch.tensor([4, 5], dtype=torch.int32)
    for i, layer in enumerate(layers):
        zero = torch.zeros(HEADS, 30, SIZE)
        where = torch.arange(30, dtype=torch.int32).repeat(HEADS, 1)
        layer.fill(zero, zero, where, [30] * HEADS, region)
        for block in (4, 5):
            layer.pages.raw.view(-1, LAYERS, HEADS, BLOCK, 2 * SIZE)[block, i] = 0
        seen = layer.held(layer.source(region, tail, 20, 30), [50] * HEADS)
        assert seen.counts == [50] * HEADS and not seen.keys.any()
        # All keys are alike, so a query's weights are those of the biases.
        queries = torch.randn(GROUP * HEADS, 1, SIZE)
        got = seen.window_scores(queries, SIZE**-0.5, 50)
        for head, own in enumerate(region.biases(i)):
            want = torch.cat([own, torch.zeros(20)]).softmax(0)
            torch.testing.assert_close(got[head], want, rtol=1e-3, atol=1e-5)


def check_attention(
    layers: list[TritonCacheLayer],
    region: Region,
    held: list[list[int]],
    tail: list[int],
    tail_tokens: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Checks attention in a batch of the compacted request and one without a region, as the engine
    makes it."""
    spec = types.SimpleNamespace(block_size=BLOCK)
    builder = KVCrushTritonMetadataBuilder(spec, [], None, torch.device("cpu"))
    settings = Settings(policy="mikv", allow=("mikv",))
    builder.directory = ResidentDirectory(5, LAYERS, HEADS, 30, settings, torch.device("cpu"))
    builder.directory.write(3, region)
    builder.directory.stage_blocks(3, region.blocks)
    builder.directory.apply()
    builder.states = torch.tensor([3, 1, -1, -1, -1], dtype=torch.int32)
    builder.paged = True
    table = torch.zeros(2, 12, dtype=torch.int32)
    blocks = [8, 17, 18, *tail]
    table[0, : len(blocks)] = torch.tensor(blocks)
    table[1, : len(tail)] = torch.tensor(tail)
    slots = 3 * BLOCK + tail_tokens
    common = types.SimpleNamespace(
        num_reqs=2,
        seq_lens=torch.tensor([slots, tail_tokens], dtype=torch.int32),
        block_table_tensor=table,
        query_start_loc=torch.tensor([0, 1, 3], dtype=torch.int32),
        max_query_len=2,
        num_actual_tokens=3,
        slot_mapping=torch.zeros(3, dtype=torch.int64),
    )
    metadata = builder.build(0, common)
    assert len(metadata.batches) == LAYERS
    query = torch.randn(3, GROUP * HEADS, SIZE)
    for i, layer in enumerate(layers):
        out = torch.empty_like(query)
        attention(layer.pages, metadata.of(i), query, out)
        seen = [held, [h[-tail_tokens:] for h in held], [h[-tail_tokens:] for h in held]]
        for row in range(3):
            for head in range(GROUP * HEADS):
                places = seen[row][head // GROUP]
                if row == 1:
                    places = places[:-1]  # the first of two new tokens
                k, v = key[i, head // GROUP, places], value[i, head // GROUP, places]
                want = (query[row, head] @ k.T * SIZE**-0.5).softmax(-1) @ v
                torch.testing.assert_close(out[row, head], want, rtol=0, atol=0.2)
