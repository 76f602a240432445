"""The CPU kernels as plain functions over `Layer`, `Batch` and `Source`. These are prepared once,
so that a call costs only a few microseconds.

The library checks lengths, counts, page indices and codecs; a ValueError says what was wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.cpu.cache import Batch, Directory, Layer, Source
from vllm_kvcrush.ops.cpu.library import DTYPES, LIBRARY, address, check, per_row


def _rows(tensor: Tensor, heads: int, size: int, what: str) -> int:
    """Returns the row stride of a tensor [rows, heads, size]. Raises ValueError if its shape is
    another or its rows are not contiguous; `what` names it."""
    if tensor.shape[1:] != (heads, size) or tensor.stride()[1:] != (size, 1):
        raise ValueError(
            f"{what} is {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"[rows, {heads}, {size}] with contiguous rows is needed"
        )
    return tensor.stride(0)


def attention(
    layer: Layer, batch: Batch, query: Tensor, out: Tensor, lse: Tensor | None = None
) -> None:
    """Computes paged attention of decode and prefill rows and writes it to `out`.

    A row attends to all of its sequence's compressed pages and to the tail up to its own token.

    Args:
        query: [rows, heads, k_size], unscaled; any dtype of DTYPES.
        out: [rows, heads, v_size]; any dtype of DTYPES; rows of no sequence stay as they are.
        lse: None, or float32 [rows, heads], which receives log Σ exp(logit), so that the result can
            be merged with that of other attention.
    """
    rows = min(len(query), len(out))
    if lse is not None and tuple(lse.shape[1:]) != (layer.heads,):
        raise ValueError(f"lse is {tuple(lse.shape)}; [rows, {layer.heads}] is needed")
    if int(batch.rows_read[-1]) > (rows if lse is None else min(rows, len(lse))):
        raise ValueError(f"the batch has {int(batch.rows_read[-1])} rows, query or output {rows}")
    check(
        LIBRARY.kvc_attention(
            layer._pointer,
            batch._pointer,
            query.data_ptr(),
            DTYPES[query.dtype],
            _rows(query, layer.heads, layer.k_size, "query"),
            out.data_ptr(),
            DTYPES[out.dtype],
            _rows(out, layer.heads, layer.v_size, "out"),
            address(lse, torch.float32),
        )
    )


def store(layer: Layer, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Writes new tokens into raw slots of the tail.

    Args:
        key, value: [rows, kv_heads, size] in the layer's dtype.
        slots: int64 [rows], block * block_size + place in the block; a row with a negative slot is
            skipped. It may be shorter than `key` and `value`, whose last rows are skipped then.
    """
    if key.dtype != layer.dtype or value.dtype != layer.dtype:
        raise ValueError(f"keys are {key.dtype} and values {value.dtype}, the cache {layer.dtype}")
    if len(slots) > min(len(key), len(value)):
        raise ValueError(f"{len(slots)} slots for {min(len(key), len(value))} rows")
    check(
        LIBRARY.kvc_store(
            layer._pointer,
            len(slots),
            key.data_ptr(),
            _rows(key, layer.kv_heads, layer.k_size, "key"),
            value.data_ptr(),
            _rows(value, layer.kv_heads, layer.v_size, "value"),
            address(slots, torch.int64),
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
    """Fills one page of a KV head.

    Args:
        page: index of the page in the pool.
        key, value: float32 [n, size].
        positions: int32 [n], ascending, spanning less than layout.MAX_SPAN; None for raw pages.
        head: the KV head, whose tables fitted codecs use.
    """
    n = len(key)
    if tuple(key.shape[1:]) != (layer.k_size,) or tuple(value.shape) != (n, layer.v_size):
        raise ValueError(f"K {tuple(key.shape)} and V {tuple(value.shape)} do not fit the layer")
    if positions is not None and len(positions) != n:
        raise ValueError(f"{len(positions)} positions for {n} tokens")
    check(
        LIBRARY.kvc_encode(
            layer._pointer,
            CODECS[codec].number,
            head,
            page,
            n,
            address(key, torch.float32),
            address(value, torch.float32),
            address(positions, torch.int32),
        )
    )


def decode(
    layer: Layer, codec: str, page: int, count: int, head: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the content of a page of a KV head: float32 K [count, k_size] and V [count, v_size],
    and int32 positions [count] (None for raw pages). Arguments are those of `encode`."""
    limit = layer.capacity(codec, head)
    if not 0 <= count <= limit:
        raise ValueError(f"{count} tokens in a page that holds {limit}")
    key, value = torch.empty(count, layer.k_size), torch.empty(count, layer.v_size)
    positions = None if not CODECS[codec].has_positions else torch.empty(count, dtype=torch.int32)
    check(
        LIBRARY.kvc_decode(
            layer._pointer,
            CODECS[codec].number,
            head,
            page,
            count,
            key.data_ptr(),
            value.data_ptr(),
            address(positions),
        )
    )
    return key, value, positions


def _flat(layer: Layer, slots: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Returns the slots of all heads one after the other, int64, and where each head's slots
    start, int64 [kv_heads + 1]."""
    if len(slots) != layer.kv_heads:
        raise ValueError(f"slots of {len(slots)} heads for {layer.kv_heads} KV heads")
    if isinstance(slots, Tensor):
        flat = slots.to(torch.int64).reshape(-1).contiguous()
        return flat, torch.arange(layer.kv_heads + 1) * slots.shape[1]
    flat = torch.cat([s.to(torch.int64) for s in slots]).contiguous()
    return flat, torch.tensor([0, *(len(s) for s in slots)]).cumsum(0)


def compact(
    layer: Layer,
    source: Source,
    slots: Sequence[Tensor] | Tensor,
    target: Directory,
) -> None:
    """Moves chosen tokens of a request into new pages, decoding and encoding on the way; a page
    whose tokens all stay together, in its codec, is copied.

    Everything is read before anything is written: targets may be among this layer's sources.

    Args:
        slots: the tokens to move, int64 [n] for each KV head or [kv_heads, n]. Slots count the
            directory's tokens, then the tail's. Those for one target page that keeps positions
            must be in position order; equal positions, which fitted pages may have, are moved
            apart.
        target: row 0 says which pages each head fills, and with how many tokens.

    Raises:
        ValueError: slots of a page are not in position order, or one comes twice; nothing was
            written.
    """
    flat, start = _flat(layer, slots)
    check(
        LIBRARY.kvc_compact(
            layer._pointer,
            source._pointer,
            flat.data_ptr(),
            start.data_ptr(),
            ctypes.addressof(target.struct),
        )
    )


def gather(
    layer: Layer, source: Source, slots: Sequence[Tensor] | Tensor, positions: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads chosen slots of every KV head, in the form that `fill` takes.

    Args:
        slots: as in `compact`, but in any order.
        positions: whether to return positions; raw compressed pages have none.

    Returns:
        Float32 K [kv_heads, n, k_size] and V [kv_heads, n, v_size], and int32 positions
        [kv_heads, n] or None; n is the largest number of slots of a head, and rows past a head's
        own are 0.
    """
    flat, start = _flat(layer, slots)
    rows = int(start.diff().max())
    key = torch.empty(layer.kv_heads, rows, layer.k_size)
    value = torch.empty(layer.kv_heads, rows, layer.v_size)
    where = torch.empty(layer.kv_heads, rows, dtype=torch.int32) if positions else None
    _gather(layer, source, flat, start, key, value, where)
    return key, value, where


def gather_keys(layer: Layer, source: Source, counts: Sequence[int]) -> Tensor:
    """Returns the keys of each head's first `counts` slots, float32 [kv_heads, n, k_size], padded
    as `gather` does."""
    key = torch.empty(layer.kv_heads, max(counts), layer.k_size)
    _gather(layer, source, *_flat(layer, [torch.arange(n) for n in counts]), key, None, None)
    return key


def gather_values(layer: Layer, source: Source, counts: Sequence[int]) -> Tensor:
    """Returns the values of each head's first `counts` slots, float32 [kv_heads, n, v_size], padded
    as `gather` does."""
    value = torch.empty(layer.kv_heads, max(counts), layer.v_size)
    _gather(layer, source, *_flat(layer, [torch.arange(n) for n in counts]), None, value, None)
    return value


def _gather(
    layer: Layer,
    source: Source,
    flat: Tensor,
    start: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    where: Tensor | None,
) -> None:
    rows = int(start.diff().max())
    check(
        LIBRARY.kvc_gather(
            layer._pointer,
            source._pointer,
            flat.data_ptr(),
            start.data_ptr(),
            rows,
            address(key),
            address(value),
            address(where),
        )
    )


def fill(
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    counts: int | Sequence[int] | Tensor,
    target: Directory,
) -> None:
    """Fills pages with given tokens, such as those that `gather` returned and a policy changed.

    Args:
        keys, values: float32 [kv_heads, n, size].
        positions: int32 [kv_heads, n], in order within each page that keeps them, as in `compact`;
            None if no page keeps any.
        counts: how many of its n tokens each head has.
        target: row 0 says which pages each head fills, and with how many tokens.

    Raises:
        ValueError: counts and pages do not agree, or positions are not in order; nothing was
            written.
    """
    heads, rows = layer.kv_heads, keys.shape[1]
    for what, tensor, size in (("keys", keys, layer.k_size), ("values", values, layer.v_size)):
        if tuple(tensor.shape) != (heads, rows, size):
            raise ValueError(f"{what} are {tuple(tensor.shape)}; {(heads, rows, size)} are needed")
    if positions is not None and tuple(positions.shape) != (heads, rows):
        raise ValueError(f"positions are {tuple(positions.shape)}; {(heads, rows)} are needed")
    own = per_row(counts, heads)
    # Bound to names, so that they live as long as the call.
    keys, values = keys.contiguous(), values.contiguous()
    positions = None if positions is None else positions.contiguous()
    check(
        LIBRARY.kvc_fill(
            layer._pointer,
            rows,
            own.data_ptr(),
            address(keys, torch.float32),
            address(values, torch.float32),
            address(positions, torch.int32),
            ctypes.addressof(target.struct),
        )
    )


def read(
    layer: Layer, source: Source, head: int, first: int, count: int, positions: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the tokens at slots [first, first + count) of one KV head: float32 K [count, k_size],
    V [count, v_size], and int32 positions [count], or None unless asked for."""
    key, value = torch.empty(count, layer.k_size), torch.empty(count, layer.v_size)
    where = torch.empty(count, dtype=torch.int32) if positions else None
    check(
        LIBRARY.kvc_read(
            layer._pointer,
            source._pointer,
            head,
            first,
            count,
            key.data_ptr(),
            value.data_ptr(),
            address(where),
        )
    )
    return key, value, where


def positions(layer: Layer, source: Source, tokens: int | Sequence[int] | Tensor) -> Tensor:
    """Returns the positions of each head's first `tokens` slots, int32 [kv_heads, n]; n is the
    largest number of them, and positions past a head's own are 0. In pages of fitted codecs they
    are exact only for the first token of each strip."""
    counts = per_row(tokens, layer.kv_heads).tolist()
    found = torch.zeros(layer.kv_heads, max(counts), dtype=torch.int32)
    for head, (row, count) in enumerate(zip(found, counts, strict=True)):
        check(
            LIBRARY.kvc_read(
                layer._pointer, source._pointer, head, 0, count, None, None, row.data_ptr()
            )
        )
    return found
