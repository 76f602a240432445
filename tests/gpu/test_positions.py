"""Positions that compactions store: by a plain loop, by the CPU's kernels and by the GPU's."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from tests.gpu.cache import POSITIONS, TABLE_LAYER, Cache
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.cache import Source

SIZE, BLOCK, HEADS = 64, 64, 2


class Both:
    """The same tokens in pages of a CPU cache and of a GPU cache, by head."""

    def __init__(self, draw: random.Random, device: str, codecs: tuple[str, ...]):
        self.gpu = Cache(
            draw, device, 1, SIZE, SIZE, torch.float32, HEADS, BLOCK, blocks=30, layers=1,
            fitted_codecs=("tc4", "tc6"),
        )  # fmt: skip
        size, page_bytes = len(self.gpu.layer.pool), self.gpu.layer.page_bytes
        pool = torch.zeros(size + 64, dtype=torch.uint8)
        start = -pool.data_ptr() % 64
        angles = Angles(self.gpu.tables["tc4"].rope, POSITIONS)
        self.cpu = cpu.Layer(
            pool[start : start + size], index=0, layers=1, heads=HEADS, kv_heads=HEADS,
            k_size=SIZE, v_size=SIZE, block_size=BLOCK, dtype=torch.float32, scale=SIZE**-0.5,
            tables={
                name: cpu.LayerTable(t, TABLE_LAYER, range(HEADS), page_bytes, SIZE, angles)
                for name, t in self.gpu.tables.items()
            },
        )  # fmt: skip
        # Tokens of one request, dealt out to the pages at random: as what was chosen by importance.
        counts = [draw.randrange(33, 100) for _ in codecs]  # three codecs: 96 tokens at least
        self.entries: list[tuple[int, int, int]] = []
        for head in range(HEADS):
            true = draw.randrange(40) + torch.randint(1, 4, (sum(counts),)).cumsum(0).int()
            owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
            owner = owner[torch.randperm(len(owner))]
            for i, codec in enumerate(codecs):
                page = self.gpu.page()
                self.entries.append((page, counts[i], CODECS[codec].number))
                key, value = (torch.randn(counts[i], SIZE) for _ in range(2))
                where = true[owner == i]
                cpu.encode(self.cpu, codec, page, key, value, where, head)
                self.gpu.fill(page, codec, key, value, where, head)
        self.held, self.codecs = sum(counts), codecs

    def columns(self, entries: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        """Returns begin, end, page, count and codec of a directory of these pages."""
        each = len(entries) // HEADS
        begin = torch.arange(HEADS, dtype=torch.int32) * each
        page, count, codec = (torch.tensor(x) for x in zip(*entries, strict=True))
        return begin, begin + each, page.int(), count, codec.to(torch.uint8)

    def sources(self, entries: list[tuple[int, int, int]]) -> tuple[cpu.Source, Source]:
        """Returns these pages as the source of a request, on the CPU and on the GPU."""
        none = torch.zeros(1, dtype=torch.int32)
        own = cpu.Source(self.directory(entries), none, 0, 0, BLOCK)
        columns = (x.to(self.gpu.device) for x in (*self.columns(entries), none))
        return own, Source.of(*columns, 0, 0)

    def directory(self, entries: list[tuple[int, int, int]]) -> cpu.Directory:
        begin, end, page, count, codec = self.columns(entries)
        return cpu.Directory(begin[None], end[None], page, count.to(torch.uint16), codec)

    def positions(self, entries: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Returns the positions of all slots of these pages, int32 [heads, n], read on the CPU and
        on the GPU."""
        own, other = self.sources(entries)
        n = sum(count for _, count, _ in entries) // HEADS
        slots = torch.arange(n, device=self.gpu.device).repeat(HEADS, 1)
        where = compaction.gather(self.gpu.layer, other, slots, positions=True)[2]
        assert where is not None
        return cpu.positions(self.cpu, own, n), where.cpu()

    def compact(self, slots: Tensor, target: list[tuple[int, int, int]]) -> None:
        """Compacts on the CPU and on the GPU."""
        own, other = self.sources(self.entries)
        cpu.compact(self.cpu, own, slots, self.directory(target))
        into = self.sources(target)[1]
        compaction.compact(self.gpu.layer, other, slots.to(self.gpu.device), into)

    def pages(self, codecs: list[str], count: int) -> list[tuple[int, int, int]]:
        """Returns fresh pages with `count` tokens each."""
        return [(self.gpu.page(), count, CODECS[c].number) for _ in range(HEADS) for c in codecs]


def stored(read: list[int], starts: set[int]) -> list[int]:
    """Returns a head's stored positions, given those that are read, by the definition."""
    found: list[int] = []
    for i, position in enumerate(read):
        if i == 0 or (i in starts and position < read[i - 1]):
            found.append(position)
        else:
            assert position >= read[i - 1]
            found.append(max(position, found[-1] + 1))
    return found


@pytest.mark.parametrize("target", ["int8", "exact", "int4", "tc6"])
def test_merges_of_fitted_and_other_pages(draw: random.Random, device: str, target: str) -> None:
    both = Both(draw, device, ("tc4", "int8", "tc6"))
    read, again = both.positions(both.entries)
    assert torch.equal(read, again)
    slots = read.argsort(dim=1, stable=True)
    # Two parts, each in position order, in two pages each.
    part = torch.rand(HEADS, both.held).argsort(1) < 48
    slots = torch.stack(
        [torch.cat([s[p[s]], s[~p[s]]])[:96] for s, p in zip(slots, part, strict=True)]
    )
    count = 24
    assert min(both.cpu.capacity(target, head) for head in range(HEADS)) >= count
    pages = both.pages([target] * 4, count)
    both.compact(slots, pages)
    own, other = both.positions(pages)
    assert torch.equal(own, other)
    ties = 0
    for head in range(HEADS):
        given = read[head][slots[head]].tolist()
        want = torch.tensor(stored(given, {24, 48, 72}))
        ties += sum(a == b for a, b in itertools.pairwise(given))
        if target == "tc6":  # which knows where strips begin
            strips = torch.tensor([24 * (i // 24) + i % 24 // 16 * 16 for i in range(96)])
            want = want[strips] + torch.arange(96) % 24 % 16
        assert torch.equal(own[head].long(), want)
    assert ties > 0, "nothing tied, so nothing was tested"


def test_tokens_that_tie_at_the_end_stay_within_the_tables(
    draw: random.Random, device: str
) -> None:
    """If tokens before them moved them on, the last tokens would be beyond the longest context."""
    both = Both(draw, device, ("int8",))
    end = Angles(both.gpu.tables["tc4"].rope, POSITIONS).positions
    near = torch.arange(end - 20, end, dtype=torch.int32)
    both.entries, both.held = [], 40
    for head in range(HEADS):
        for codec in ("int8", "tc4"):
            page = both.gpu.page()
            both.entries.append((page, 20, CODECS[codec].number))
            key, value = (torch.randn(20, SIZE) for _ in range(2))
            cpu.encode(both.cpu, codec, page, key, value, near, head)
            both.gpu.fill(page, codec, key, value, near, head)
    read, _ = both.positions(both.entries)
    pages = both.pages(["tc6"], 40)
    both.compact(read.argsort(dim=1, stable=True), pages)
    own, other = both.positions(pages)
    assert torch.equal(own, other)
    strips = torch.arange(0, 40, 16)
    assert torch.equal(own[:, strips].long(), (end - 40 + strips).expand(HEADS, -1))


def test_slots_out_of_order_are_refused(draw: random.Random, device: str, mode: str) -> None:
    both = Both(draw, device, ("int8", "tc4"))
    read, _ = both.positions(both.entries)
    slots = read.argsort(dim=1, stable=True)[:, :16]
    slots[1, [4, 9]] = slots[1, [9, 4]]
    pages = both.pages(["int8"], 16)
    words = r"slots of head 1 are not in position order: position \d+ comes after \d+ in one page"
    own, other = both.sources(both.entries)
    before = both.gpu.layer.pool.clone()
    with pytest.raises(ValueError, match=words):
        cpu.compact(both.cpu, own, slots, both.directory(pages))
    if mode == "interpreter":
        with pytest.raises(ValueError, match=words):
            compaction.compact(both.gpu.layer, other, slots, both.sources(pages)[1])
        assert torch.equal(both.gpu.layer.pool, before)
