"""A request's compressed region: which pages of the pool its layers and heads own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_kvcrush.ops import cpu
from vllm_kvcrush.pages import CODECS, FITTED
from vllm_kvcrush.plan import Part


class Pages(Protocol):
    """A layer's pages in the pool that all layers share.

    Attributes:
        kv_heads, block_pages: pages of a block that are this layer's, and that are anyone's.
        num_blocks: of the pool.
        page_bytes: of every page.
        pool: all pages, contiguous.
    """

    kv_heads: int
    block_pages: int
    num_blocks: int
    page_bytes: int

    @property
    def pool(self) -> Tensor: ...
    def capacity(self, codec: str, head: int = 0) -> int:
        """Tokens that a page of a KV head holds."""
        ...


@dataclass
class Region:
    """Pages that each layer and head owns, in slot order; n pages in all.

    Attributes:
        blocks: number of blocks that they lie in.
        begin, end: int32 [layers, kv_heads]: entries [begin, end) of a layer and head.
        second: int32 [layers, kv_heads], where those of the second part begin.
        page: int32 [n], page index in the pool.
        count: uint16 [n], tokens in it.
        codec: uint8 [n].
        own: whether every page lies where its layer and head have their raw pages.
    """

    blocks: int
    begin: Tensor
    end: Tensor
    second: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor
    own: bool

    @classmethod
    def of(cls, blocks: Sequence[int], parts: Sequence[Part], layers: Sequence[Pages]) -> Region:
        """Tokens in pages that fill `blocks`; `layers` share a pool, in the order of their pages.

        Where all heads take the same number of pages, each takes its own of every block: nothing
        is then written where another layer still has to be read. Else pages are handed out one
        after the other."""
        heads, pairs = layers[0].kv_heads, layers[0].block_pages
        own = len(parts) == 1 and parts[0].codec not in FITTED
        wanted: list[list[tuple[int, int]]] = []  # (tokens, codec) of the pages of each pair
        first_parts: list[int] = []  # how many of them are of the first part
        for layer in layers:
            for head in range(heads):
                pages: list[tuple[int, int]] = []
                for i, part in enumerate(parts):
                    if i == 1:
                        first_parts.append(len(pages))
                    room = layer.capacity(part.codec, head)
                    full, rest = divmod(part.tokens, room)
                    pages += [(room, CODECS[part.codec])] * full
                    pages += [(rest, CODECS[part.codec])] * (rest > 0)
                wanted.append(pages)
        first = torch.tensor(blocks, dtype=torch.int32) * pairs
        end = torch.tensor([len(pages) for pages in wanted]).cumsum(0).to(torch.int32)
        begin = torch.cat([end.new_zeros(1), end[:-1]])
        n = int(end[-1])
        if own:
            each = n // pairs
            page = (first[:each] + torch.arange(pairs, dtype=torch.int32)[:, None]).flatten()
        else:
            page = (first[:, None] + torch.arange(pairs, dtype=torch.int32)).flatten()[:n]
        assert len(page) == n, f"{n} pages in {len(blocks)} blocks of {pairs}"
        flat = [entry for pages in wanted for entry in pages]
        return cls(
            len(blocks),
            begin.view(-1, heads),
            end.view(-1, heads),
            (begin + torch.tensor(first_parts, dtype=torch.int32) if first_parts else end).view(
                -1, heads
            ),
            page.to(torch.int32),
            torch.tensor([count for count, _ in flat], dtype=torch.int32).to(torch.uint16),
            torch.tensor([codec for _, codec in flat], dtype=torch.uint8),
            own,
        )

    def directory(self, layer: int, part: int | None = None) -> cpu.Directory:
        """The pages of one layer, or those of its first or second part."""
        rows = slice(layer, layer + 1)
        begin = self.second if part == 1 else self.begin
        end = self.second if part == 0 else self.end
        return cpu.Directory(begin[rows], end[rows], self.page, self.count, self.codec)


class Stage:
    """Pages of a new region before they are where they belong: those of one layer may lie where
    the old ones of another are that has not been read yet.

    Args:
        target: the new region.
        source: the old one, or None.
        pool: the layer whose pool they are in; any will do.
    """

    def __init__(self, target: Region, source: Region | None, pool: Pages) -> None:
        self._target, self._pool = target, pool
        direct = target.own and (source is None or source.own)
        self.pages: Tensor | None = None
        if not direct:
            self.pages = torch.empty(
                len(target.page), pool.page_bytes, dtype=torch.uint8, device=pool.pool.device
            )

    def finish(self) -> None:
        """Puts the pages in their places."""
        if self.pages is not None:
            pool = self._pool.pool.view(-1, self._pool.page_bytes)
            pool[self._target.page.to(pool.device).long()] = self.pages


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
