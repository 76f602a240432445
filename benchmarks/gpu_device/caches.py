"""Pages in which a batch holds its tokens, in as many layers as a call must not find in a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device.cases import SHAPES, Case
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.cache import Batch, Directory, Layer, Source, runs_of

DISTINCT = 4  # pages of a KV head with contents of their own; all others are copies of them
MOST_LAYERS = 32


class Cache:
    """A pool with a batch of sequences: `raw` is all tail; other codecs leave in the tail a block
    or a chunk's rows, and the rest in full pages of their own.

    Attributes:
        layers: the layers of the pool, all of the same content.
        batches: the batch as each of them sees it.
        paged: tokens of each sequence in compressed pages, of each KV head.
    """

    def __init__(
        self, case: Case, codec: str, dtype: torch.dtype, device: str, working_set: int,
        spare: int = 0,
    ):  # fmt: skip
        heads, kv_heads, size = SHAPES[case.shape]
        self.case, self.codec, self.dtype, self.device = case, codec, dtype, device
        step = case.block_size
        tail = case.context if codec == "raw" else min(case.context, max(step, case.rows))
        self.tail, self.paged = tail, case.context - tail
        self.tail_blocks = -(-tail // step)
        page_bytes = step * 2 * size * dtype.itemsize
        probe = Layer(
            torch.empty(kv_heads * page_bytes, dtype=torch.uint8, device=device),
            index=0, layers=1, heads=heads, kv_heads=kv_heads, k_size=size, v_size=size,
            block_size=step, dtype=dtype, scale=size**-0.5,
        )  # fmt: skip
        self.capacity = probe.capacity(codec)
        self.pages = -(-self.paged // self.capacity)  # of a sequence and KV head
        per_seq = self.pages + self.tail_blocks
        blocks = case.batch * per_seq + spare
        layer_bytes = blocks * kv_heads * page_bytes
        layers = max(1, min(MOST_LAYERS, -(-working_set // layer_bytes)))
        pool = torch.empty(layers * layer_bytes, dtype=torch.uint8, device=device)
        self.layers = [
            Layer(
                pool, index=i, layers=layers, heads=heads, kv_heads=kv_heads, k_size=size,
                v_size=size, block_size=step, dtype=dtype, scale=size**-0.5,
            )
            for i in range(layers)
        ]  # fmt: skip
        order = torch.randperm(blocks)
        self.spare = order[blocks - spare :]
        own = order[: blocks - spare].view(case.batch, per_seq)
        self.page_blocks, self.table = own[:, : self.pages], own[:, self.pages :]
        self._fill(pool.view(-1, page_bytes), probe)
        self.batches = [self._batch(layer) for layer in self.layers]

    def _fill(self, pages: Tensor, layer: Layer) -> None:
        block_pages = self.layers[0].block_pages
        every = pages.view(-1, block_pages, pages.shape[1])
        for blocks, codec in ((self.table, "raw"), (self.page_blocks, self.codec)):
            content = distinct(layer, codec)
            repeats = -(-block_pages // len(content))
            content = content.repeat(repeats, 1)[:block_pages]
            # Block by block: one index over all would copy the pool.
            for block in blocks.flatten().tolist():
                every[block] = content

    def entries(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns begin, end [batch, kv_heads], page, count and codec of a directory, on the
        host."""
        batch, heads = self.case.batch, layer.kv_heads
        begin = torch.arange(batch * heads, dtype=torch.int32).view(batch, heads) * self.pages
        page = self.page_blocks[:, None] * layer.block_pages
        page = page + layer.first_page + torch.arange(heads)[None, :, None]
        count = torch.full((batch, heads, self.pages), self.capacity, dtype=torch.int32)
        if self.pages:
            count[..., -1] = self.paged - (self.pages - 1) * self.capacity
        codec = torch.full((page.numel(),), CODECS[self.codec].number, dtype=torch.uint8)
        return begin, begin + self.pages, page.flatten().int(), count.flatten(), codec

    def _batch(self, layer: Layer) -> Batch:
        case, directory = self.case, None
        if self.pages:
            directory = Directory.of(*self.entries(layer), device=self.device)
        start = torch.arange(case.batch + 1, dtype=torch.int32) * case.rows
        length = torch.full((case.batch,), self.tail, dtype=torch.int32)
        start, length, table = (x.to(self.device) for x in (start, length, self.table.int()))
        return Batch.of(start, length, table, directory, case.rows, case.block_size)

    def source(self, layer: Layer, seq: int) -> Source:
        """Returns one sequence, as compactions see it."""
        begin, end, page, count, codec = self.entries(layer)
        first, last = int(begin[seq, 0]), int(end[seq, -1])
        own = slice(first, last)
        entries = (begin[seq] - first, end[seq] - first, page[own], count[own], codec[own])
        table = self.table[seq].int()
        return _source(self.device, *entries, table, self.tail, self.paged, runs_of(codec[own]))

    def tokens(self, layer: Layer, seq: int) -> tuple[Tensor, Tensor]:
        """Returns float32 keys and values of a sequence: [kv_heads, context, size] each."""
        slots = torch.arange(self.case.context, device=self.device).repeat(layer.kv_heads, 1)
        key, value, _ = compaction.gather(layer, self.source(layer, seq), slots)
        assert key is not None and value is not None
        return key, value


def _source(device: str, *arguments: Any) -> Source:
    """Returns `Source.of` from the host's tensors."""
    there: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    return Source.of(*there)


def target(layer: Layer, blocks: Tensor, codec: str, tokens: int, device: str) -> Source:
    """Returns fresh pages for `tokens` tokens of each KV head, in blocks of the pool."""
    full = layer.capacity(codec)
    pages = -(-tokens // full)
    heads = torch.arange(layer.kv_heads)
    page = blocks[None, :pages] * layer.block_pages + layer.first_page + heads[:, None]
    count = torch.full((layer.kv_heads, pages), full, dtype=torch.int32)
    count[:, -1] = tokens - (pages - 1) * full
    begin = (heads * pages).int()
    codecs = torch.full((layer.kv_heads * pages,), CODECS[codec].number, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int32)
    entries = (begin, begin + pages, page.flatten().int(), count.flatten(), codecs)
    return _source(device, *entries, none, 0, 0, runs_of(codecs))


def distinct(layer: Layer, codec: str) -> Tensor:
    """Pages of normal K and V in a codec: uint8 [kv_heads * DISTINCT, page_bytes]."""
    heads, device = layer.kv_heads, layer.pool.device
    pages = torch.zeros(heads * DISTINCT, layer.page_bytes, dtype=torch.uint8, device=device)
    tokens = DISTINCT * layer.capacity(codec)
    key, value = (torch.randn(heads, tokens, layer.k_size, device=device) for _ in range(2))
    where = torch.arange(tokens, dtype=torch.int32, device=device).repeat(heads, 1)
    count = torch.full((heads * DISTINCT,), layer.capacity(codec), dtype=torch.int32)
    begin = (torch.arange(heads) * DISTINCT).int()
    page = torch.arange(heads * DISTINCT, dtype=torch.int32)
    codecs = torch.full((heads * DISTINCT,), CODECS[codec].number, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int32)
    entries = (begin, begin + DISTINCT, page, count, codecs)
    to = _source(str(device), *entries, none, 0, 0, runs_of(codecs))
    compaction.encode(layer.over(pages), to, key, value, where)
    return pages
