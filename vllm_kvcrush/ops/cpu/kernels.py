"""The CPU kernels as plain functions over `Layer`, `Batch` and `Source`, whose arguments are
prepared once and cost a call a few microseconds.

Lengths, counts, page indices and codecs are checked by the library; a ValueError says what was
wrong.
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
        slots: int64 [rows], block * block_size + place; negative: skip the row. Later rows of
            key and value than slots has are skipped too.
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
    """Reads a page of a KV head: float32 K [count, k_size] and V [count, v_size], and int32
    positions (None for raw pages)."""
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
    """Slots of all heads one after the other, and where each head's start."""
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
    """Reads chosen slots of every KV head: what `fill` takes.

    Args:
        slots: for each KV head int64 [n_h], in any order, as `compact` takes them, or a tensor
            [kv_heads, n].
        positions: whether they are wanted; raw compressed pages have none.

    Returns:
        Float32 K [kv_heads, n, k_size] and V [kv_heads, n, v_size] and int32 positions
        [kv_heads, n], or None if they are not wanted; n is the largest n_h, and rows past a head's
        own are 0.
    """
    flat, start = _flat(layer, slots)
    rows = int(start.diff().max())
    key = torch.empty(layer.kv_heads, rows, layer.k_size)
    value = torch.empty(layer.kv_heads, rows, layer.v_size)
    where = torch.empty(layer.kv_heads, rows, dtype=torch.int32) if positions else None
    check(
        LIBRARY.kvc_gather(
            layer._pointer,
            source._pointer,
            flat.data_ptr(),
            start.data_ptr(),
            rows,
            key.data_ptr(),
            value.data_ptr(),
            address(where),
        )
    )
    return key, value, where


def fill(
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    counts: int | Sequence[int] | Tensor,
    target: Directory,
) -> None:
    """Fills pages with given tokens: the other half of a compaction, after `gather` and whatever
    was done to its tokens.

    Args:
        keys, values: float32 [kv_heads, n, size].
        positions: int32 [kv_heads, n], in order within each page that keeps them, as `compact`
            wants them; None if no page keeps any.
        counts: tokens of each head, the first ones of its n.
        target: row 0 says which pages each head fills, each with as many as its count says.

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
    # Held here, so that they live as long as the call.
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
    """Slots [first, first + count) of one KV head: float32 K [count, k_size], V [count, v_size],
    and, if asked for, int32 positions."""
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
    """Returns where each head's first `tokens` slots stand, int32 [kv_heads, n]; n is the largest
    number of them, and 0 stands past a head's own. In pages of fitted codecs they are exact only
    for the first token of each strip."""
    counts = per_row(tokens, layer.kv_heads).tolist()
    found = torch.zeros(layer.kv_heads, max(counts), dtype=torch.int32)
    for head, (row, count) in enumerate(zip(found, counts, strict=True)):
        check(
            LIBRARY.kvc_read(
                layer._pointer, source._pointer, head, 0, count, None, None, row.data_ptr()
            )
        )
    return found


def huge_pages(tensor: Tensor) -> None:
    """Asks the system to back a tensor with huge pages, since address translation costs a
    scattered cache time: attention over raw pages (llama's heads, 8K tokens, 400 MB) takes 16 %
    less with them, over int4 pages 4 %. Contents are kept; touched memory is copied at once, which
    takes about as long as filling it did. Where the system refuses, nothing changes."""
    LIBRARY.kvc_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
