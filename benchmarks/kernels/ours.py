"""The plugin's own kernels as candidates: pages of every codec."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.kernels.candidates import Candidate
from benchmarks.kernels.cases import DISTINCT, PAGE, Case
from vllm_kvcrush.codecs import CODECS, FITTED
from vllm_kvcrush.codecs.transform.calibrate import POINTS
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.cpu.tables import LayerTable


class Ours(Candidate):
    """Paged attention of csrc/: each sequence has a compressed region in pages of `codec`, block
    ids at random, and a raw tail with the queries' own tokens. With codec "raw" all is tail."""

    dtype = torch.bfloat16
    tolerance: ClassVar[float] = 8e-3  # as for vLLM's: products of bfloat16 round alike

    def __init__(self, case: Case, working_set: int):
        super().__init__(case, working_set)
        shape, batch, count = case.shape, case.batch, case.query_len
        packed = self.codec != "raw"
        self.lengths = [count + math.ceil(self.keep * (n - count)) for n in case.lengths]
        self._tails = [count if packed else n for n in self.lengths]
        page_bytes = PAGE * 2 * shape.head_size * self.dtype.itemsize
        table = self._table(page_bytes)
        self._room = self._capacity(page_bytes, table) if packed else PAGE
        pages = -(-(max(self.lengths) - (count if packed else 0)) // self._room) * packed
        tail_blocks = -(-max(self._tails) // PAGE)
        self.bytes_read = sum(
            shape.kv_heads * page_bytes * ((n - t) / self._room + t / PAGE)
            for n, t in zip(self.lengths, self._tails, strict=True)
        ).__ceil__()
        self.sets = math.ceil(working_set / self.bytes_read)
        # Blocks of DISTINCT contents come first; all others are copies of them.
        wanted = self.sets * batch * (pages + tail_blocks)
        draw = torch.Generator().manual_seed(wanted)
        block_bytes = shape.kv_heads * page_bytes
        pool = torch.empty(2 * DISTINCT + wanted, block_bytes, dtype=torch.uint8)
        self._layer = cpu.Layer(
            pool,
            index=0,
            layers=1,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            k_size=shape.head_size,
            v_size=shape.head_size,
            block_size=PAGE,
            dtype=self.dtype,
            scale=shape.scale,
            tables={} if table is None else {self.codec: table},
        )
        self._fill()
        blocks = 2 * DISTINCT + torch.randperm(wanted, generator=draw)
        blocks = blocks.view(self.sets, batch, pages + tail_blocks)
        copied = torch.randint(DISTINCT, blocks.shape, generator=draw)
        copied[:, :, pages:] += DISTINCT  # raw ones
        for to, source in zip(
            blocks.flatten().split(256), copied.flatten().split(256), strict=True
        ):
            pool[to] = pool[source]  # all at once would take as much memory again
        self._region, self._tail = blocks[:, :, :pages], blocks[:, :, pages:].to(torch.int32)
        starts = torch.arange(batch + 1, dtype=torch.int32) * count
        tails = torch.tensor(self._tails, dtype=torch.int32)
        self._batches = [
            cpu.Batch(
                starts,
                tails,
                self._tail[i].contiguous(),
                self._directory(self._region[i]) if pages else None,
            )
            for i in range(self.sets)
        ]

    def _table(self, page_bytes: int) -> LayerTable | None:
        """Tables of a fitted codec, the same for every head: of keys whose channels hang together
        as a model's do, so that bits are as unequal. What is coded with them does not matter to the
        time that it takes."""
        if self.codec not in FITTED:
            return None
        size, heads = self.case.shape.head_size, self.case.shape.kv_heads
        draw = torch.Generator().manual_seed(size)
        rope = Rope(1e5 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))
        spread = 0.05 + torch.rand(size, generator=draw) ** 3
        mix = torch.linalg.qr(torch.randn(size, size, generator=draw)).Q * spread
        keys = torch.randn(1, 1, 4000, size, generator=draw) @ mix
        queries = torch.randn(1, 1, 1000, size, generator=draw)
        (point,) = (p for p in POINTS if p.name == self.codec)
        one = fit(Statistics.of(keys, queries), point, rope, 4096)
        parts = (one.key_mean, one.forward, one.inverse, one.cost, one.bits, one.value_bits)
        tables = Tables(point, rope, *(p.expand(1, heads, *p.shape[2:]) for p in parts))
        return LayerTable(tables, 0, range(heads), page_bytes, size, Angles(rope, 1 << 16))

    def _capacity(self, page_bytes: int, table: LayerTable | None) -> int:
        if table is not None:
            return table.capacity[0]
        size = self.case.shape.head_size
        return cpu.capacity(self.codec, page_bytes, size, size, self.dtype)

    def _fill(self) -> None:
        """Blocks [0, DISTINCT) packed, [DISTINCT, 2 * DISTINCT) raw, from the case's contents."""
        case, layer = self.case, self._layer
        heads, size = case.shape.kv_heads, case.shape.head_size
        keys, values = (
            part.transpose(0, 1).reshape(heads, -1, size) for part in (case.keys, case.values)
        )
        for i in range(DISTINCT):
            here = torch.arange(i * PAGE, i * PAGE + self._room) % keys.shape[1]
            for head in range(heads if self.codec != "raw" else 0):
                page = layer.page(i, head)
                k, v = keys[head, here], values[head, here]
                places = torch.arange(i * self._room, (i + 1) * self._room, dtype=torch.int32)
                cpu.encode(layer, self.codec, page, k, v, places, head)
            cpu.store(
                layer,
                case.keys[i].transpose(0, 1).to(self.dtype).contiguous(),
                case.values[i].transpose(0, 1).to(self.dtype).contiguous(),
                (DISTINCT + i) * PAGE + torch.arange(PAGE),
            )

    def _counts(self, sequence: int) -> list[int]:
        left = self.lengths[sequence] - self._tails[sequence]
        return [
            max(0, min(self._room, left - i * self._room)) for i in range(self._region.shape[2])
        ]

    def _directory(self, blocks: Tensor) -> cpu.Directory:
        batch, pages = blocks.shape
        heads = self.case.shape.kv_heads
        page = blocks.unsqueeze(1) * heads + torch.arange(heads).view(1, heads, 1)
        counts = torch.tensor([self._counts(s) for s in range(batch)])
        begin = (torch.arange(batch * heads) * pages).view(batch, heads).to(torch.int32)
        return cpu.Directory(
            begin,
            begin + pages,
            page.flatten().to(torch.int32),
            counts.unsqueeze(1).expand(page.shape).flatten().to(torch.uint16),
            torch.full((page.numel(),), CODECS[self.codec].number, dtype=torch.uint8),
        )

    def run(self, index: int, out: Tensor) -> None:
        cpu.attention(self._layer, self._batches[index], self.queries, out)

    def held(self, index: int, sequence: int) -> tuple[Tensor, Tensor]:
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for head in range(self.case.shape.kv_heads):
            found = [
                cpu.decode(
                    self._layer, self.codec, self._layer.page(int(block), head), count, head
                )[:2]
                for block, count in zip(
                    self._region[index, sequence], self._counts(sequence), strict=True
                )
            ]
            left = self._tails[sequence]
            for block in self._tail[index, sequence]:
                raw = self._layer.page(int(block), head)
                found.append(cpu.decode(self._layer, "raw", raw, min(PAGE, left))[:2])
                left -= min(PAGE, left)
            parts.append(found)
        keys, values = (
            torch.stack([torch.cat([p[side] for p in found]) for found in parts]).double()
            for side in (0, 1)
        )
        return keys, values


class OursRaw(Ours):
    """Pages in the model's dtype."""

    name, codec, tolerance = "kvcrush-raw", "raw", 4e-3


class OursRawEvicted(OursRaw):
    """What evicting three tokens of four earns."""

    name, keep = "kvcrush-raw-evicted-4x", 0.25


class OursFp32(OursRaw):
    """What a model served in float32 gets."""

    name, dtype, tolerance = "kvcrush-fp32", torch.float32, 1e-5


class OursInt8(Ours):
    """Every token in 8 bits."""

    name, codec = "kvcrush-int8", "int8"


class OursInt8Evicted(OursInt8):
    """A quarter of the tokens in 8 bits."""

    name, keep = "kvcrush-int8-evicted-4x", 0.25


class OursInt4(Ours):
    """Every token in 4 bits."""

    # Queries and weights are rounded to 8 bits for the integer products.
    name, codec, tolerance = "kvcrush-int4", "int4", 4e-2


class OursInt4Evicted(OursInt4):
    """A quarter of the tokens in 4 bits."""

    name, keep = "kvcrush-int4-evicted-4x", 0.25


class OursTC4(Ours):
    """Every token in some four bits by transform coding."""

    name, codec, tolerance = "kvcrush-tc4", "tc4", 4e-2


class OursTC6(Ours):
    """Every token in some two and a half bits."""

    name, codec, tolerance = "kvcrush-tc6", "tc6", 4e-2


class OursTC8(Ours):
    """Every token in less than two bits: a transform for every key."""

    name, codec, tolerance = "kvcrush-tc8", "tc8", 4e-2


class OursTada(Ours):
    """Every token in three bits around its page's mean."""

    name, codec, tolerance = "kvcrush-tada", "tada", 4e-2


class OursGear(Ours):
    """Every token in four bits, with a product of low rank and single channels beside them."""

    name, codec, tolerance = "kvcrush-gear", "gear", 4e-2


OURS: tuple[type[Candidate], ...] = (
    OursRaw,
    OursFp32,
    OursInt8,
    OursInt4,
    OursTC4,
    OursTC6,
    OursTC8,
    OursTada,
    OursGear,
    OursRawEvicted,
    OursInt8Evicted,
    OursInt4Evicted,
)
