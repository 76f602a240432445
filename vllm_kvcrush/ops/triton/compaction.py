"""Reading a request's tokens and encoding them into new pages: what a compaction calls.

Nothing here waits for the device, so the layers of a compaction can be queued one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton import knobs

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.codecs.layout import GROUP
from vllm_kvcrush.ops.triton.cache import DTYPES, Layer, Source, on_device
from vllm_kvcrush.ops.triton.codecs import BY_NAME
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.config import encode_tiles, gather_warps, product_options
from vllm_kvcrush.ops.triton.kernels.compaction import encode_kernel, gather_kernel

SLOTS = 32  # of a program that gathers


def gather(
    layer: Layer,
    source: Source,
    slots: Sequence[Tensor] | Tensor,
    *,
    keys: bool = True,
    values: bool = True,
    positions: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Reads chosen slots of every KV head: what `fill` takes.

    Args:
        slots: for each KV head int64 [n_h], or a tensor [kv_heads, n], -1 past a head's own.
        keys, values, positions: whether they are wanted.
        dtype: of keys and values.

    Returns:
        K [kv_heads, n, k_size] and V [kv_heads, n, v_size], and int32 positions [kv_heads, n], -1
        in raw pages; None if not wanted. n is the largest n_h, and rows past a head's own are 0.
    """
    device = layer.pool.device
    rows = padded(slots, device)
    if len(rows) != layer.kv_heads:
        raise ValueError(f"slots of {len(rows)} heads for {layer.kv_heads} KV heads")

    def made(wanted: bool, dtype: torch.dtype, *size: int) -> Tensor | None:
        return torch.empty(*rows.shape, *size, dtype=dtype, device=device) if wanted else None

    key, value = made(keys, dtype, layer.k_size), made(values, dtype, layer.v_size)
    where = made(positions, torch.int32)
    # The tail is read with the raw pages, which also clear the rows of no slot.
    runs = dict.fromkeys((*source.runs, "raw")) if rows.shape[1] else ()
    for codec in (variant for run in runs for variant in layer.variants(run)):
        gather_pages(layer, codec, source, rows, key, value, where)
    return key, value, where


def padded(slots: Sequence[Tensor] | Tensor, device: torch.device) -> Tensor:
    """Returns slots of each head as one tensor int64 [kv_heads, n] on `device`, -1 past a head's
    own."""
    if isinstance(slots, Tensor):
        return slots.to(device, non_blocking=True)
    most = max((len(own) for own in slots), default=0)
    rows = [F.pad(own.to(torch.int64), (0, most - len(own)), value=-1) for own in slots]
    return torch.stack(rows).to(device, non_blocking=True)


def first_slots(tokens: int | Sequence[int], layer: Layer) -> Tensor:
    """Returns each head's first `tokens` slots, as `padded` does: of all heads equally many, or of
    each its own number."""
    own = [tokens] * layer.kv_heads if isinstance(tokens, int) else list(tokens)
    most, device = max(own), layer.pool.device
    slots = torch.arange(most, device=device).expand(len(own), -1)
    return slots if min(own) == most else within(slots, on_device(tuple(own), device))


def within(slots: Tensor, counts: Tensor) -> Tensor:
    """Returns slots [kv_heads, n], with -1 past each head's first `counts`, int32 [kv_heads]."""
    columns = torch.arange(slots.shape[1], device=slots.device)
    return slots.masked_fill(columns >= counts.unsqueeze(1), -1)


def positions(layer: Layer, source: Source, tokens: int | Sequence[int]) -> Tensor:
    """Returns where each head's first `tokens` slots stand, int32 [kv_heads, n]; n is the largest
    number of them, and 0 stands past a head's own. In pages of fitted codecs they are exact only
    for the first token of each strip."""
    where = gather(layer, source, first_slots(tokens, layer), keys=False, values=False)[2]
    assert where is not None
    return where


def gather_pages(
    layer: Layer,
    codec: Traits,
    source: Source,
    slots: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    where: Tensor | None,
) -> None:
    """The part of `gather` that lies in pages of one codec; the other rows stay as they are."""
    count = slots.shape[1]
    # What is not written still needs an address.
    wanted = (slots if x is None else x for x in (key, value, where))
    gather_kernel[(triton.cdiv(count, SLOTS), layer.kv_heads)](
        *wanted, slots,
        *layer.views(),
        source.begin, source.end, source.page, source.codec, source.first, source.tail_slot,
        source.tail_table, *layer.tables(), count, slots.stride(0),
        len(source.page).bit_length(), layer.block_pages, layer.first_page,
        source.tail_position, T=SLOTS, CODEC=codec, KEYS=key is not None,
        VALUES=value is not None, POSITIONS=where is not None, G=layer.geometry,
        DTYPE=DTYPES[layer.dtype],
        num_warps=gather_warps(layer.geometry.k_pad, layer.geometry.v_pad),
        **product_options(layer.wave),
    )  # fmt: skip


def encode(
    layer: Layer, target: Source, key: Tensor, value: Tensor, positions: Tensor | None
) -> None:
    """Fills pages.

    Args:
        target: its entries say which pages each head fills, each with the next `count` rows.
        key, value: float32 [kv_heads, n, size], contiguous; n is the largest number of any head.
        positions: int32 [kv_heads, n], contiguous, ascending, or None if only raw pages are filled.
    """
    for run in target.runs if len(target.page) and key.shape[1] else ():
        if layer.variants(run):
            codec = BY_NAME[run]
            if codec.share is not None:
                codec.share(layer, codec, target, key, value)
            fill = codec.encode_pages or _encode_pages
            fill(layer, codec, target, key, value, positions)


def _encode_pages(
    layer: Layer,
    codec: Traits,
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


def compact(layer: Layer, source: Source, slots: Sequence[Tensor] | Tensor, target: Source) -> None:
    """Moves chosen tokens of a request into new pages, decoding and encoding on the way.

    All is read before anything is written: targets may be among this layer's sources.

    Args:
        slots: as `gather` takes them, in position order within each page that keeps positions.
        target: its entries say which pages each head fills, each with as many as its count says.

    Raises:
        ValueError: slots of a page are not in position order. Known only where kernels are
            interpreted or debugged (TRITON_DEBUG=1): to know it means to wait for the device.
    """
    key, value, where = gather(layer, source, slots)
    assert key is not None and value is not None
    _fill(layer, key, value, where, target)


def fill(
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    counts: int | Sequence[int],
    target: Source,
) -> None:
    """Fills pages with given tokens: the other half of a compaction, after `gather` and whatever
    was done to its tokens.

    Args:
        keys, values: float32 [kv_heads, n, size].
        positions: int32 [kv_heads, n], in order within each page that keeps them; None if no page
            keeps any.
        counts: tokens of each head, the first ones of its n.
        target: its entries say which pages each head fills, each with as many as its count says.

    Raises:
        ValueError: shapes do not fit, or positions are missing. And where kernels are interpreted
            or debugged: counts and pages do not agree, or positions are not in order.
    """
    heads, rows = layer.kv_heads, keys.shape[1]
    for what, x, size in (("keys", keys, layer.k_size), ("values", values, layer.v_size)):
        if x.shape != (heads, rows, size) or x.dtype != torch.float32:
            raise ValueError(
                f"{what} are {x.dtype} {tuple(x.shape)}; float32 {(heads, rows, size)} are needed"
            )
    if positions is not None and positions.shape != (heads, rows):
        raise ValueError(f"positions are {tuple(positions.shape)}; {(heads, rows)} are needed")
    if positions is None and any(run != "raw" for run in target.runs):
        raise ValueError(f"pages of {', '.join(target.runs)} keep positions, and there are none")
    own = [counts] * heads if isinstance(counts, int) else list(counts)
    if len(own) != heads or not all(0 <= count <= rows for count in own):
        raise ValueError(f"counts {own} for {heads} heads of {rows} tokens")
    if knobs.runtime.interpret or knobs.runtime.debug:
        room = torch.zeros(heads, dtype=torch.int64, device=target.count.device)
        room.index_add_(0, target.head.long(), target.count.long())
        if room.tolist() != own:
            raise ValueError(f"pages for {room.tolist()} tokens of each head, and {own} tokens")
    where = None if positions is None else positions.int().contiguous()
    _fill(layer, keys.contiguous(), values.contiguous(), where, target)


def _fill(layer: Layer, key: Tensor, value: Tensor, where: Tensor | None, target: Source) -> None:
    if where is not None and len(target.page) and where.shape[1]:
        if knobs.runtime.interpret or knobs.runtime.debug:
            _check_order(target, where)
        if layer.fitted is not None:
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
    """`stored_positions`, such that none in a page of a codec with tables is moved beyond `limit`,
    which is what they know, unless one was read from there."""
    where = stored_positions(read)
    heads, width = read.shape
    # The entry of each place: the last one that begins there or before.
    places = torch.arange(heads * width, device=read.device).view(heads, width)
    starts = target.head.long() * width + target.first
    entry = (torch.searchsorted(starts, places, right=True) - 1).clamp_(min=0)
    count = target.count[entry]
    place = places % width - target.first[entry]
    last = (target.first[entry] + count - 1).clamp_(min=0)
    fitted = _needs_tables(read.device)[target.codec[entry].long()]
    fitted &= read.gather(1, last.long()) < limit
    return torch.where(fitted, where.minimum(limit - count + place), where).int()


@functools.cache
def _needs_tables(device: torch.device) -> Tensor:
    """bool, by the codecs' numbers. Copied once: a copy from the host waits for the device."""
    return torch.tensor([codec.needs_tables for codec in CODECS.values()], device=device)


def _check_order(target: Source, read: Tensor) -> None:
    columns = (target.head, target.first, target.count, target.codec)
    for head, first, count, codec in zip(*(x.tolist() for x in columns), strict=True):
        own = read[head, first : first + count]
        back = (own[1:] < own[:-1]).nonzero().flatten().tolist()
        if back and codec != CODECS["raw"].number:
            before, after = own[back[0] : back[0] + 2].tolist()
            raise ValueError(
                f"slots of head {head} are not in position order: position {after} comes after "
                f"{before} in one page"
            )
