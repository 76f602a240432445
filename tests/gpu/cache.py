"""A poisoned cache of a few layers in GPU layout, and what has been put into one of them."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
from torch import Tensor

from tests.gpu import oracle
from vllm_kvcrush.codecs import CODECS, FITTED, reference
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.points import POINTS
from vllm_kvcrush.codecs.transform.reference import origins
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton import attention, compaction
from vllm_kvcrush.ops.triton.cache import Batch, Directory, Layer, Source, runs_of
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

CHUNKS = ("tada", "gear")  # codecs whose pages are one chunk
POSITIONS = 90_000  # number of positions that the tables have angles for
TABLE_LAYER = 1  # index of the tested layer in the tables


@functools.cache
def tables_of(size: int, kv_heads: int) -> dict[str, Tables]:
    """Returns tables of two layers, whose heads have different keys, and different numbers of bits
    for keys and values."""
    rope = Rope(1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))
    generator = torch.Generator().manual_seed(size)
    draw = torch.randn(2, 2, kv_heads, 600, size, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0.5, -1, size).double() * torch.linspace(1, 2, kv_heads)[:, None, None]
    statistics = Statistics.of(draw[0] * spread + 1, draw[1] * spread)
    found = {}
    for i, point in enumerate(POINTS):
        bits = (4 - i + torch.arange(kv_heads) % 2).clamp(max=4).to(torch.uint8)
        fitted_tables = fit(statistics, point, rope, 512)
        found[point.name] = dataclasses.replace(fitted_tables, value_bits=bits.expand(2, -1))
    return found


class Cache:
    """A poisoned cache of a few layers, and what has been put into one of them.

    Attributes:
        keys, values, positions: by sequence and KV head, what is read back from the pages, float64.
    """

    def __init__(
        self, draw: random.Random, device: str, group: int, k_size: int, v_size: int,
        dtype: torch.dtype = torch.float16, kv_heads: int = 2, block_size: int = 32,
        blocks: int = 24, layers: int = 0, fitted_codecs: tuple[str, ...] = (),
    ):  # fmt: skip
        self.draw, self.device, self.dtype, self.block_size = draw, device, dtype, block_size
        layers = layers or draw.randrange(1, 4)
        page_bytes = block_size * (k_size + v_size) * dtype.itemsize
        # All bits set: NaN as a float of any width.
        pool = torch.full((blocks * layers * kv_heads * page_bytes,), 255, dtype=torch.uint8)
        self.tables = {c: tables_of(k_size, kv_heads)[c] for c in fitted_codecs}
        angles = [Angles(t.rope, POSITIONS) for t in self.tables.values()]
        self.layer = Layer(
            pool.to(device), index=draw.randrange(layers), layers=layers, heads=group * kv_heads,
            kv_heads=kv_heads, k_size=k_size, v_size=v_size, block_size=block_size, dtype=dtype,
            scale=k_size**-0.5,
            tables={
                c: LayerTable(t, TABLE_LAYER, range(kv_heads), page_bytes, v_size, angles[0])
                for c, t in self.tables.items()
            },
        )  # fmt: skip
        self.free = list(range(blocks))
        draw.shuffle(self.free)
        self.pages: list[int] = []
        self.entries: list[tuple[int, int, int]] = []  # page, count, codec
        self.begin: list[list[int]] = []
        self.end: list[list[int]] = []
        self.tails: list[list[int]] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.keys: list[list[Tensor]] = []
        self.values: list[list[Tensor]] = []
        self.positions: list[list[Tensor]] = []

    def bytes_of(self, page: int) -> Tensor:
        """Returns a page's bytes, on the CPU."""
        size = self.layer.geometry.page_bytes
        return self.layer.pool[page * size : (page + 1) * size].cpu()

    def write(self, page: int, content: Tensor) -> None:
        size = self.layer.geometry.page_bytes
        self.layer.pool[page * size : (page + 1) * size] = content.to(self.device)

    def page(self) -> int:
        """Returns any unused page: compressed pages may come from anywhere in their block."""
        if not self.pages:
            block = self.free.pop()
            self.pages = [block * self.layer.block_pages + i for i in range(self.layer.block_pages)]
            self.draw.shuffle(self.pages)
        return self.pages.pop()

    def content(self, n: int) -> tuple[Tensor, Tensor]:
        """Returns random keys, with outlier channels and a sink as models have them, and values."""
        key, value = torch.randn(n, self.layer.k_size), torch.randn(n, self.layer.v_size)
        key[:, self.draw.randrange(self.layer.k_size)] += 4
        key[:, self.draw.randrange(self.layer.k_size)] *= 6
        if n:
            key[0] *= 4
            value[0] *= 0.02
        return key, value

    def fill(
        self, page: int, codec: str, key: Tensor, value: Tensor, where: Tensor | None, head: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Writes a page and returns what is read back from it, float64."""
        content, geometry = self.bytes_of(page), self.layer.geometry
        if codec in CHUNKS:
            return self._fill_chunk(page, codec, key, value, where)
        if codec in FITTED:
            assert where is not None
            section, tables = self.layer.fitted.sections[codec][head], self.tables[codec]
            kept = oracle.encode_fitted(
                content, section, geometry, key, value, where, tables, TABLE_LAYER, head
            )
        else:
            oracle.encode(content, codec, geometry, key, value, where, self.dtype)
            kept = oracle.kept(codec, key, value, self.dtype)
        self.write(page, content)
        return kept

    def _fill_chunk(
        self, page: int, codec: str, key: Tensor, value: Tensor, where: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # By the kernels, whose pages have tests of their own; read back by the oracle.
        n, number = len(key), CODECS[codec].number
        if n == 0:
            return key.double(), value.double()
        assert where is not None
        heads = self.layer.kv_heads
        ends = [1] * heads
        target = Source.of(
            *(torch.tensor(x, device=self.device) for x in ([0, *ends[1:]], ends, [page])),
            *(torch.tensor(x, device=self.device) for x in ([n], [number], [0])),
            0, 0, (codec,),
        )  # fmt: skip
        rows = [x.to(self.device).expand(heads, -1, -1).contiguous() for x in (key, value)]
        places = where.to(self.device).expand(heads, -1).contiguous()
        compaction.encode(self.layer, target, *rows, places)
        k, v, _ = oracle.decode(self.bytes_of(page), codec, self.layer.geometry, n, self.dtype)
        return k, v

    def put(
        self,
        codecs: list[str] | list[list[str]],
        tail: int,
        counts: list[int] | list[list[int]] | None = None,
    ) -> None:
        """Adds a sequence: for each head pages of the codecs, then `tail` raw tokens.

        Args:
            codecs: of all heads' pages, or of each head's own.
            counts: tokens of each page, or of each page of each head; None for full, partly filled
                and empty pages at random.
        """
        layer, step = self.layer, self.block_size
        blocks = [self.free.pop() for _ in range(-(-tail // step))]
        keys, values, positions, begin, end = [], [], [], [], []
        start = 20_000 + self.draw.randrange(1000)  # after all pages' positions
        for head in range(layer.kv_heads):
            begin.append(len(self.entries))
            k_parts, v_parts, p_parts = [], [], []
            at = self.draw.randrange(1000)
            own: list[Any] = [codecs, counts or []]
            own = [x[head] if x and isinstance(x[0], list) else x for x in own]
            order = list(enumerate(own[0]))
            for i, codec in order if head % 2 == 0 else order[::-1]:
                full = layer.capacity(codec, head)
                some = [full, self.draw.randrange(full + 1), min(full, 5), 0]
                count = min(full, own[1][i]) if own[1] else self.draw.choice(some)
                key, value = self.content(count)
                where = (at + torch.randint(1, 9, (count,)).cumsum(0)).int()
                at += 9 * count
                page = self.page()
                self.entries.append((page, count, CODECS[codec].number))
                k_kept, v_kept = self.fill(
                    page, codec, key, value, None if codec == "raw" else where, head
                )
                if codec in FITTED:  # they keep the positions of strips
                    steps = torch.arange(count) % 16
                    where = (origins(where) + steps).int()
                k_parts.append(k_kept)
                v_parts.append(v_kept)
                p_parts.append(where)
            end.append(len(self.entries))
            key, value = self.content(tail)
            for i, block in enumerate(blocks):
                part = slice(i * step, (i + 1) * step)
                self.fill(layer.page(block, head), "raw", key[part], value[part], None)
            k_parts.append(key.to(self.dtype).double())
            v_parts.append(value.to(self.dtype).double())
            p_parts.append(torch.arange(start, start + tail, dtype=torch.int32))
            keys.append(torch.cat(k_parts))
            values.append(torch.cat(v_parts))
            positions.append(torch.cat(p_parts))
        self.begin.append(begin)
        self.end.append(end)
        self.tails.append(blocks)
        self.lengths.append(tail)
        self.starts.append(start)
        self.keys.append(keys)
        self.values.append(values)
        self.positions.append(positions)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        columns = zip(*self.entries, strict=True) if self.entries else ([], [], [])
        page, count, codec = (torch.tensor(list(x), dtype=torch.int32) for x in columns)
        return page, count.to(torch.uint16), codec.to(torch.uint8)

    def _draw_biases(self, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        offsets = log_bias = None
        if bias:
            # Every third page has none.
            total, starts = 0, []
            for i, (_, n, _) in enumerate(self.entries):
                starts.append(-1 if i % 3 == 2 else total)
                total += 0 if i % 3 == 2 else n
            offsets, log_bias = torch.tensor(starts), torch.randn(total + 1)
        self.log_bias = (offsets, log_bias)
        return self.log_bias

    def directory(self, bias: bool = False) -> Directory:
        page, count, codec = self._entries()
        offsets, log_bias = self._draw_biases(bias)
        begin, end = (torch.tensor(x, dtype=torch.int32) for x in (self.begin, self.end))
        # Kept for as long as the directory may be read.
        self.device_bias = None if log_bias is None else log_bias.to(self.device)
        return Directory.of(begin, end, page, count, codec, offsets, self.device_bias, self.device)

    def source(self, seq: int, bias: bool = False) -> Source:
        offsets, log_bias = (
            None if x is None else x.to(self.device) for x in self._draw_biases(bias)
        )
        page, count, codec = (x.to(self.device) for x in self._entries())
        first, last = self.begin[seq][0], self.end[seq][-1]
        begin, end = (
            (torch.tensor([x[seq]], dtype=torch.int32) - first).to(self.device)
            for x in (self.begin, self.end)
        )
        own = slice(first, last)
        return Source.of(
            begin, end, page[own], count[own], codec[own],
            torch.tensor(self.tails[seq], dtype=torch.int32, device=self.device),
            self.lengths[seq], self.starts[seq], runs_of(codec[own].cpu()),
            None if offsets is None else offsets[own], log_bias,
        )  # fmt: skip

    def biases(self, seq: int) -> list[Tensor]:
        """Returns what the last `directory` or `source` with biases adds to logits, by head and
        token."""
        offsets, log_bias = self.log_bias
        assert offsets is not None and log_bias is not None
        result = []
        for head in range(self.layer.kv_heads):
            parts = []
            for i in range(self.begin[seq][head], self.end[seq][head]):
                n, start = self.entries[i][1], int(offsets[i])
                parts.append(torch.zeros(n) if start < 0 else log_bias[start : start + n])
            result.append(torch.cat([*parts, torch.zeros(self.lengths[seq])]))
        return result

    def batch(self, rows: list[int], bias: bool = False) -> Batch:
        columns = max(1, *(len(t) for t in self.tails)) + 1
        table = torch.full((len(rows), columns), -1, dtype=torch.int32)
        for row, blocks in zip(table, self.tails, strict=True):
            row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        starts = torch.tensor([0, *rows]).cumsum(0).int()
        return Batch.of(
            starts.to(self.device),
            torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            table.to(self.device),
            self.directory(bias) if self.entries else None,
            max(rows),
            self.block_size,
        )

    def check(
        self, rows: list[int], tolerance: float, bias: bool = False, parts: int | None = None
    ) -> None:
        """Computes attention with `rows` random queries of each sequence, and compares it with the
        float64 oracle's."""
        layer, total = self.layer, sum(rows)
        batch = self.batch(rows, bias)
        query = torch.randn(total, layer.heads, layer.k_size).to(self.dtype)
        # Rows beyond the batch's, as in a padded graph, and strides must not be touched or matter.
        wide = torch.full((total + 3, layer.heads + 1, layer.v_size), torch.nan, device=self.device)
        out = wide[:, : layer.heads]
        lse = torch.full((total + 3, layer.heads), torch.nan, device=self.device)
        padded = torch.cat([query, torch.full((3, *query.shape[1:]), torch.nan).to(query)])
        attention.attention(layer, batch, padded.to(self.device), out, lse, parts)
        wide, lse = wide.cpu(), lse.cpu()
        out = wide[:, : layer.heads]
        assert (
            wide[total:].isnan().all() and wide[:, -1].isnan().all() and lse[total:].isnan().all()
        )
        first = 0
        for seq, count in enumerate(rows):
            part = slice(first, first + count)
            want, want_lse = reference.attention(
                query[part], self.keys[seq], self.values[seq], layer.scale, self.lengths[seq],
                self.biases(seq) if bias else None,
            )  # fmt: skip
            largest = max([1e-3, *(float(v.abs().max()) for v in self.values[seq] if len(v))])
            error = (out[part] - want).abs().max() if count else 0
            assert error <= tolerance * largest, f"sequence {seq}: {error} of {largest}"
            torch.testing.assert_close(lse[part].double(), want_lse, rtol=1e-3, atol=3 * tolerance)
            first += count
