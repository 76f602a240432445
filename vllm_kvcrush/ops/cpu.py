"""The CPU kernels of csrc/, on torch tensors.

Two ways in: plain functions over `Layer`, `Batch` and `Request`, whose arguments are prepared once
and cost a call a few microseconds, and the same as torch ops (`torch.ops.kvcrush`), which
`torch.compile` can look at. Lengths, counts, page indices and codecs are checked by the library; a
ValueError says what was wrong. What these functions are given must stay alive and unchanged in
size while a Layer, Batch or Request refers to it; the objects hold references for that.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs.layout import CODECS, FITTED
from vllm_kvcrush.ops.fitted import LayerTable

VERSION = 5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_i32, _i64, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [
        ("pool", _ptr),
        ("num_blocks", _i64),
        ("page_bytes", _i64),
        ("block_pages", _i32),
        ("first_page", _i32),
        ("block_size", _i32),
        ("num_kv_heads", _i32),
        ("num_heads", _i32),
        ("k_size", _i32),
        ("v_size", _i32),
        ("dtype", _i32),
        ("scale", ctypes.c_float),
        ("reserved", _i32),
        ("tables", _ptr),
    ]


class _Directory(ctypes.Structure):
    _fields_ = [
        ("begin", _ptr),
        ("end", _ptr),
        ("stride", _i64),
        ("size", _i64),
        ("page", _ptr),
        ("count", _ptr),
        ("codec", _ptr),
        ("bias", _ptr),
        ("log_bias", _ptr),
        ("log_bias_size", _i64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("num_seqs", _i32),
        ("query_start", _ptr),
        ("tail_length", _ptr),
        ("tail_table", _ptr),
        ("tail_stride", _i64),
        ("directory", _Directory),
    ]


class _Scoring(ctypes.Structure):
    _fields_ = [
        ("window", _i32),
        ("pool", _i32),
        ("pool_max", _i32),
        ("reduce", _i32),
        ("factor", ctypes.c_float),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("directory", _Directory),
        ("tail_table", _ptr),
        ("tail_length", _i32),
        ("tail_position", _i32),
    ]


def _load() -> ctypes.CDLL:
    path = pathlib.Path(__file__).parent.parent / "_kernels.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"vllm-kvcrush's CPU kernels cannot be loaded ({error}); build them with "
            "`pip install -e .` in the project's directory, which needs a C++ compiler"
        ) from None
    found = library.kvc_version()
    if found != VERSION:
        raise ImportError(
            f"{path.name} has version {found} of the kernels' interface and this package needs "
            f"{VERSION}; run `pip install -e .` in the project's directory again"
        )
    pointers = {
        "kvc_attention": [_ptr, _ptr, _ptr, _i32, _i64, _ptr, _i32, _i64, _ptr],
        "kvc_store": [_ptr, _i64, _ptr, _i64, _ptr, _i64, _ptr],
        "kvc_check_layer": [_ptr],
        "kvc_encode": [_ptr, _i32, _i32, _i64, _i32, _ptr, _ptr, _ptr],
        "kvc_decode": [_ptr, _i32, _i32, _i64, _i32, _ptr, _ptr, _ptr],
        "kvc_compact": [_ptr, _ptr, _ptr, _ptr, _ptr],
        "kvc_read": [_ptr, _ptr, _i32, _i64, _i64, _ptr, _ptr, _ptr],
        "kvc_window_scores": [_ptr, _ptr, _ptr, _i32, _i64, _i64, _ptr, _i64, _ptr],
        "kvc_top_mask": [_i64, _i64, _ptr, _i64, _ptr],
        "kvc_represent": [_i64, _i64, _i64, _ptr, _ptr, _i64, _ptr, _i64],
        "kvc_mask_slots": [_i64, _i64, _ptr, _i64, _ptr],
        "kvc_huge_pages": [_ptr, _i64],
    }
    for name, arguments in pointers.items():
        getattr(library, name).argtypes = arguments
    library.kvc_capacity.argtypes = [_i32, _i64, _i32, _i32, _i32]
    library.kvc_capacity.restype = library.kvc_scratch_peak.restype = _i64
    library.kvc_huge_pages.restype = None
    library.kvc_error.restype = library.kvc_isa.restype = ctypes.c_char_p
    library.kvc_use_isa.argtypes = [ctypes.c_char_p]
    return library


_library = _load()


def _check(status: int) -> None:
    if status:
        raise ValueError(f"vllm-kvcrush kernels: {_library.kvc_error().decode()}")


def _address(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("the CPU kernels take contiguous tensors in CPU memory")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"a tensor has dtype {tensor.dtype} where {dtype} is needed")
    return tensor.data_ptr()


def isa() -> str:
    """Instruction set in use: "baseline", "avx2", "avx512" or "neon". KVCRUSH_ISA, read at the
    first call, overrides the choice."""
    return str(_library.kvc_isa().decode())


def use_isa(name: str) -> None:
    """Makes later calls use other kernels than the best that this CPU has; for tests."""
    _check(_library.kvc_use_isa(name.encode()))


def threads() -> int:
    """Threads that a large call uses: those of torch's OpenMP runtime."""
    return int(_library.kvc_threads())


def scratch_peak() -> int:
    """The most bytes of working memory that the kernels of this process have held at once since the
    last call of this function. Up to 16 MiB of each kind and thread are kept from call to call."""
    return int(_library.kvc_scratch_peak())


def capacity(codec: str, page_bytes: int, k_size: int, v_size: int, dtype: torch.dtype) -> int:
    """Tokens that a page holds, as the library sees it; `pages.capacity` says the same."""
    return int(_library.kvc_capacity(CODECS[codec], page_bytes, k_size, v_size, DTYPES[dtype]))


class Layer:
    """One layer of a cache whose storage is blocks x layers x KV heads equal pages.

    Args:
        pool: the whole cache, any dtype and shape, contiguous, 64-byte aligned; its bytes are
            [blocks, layers, kv_heads, page_bytes].
        index: of this layer among `layers`.
        dtype: of raw pages: float32, bfloat16 or float16.
        scale: factor of q·k.
        tables: of fitted codecs, by name; pages of the others have no tables.
    """

    def __init__(
        self,
        pool: Tensor,
        *,
        index: int,
        layers: int,
        heads: int,
        kv_heads: int,
        k_size: int,
        v_size: int,
        block_size: int,
        dtype: torch.dtype,
        scale: float,
        tables: Mapping[str, LayerTable] | None = None,
    ):
        page_bytes = block_size * (k_size + v_size) * dtype.itemsize
        block_bytes = layers * kv_heads * page_bytes
        size = pool.numel() * pool.itemsize
        if size % block_bytes:
            raise ValueError(f"a pool of {size} bytes is not whole blocks of {block_bytes} bytes")
        self.pool, self.dtype, self.page_bytes = pool, dtype, page_bytes
        self.heads, self.kv_heads, self.k_size, self.v_size = heads, kv_heads, k_size, v_size
        self.block_size, self.first_page, self.scale = block_size, index * kv_heads, scale
        self.block_pages, self.num_blocks = layers * kv_heads, size // block_bytes
        self.tables = dict(tables or {})
        addresses = [self.tables[c].address if c in self.tables else None for c in FITTED]
        self._tables = (ctypes.c_void_p * len(FITTED))(*addresses)
        self._struct = _Layer(
            _address(pool),
            self.num_blocks,
            page_bytes,
            self.block_pages,
            self.first_page,
            block_size,
            kv_heads,
            heads,
            k_size,
            v_size,
            DTYPES[dtype],
            scale,
            0,
            ctypes.addressof(self._tables),
        )
        self._pointer = ctypes.addressof(self._struct)
        _check(_library.kvc_check_layer(self._pointer))

    def page(self, block: int, head: int) -> int:
        """Index of the page of a block and KV head of this layer."""
        return block * self.block_pages + self.first_page + head

    def capacity(self, codec: str, head: int = 0) -> int:
        """Tokens that a page of a KV head holds."""
        if codec in FITTED:
            return self.tables[codec].capacity[head]
        return capacity(codec, self.page_bytes, self.k_size, self.v_size, self.dtype)


class Directory:
    """Which pages each (row, KV head) owns: entries [begin, end) of page, count and codec.

    Rows are the sequences of a batch, or the one of a request. `begin` and `end` may be slices of
    larger arrays, say one layer of [rows, layers, kv_heads].

    Args:
        begin, end: int32 [rows, kv_heads], the last dimension contiguous, equal strides.
        page: int32 [entries], page index in the pool.
        count: uint16 [entries], tokens.
        codec: uint8 [entries], numbers of pages.CODECS.
        bias: int64 [entries], where in `log_bias` a page's tokens start, or -1.
        log_bias: float32, added to the logits of those tokens.
    """

    def __init__(
        self,
        begin: Tensor,
        end: Tensor,
        page: Tensor,
        count: Tensor,
        codec: Tensor,
        bias: Tensor | None = None,
        log_bias: Tensor | None = None,
    ):
        for tensor in (begin, end):
            if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.stride(1) != 1:
                raise ValueError("begin and end must be int32 [rows, kv_heads] with unit stride")
        if begin.stride(0) != end.stride(0) or begin.shape != end.shape:
            raise ValueError("begin and end must have equal shapes and strides")
        self.rows = begin.shape[0]
        self._kept = (begin, end, page, count, codec, bias, log_bias)
        if not len(page) == len(count) == len(codec) or (
            bias is not None and len(bias) != len(page)
        ):
            raise ValueError("page, count, codec and bias must have one entry each")
        if (bias is None) != (log_bias is None):
            raise ValueError("bias and log_bias go together")
        self.struct = _Directory(
            begin.data_ptr(),
            end.data_ptr(),
            begin.stride(0),
            len(page),
            _address(page, torch.int32),
            _address(count, torch.uint16),
            _address(codec, torch.uint8),
            _address(bias, torch.int64),
            _address(log_bias, torch.float32),
            0 if log_bias is None else log_bias.numel(),
        )


_NO_DIRECTORY = _Directory()


class Batch:
    """The sequences of one step, as every layer sees them.

    Args:
        query_start: int32 [seqs + 1], rows of the query that belong to each sequence.
        tail_length: int32 [seqs], tokens in the raw tail, this step's included.
        tail_table: int32 [seqs, columns], block ids of the tail; rows may be strided.
        directory: compressed pages, or None if no sequence has any.
    """

    def __init__(
        self,
        query_start: Tensor,
        tail_length: Tensor,
        tail_table: Tensor,
        directory: Directory | None = None,
    ):
        seqs = len(query_start) - 1
        if len(tail_length) < seqs or len(tail_table) < seqs:
            raise ValueError(f"tail_length and tail_table need a row for each of {seqs} sequences")
        if directory is not None and directory.rows < seqs:
            raise ValueError(f"a directory of {directory.rows} rows for {seqs} sequences")
        if tail_table.dtype != torch.int32 or tail_table.stride(1) != 1:
            raise ValueError("tail_table must be int32 [seqs, columns] with unit stride")
        self._kept = (query_start, tail_length, tail_table, directory)
        self.rows_read = query_start
        self.struct = _Batch(
            seqs,
            _address(query_start, torch.int32),
            _address(tail_length, torch.int32),
            tail_table.data_ptr(),
            # A row must not be read past its own columns.
            tail_table.stride(0) if len(tail_table) > 1 else tail_table.shape[1],
            _NO_DIRECTORY if directory is None else directory.struct,
        )
        self._pointer = ctypes.addressof(self.struct)


class Request:
    """One request's tokens in a layer: its directory's (row 0), then its tail's.

    Args:
        directory: compressed pages, or None.
        tail_table: int32 [blocks], block ids of the tail.
        tail_length: tokens in it.
        tail_position: position of its first token.
    """

    def __init__(
        self,
        directory: Directory | None,
        tail_table: Tensor,
        tail_length: int,
        tail_position: int,
        block_size: int,
    ):
        if tail_length > len(tail_table) * block_size:
            raise ValueError(f"{tail_length} tokens in a tail of {len(tail_table)} blocks")
        self._kept = (directory, tail_table)
        self.struct = _Request(
            _NO_DIRECTORY if directory is None else directory.struct,
            _address(tail_table, torch.int32),
            tail_length,
            tail_position,
        )
        self._pointer = ctypes.addressof(self.struct)


def _rows(tensor: Tensor, heads: int, size: int, what: str) -> int:
    """Row stride of [rows, heads, size] whose rows are contiguous inside."""
    if tensor.shape[1:] != (heads, size) or tensor.stride()[1:] != (size, 1):
        raise ValueError(
            f"{what} is {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"[rows, {heads}, {size}] with contiguous rows is needed"
        )
    return tensor.stride(0)


def attention(
    layer: Layer, batch: Batch, query: Tensor, out: Tensor, lse: Tensor | None = None
) -> None:
    """Paged attention of decode and prefill rows, into `out`.

    A row sees all of its sequence's compressed pages and the tail up to its own token.

    Args:
        query: [rows, heads, k_size], unscaled; any of the three dtypes.
        out: [rows, heads, v_size]; any of the three dtypes; rows of no sequence stay as they are.
        lse: None, or float32 [rows, heads]: receives log Σ exp(logit), for merging with others.
    """
    rows = min(len(query), len(out))
    if lse is not None and tuple(lse.shape[1:]) != (layer.heads,):
        raise ValueError(f"lse is {tuple(lse.shape)}; [rows, {layer.heads}] is needed")
    if int(batch.rows_read[-1]) > (rows if lse is None else min(rows, len(lse))):
        raise ValueError(f"the batch has {int(batch.rows_read[-1])} rows, query or output {rows}")
    _check(
        _library.kvc_attention(
            layer._pointer,
            batch._pointer,
            query.data_ptr(),
            DTYPES[query.dtype],
            _rows(query, layer.heads, layer.k_size, "query"),
            out.data_ptr(),
            DTYPES[out.dtype],
            _rows(out, layer.heads, layer.v_size, "out"),
            _address(lse, torch.float32),
        )
    )


def store(layer: Layer, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Writes new tokens into raw slots of the tail.

    Args:
        key, value: [rows, kv_heads, size] in the layer's dtype.
        slots: int64 [rows], block * block_size + place; negative: skip the row. Later rows of
            key and value than slots has are skipped too.
    """
    if key.dtype != layer.dtype or value.dtype != layer.dtype:
        raise ValueError(f"keys are {key.dtype} and values {value.dtype}, the cache {layer.dtype}")
    if len(slots) > min(len(key), len(value)):
        raise ValueError(f"{len(slots)} slots for {min(len(key), len(value))} rows")
    _check(
        _library.kvc_store(
            layer._pointer,
            len(slots),
            key.data_ptr(),
            _rows(key, layer.kv_heads, layer.k_size, "key"),
            value.data_ptr(),
            _rows(value, layer.kv_heads, layer.v_size, "value"),
            _address(slots, torch.int64),
        )
    )


def encode(
    layer: Layer,
    codec: str,
    page: int,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    head: int = 0,
) -> None:
    """Fills one page of a KV head; which one matters to fitted codecs.

    Args:
        key, value: float32 [n, size].
        positions: int32 [n], ascending, spanning less than pages.MAX_SPAN; None for raw pages.
    """
    n = len(key)
    if tuple(key.shape[1:]) != (layer.k_size,) or tuple(value.shape) != (n, layer.v_size):
        raise ValueError(f"K {tuple(key.shape)} and V {tuple(value.shape)} do not fit the layer")
    if positions is not None and len(positions) != n:
        raise ValueError(f"{len(positions)} positions for {n} tokens")
    _check(
        _library.kvc_encode(
            layer._pointer,
            CODECS[codec],
            head,
            page,
            n,
            _address(key, torch.float32),
            _address(value, torch.float32),
            _address(positions, torch.int32),
        )
    )


def decode(
    layer: Layer, codec: str, page: int, count: int, head: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads a page of a KV head: float32 K [count, k_size] and V [count, v_size], and int32
    positions (None for raw pages)."""
    limit = layer.capacity(codec, head)
    if not 0 <= count <= limit:
        raise ValueError(f"{count} tokens in a page that holds {limit}")
    key, value = torch.empty(count, layer.k_size), torch.empty(count, layer.v_size)
    positions = None if codec == "raw" else torch.empty(count, dtype=torch.int32)
    _check(
        _library.kvc_decode(
            layer._pointer,
            CODECS[codec],
            head,
            page,
            count,
            key.data_ptr(),
            value.data_ptr(),
            _address(positions),
        )
    )
    return key, value, positions


def compact(
    layer: Layer,
    source: Request,
    slots: Sequence[Tensor] | Tensor,
    target: Directory,
) -> None:
    """Moves chosen tokens of a request into new pages, decoding and encoding on the way; a page
    whose tokens all stay together, in its codec, is copied.

    All is read before anything is written: targets may be among this layer's sources.

    Args:
        slots: for each KV head int64 [n]: slots among the directory's tokens in order, then the
            tail's, in position order within each page that keeps positions. A tensor
            [kv_heads, n] will do. Positions that tie, as those of fitted pages may, are moved on.
        target: row 0 says which pages each head fills, each with as many as its count says.

    Raises:
        ValueError: slots of a page are not in position order, or one comes twice; nothing was
            written.
    """
    if len(slots) != layer.kv_heads:
        raise ValueError(f"slots of {len(slots)} heads for {layer.kv_heads} KV heads")
    if isinstance(slots, Tensor):
        flat = slots.to(torch.int64).reshape(-1).contiguous()
        start = torch.arange(layer.kv_heads + 1) * slots.shape[1]
    else:
        flat = torch.cat([s.to(torch.int64) for s in slots]).contiguous()
        sizes = torch.tensor([0, *(len(s) for s in slots)])
        start = sizes.cumsum(0)
    _check(
        _library.kvc_compact(
            layer._pointer,
            source._pointer,
            flat.data_ptr(),
            start.data_ptr(),
            ctypes.addressof(target.struct),
        )
    )


def read(
    layer: Layer, source: Request, head: int, first: int, count: int, positions: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Slots [first, first + count) of one KV head: float32 K [count, k_size], V [count, v_size],
    and, if asked for, int32 positions."""
    key, value = torch.empty(count, layer.k_size), torch.empty(count, layer.v_size)
    where = torch.empty(count, dtype=torch.int32) if positions else None
    _check(
        _library.kvc_read(
            layer._pointer,
            source._pointer,
            head,
            first,
            count,
            key.data_ptr(),
            value.data_ptr(),
            _address(where),
        )
    )
    return key, value, where


def positions(layer: Layer, source: Request, tokens: int) -> Tensor:
    """Where each head's first `tokens` slots stand, int32 [kv_heads, tokens]; in pages of fitted
    codecs exactly only for the first of each strip."""
    found = torch.empty(layer.kv_heads, tokens, dtype=torch.int32)
    for head, row in enumerate(found):
        _check(
            _library.kvc_read(
                layer._pointer, source._pointer, head, 0, tokens, None, None, row.data_ptr()
            )
        )
    return found


# -- scoring and choosing -------------------------------------------------------------------------

REDUCTIONS = {None: 0, "mean": 1, "max": 2}


def window_scores(
    layer: Layer,
    source: Request,
    queries: Tensor,
    candidates: int,
    *,
    mean: bool = True,
    pool: int = 1,
    pool_kind: str = "max",
    reduce: str | None = "mean",
) -> Tensor:
    """Attention of a window of queries over a request's slots, as policies want it: what
    `reference.window_attention` gives, summed over the window, then `pool_scores` and
    `reduce_groups`, without copies of the keys.

    Args:
        queries: [heads, w, k_size], unscaled, any dtype and strides of the first two dimensions;
            row i is the query of the tail's token tail_length - w + i, and w <= tail_length.
        candidates: m; scores are wanted, and pooled, for slots [0, m).
        mean: the mean over the window instead of the sum.
        pool, pool_kind: width of the pooling window, 1 for none; "avg" or "max".
        reduce: "mean" or "max" over the query heads of a KV head, or None.

    Returns:
        float32 [kv_heads, m], or [heads, m] without reduction.
    """
    window = queries.shape[1]
    if tuple(queries.shape) != (layer.heads, window, layer.k_size) or queries.stride(2) != 1:
        raise ValueError(
            f"queries are {tuple(queries.shape)} with strides {queries.stride()}; "
            f"[{layer.heads}, w, {layer.k_size}] with contiguous rows is needed"
        )
    if pool_kind not in ("avg", "max"):
        raise ValueError(f"pool_kind={pool_kind!r} is not one of avg, max")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not one of mean, max, None")
    out = torch.empty(layer.heads if reduce is None else layer.kv_heads, max(0, candidates))
    factor = 1 / max(1, window) if mean else 1.0
    scoring = _Scoring(window, pool, pool_kind == "max", REDUCTIONS[reduce], factor)
    _check(
        _library.kvc_window_scores(
            layer._pointer,
            source._pointer,
            queries.data_ptr(),
            DTYPES[queries.dtype],
            queries.stride(0),
            queries.stride(1),
            ctypes.addressof(scoring),
            candidates,
            out.data_ptr(),
        )
    )
    return out


class Held:
    """What a request holds in one layer: `reference.Held` on the cache itself, whose keys and
    values become tensors only when they are asked for.

    Args:
        layer, source: the layer, and the request's tokens in it.
        tokens: n, held by every KV head.
    """

    def __init__(self, layer: Layer, source: Request, tokens: int):
        self._layer, self._source, self._tokens = layer, source, tokens

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self._layer.kv_heads

    @property
    def device(self) -> torch.device:
        """Where policies compute."""
        return self._layer.pool.device

    @cached_property
    def _read(self) -> tuple[Tensor, Tensor]:
        layer = self._layer
        parts = [
            read(layer, self._source, head, 0, self._tokens)[:2] for head in range(layer.kv_heads)
        ]
        keys, values = zip(*parts, strict=True)
        return torch.stack(keys), torch.stack(values)

    @property
    def keys(self) -> Tensor:
        """Float32 [H, n, D]."""
        return self._read[0]

    @property
    def values(self) -> Tensor:
        """Float32 [H, n, D]."""
        return self._read[1]

    def window_scores(
        self, queries: Tensor, scale: float, candidates: int, **options: Any
    ) -> Tensor:
        """`window_scores` over these keys, without reading them."""
        if scale != self._layer.scale:
            raise ValueError(f"scale={scale!r} is not the layer's, {self._layer.scale!r}")
        return window_scores(self._layer, self._source, queries, candidates, **options)


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Marks each head's `keep` best slots, as `reference.top_mask` does: float32 [H, m] → bool."""
    rows = scores.to(torch.float32).contiguous()
    mask = torch.empty(rows.shape, dtype=torch.bool)
    _check(_library.kvc_top_mask(*rows.shape, rows.data_ptr(), keep, mask.data_ptr()))
    return mask


def mask_slots(mask: Tensor, count: int) -> Tensor:
    """Slots that a bool mask [H, m] with `count` ones in each row marks: int64 [H, count]."""
    rows = mask.contiguous()
    slots = torch.empty(rows.shape[0], max(0, count), dtype=torch.int64)
    _check(_library.kvc_mask_slots(*rows.shape, rows.data_ptr(), count, slots.data_ptr()))
    return slots


def represent(
    bits: Tensor, important: Tensor, count: int, anchor: Tensor | None, unit: int = 1
) -> Tensor:
    """KVCrush's choice (arXiv 2503.00022): adds to each head's important units `count` evenly
    spaced ones of its others, in the order of their Hamming distance to the anchor, then of their
    index.

    Args:
        bits: bool [b, u * unit], a row for each head that describes tokens.
        important: bool [H, u], equally many ones in each row.
        count: representatives wanted of each head.
        anchor: bool [b * unit], or None for the majority of each head's others.
        unit: tokens of a unit; its vector is the bits of its tokens, head after head.

    Returns:
        bool [H, u].
    """
    rows, mask = bits.contiguous(), important.clone().contiguous()
    units = mask.shape[1]
    if rows.dtype != torch.bool or rows.shape[1] != units * unit:
        raise ValueError(f"bits are {rows.dtype} {tuple(rows.shape)} for {units} units of {unit}")
    if anchor is not None and tuple(anchor.shape) != (rows.shape[0] * unit,):
        raise ValueError(f"an anchor of {tuple(anchor.shape)} for {rows.shape[0]} heads of {unit}")
    _check(
        _library.kvc_represent(
            rows.shape[0],
            units,
            unit,
            rows.data_ptr(),
            _address(None if anchor is None else anchor.contiguous(), torch.bool),
            mask.shape[0],
            mask.data_ptr(),
            count,
        )
    )
    return mask


def huge_pages(tensor: Tensor) -> None:
    """Asks the system to back a tensor with huge pages, since address translation costs a
    scattered cache up to a third of its speed. Where it cannot, nothing changes."""
    _library.kvc_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.itemsize)


# -- torch ops ------------------------------------------------------------------------------------

# Everything that a kernel needs travels as tensors and numbers, so that a graph can hold it.
_SCHEMAS = {
    "paged_attention": (
        "(Tensor(a!) out, Tensor query, Tensor pool, int[] shape, float scale, "
        "Tensor query_start, Tensor tail_length, Tensor tail_table, Tensor? begin=None, "
        "Tensor? end=None, Tensor? page=None, Tensor? count=None, Tensor? codec=None) -> ()"
    ),
    "store": ("(Tensor(a!) pool, Tensor key, Tensor value, Tensor slots, int[] shape) -> ()"),
}


def shape(layer: Layer) -> list[int]:
    """What the torch ops take as `shape`: a layer's geometry as numbers."""
    return [
        layer.first_page // layer.kv_heads,
        layer.block_pages // layer.kv_heads,
        layer.heads,
        layer.kv_heads,
        layer.k_size,
        layer.v_size,
        layer.block_size,
        DTYPES[layer.dtype],
    ]


def _layer(pool: Tensor, shape: Sequence[int], scale: float) -> Layer:
    index, layers, heads, kv_heads, k_size, v_size, block_size, dtype = shape
    return Layer(
        pool,
        index=index,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        k_size=k_size,
        v_size=v_size,
        block_size=block_size,
        dtype=list(DTYPES)[dtype],
        scale=scale,
    )


def _op_attention(
    out: Tensor,
    query: Tensor,
    pool: Tensor,
    shape: Sequence[int],
    scale: float,
    query_start: Tensor,
    tail_length: Tensor,
    tail_table: Tensor,
    *directory: Tensor | None,
    **named: Tensor | None,
) -> None:
    names = ("begin", "end", "page", "count", "codec")
    given = dict(zip(names, directory, strict=False)) | named
    entries: list[Any] = [given.get(name) for name in names]
    pages = None if entries[0] is None else Directory(*entries)
    batch = Batch(query_start, tail_length, tail_table, pages)
    attention(_layer(pool, shape, scale), batch, query, out)


def _op_store(
    pool: Tensor, key: Tensor, value: Tensor, slots: Tensor, shape: Sequence[int]
) -> None:
    store(_layer(pool, shape, 1.0), key, value, slots)


def _fake(*_: Any, **__: Any) -> None:
    """Both ops only write into an argument."""


_ops = torch.library.Library("kvcrush", "DEF")  # type: ignore[no-untyped-call]
for _name, _run in (("paged_attention", _op_attention), ("store", _op_store)):
    _ops.define(_name + _SCHEMAS[_name])  # type: ignore[no-untyped-call]
    _ops.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kvcrush::{_name}", _fake, lib=_ops)
