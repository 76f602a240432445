"""int4: keys with a grid per channel and 64 tokens, values rotated, with a scale per token.

    | K codes       | V codes       | V scales | K grids | positions |  | header |
    | cap x k_size/2| cap x v_size/2| cap f16  | below   | cap u16   |  | 32 B   |
    K grids: half scales of group 0, of group 1, ..., then middles; k_size x 2 B each

Codes are those of csrc/layout.h: keys are zero + scale * code per channel and group of 64 tokens,
code in 0..15; values are rotated (R = Hadamard blocks times signs), R v = scale * (code - 7.5) with
one scale per token. Keys are read as middle + half scale * (2 code - 15), so scale / 2 and zero +
7.5 scale are what is stored, in bfloat16 for bfloat16 models and float16 for others: no conversion
in the loop.

Kernels read words of 16 bits, whose codes are unpacked as planes: word i of a row holds channels 4i
(lowest bits) to 4i + 3, and plane s is the channels 4i + s. One shift and a few logical and float
operations turn two words into two 16-bit floats. A group's half scales (and middles) are stored
plane by plane. A Hadamard transform over 2^n channels is one of 4 between the planes and one of
2^(n-2) within each.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

import triton
import triton.language as tl

from vllm_kvcrush.codecs.layout import GROUP
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.config import tile_tokens
from vllm_kvcrush.ops.triton.kernels import tokens
from vllm_kvcrush.ops.triton.kernels.encoding import (
    HALF_MAX,
    fit_tokens,
    inverse,
    rotate,
    rounded,
    to_half,
)
from vllm_kvcrush.ops.triton.kernels.pages import (
    code_words,
    page_loop,
    plane_signs,
    query_planes,
    token_scales,
)
from vllm_kvcrush.ops.triton.kernels.tiles import (
    dot,
    grid_plane,
    half_steps,
    interleave,
    planes_hadamard,
    rotation_sign,
)
from vllm_kvcrush.ops.triton.kernels.tokens import section, stored_positions


def _tile(capacity: int, most: int) -> int:
    # A tile has the grids of one group.
    return min(tile_tokens(capacity, most), GROUP)


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
    # Two bytes a token are no asynchronous copy: asked for early, they arrive in time.
    steps = token_scales(pool.half, page, first, n, AT.v_scale, T, G)
    return tl.arange(0, T) < n, (steps,)


@triton.jit
def _key_plane(
    w, pool, page, first, S: tl.constexpr, AT: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Plane S of the keys in `w`: DTYPE [T, k_pad / 4]."""
    row: tl.constexpr = G.k_size // 4
    c = tl.arange(0, G.k_pad // 4)
    base = pool.grid + page * (G.page_bytes // 2) + first // 64 * G.k_size + S * row
    half_scale = tl.load(base + AT.k_scale // 2 + c, mask=c < row, other=0.0)
    middle = tl.load(base + AT.k_middle // 2 + c, mask=c < row, other=0.0)
    return grid_plane(w, half_scale, middle, S, DTYPE, PTX)


@triton.jit
def _scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    k = code_words(pool.words, page, first, n, AT.k, G.k_size // 4, G.k_pad // 4, T, G)
    logits = tl.zeros([M, T], tl.float32)
    logits = dot(q[0], tl.trans(_key_plane(k, pool, page, first, 0, AT, G, DTYPE, PTX)), logits)
    logits = dot(q[1], tl.trans(_key_plane(k, pool, page, first, 1, AT, G, DTYPE, PTX)), logits)
    logits = dot(q[2], tl.trans(_key_plane(k, pool, page, first, 2, AT, G, DTYPE, PTX)), logits)
    logits = dot(q[3], tl.trans(_key_plane(k, pool, page, first, 3, AT, G, DTYPE, PTX)), logits)
    return logits * scale


@triton.jit
def _values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    v = code_words(pool.words, page, first, n, AT.v, G.v_size // 4, G.v_pad // 4, T, G)
    # Half steps of scale / 2, times 8: about the largest value, so that what is rounded to float16
    # is as far from its least number as a raw page's weights are.
    weights = (weights * (4.0 * tile[0])[None, :]).to(DTYPE)
    a0 = dot(weights, half_steps(v, 0, DTYPE, PTX), acc[0] * factor[:, None])
    a1 = dot(weights, half_steps(v, 1, DTYPE, PTX), acc[1] * factor[:, None])
    a2 = dot(weights, half_steps(v, 2, DTYPE, PTX), acc[2] * factor[:, None])
    a3 = dot(weights, half_steps(v, 3, DTYPE, PTX), acc[3] * factor[:, None])
    return a0, a1, a2, a3


# -- single tokens ---------------------------------------------------------------------------------


@triton.jit
def _token_plane(w, pool, page, index, mask, S: tl.constexpr, AT: tl.constexpr, G: tl.constexpr):
    """Plane S of the keys in words [T, k_pad / 4]: float32."""
    row: tl.constexpr = G.k_size // 4
    c = tl.arange(0, G.k_pad // 4)[None, :]
    at = page * (G.page_bytes // 2) + index // 64 * G.k_size + S * row
    at = pool.grid + at[:, None] + AT.k_scale // 2 + c
    inside = mask[:, None] & (c < row)
    steps = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at += (AT.k_middle - AT.k_scale) // 2
    middle = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return half_steps(w, S, tl.float32, False) * steps + middle


@triton.jit
def _expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    w = tokens.code_words(pool.words, page, index, mask, AT.k, G.k_size // 4, G.k_pad // 4, G)
    a = _token_plane(w, pool, page, index, mask, 0, AT, G)
    b = _token_plane(w, pool, page, index, mask, 1, AT, G)
    c = _token_plane(w, pool, page, index, mask, 2, AT, G)
    d = _token_plane(w, pool, page, index, mask, 3, AT, G)
    return (interleave(a, b, c, d, T, G.k_pad // 4),)


@triton.jit
def _expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    C: tl.constexpr = G.v_pad // 4
    w = tokens.code_words(pool.words, page, index, mask, AT.v, G.v_size // 4, C, G)
    # Half steps; and past v_size, where words are zero, there is nothing to rotate back.
    scale = 0.5 * tokens.token_scales(pool.half, page, index, mask, AT.v_scale, G)
    a = half_steps(w, 0, tl.float32, False) * scale
    b = half_steps(w, 1, tl.float32, False) * scale
    c = half_steps(w, 2, tl.float32, False) * scale
    d = half_steps(w, 3, tl.float32, False) * scale
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


# -- encoding --------------------------------------------------------------------------------------


@triton.jit
def _pack(codes, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Codes 0..15, float32 [ROWS, SIZE], as bytes [ROWS, SIZE / 2]."""
    low, high = tl.split(tl.reshape(codes.to(tl.uint8), [ROWS, SIZE // 2, 2]))
    return low | (high << 4)


@triton.jit
def _encode_keys(
    x, pool, page, group, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    t, c = tl.arange(0, T), tl.arange(0, G.k_pad)
    least = tl.min(tl.where((t < n)[:, None], x, float("inf")), 0)
    most = tl.max(tl.where((t < n)[:, None], x, float("-inf")), 0)
    zero = to_half(least)
    scale = to_half((most - zero) / 15.0)
    levels = (x - zero[None, :]) * inverse(scale)[None, :]
    levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 15.0))
    b = tl.arange(0, G.k_pad // 2)[None, :]
    row: tl.constexpr = G.k_size // 2
    at = pool.codes + page * G.page_bytes + AT.k + (group * T + t)[:, None] * row + b
    tl.store(at, _pack(levels, T, G.k_pad), mask=(t < n)[:, None] & (b < row))
    at = page * (G.page_bytes // 2) + group * G.k_size + c % 4 * (G.k_size // 4) + c // 4
    kind = pool.grid.dtype.element_ty
    tl.store(pool.grid + at + AT.k_scale // 2, (0.5 * scale).to(kind), mask=c < G.k_size)
    middle = tl.minimum(tl.maximum(zero + 7.5 * scale, -HALF_MAX), HALF_MAX)
    tl.store(pool.grid + at + AT.k_middle // 2, middle.to(kind), mask=c < G.k_size)


@triton.jit
def _encode_values(x, pool, page, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    t, c = tl.arange(0, T), tl.arange(0, G.v_pad)
    y = rotate(x * rotation_sign(c)[None, :], T, G.v_pad, G.rotation)
    levels, scale = fit_tokens(y, T, G.v_size, G.v_pad, 4)
    b = tl.arange(0, G.v_pad // 2)[None, :]
    row: tl.constexpr = G.v_size // 2
    at = pool.codes + page * G.page_bytes + AT.v + (start + t)[:, None] * row + b
    tl.store(at, _pack(levels, T, G.v_pad), mask=(t < n)[:, None] & (b < row))
    at = pool.half + page * (G.page_bytes // 2) + AT.v_scale // 2 + start + t
    tl.store(at, scale.to(tl.float16), mask=t < n)


TRAITS = Traits(
    name="int4",
    pages=("int4",),
    tile=_tile,
    expand_keys=_expand_keys,
    expand_values=_expand_values,
    positions=_positions,
    encode_keys=_encode_keys,
    encode_values=_encode_values,
    query=_query,
    prepare=_prepare,
    scores=_scores,
    values=_values,
    loops=((page_loop, 4, True),),
)
