"""tada: rotated keys and values as they differ from the page's mean, with a scale a token and side.

    | K codes | V codes | K third bits | V third bits | means            | K scales | V scales |
    | columns | columns | of 3 bits    | of 3 bits    | k_size, v_size f16 | cap f16 | cap f16  |
    positions (cap u16), and the header

Codes are those of csrc/layout.h, in the columns of `kernels.columns`: R k = mean + scale (code -
middle) with the rotation R of k_size channels, and values likewise. A query is rotated once for all
pages; of a page's mean it gets one number for all of its tokens. Values are summed in the rotated
space, and a page's mean joins them with the sum of its tokens' weights.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcrush.codecs.layout import TADA
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.config import ANY_ADDRESS, gather_warps
from vllm_kvcrush.ops.triton.kernels import tokens
from vllm_kvcrush.ops.triton.kernels.columns import channel_plane, columns, plane, store_columns
from vllm_kvcrush.ops.triton.kernels.encoding import fit_tokens, rotate, to_half
from vllm_kvcrush.ops.triton.kernels.pages import page_loop, query_row, token_scales
from vllm_kvcrush.ops.triton.kernels.tiles import (
    deinterleave,
    dot,
    interleave,
    planes_hadamard,
    rotation_sign,
)
from vllm_kvcrush.ops.triton.kernels.tokens import section, stored_positions

if TYPE_CHECKING:
    from vllm_kvcrush.ops.triton.cache import Layer, Source


@triton.constexpr_function
def _block(size):
    return size & -size


# -- tiles -----------------------------------------------------------------------------------------


@triton.jit
def _query(rows, tables, CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """The rotated query's channels 4c + s for s = 0 .. 3: each DTYPE [M, k_pad / 4]."""
    M: tl.constexpr = rows.at.shape[0]
    q = query_row(rows, G, tl.float32) * rotation_sign(tl.arange(0, G.k_pad))[None, :]
    a, b, c, d = deinterleave(rotate(q, M, G.k_pad, _block(G.k_size)), M, G.k_pad // 4)
    return a.to(DTYPE), b.to(DTYPE), c.to(DTYPE), d.to(DTYPE)


@triton.jit
def _prepare(
    q, pool, tables, page, first, n, scale, T: tl.constexpr, VALUES: tl.constexpr,
    CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    k_steps = token_scales(pool.half, page, first, n, AT.k_scale, T, G) * (0.5 * scale)
    v_steps = token_scales(pool.half, page, first, n, AT.v_scale, T, G)
    return tl.arange(0, T) < n, (k_steps, v_steps)


@triton.jit
def _mean(
    pool, page, there, S: tl.constexpr, SIDE: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    """Plane S of a page's mean of keys (SIDE 0) or values (1): float32 [C]; 0 unless `there`: a
    page without tokens has none."""
    AT: tl.constexpr = section(G, CODEC.name)
    SIZE: tl.constexpr = G.v_size if SIDE else G.k_size
    PAD: tl.constexpr = G.v_pad if SIDE else G.k_pad
    at = page * (G.page_bytes // 2) + AT.shared // 2 + SIDE * G.k_size
    return channel_plane(pool.half, at, there, S, SIZE, PAD // 4)


@triton.jit
def _scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = CODEC.own.bits
    AT: tl.constexpr = section(G, CODEC.name)
    t = tl.arange(0, T)
    k = columns(pool, page, first + t, t < n, AT.k, AT.k_high, BITS, G.k_size, G.k_pad // 4, G)
    logits = tl.zeros([M, T], tl.float32)
    base = tl.zeros([M], tl.float32)
    for s in tl.static_range(4):
        logits = dot(q[s], tl.trans(plane(k, s, BITS, DTYPE, PTX)), logits)
        base += tl.sum(q[s].to(tl.float32) * _mean(pool, page, n > 0, s, 0, CODEC, G)[None, :], 1)
    return logits * tile[0][None, :] + (base * scale)[:, None]


@triton.jit
def _add_values(
    acc, weights, sums, factor, v, pool, page, there, S: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = CODEC.own.bits
    mean = _mean(pool, page, there, S, 1, CODEC, G)
    acc = acc * factor[:, None] + sums[:, None] * mean[None, :]
    return dot(weights, plane(v, S, BITS, DTYPE, PTX), acc)


@triton.jit
def _values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = CODEC.own.bits
    AT: tl.constexpr = section(G, CODEC.name)
    t = tl.arange(0, T)
    v = columns(pool, page, first + t, t < n, AT.v, AT.v_high, BITS, G.v_size, G.v_pad // 4, G)
    sums = 8.0 * tl.sum(weights, 1)
    # Half steps of scale / 2, times 8: see int4.
    w = (weights * (4.0 * tile[1])[None, :]).to(DTYPE)
    a0 = _add_values(acc[0], w, sums, factor, v, pool, page, n > 0, 0, CODEC, G, DTYPE, PTX)
    a1 = _add_values(acc[1], w, sums, factor, v, pool, page, n > 0, 1, CODEC, G, DTYPE, PTX)
    a2 = _add_values(acc[2], w, sums, factor, v, pool, page, n > 0, 2, CODEC, G, DTYPE, PTX)
    a3 = _add_values(acc[3], w, sums, factor, v, pool, page, n > 0, 3, CODEC, G, DTYPE, PTX)
    return a0, a1, a2, a3


# -- single tokens ---------------------------------------------------------------------------------


@triton.jit
def _token_plane(
    w, scale, pool, page, mask, S: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    at = (page * (G.page_bytes // 2) + OFFSET // 2)[:, None]
    mean = channel_plane(pool.half, at, mask[:, None], S, SIZE, C)
    return plane(w, S, BITS, tl.float32, False) * (0.5 * scale) + mean


@triton.jit
def _expand(
    pool, page, index, mask, CODES: tl.constexpr, HIGH: tl.constexpr, SCALES: tl.constexpr,
    MEAN: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    T: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One side of tokens, float32 [T, PAD]; what lies past SIZE means nothing."""
    C: tl.constexpr = PAD // 4
    w = columns(pool, page, index, mask, CODES, HIGH, BITS, SIZE, C, G)
    scale = tokens.token_scales(pool.half, page, index, mask, SCALES, G)
    a = _token_plane(w, scale, pool, page, mask, 0, MEAN, SIZE, C, BITS, G)
    b = _token_plane(w, scale, pool, page, mask, 1, MEAN, SIZE, C, BITS, G)
    c = _token_plane(w, scale, pool, page, mask, 2, MEAN, SIZE, C, BITS, G)
    d = _token_plane(w, scale, pool, page, mask, 3, MEAN, SIZE, C, BITS, G)
    a, b, c, d = planes_hadamard(a, b, c, d, T, C, BLOCK)
    return interleave(a, b, c, d, T, C) * rotation_sign(tl.arange(0, PAD))[None, :]


@triton.jit
def _expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    return (
        _expand(
            pool, page, index, mask, AT.k, AT.k_high, AT.k_scale, AT.shared, G.k_size, G.k_pad,
            _block(G.k_size), T, CODEC.own.bits, G,
        ),
    )  # fmt: skip


@triton.jit
def _expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    return _expand(
        pool, page, index, mask, AT.v, AT.v_high, AT.v_scale, AT.shared + 2 * G.k_size, G.v_size,
        G.v_pad, G.rotation, T, CODEC.own.bits, G,
    )  # fmt: skip


@triton.jit
def _positions(pool, tables, page, index, mask, codec, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    return stored_positions(pool, page, index, mask, AT.positions, G)


# -- encoding --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=ANY_ADDRESS)
def _means_kernel(
    x, raw, grid, half, words, wide, codes, heads, pages, counts, codecs, firsts, count,
    SIDE: tl.constexpr, CODEC: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Stores the rotated mean of the rows that each entry of CODEC will hold, of float32 x [heads,
    count, size]. Grid (entries,)."""
    entry = tl.program_id(0)
    n = tl.load(counts + entry)
    if (n == 0) | (CODEC.reads(tl.load(codecs + entry), CODEC) == 0):
        return
    AT: tl.constexpr = section(G, CODEC.name)
    SIZE: tl.constexpr = G.v_size if SIDE else G.k_size
    PAD: tl.constexpr = G.v_pad if SIDE else G.k_pad
    page = tl.load(pages + entry).to(tl.int64)
    first = tl.load(heads + entry).to(tl.int64) * count + tl.load(firsts + entry)
    c = tl.arange(0, PAD)
    sums = tl.zeros([PAD], tl.float32)
    for start in range(0, n, T):
        t = start + tl.arange(0, T)
        inside = (t < n)[:, None] & (c < SIZE)[None, :]
        at = x + (first + t)[:, None] * SIZE + c[None, :]
        sums += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
    mean = (sums / n * rotation_sign(c))[None, :]
    mean = to_half(tl.reshape(rotate(mean, 1, PAD, _block(SIZE)), [PAD]))
    at = half + page * (G.page_bytes // 2) + AT.shared // 2 + SIDE * G.k_size + c
    tl.store(at, mean.to(tl.float16), mask=c < SIZE)


@triton.jit
def _encode(
    x, pool, page, start, n, CODES: tl.constexpr, HIGH: tl.constexpr, SCALES: tl.constexpr,
    MEAN: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    T: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    t, c = tl.arange(0, T), tl.arange(0, PAD)
    at = pool.half + page * (G.page_bytes // 2)
    mean = tl.load(at + MEAN // 2 + c, mask=c < SIZE, other=0.0).to(tl.float32)
    y = rotate(x * rotation_sign(c)[None, :], T, PAD, BLOCK) - mean[None, :]
    levels, scale = fit_tokens(y, T, SIZE, PAD, BITS)
    store_columns(levels, pool, page, start + t, t < n, CODES, HIGH, BITS, SIZE, T, PAD // 4, G)
    tl.store(at + SCALES // 2 + start + t, scale.to(tl.float16), mask=t < n)


@triton.jit
def _encode_keys(
    x, pool, page, group, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    _encode(
        x, pool, page, start, n, AT.k, AT.k_high, AT.k_scale, AT.shared, G.k_size, G.k_pad,
        _block(G.k_size), T, CODEC.own.bits, G,
    )  # fmt: skip


@triton.jit
def _encode_values(x, pool, page, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    _encode(
        x, pool, page, start, n, AT.v, AT.v_high, AT.v_scale, AT.shared + 2 * G.k_size, G.v_size,
        G.v_pad, G.rotation, T, CODEC.own.bits, G,
    )  # fmt: skip


def _share(layer: Layer, codec: Traits, target: Source, key: Tensor, value: Tensor) -> None:
    """Writes what the tokens of each page share, before they are encoded."""
    geometry = layer.geometry
    for side, x in enumerate((key, value)):
        _means_kernel[(len(target.page),)](
            x, *layer.views(),
            target.head, target.page, target.count, target.codec, target.first, key.shape[1],
            SIDE=side, CODEC=codec, T=32, G=geometry,
            num_warps=gather_warps(geometry.k_pad, geometry.v_pad),
        )  # fmt: skip


TRAITS = Traits(
    name="tada",
    pages=("tada",),
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
    own=TADA,
)
