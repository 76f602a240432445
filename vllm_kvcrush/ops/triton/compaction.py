"""Reading a request's tokens and encoding them into new pages: what a compaction calls.

Nothing here waits for the device, so the layers of a compaction can be queued one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton import knobs

from vllm_kvcrush.codecs.layout import CODECS, FITTED, GROUP
from vllm_kvcrush.ops.triton.cache import DTYPES, Layer, Source
from vllm_kvcrush.ops.triton.codecs import BY_NAME
from vllm_kvcrush.ops.triton.codecs.record import Codec
from vllm_kvcrush.ops.triton.config import encode_tiles, gather_warps, product_options
from vllm_kvcrush.ops.triton.kernels.compaction import encode_kernel, gather_kernel

SLOTS = 32  # of a program that gathers


def gather(
    layer: Layer, source: Source, slots: Tensor, *, values: bool = True, positions: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys, values and positions of slots.

    Args:
        slots: int64 [kv_heads, n]; negative ones are skipped, their rows stay undefined.

    Returns:
        float32 K [kv_heads, n, k_size], V, and int32 positions (-1 in raw pages); None if not
        asked for.
    """
    count, device = slots.shape[1], layer.pool.device
    shape = (layer.kv_heads, count)
    key = torch.empty(*shape, layer.k_size, device=device)
    value = torch.empty(*shape, layer.v_size, device=device) if values else None
    where = torch.empty(shape, dtype=torch.int32, device=device) if positions else None
    # The tail is read with the raw pages.
    runs = dict.fromkeys((*source.runs, "raw")) if count else ()
    for codec in (variant for run in runs for variant in layer.variants(run)):
        gather_pages(layer, codec, source, slots, key, value, where)
    return key, value, where


def gather_pages(
    layer: Layer,
    codec: Codec,
    source: Source,
    slots: Tensor,
    key: Tensor,
    value: Tensor | None,
    where: Tensor | None,
) -> None:
    """The part of `gather` that lies in pages of one codec; the other rows stay as they are."""
    count = slots.shape[1]
    gather_kernel[(triton.cdiv(count, SLOTS), layer.kv_heads)](
        key, key if value is None else value, key if where is None else where, slots,
        *layer.views(),
        source.begin, source.end, source.page, source.codec, source.first, source.tail_slot,
        source.tail_table, *layer.tables(), count, slots.stride(0),
        len(source.page).bit_length(), layer.block_pages, layer.first_page,
        source.tail_position, T=SLOTS, CODEC=codec, VALUES=value is not None,
        POSITIONS=where is not None, G=layer.geometry, DTYPE=DTYPES[layer.dtype],
        num_warps=gather_warps(layer.geometry.k_pad, layer.geometry.v_pad),
        **product_options(layer.wave),
    )  # fmt: skip


def encode(
    layer: Layer, target: Source, key: Tensor, value: Tensor, positions: Tensor | None
) -> None:
    """Fills pages.

    Args:
        target: its entries say which pages each head fills, each with the next `count` rows.
        key, value: float32 [kv_heads, n, size], contiguous.
        positions: int32 [kv_heads, n], ascending, or None if only raw pages are filled.
    """
    for run in target.runs if len(target.page) and key.shape[1] else ():
        if layer.variants(run):
            codec = BY_NAME[run]
            fill = codec.encode_pages or _encode_pages
            fill(layer, codec, target, key, value, positions)


def _encode_pages(
    layer: Layer,
    codec: Codec,
    target: Source,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
) -> None:
    """The part of `encode` that goes into pages of one codec."""
    geometry = layer.geometry
    tokens, warps = encode_tiles(geometry.k_pad, geometry.v_pad)
    groups, parts = triton.cdiv(layer.most(codec.name), GROUP), 1 + GROUP // tokens
    encode_kernel[(len(target.page), groups, parts)](
        key, value, key if positions is None else positions, *layer.views(),
        target.head, target.page, target.count, target.codec, target.first, key.shape[1],
        T=GROUP, V=tokens, CODEC=codec, POSITIONS=positions is not None, G=geometry,
        num_warps=warps,
    )  # fmt: skip


def compact(layer: Layer, source: Source, slots: Tensor, target: Source) -> None:
    """Moves chosen tokens of a request into new pages, decoding and encoding on the way.

    All is read before anything is written: targets may be among this layer's sources.

    Args:
        slots: int64 [kv_heads, n], in position order within each page that keeps positions.
        target: its entries say which pages each head fills, each with as many as its count says.

    Raises:
        ValueError: slots of a page are not in position order. Known only where kernels are
            interpreted or debugged (TRITON_DEBUG=1): to know it means to wait for the device.
    """
    key, value, where = gather(layer, source, slots, positions=True)
    assert value is not None and where is not None
    if knobs.runtime.interpret or knobs.runtime.debug:
        _check_order(target, where)
    if layer.fitted is not None and where.shape[1]:
        where = _within_tables(where, target, layer.fitted.positions)
    encode(layer, target, key, value, where)


def stored_positions(read: Tensor) -> Tensor:
    """Positions that pages store of tokens whose positions were read from pages, both int32
    [kv_heads, n]; -1: not known.

    What fitted pages give back is at or before the true position, so tokens that are in order may
    tie: of these the later ones are moved to the next free position. Where positions go back,
    another part of a region begins. `order_positions` of csrc/api.cpp does the same.
    """
    steps = torch.arange(read.shape[1], device=read.device)
    back = F.pad(read[:, 1:] < read[:, :-1], (1, 0)) | (read < 0)
    part = back.cumsum(1) << 40  # more than any positions are apart
    return ((read - steps + part).cummax(1).values - part + steps).int()


def _within_tables(read: Tensor, target: Source, limit: int) -> Tensor:
    """`stored_positions`, such that none in a page of a fitted codec is moved beyond `limit`, which
    is what its tables know, unless one was read from there."""
    where = stored_positions(read)
    entries = torch.arange(len(target.count), device=read.device)
    entry = entries.repeat_interleave(target.count, output_size=read.numel()).view_as(read)
    place = torch.arange(read.shape[1], device=read.device) - target.first[entry]
    last = read.gather(1, (target.first + target.count - 1)[entry].long())
    fitted = (target.codec[entry] >= CODECS[FITTED[0]]) & (last < limit)
    most = limit - target.count[entry] + place
    return torch.where(fitted, where.minimum(most), where).int()


def _check_order(target: Source, read: Tensor) -> None:
    columns = (target.head, target.first, target.count, target.codec)
    for head, first, count, codec in zip(*(x.tolist() for x in columns), strict=True):
        own = read[head, first : first + count]
        back = (own[1:] < own[:-1]).nonzero().flatten().tolist()
        if back and codec != CODECS["raw"]:
            before, after = own[back[0] : back[0] + 2].tolist()
            raise ValueError(
                f"slots of head {head} are not in position order: position {after} comes after "
                f"{before} in one page"
            )
