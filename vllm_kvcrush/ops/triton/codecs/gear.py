"""gear: a grid of each key channel of a page and of each value, beside products of low rank, and
single channels of keys beside both.

    | K codes | V codes | K third bits | V third bits | what tokens share | V scales |
    | columns | columns | of 3 bits    | of 3 bits    | below             | cap f16  |
    | weights                   | single channels                         | positions | header
    | of K, then V: rank x cap  | of each strip k_size / 8 places (u16),  | cap u16   |
    | f16                       | then rests (f16)                        |
    What tokens share: scales and zeros of the key channels, then the factors of K and of V, f16.

Codes are those of csrc/layout.h, in the columns of `kernels.columns`. A tile's keys are made whole
before they are multiplied with queries, single channels one after the other: this codec is here to
be compared with others, and no faster way was looked for.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcrush.codecs.chunk import LOOPS
from vllm_kvcrush.codecs.layout import GEAR, STRIP
from vllm_kvcrush.codecs.reference import HALF_MAX, rotation, signs
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.kernels.columns import channel_plane, columns, plane, store_columns
from vllm_kvcrush.ops.triton.kernels.encoding import fit_tokens, inverse, rotate, rounded, to_half
from vllm_kvcrush.ops.triton.kernels.pages import (
    page_loop,
    plane_signs,
    query_planes,
    token_scales,
)
from vllm_kvcrush.ops.triton.kernels.tiles import dot, interleave, planes_hadamard, rotation_sign
from vllm_kvcrush.ops.triton.kernels.tokens import section, stored_positions

if TYPE_CHECKING:
    from vllm_kvcrush.ops.triton.cache import Layer, Source


# -- keys and values of tokens ---------------------------------------------------------------------


@triton.jit
def _weight(pool, page, index, mask, ROW: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    """float32 [T], row ROW of a page's weights."""
    AT: tl.constexpr = section(G, CODEC.name)
    at = page * (G.page_bytes // 2) + AT.weights // 2 + ROW * AT.capacity + index
    return tl.load(pool.half + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _key_plane(w, pool, page, index, mask, S: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    """Plane S of keys whose `columns` are `w`: float32 [T, C]. page: int64 [T]."""
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    RANK: tl.constexpr = CODEC.own.rank
    C: tl.constexpr = G.k_pad // 4
    SIZE: tl.constexpr = G.k_size
    N: tl.constexpr = SIZE // CODEC.own.per_single
    top: tl.constexpr = (1 << BITS) - 1
    some = mask[:, None]
    at = page * (G.page_bytes // 2)
    shared = (at + AT.shared // 2)[:, None]
    scale = channel_plane(pool.half, shared, some, S, SIZE, C)
    x = channel_plane(pool.half, shared + SIZE, some, S, SIZE, C)
    x += 0.5 * (plane(w, S, BITS, tl.float32, False) + top) * scale
    for r in tl.static_range(RANK):
        factor = channel_plane(pool.half, shared + (2 + r) * SIZE, some, S, SIZE, C)
        x += _weight(pool, page, index, mask, r, CODEC, G)[:, None] * factor
    channel = (tl.arange(0, C) * 4 + S)[None, :]
    at += AT.singles // 2 + index // 16 * (2 * N)
    for i in range(N):
        place = tl.load(pool.words + at + i, mask=mask, other=0).to(tl.int32)
        rest = tl.load(pool.half + at + N + i, mask=mask, other=0.0).to(tl.float32)
        rest = tl.where(index % 16 == place // 256, rest, 0.0)
        x += tl.where(channel == (place % 256)[:, None], rest[:, None], 0.0)
    return x


@triton.jit
def _expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    w = columns(pool, page, index, mask, AT.k, AT.k_high, BITS, G.k_size, G.k_pad // 4, G)
    a = _key_plane(w, pool, page, index, mask, 0, CODEC, G)
    b = _key_plane(w, pool, page, index, mask, 1, CODEC, G)
    c = _key_plane(w, pool, page, index, mask, 2, CODEC, G)
    d = _key_plane(w, pool, page, index, mask, 3, CODEC, G)
    return (interleave(a, b, c, d, T, G.k_pad // 4),)


@triton.jit
def _value_plane(
    w, scale, pool, page, index, mask, S: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    """Plane S of rotated values: float32 [T, C]. page: int64 [T]; scale: [T, 1]."""
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    RANK: tl.constexpr = CODEC.own.rank
    C: tl.constexpr = G.v_pad // 4
    x = plane(w, S, BITS, tl.float32, False) * (0.5 * scale)
    at = page * (G.page_bytes // 2) + AT.shared // 2 + (2 + RANK) * G.k_size
    for r in tl.static_range(RANK):
        factor = (at + r * G.v_size)[:, None]
        factor = channel_plane(pool.half, factor, mask[:, None], S, G.v_size, C)
        x += _weight(pool, page, index, mask, RANK + r, CODEC, G)[:, None] * factor
    return x


@triton.jit
def _expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    C: tl.constexpr = G.v_pad // 4
    w = columns(pool, page, index, mask, AT.v, AT.v_high, BITS, G.v_size, C, G)
    at = page * (G.page_bytes // 2) + AT.v_scale // 2 + index
    scale = tl.load(pool.half + at, mask=mask, other=0.0).to(tl.float32)[:, None]
    a = _value_plane(w, scale, pool, page, index, mask, 0, CODEC, G)
    b = _value_plane(w, scale, pool, page, index, mask, 1, CODEC, G)
    c = _value_plane(w, scale, pool, page, index, mask, 2, CODEC, G)
    d = _value_plane(w, scale, pool, page, index, mask, 3, CODEC, G)
    a, b, c, d = planes_hadamard(a, b, c, d, T, C, G.rotation)
    a *= plane_signs(0, G)[None, :]
    b *= plane_signs(1, G)[None, :]
    c *= plane_signs(2, G)[None, :]
    d *= plane_signs(3, G)[None, :]
    return interleave(a, b, c, d, T, C)


@triton.jit
def _positions(pool, tables, page, index, mask, codec, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    return stored_positions(pool, page, index, mask, AT.positions, G)


# -- tiles -----------------------------------------------------------------------------------------


@triton.jit
def _query(rows, tables, CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    return query_planes(rows, G, DTYPE)


@triton.jit
def _prepare(
    q, pool, tables, page, first, n, scale, T: tl.constexpr, VALUES: tl.constexpr,
    CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    steps = token_scales(pool.half, page, first, n, AT.v_scale, T, G)
    return tl.arange(0, T) < n, (steps,)


@triton.jit
def _scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    t = tl.arange(0, T)
    pages = tl.zeros([T], tl.int64) + page
    k = columns(pool, page, first + t, t < n, AT.k, AT.k_high, BITS, G.k_size, G.k_pad // 4, G)
    logits = tl.zeros([M, T], tl.float32)
    for s in tl.static_range(4):
        x = _key_plane(k, pool, pages, first + t, t < n, s, CODEC, G).to(DTYPE)
        logits = dot(q[s], tl.trans(x), logits)
    return logits * scale


@triton.jit
def _add_values(
    acc, weights, sums, factor, v, pool, page, there, S: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    RANK: tl.constexpr = CODEC.own.rank
    acc = acc * factor[:, None]
    at = page * (G.page_bytes // 2) + AT.shared // 2 + (2 + RANK) * G.k_size
    for r in tl.static_range(RANK):
        own = channel_plane(pool.half, at + r * G.v_size, there, S, G.v_size, G.v_pad // 4)
        acc += sums[r][:, None] * own[None, :]
    return dot(weights, plane(v, S, BITS, DTYPE, PTX), acc)


@triton.jit
def _weighted(weights, pool, page, index, mask, CODEC: tl.constexpr, G: tl.constexpr):
    """For each factor of values, 8 times the sum of attention's weights times the tokens': a tuple
    of float32 [M]."""
    RANK: tl.constexpr = CODEC.own.rank
    sums = ()
    for r in tl.static_range(RANK):
        own = _weight(pool, page, index, mask, RANK + r, CODEC, G)
        sums = sums + (8.0 * tl.sum(weights * own[None, :], 1),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def _values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    t = tl.arange(0, T)
    v = columns(pool, page, first + t, t < n, AT.v, AT.v_high, BITS, G.v_size, G.v_pad // 4, G)
    sums = _weighted(weights, pool, page, first + t, t < n, CODEC, G)
    # Half steps of scale / 2, times 8: see int4.
    w = (weights * (4.0 * tile[0])[None, :]).to(DTYPE)
    a0 = _add_values(acc[0], w, sums, factor, v, pool, page, n > 0, 0, CODEC, G, DTYPE, PTX)
    a1 = _add_values(acc[1], w, sums, factor, v, pool, page, n > 0, 1, CODEC, G, DTYPE, PTX)
    a2 = _add_values(acc[2], w, sums, factor, v, pool, page, n > 0, 2, CODEC, G, DTYPE, PTX)
    a3 = _add_values(acc[3], w, sums, factor, v, pool, page, n > 0, 3, CODEC, G, DTYPE, PTX)
    return a0, a1, a2, a3


# -- encoding --------------------------------------------------------------------------------------


@triton.jit
def _less_product(
    x, pool, page, index, mask, FIRST: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Rows [T, PAD] less the product whose factors begin at number FIRST of what tokens share."""
    AT: tl.constexpr = section(G, CODEC.name)
    RANK: tl.constexpr = CODEC.own.rank
    c = tl.arange(0, PAD)
    shared = pool.half + page * (G.page_bytes // 2) + AT.shared // 2 + FIRST
    for r in tl.static_range(RANK):
        factor = tl.load(shared + r * SIZE + c, mask=c < SIZE, other=0.0).to(tl.float32)
        x -= _weight(pool, page, index, mask, ROW + r, CODEC, G)[:, None] * factor[None, :]
    return x


@triton.jit
def _encode_keys(
    x, pool, page, group, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    SIZE: tl.constexpr = G.k_size
    N: tl.constexpr = SIZE // CODEC.own.per_single
    t, c = tl.arange(0, T), tl.arange(0, G.k_pad)
    mask = t < n
    half_page = page * (G.page_bytes // 2)
    x = _less_product(x, pool, page, start + t, mask, 2 * SIZE, 0, SIZE, G.k_pad, CODEC, G)
    shared = pool.half + half_page + AT.shared // 2 + c
    scale = tl.load(shared, mask=c < SIZE, other=0.0).to(tl.float32)
    zero = tl.load(shared + SIZE, mask=c < SIZE, other=0.0).to(tl.float32)
    top: tl.constexpr = (1 << BITS) - 1
    levels = (x - zero[None, :]) * inverse(scale)[None, :]
    levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 1.0 * top))
    store_columns(
        levels, pool, page, start + t, mask, AT.k, AT.k_high, BITS, SIZE, T, G.k_pad // 4, G
    )
    rest = x - zero[None, :] - levels * scale[None, :]
    token_at = half_page + AT.singles // 2 + (start + t) // 16 * (2 * N)
    strip = tl.arange(0, T // 16)
    strip_at = half_page + AT.singles // 2 + (start // 16 + strip) * (2 * N)
    for i in range(N):
        place = tl.load(pool.words + token_at + i, mask=mask, other=0).to(tl.int32)
        here = mask & (t % 16 == place // 256)
        own = tl.where(here[:, None] & (c[None, :] == (place % 256)[:, None]), rest, 0.0)
        own = tl.sum(tl.reshape(tl.sum(own, 1), [T // 16, 16]), 1)
        tl.store(pool.half + strip_at + N + i, to_half(own).to(tl.float16), mask=16 * strip < n)


@triton.jit
def _encode_values(x, pool, page, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    BITS: tl.constexpr = CODEC.own.bits
    RANK: tl.constexpr = CODEC.own.rank
    SIZE: tl.constexpr = G.v_size
    FIRST: tl.constexpr = (2 + RANK) * G.k_size
    t, c = tl.arange(0, T), tl.arange(0, G.v_pad)
    mask = t < n
    y = rotate(x * rotation_sign(c)[None, :], T, G.v_pad, G.rotation)
    y = _less_product(y, pool, page, start + t, mask, FIRST, RANK, SIZE, G.v_pad, CODEC, G)
    levels, scale = fit_tokens(y, T, SIZE, G.v_pad, BITS)
    store_columns(
        levels, pool, page, start + t, mask, AT.v, AT.v_high, BITS, SIZE, T, G.v_pad // 4, G
    )
    at = pool.half + page * (G.page_bytes // 2) + AT.v_scale // 2 + start + t
    tl.store(at, scale.to(tl.float16), mask=mask)


# -- what the tokens of a page share ---------------------------------------------------------------


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def _directions(rest: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the main directions of rows [entries, n, D], [entries, rank, D], and how much of them
    each row has, [entries, n, rank]: as `codecs.chunk` finds them."""
    found, along = [], []
    for _ in range(GEAR.rank):
        one = signs(rest.shape[2]).to(rest).expand(len(rest), -1)[..., None]
        for _ in range(LOOPS):
            one = rest.mT @ (rest @ one)
            length = one.norm(dim=1, keepdim=True)
            usual = (length > 1e-30) & (length < 1e30)
            one = torch.where(usual, one / length, 0.0)
        found.append(one[..., 0])
        along.append(rest @ one)
        rest = rest - along[-1] * one.mT
    return torch.stack(found, 1), torch.cat(along, 2)


def _grids(rest: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scales and zeros [entries, D] of the key channels of rows [entries, n, D], where
    `there` [entries, n, 1], and the places of the single channels, int16 [entries, strips, N]."""
    entries, _, size = rest.shape
    count = there.sum(1).clamp(min=1)
    mean = (rest * there).sum(1) / count
    spread = torch.where(there, rest - mean[:, None], 0.0).square().sum(1) / count
    constant = spread <= 1e-12 * mean.square() + 1e-30
    far = (rest - mean[:, None]).abs() / spread.sqrt().masked_fill(constant, torch.inf)[:, None]
    far = far.masked_fill(~there, -1).reshape(entries, -1, STRIP * size)
    places = far.argsort(dim=2, descending=True, stable=True)[..., : size // GEAR.per_single]
    apart = torch.zeros_like(far, dtype=torch.bool).scatter_(2, places, True).view(rest.shape)
    gone = apart | ~there
    low = rest.masked_fill(gone, torch.inf).amin(1)
    high = rest.masked_fill(gone, -torch.inf).amax(1)
    low, high = (torch.where(gone.all(1), mean, end) for end in (low, high))
    zero = _half(low)
    scale = ((high - zero) / (2**GEAR.bits - 1)).clamp(min=0)
    return scale, zero, (places // size * 256 + places % size).to(torch.int16)


def _share(layer: Layer, codec: Traits, target: Source, key: Tensor, value: Tensor) -> None:
    """Writes what the tokens of each page share, and weights and places, before they are
    encoded. Nothing waits for the device."""
    at, count = layer.geometry.section("gear"), key.shape[1]
    most = -(-min(at.capacity, count) // STRIP) * STRIP
    row = torch.arange(most, device=key.device)
    there = (row < target.count.unsqueeze(1)).unsqueeze(2)
    index = (target.first.unsqueeze(1) + row).clamp(max=count - 1).long()
    head = target.head.long().unsqueeze(1)
    own = ((target.codec == codec.number) & (target.count > 0)).unsqueeze(1)
    page, width = target.page.long(), layer.geometry.page_bytes // 2

    def put(pool: Tensor, start: int, x: Tensor) -> None:
        part = pool.view(-1, width)[:, start // 2 : start // 2 + x.shape[1]]
        part[page] = torch.where(own, x.to(pool.dtype), part[page])

    k, v = key[head, index] * there, value[head, index] * there
    mean = k.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    k_factor, k_weight = _directions((k - mean) * there)
    v_factor, v_weight = _directions(v)
    v_factor = v_factor @ rotation(layer.v_size).T.to(v)
    rest = k - _half(k_weight) @ _half(k_factor)
    scale, zero, places = _grids(rest, there)
    shared = [scale, zero, k_factor.flatten(1), v_factor.flatten(1)]
    put(layer.half, at.shared, torch.cat(shared, 1).clamp(-HALF_MAX, HALF_MAX))
    both = torch.cat([k_weight, v_weight], 2).mT.clamp(-HALF_MAX, HALF_MAX)
    put(layer.half, at.weights, F.pad(both, (0, at.capacity - most)).flatten(1))
    # Rests come with the codes.
    put(layer.words, at.singles, F.pad(places, (0, places.shape[2])).flatten(1))


TRAITS = Traits(
    name="gear",
    pages=("gear",),
    expand_keys=_expand_keys,
    expand_values=_expand_values,
    positions=_positions,
    encode_keys=_encode_keys,
    encode_values=_encode_values,
    share=_share,
    query=_query,
    prepare=_prepare,
    scores=_scores,
    values=_values,
    loops=((page_loop, 4, True),),
    own=GEAR,
)
