"""A request's compressed region: which pages of the pool its layers and heads own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops import cpu


class Pages(Protocol):
    """A layer's pages in the pool that all layers share.

    Attributes:
        kv_heads: pages of a block that belong to this layer, one for each KV head.
        block_pages: pages of a block, over all layers.
        num_blocks: blocks of the pool.
        page_bytes: bytes of a page.
    """

    kv_heads: int
    block_pages: int
    num_blocks: int
    page_bytes: int

    def capacity(self, codec: str, head: int = 0) -> int:
        """Returns the number of tokens that a page of a KV head holds."""
        ...


@dataclass
class Region:
    """Pages that each layer and head owns, in slot order; n pages in all, which are owned by one
    layer and head after the other. All but `log_bias` is on the host.

    Attributes:
        block_ids: int64, the blocks that the pages lie in, as the request's block table has them.
        codecs: codecs of the parts of a layer and head, which follow each other.
        bounds: int32 [layers, kv_heads, parts + 1], the entry at which each part begins, and the
            end of the last.
        begin, end: int32 [layers, kv_heads], the entries [begin, end) of each layer and head in
            `page`, `count`, `codec` and `bias`.
        page: int32 [n], indices of the pages in the pool.
        count: uint16 [n], tokens in each page.
        codec: uint8 [n], number of each page's codec.
        tokens: int64 [layers, kv_heads], tokens of each layer and head.
        bias: int64 [n], where in `log_bias` the tokens of each page start; None if no token has a
            log bias.
        log_bias: float32 [tokens], in the order of the pages, what is added to a token's logit; or
            None. It is on the cache's device.
        uploaded: what a backend has made of the region while a compaction reads or fills it.
    """

    block_ids: Tensor
    codecs: tuple[str, ...]
    bounds: Tensor
    begin: Tensor
    end: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor
    tokens: Tensor
    bias: Tensor | None = None
    log_bias: Tensor | None = None
    uploaded: Any = None

    @property
    def blocks(self) -> int:
        """Number of blocks that its pages lie in."""
        return len(self.block_ids)

    @property
    def part_tokens(self) -> np.ndarray:
        """Tokens of each part of each layer and head, int64 [parts, layers, kv_heads]."""
        before = np.concatenate(([0], self.count.numpy().cumsum(dtype=np.int64)))
        return np.moveaxis(np.diff(before[self.bounds.numpy()]), -1, 0)

    @property
    def codec_pages(self) -> dict[str, int]:
        """Pages in each codec."""
        numbers = np.bincount(self.codec.numpy(), minlength=len(CODECS))
        return {codec: int(n) for codec in CODECS if (n := numbers[CODECS[codec].number])}

    @classmethod
    def of(
        cls,
        blocks: Sequence[int],
        codecs: Sequence[str],
        tokens: np.ndarray,
        layers: Sequence[Pages],
        raw: Sequence[int] = (),
        old: Region | None = None,
    ) -> tuple[Region, list[int]]:
        """Divides the pages of some blocks among layers and heads.

        The blocks may be among those that are read while the pages are filled. Then the layers are
        filled in an order in which each finds enough pages that no later layer reads: those that
        free most pages come first.

        Args:
            blocks: ids of the blocks to fill.
            codecs: codecs of the region's parts, in slot order.
            tokens: int64 [parts, layers, kv_heads], how many tokens fill each part.
            layers: layers that share a pool, in the order of their pages.
            raw: ids of the blocks whose raw pages are read.
            old: the region that is read, or None.

        Returns:
            The region, and the layers in the order in which they must be filled, each after all of
            the layer was read.
        """
        heads, pairs = layers[0].kv_heads, layers[0].block_pages
        rooms = np.array(
            [[p.capacity(codec, h) for codec in codecs] for p in layers for h in range(heads)]
        )
        in_all = torch.from_numpy(tokens.sum(0))
        tokens = tokens.reshape(len(codecs), pairs).T
        pages = -(-tokens // rooms)  # pages of each pair and part
        sizes = pages.ravel()
        count = rooms.ravel().repeat(sizes)
        last = sizes.cumsum() - 1
        rests = (tokens - (pages - 1) * rooms).ravel()
        count[last[sizes > 0]] = rests[sizes > 0]
        codec = np.tile([CODECS[codec].number for codec in codecs], pairs).repeat(sizes)
        wanted = pages.sum(1)
        end = wanted.cumsum()
        begin = end - wanted
        bounds = begin[:, None] + np.pad(pages.cumsum(1), ((0, 0), (1, 0)))
        page, order = _shared_out(np.array(blocks), wanted, heads, np.array(raw), old)
        region = cls(
            torch.tensor(blocks, dtype=torch.int64),
            tuple(codecs),
            torch.from_numpy(bounds.astype(np.int32)).view(-1, heads, len(codecs) + 1),
            torch.from_numpy(begin.astype(np.int32)).view(-1, heads),
            torch.from_numpy(end.astype(np.int32)).view(-1, heads),
            torch.from_numpy(page.astype(np.int32)),
            torch.from_numpy(count.astype(np.uint16)),
            torch.from_numpy(codec.astype(np.uint8)),
            in_all,
        )
        return region, order

    def directory(self, layer: int) -> cpu.Directory:
        """Returns the pages of one layer, as the CPU kernels take them."""
        rows = slice(layer, layer + 1)
        return cpu.Directory(
            self.begin[rows],
            self.end[rows],
            self.page,
            self.count,
            self.codec,
            self.bias,
            self.log_bias,
        )

    def open_biases(self, device: torch.device | str = "cpu") -> None:
        """Gives every token a log bias on a device, 0 so far."""
        counts = self.count.long()
        self.bias = counts.cumsum(0) - counts
        self.log_bias = torch.zeros(int(counts.sum()), device=device)

    def biases(self, layer: int) -> list[Tensor]:
        """Returns the log biases of a layer's tokens, by head: parts of `log_bias`, to read or to
        set."""
        assert self.log_bias is not None
        before = int(self.tokens[:layer].sum())
        sizes = self.tokens[layer].tolist()
        return list(torch.split(self.log_bias[before : before + sum(sizes)], sizes))


def _shared_out(
    blocks: np.ndarray, wanted: np.ndarray, heads: int, raw: np.ndarray, old: Region | None
) -> tuple[np.ndarray, list[int]]:
    """Returns the page indices of each pair of layer and head, one pair after the other, and the
    order in which the layers must be filled. Arguments are those of `Region.of`; `wanted` has the
    number of pages of each pair."""
    pairs = len(wanted)
    n = int(wanted.sum())
    assert n <= len(blocks) * pairs, f"{n} pages in {len(blocks)} blocks of {pairs}"
    layers = pairs // heads
    mine = np.arange(pairs) // heads
    page = (blocks[:, None] * pairs + np.arange(pairs)).ravel()
    # The layer that still has to read each page before it is written, or -1.
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
        # Each pair takes its own page of every block, as raw pages must.
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


@dataclass
class Joined:
    """The pages of n requests, of which some have regions, in one list.

    Attributes:
        begin, end: int32 [n, layers, kv_heads], as in `Region`.
        page, count, codec, bias, log_bias: as in `Region`.
        blocks: int32 [n], number of blocks of each request's region.
    """

    begin: Tensor
    end: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor
    bias: Tensor | None
    log_bias: Tensor | None
    blocks: Tensor


def joined(regions: Sequence[Region | None]) -> Joined:
    """Returns the pages of several requests together; at least one of them must have a region."""
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
    bias, log_bias = _joined_biases(known)
    blocks = torch.tensor([region.blocks if region else 0 for region in regions], dtype=torch.int32)
    return Joined(begin, end, page, count, codec, bias, log_bias, blocks)


def _joined_biases(regions: Sequence[Region]) -> tuple[Tensor | None, Tensor | None]:
    if all(region.log_bias is None for region in regions):
        return None, None
    starts, values, first = [], [], 0
    for region in regions:
        if region.bias is None or region.log_bias is None:
            starts.append(torch.full((len(region.page),), -1))
        else:
            starts.append(region.bias + first)
            values.append(region.log_bias)
            first += len(region.log_bias)
    return torch.cat(starts), torch.cat(values)


def batches(
    start: Tensor,
    length: Tensor,
    table: Tensor,
    regions: Sequence[Region | None],
    block_size: int,
) -> list[cpu.Batch]:
    """Returns one batch for each layer, for sequences of which some have compressed regions.

    Args:
        start: int32 [n + 1], first query row of each sequence, and the end.
        length: int32 [n], slots held, where compressed blocks count like any others.
        table: int32 [n, columns], all blocks of each sequence, compressed ones first.
        regions: the region of each sequence, or None.
        block_size: tokens in a block.
    """
    own = joined(regions)
    begin, end, blocks = own.begin, own.end, own.blocks
    pages = own.page, own.count, own.codec, own.bias, own.log_bias
    columns = (torch.arange(table.shape[1]) + blocks.unsqueeze(1)).clamp_(max=table.shape[1] - 1)
    tails = table.gather(1, columns)
    lengths = length - blocks * block_size
    return [
        cpu.Batch(start, lengths, tails, cpu.Directory(begin[:, i], end[:, i], *pages))
        for i in range(begin.shape[1])
    ]
