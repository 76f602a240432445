"""The directory of all requests: what each of them finds in it, however they come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.cache import Cache
from vllm_kvcrush.codecs import by_number
from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker import allowed
from vllm_kvcrush.engine.worker.directory import ResidentDirectory
from vllm_kvcrush.engine.worker.region import Region, joined
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.cache import Batch, Directory, run_of
from vllm_kvcrush.ops.triton.codecs import RUNS

CPU = torch.device("cpu")
STATES, LAYERS, HEADS, BLOCKS = 5, 3, 2, 40  # 6 pages in a block, of 8 entries


@dataclass
class Pages:
    """One layer of a pool whose pages hold few tokens."""

    kv_heads: int = HEADS
    block_pages: int = LAYERS * HEADS
    num_blocks: int = BLOCKS
    page_bytes: int = 64

    def capacity(self, codec: str, head: int = 0) -> int:
        return {"raw": 4, "int8": 7, "int4": 11}[codec]


def settings(*allow: str) -> Settings:
    return Settings(policy=allow[0], allow=allow)


def fill_of(draw: random.Random, blocks: list[int], codecs: list[str], biased: bool) -> Region:
    """A region with unequal heads in any of its parts, of which one may be empty."""
    tokens = np.zeros((len(codecs), LAYERS, HEADS), dtype=int)
    for _ in range(draw.randrange(1, len(blocks) * LAYERS * HEADS + 1)):
        # A page more for any of them, of which the last need not be full.
        part, layer, head = (draw.randrange(n) for n in tokens.shape)
        tokens[part, layer, head] += Pages().capacity(codecs[part])
    tokens -= np.array([[[draw.randrange(4) for _ in range(HEADS)] for _ in range(LAYERS)]])
    tokens = tokens.clip(0)
    region, _ = Region.of(blocks, codecs, tokens, [Pages()] * LAYERS)
    if biased:
        region.open_biases()
        assert region.log_bias is not None
        region.log_bias.normal_()
    return region


def entries_of(region: Region, layer: int, head: int) -> dict[str, list[tuple[int, ...]]]:
    """Page, tokens and address of the biases of each entry, by run."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for e in range(int(region.begin[layer, head]), int(region.end[layer, head])):
        address = 0
        if region.bias is not None and region.log_bias is not None:
            address = region.log_bias.data_ptr() + 4 * int(region.bias[e])
        run = run_of(by_number(int(region.codec[e])).name)
        found.setdefault(run, []).append((int(region.page[e]), int(region.count[e]), address))
    return found


def read(directory: Directory, state: int, table: list[int], head: int) -> Iterator[Any]:
    """What attention finds: as `entries_of`, a run after the other."""
    runs = directory.runs[state + 1 if directory.blocks[state] else 0, head]
    for name, (begin, end) in zip(RUNS, runs.tolist(), strict=True):
        own = []
        for e in range(begin, end):
            at = (table[e >> directory.shift] << directory.shift) + e % (1 << directory.shift)
            address = 0 if directory.bias is None else int(directory.bias[at])
            own.append((int(directory.page[at]), int(directory.count[at]), address))
        if own:
            yield name, own


@pytest.mark.parametrize("biases", [False, True])
def test_requests_come_and_go(draw: random.Random, biases: bool) -> None:
    """Each is found as it was written, alone and beside one that shares its blocks; nothing that
    attention reads ever moves."""
    own = settings("mikv", "int4", "keepkv" if biases else "adakv")
    directory = ResidentDirectory(STATES, LAYERS, HEADS, BLOCKS, own, CPU)
    first = directory.layers[0]
    assert first.shift == 3 and (first.bias is not None) == biases
    assert {r for r, there in zip(RUNS, first.present, strict=True) if there} == {
        "raw",
        "int8",
        "int4",
    }

    def addresses() -> list[int]:
        return [
            x.data_ptr()
            for own in directory.layers
            for x in (own.runs, own.blocks, own.page, own.count, own.bias)
            if x is not None
        ]

    at_first, live = addresses(), {}
    free = list(range(BLOCKS))
    for _ in range(60):
        state = draw.randrange(STATES)
        shared = [r for s, r in live.items() if s != state]
        if state in live and draw.random() < 0.3:
            region = live.pop(state)
            directory.stage_blocks(state, 0)
        else:
            if shared and draw.random() < 0.2:
                region = draw.choice(shared)
            else:
                draw.shuffle(free)
                blocks = free[: draw.randrange(1, 5)]
                codecs = draw.sample(["raw", "int8", "int4"], draw.randrange(1, 4))
                region = fill_of(draw, blocks, codecs, biases and draw.random() < 0.5)
            live[state] = region
            directory.write(state, region)
            region.uploaded = None
            directory.stage_blocks(state, region.blocks)
        directory.apply()
        used = {b for r in live.values() for b in r.block_ids.tolist()}
        free = [b for b in range(BLOCKS) if b not in used]
        for s in range(STATES):
            for layer, own in enumerate(directory.layers):
                for head in range(HEADS):
                    found = live.get(s)
                    table = [] if found is None else found.block_ids.tolist()
                    want = {} if found is None else entries_of(found, layer, head)
                    assert dict(read(own, s, table, head)) == want
    assert addresses() == at_first


def test_what_was_not_compiled_is_refused(draw: random.Random) -> None:
    directory = ResidentDirectory(STATES, LAYERS, HEADS, BLOCKS, settings("int8"), CPU)
    with pytest.raises(AssertionError, match="not compiled for pages of int4"):
        directory.write(0, fill_of(draw, [1, 2, 3], ["int4"], False))
    with pytest.raises(AssertionError, match="not compiled for log biases"):
        directory.write(0, fill_of(draw, [1, 2, 3], ["int8"], True))


@pytest.mark.parametrize(
    ("allow", "fitted", "codecs", "biases"),
    [
        (("kvcrush", "none"), (), set(), False),
        (("int8", "none"), (), {"int8"}, False),
        (("auto",), ("tc4", "tc6", "tc8"), {"int8", "tc4", "tc6", "tc8"}, False),
        (("auto",), (), {"int8", "int4"}, False),
        (("adakv",), (), {"raw"}, False),
        (("keepkv(streaming)@int8",), (), {"raw", "int8"}, True),
        (("fair(keepkv)", "int4"), (), {"raw", "int4"}, True),
    ],
)
def test_what_settings_allow(
    allow: tuple[str, ...], fitted: tuple[str, ...], codecs: set[str], biases: bool
) -> None:
    rooms = {codec: (((20, 4),),) for codec in fitted}
    own = Settings(policy=allow[0], allow=allow, fitted=rooms)
    assert allowed.region_codecs(own) == codecs and allowed.has_biases(own) == biases


@pytest.mark.parametrize("bias", [False, True])
def test_attention_reads_it(draw: random.Random, bias: bool) -> None:
    """Two requests in any rows, beside one that has no state and one without pages, as from a
    directory of the batch."""
    cache = Cache(draw, "cpu", 2, 32, 32, torch.float32, kv_heads=2, block_size=16, blocks=40)
    layer = cache.layer
    layers = layer.block_pages // layer.kv_heads
    index = layer.first_page // layer.kv_heads
    tables, tails, regions = [], [], []
    for codecs in (["int8", "int4"], ["int4"], []):
        tail = draw.randrange(1, 40)
        cache.put([[]] * 2, tail)
        blocks = [cache.free.pop() for _ in range(4)] if codecs else []
        if codecs:
            tokens = np.zeros((len(codecs), layers, 2), dtype=int)
            tokens[:, index] = [[draw.randrange(1, 30) for _ in range(2)] for _ in codecs]
            region, _ = Region.of(blocks, codecs, tokens, [layer] * layers)
            if bias and len(codecs) == 2:
                region.open_biases()
                assert region.log_bias is not None
                region.log_bias.normal_()
            for head in range(2):
                for e in range(int(region.begin[index, head]), int(region.end[index, head])):
                    n = int(region.count[e])
                    where = torch.arange(n, dtype=torch.int32)
                    codec = by_number(int(region.codec[e])).name
                    cache.fill(int(region.page[e]), codec, *cache.content(n), where, head)
        tables.append(blocks + cache.tails[-1])
        tails.append(tail)
        regions.append(region if codecs else None)
    directory = ResidentDirectory(7, layers, 2, 40, settings("mikv", "keepkv"), CPU)
    states = [6, 2, -1]
    for state, region in zip(states, regions, strict=True):
        if region is not None:
            directory.write(state, region)
            directory.stage_blocks(state, region.blocks)
    directory.apply()

    rows = [1, 3, 2]
    start = torch.tensor([0, *rows]).cumsum(0).int()
    table = torch.full((3, max(map(len, tables))), -1, dtype=torch.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    taken = torch.tensor([0 if r is None else r.blocks for r in regions]).int()
    length = torch.tensor(tails).int()
    query = torch.randn(sum(rows), layer.heads, 32)
    batch = Batch(
        start,
        length + taken * 16,
        table,
        torch.tensor(states, dtype=torch.int32),
        directory.layers[index],
        max(rows),
    )
    got = torch.full_like(query, torch.nan)
    attention(layer, batch, query, got)

    own = joined(regions)
    flat = Directory.of(
        own.begin[:, index], own.end[:, index], own.page, own.count, own.codec, own.bias,
        own.log_bias,
    )  # fmt: skip
    tail_table = torch.full((3, 3), -1, dtype=torch.int32)
    for row, blocks in zip(tail_table, cache.tails, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    want = torch.full_like(query, torch.nan)
    attention(layer, Batch.of(start, length, tail_table, flat, max(rows), 16), query, want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if bias:
        # Or the comparison would compare nothing.
        assert own.log_bias is not None
        own.log_bias.zero_()
        attention(layer, Batch.of(start, length, tail_table, flat, max(rows), 16), query, want)
        assert (got[0] - want[0]).abs().max() > 1e-4
