"""A request's compressed region: which pages of the pool its layers and heads own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.plan import Part


class Pages(Protocol):
    """A layer's pages in the pool that all layers share.

    Attributes:
        kv_heads, block_pages: pages of a block that are this layer's, and that are anyone's.
        num_blocks: of the pool.
        page_bytes: of every page.
    """

    kv_heads: int
    block_pages: int
    num_blocks: int
    page_bytes: int

    def capacity(self, codec: str, head: int = 0) -> int:
        """Tokens that a page of a KV head holds."""
        ...


@dataclass
class Region:
    """Pages that each layer and head owns, in slot order; n pages in all.

    Attributes:
        blocks: number of blocks that they lie in.
        begin, end: int32 [layers, kv_heads]: entries [begin, end) of a layer and head.
        page: int32 [n], page index in the pool.
        count: uint16 [n], tokens in it.
        codec: uint8 [n].
    """

    blocks: int
    begin: Tensor
    end: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor

    @classmethod
    def of(
        cls,
        blocks: Sequence[int],
        parts: Sequence[Part],
        layers: Sequence[Pages],
        raw: Sequence[int] = (),
        old: Region | None = None,
    ) -> tuple[Region, list[int]]:
        """Shares the pages of some blocks out over layers and heads.

        The blocks may be among those that are read while the pages are filled. Then the layers are
        filled in an order in which each finds enough pages that no later layer reads: those that
        have most pages to give come first.

        Args:
            blocks: to fill.
            parts: the tokens that fill them, in slot order.
            layers: share a pool, in the order of their pages.
            raw: blocks with raw pages that are read.
            old: region that is read.

        Returns:
            The region, and the layers in the order in which they must be filled, each after all of
            it was read.
        """
        heads, pairs = layers[0].kv_heads, layers[0].block_pages
        rooms = np.array(
            [[p.capacity(part.codec, h) for part in parts] for p in layers for h in range(heads)]
        )
        tokens = np.array([part.tokens for part in parts])
        pages = -(-tokens // rooms)  # of each pair and part
        sizes = pages.ravel()
        count = rooms.ravel().repeat(sizes)
        last = sizes.cumsum() - 1
        rests = (tokens - (pages - 1) * rooms).ravel()
        count[last[sizes > 0]] = rests[sizes > 0]
        codec = np.tile([CODECS[part.codec].number for part in parts], pairs).repeat(sizes)
        wanted = pages.sum(1)
        end = wanted.cumsum()
        begin = end - wanted
        page, order = _shared_out(np.array(blocks), wanted, heads, np.array(raw), old)
        region = cls(
            len(blocks),
            torch.from_numpy(begin.astype(np.int32)).view(-1, heads),
            torch.from_numpy(end.astype(np.int32)).view(-1, heads),
            torch.from_numpy(page.astype(np.int32)),
            torch.from_numpy(count.astype(np.uint16)),
            torch.from_numpy(codec.astype(np.uint8)),
        )
        return region, order

    def directory(self, layer: int) -> cpu.Directory:
        """The pages of one layer."""
        rows = slice(layer, layer + 1)
        return cpu.Directory(self.begin[rows], self.end[rows], self.page, self.count, self.codec)


def _shared_out(
    blocks: np.ndarray, wanted: np.ndarray, heads: int, raw: np.ndarray, old: Region | None
) -> tuple[np.ndarray, list[int]]:
    """Page indices of each pair of layer and head, one pair after the other, and the order of the
    layers. `wanted`: pages by pair."""
    pairs = len(wanted)
    n = int(wanted.sum())
    assert n <= len(blocks) * pairs, f"{n} pages in {len(blocks)} blocks of {pairs}"
    layers = pairs // heads
    mine = np.arange(pairs) // heads
    page = (blocks[:, None] * pairs + np.arange(pairs)).ravel()
    # The layer that still has to read each page before it is written; none: -1.
    reader = np.full(len(page), -1)
    reader.reshape(-1, pairs)[np.isin(blocks, raw)] = mine
    if old is not None:
        lengths = (old.end - old.begin).sum(1).numpy()
        row = {int(block): i for i, block in enumerate(blocks)}
        theirs = old.page.numpy()
        rows = np.array([row.get(int(b), -1) for b in np.unique(theirs // pairs)], dtype=int)
        where = rows[np.unique(theirs // pairs, return_inverse=True)[1]]
        inside = where >= 0
        reader[where[inside] * pairs + theirs[inside] % pairs] = np.repeat(
            np.arange(layers), lengths
        )[inside]
    if (wanted == len(blocks)).all() and (old is None or (reader.reshape(-1, pairs) == mine).all()):
        # Each takes its own page of every block, as raw pages must.
        return page.reshape(-1, pairs).T.ravel(), list(range(layers))
    needs = wanted.reshape(-1, heads).sum(1)
    gives = np.bincount(reader + 1, minlength=layers + 1)[1:]
    order = np.argsort(needs - gives, kind="stable")
    free = page[reader == -1]
    found: list[np.ndarray] = [free] * layers
    for layer in order:
        free = np.sort(np.concatenate((free, page[reader == layer])))
        found[layer], free = free[: needs[layer]], free[needs[layer] :]
        assert len(found[layer]) == needs[layer]
    return np.concatenate(found), order.tolist()


def joined(
    regions: Sequence[Region | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The pages of n requests, of which some have regions, in one list: `begin` and `end`
    [n, layers, kv_heads], `page`, `count` and `codec` as in `Region`; and blocks that each
    request's take, int32 [n]."""
    known = [region for region in regions if region is not None]
    begin = torch.zeros(len(regions), *known[0].begin.shape, dtype=torch.int32)
    end = torch.zeros_like(begin)
    first = 0
    for row, region in enumerate(regions):
        if region is not None:
            torch.add(region.begin, first, out=begin[row])
            torch.add(region.end, first, out=end[row])
            first += len(region.page)
    page, count, codec = (
        torch.cat([getattr(region, name) for region in known])
        for name in ("page", "count", "codec")
    )
    blocks = torch.tensor([region.blocks if region else 0 for region in regions], dtype=torch.int32)
    return begin, end, page, count, codec, blocks


def batches(
    start: Tensor,
    length: Tensor,
    table: Tensor,
    regions: Sequence[Region | None],
    block_size: int,
) -> list[cpu.Batch]:
    """One batch a layer for sequences of which some have compressed regions.

    Args:
        start: int32 [n + 1], first query row of each sequence.
        length: int32 [n], slots held, where compressed blocks count like any others.
        table: int32 [n, columns], all blocks of each sequence, compressed ones first.
        regions: [n].
    """
    begin, end, page, count, codec, blocks = joined(regions)
    columns = (torch.arange(table.shape[1]) + blocks.unsqueeze(1)).clamp_(max=table.shape[1] - 1)
    tails = table.gather(1, columns)
    lengths = length - blocks * block_size
    return [
        cpu.Batch(start, lengths, tails, cpu.Directory(begin[:, i], end[:, i], page, count, codec))
        for i in range(begin.shape[1])
    ]
