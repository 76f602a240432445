"""What the launchers of `vllm_kvcrush.ops.triton` launch, compiled for a device and not run.

`builds` says which variants there are; this asks the code that an engine calls. Triton itself
decides, from the arguments, which kernel it needs, as it would on such a device.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu import builds
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton import attention, compaction, scores, shift, store, tap
from vllm_kvcrush.ops.triton.cache import Batch, Directory, Layer, Source, runs_of
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

PROCESSORS = 132  # of an H100 or H200
BLOCK_SIZE = 32  # tokens of a raw page
MOST_TOKENS = 16_384  # of a step
BLOCKS = 64  # in the pool, all of whose contents are zero


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its compile-time arguments, grid and compiled kernel."""

    name: str
    constants: dict[str, Any]
    grid: tuple[int, ...]
    kernel: Any

    @property
    def hash(self) -> str:
        """Tells launches apart that need compilations of their own."""
        return str(self.kernel.hash)


class _Driver:
    """What Triton asks before it compiles."""

    def __init__(self, target: str):
        self._target = builds.TARGETS[target]

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Compiles each launch's kernel for a target, within, and puts it on the list. Tensors are the
    CPU's, and what kernels would write stays what it was."""
    found: list[Launch] = []
    run, processors = JITFunction.run, attention._processors

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = list(inspect.signature(self.fn).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        constants = {name: given[name] for name in names if name.isupper()}
        found.append(Launch(self.fn.__name__, constants, grid, kernel))
        return kernel

    JITFunction.run, attention._processors = record, lambda device: PROCESSORS
    driver.set_active(_Driver(target))
    try:
        yield found
    finally:
        JITFunction.run, attention._processors = run, processors
        driver._active = None


class Model:
    """A layer in the middle of a model's cache, as an engine has it, and what it is called with."""

    def __init__(
        self, heads: int, kv_heads: int, size: int, index: int = 1, layers: int = 3,
        dtype: torch.dtype = torch.bfloat16, tables: Mapping[str, LayerTable] | None = None,
    ):  # fmt: skip
        self.dtype, self.index, self.layers = dtype, index, layers
        page_bytes = BLOCK_SIZE * 2 * size * dtype.itemsize
        pool = torch.zeros(BLOCKS * layers * kv_heads * page_bytes, dtype=torch.uint8)
        self.layer = Layer(
            pool, index=index, layers=layers, heads=heads, kv_heads=kv_heads, k_size=size,
            v_size=size, block_size=BLOCK_SIZE, dtype=dtype, scale=size**-0.5, tables=tables,
        )  # fmt: skip
        self.layer.ptx = True  # as on such a device

    def entries(self, codecs: tuple[str, ...], rows: int) -> tuple[Tensor, ...]:
        """Returns begin, end [rows, KV heads], page, count and codec: a page of each codec for
        every row and head."""
        heads, each = self.layer.kv_heads, len(codecs)
        begin = torch.arange(rows * heads, dtype=torch.int32).view(rows, heads) * each
        codec = torch.tensor([CODECS[c].number for c in codecs] * (rows * heads), dtype=torch.uint8)
        page = torch.arange(len(codec), dtype=torch.int32) % BLOCKS
        return begin, begin + each, page, torch.full_like(page, 5), codec

    def batch(self, rows: list[int], codecs: tuple[str, ...] = (), biased: bool = False) -> Batch:
        """Returns a step: query rows of each sequence, all of which have pages of the codecs,
        perhaps with log biases."""
        directory, n = None, len(rows)
        if codecs:
            entries = self.entries(codecs, n)
            biases = (torch.arange(len(entries[2])), torch.zeros(1)) if biased else ()
            directory = Directory.of(*entries, *biases)
            # What one layer of several sees of the directory of all.
            runs = directory.runs.unsqueeze(1).repeat(1, self.layers, 1, 1, 1)
            directory.runs = runs[:, self.index]
        start = torch.tensor([0, *rows]).cumsum(0).int()
        table = torch.zeros(n, 17, dtype=torch.int32)
        return Batch.of(start, torch.tensor(rows).int(), table, directory, max(rows), BLOCK_SIZE)

    def step(self, rows: list[int], codecs: tuple[str, ...] = (), biased: bool = False) -> None:
        """Shifts, keeps queries, stores and attends, as a forward pass and what comes before it do.
        Query, key and value are parts of one projection."""
        layer, total = self.layer, sum(rows)
        batch = self.batch(rows, codecs, biased)
        most = [torch.zeros(512).int() for _ in range(4)]
        long = torch.zeros(MOST_TOKENS, dtype=torch.int64)
        shift.shift(
            most[0], long, most[1], long.int(), batch.length, long[:total],
            torch.arange(len(rows)), batch.query_start, most[2], most[3], 16,
        )  # fmt: skip
        sizes = [layer.heads, layer.kv_heads, layer.kv_heads]
        projected = torch.zeros(total, sum(sizes), layer.k_size, dtype=self.dtype)
        query, key, value = projected.split(sizes, 1)
        store.store(layer, key, value, torch.arange(total))
        ring = torch.zeros(16, layer.heads, layer.k_size, dtype=self.dtype)
        tap.tap(ring, query, torch.full((total + 1,), -1, dtype=torch.int32)[1:])
        attention.attention(layer, batch, query, torch.empty_like(query))

    def source(self, codecs: tuple[str, ...], tail: int) -> Source:
        """Returns a request's tokens: a page of each codec for every head, and a tail."""
        begin, end, page, count, codec = self.entries(codecs, 1)
        table = torch.zeros(-(-tail // self.layer.block_size), dtype=torch.int32)
        return Source.of(begin, end, page, count, codec, table, tail, 9, runs_of(codec))

    def compact(self, source: tuple[str, ...], target: tuple[str, ...], tail: int) -> None:
        """Moves tokens from pages and a tail into other pages."""
        held = self.source(source, tail)
        kept = torch.arange(5 * len(target)).repeat(self.layer.kv_heads, 1)
        compaction.compact(self.layer, held, kept, self.source(target, 0))

    def score(self, codecs: tuple[str, ...], tail: int, window: int) -> None:
        """Scores what a request holds by the newest queries."""
        queries = torch.zeros(self.layer.heads, window, self.layer.k_size, dtype=self.dtype)
        held = self.source(codecs, tail)
        scores.window_scores(self.layer, held, queries, 5 * len(codecs) + tail)
