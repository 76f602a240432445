"""int8: one scale per token and side.

    | K codes     | V codes     | K scales | V scales | positions |     | header |
    | cap x k_size| cap x v_size| cap f16  | cap f16  | cap u16   |     | 32 B   |

Codes are those of csrc/layout.h, in -127..127. Kernels read words of 16 bits: word i of a row holds
channels 2i (low byte) and 2i + 1, and plane s is the channels 2i + s.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.kernels import tokens
from vllm_kvcrush.ops.triton.kernels.encoding import inverse, rounded, to_half
from vllm_kvcrush.ops.triton.kernels.pages import code_words, page_loop, query_pairs, token_scales
from vllm_kvcrush.ops.triton.kernels.tiles import codes8, dot
from vllm_kvcrush.ops.triton.kernels.tokens import section, stored_positions

# -- tiles -----------------------------------------------------------------------------------------


@triton.jit
def _query(rows, tables, CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    return query_pairs(rows, G, DTYPE)


@triton.jit
def _prepare(
    q, pool, tables, page, first, n, scale, T: tl.constexpr, VALUES: tl.constexpr,
    CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    k_steps = token_scales(pool.half, page, first, n, AT.k_scale, T, G) * scale
    v_steps = token_scales(pool.half, page, first, n, AT.v_scale, T, G)
    return tl.arange(0, T) < n, (k_steps, v_steps)


@triton.jit
def _scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    k = code_words(pool.words, page, first, n, AT.k, G.k_size // 2, G.k_pad // 2, T, G)
    logits = dot(q[0], tl.trans(codes8(k, 0, DTYPE, PTX)), tl.zeros([M, T], tl.float32))
    logits = dot(q[1], tl.trans(codes8(k, 1, DTYPE, PTX)), logits)
    return logits * tile[0][None, :]


@triton.jit
def _values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    v = code_words(pool.words, page, first, n, AT.v, G.v_size // 2, G.v_pad // 2, T, G)
    # Times 128: about the largest value, so that what is rounded to float16 is as far from its
    # least number as a raw page's weights are.
    weights = (weights * (128.0 * tile[1])[None, :]).to(DTYPE)
    a0 = dot(weights, codes8(v, 0, DTYPE, PTX), acc[0] * factor[:, None])
    a1 = dot(weights, codes8(v, 1, DTYPE, PTX), acc[1] * factor[:, None])
    return a0, a1


# -- single tokens ---------------------------------------------------------------------------------


@triton.jit
def _codes(
    pool, page, index, mask, OFFSET: tl.constexpr, SCALES: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    w = tokens.code_words(pool.words, page, index, mask, OFFSET, SIZE // 2, PAD // 2, G)
    scale = tokens.token_scales(pool.half, page, index, mask, SCALES, G)
    even = codes8(w, 0, tl.float32, False) * scale
    odd = codes8(w, 1, tl.float32, False) * scale
    return tl.reshape(tl.join(even, odd), [T, PAD])


@triton.jit
def _expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    AT: tl.constexpr = section(G, CODEC.name)
    return (_codes(pool, page, index, mask, AT.k, AT.k_scale, G.k_size, G.k_pad, T, G),)


@triton.jit
def _expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    return _codes(pool, page, index, mask, AT.v, AT.v_scale, G.v_size, G.v_pad, T, G)


@triton.jit
def _positions(pool, tables, page, index, mask, codec, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    return stored_positions(pool, page, index, mask, AT.positions, G)


# -- encoding --------------------------------------------------------------------------------------


@triton.jit
def _encode(
    x, pool, page, start, n, OFFSET: tl.constexpr, SCALES: tl.constexpr, T: tl.constexpr,
    SIZE: tl.constexpr, PAD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    t, c = tl.arange(0, T), tl.arange(0, PAD)[None, :]
    scale = to_half(tl.max(tl.abs(x), 1) / 127.0)
    levels = tl.minimum(tl.maximum(x * inverse(scale)[:, None], -127.0), 127.0)
    at = pool.codes + (page * G.page_bytes + OFFSET + start * SIZE) + t[:, None] * SIZE + c
    mask = (t < n)[:, None] & (c < SIZE)
    tl.store(at, rounded(levels).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    at = pool.half + (page * (G.page_bytes // 2) + SCALES // 2 + start) + t
    tl.store(at, scale.to(tl.float16), mask=t < n)


@triton.jit
def _encode_keys(
    x, pool, page, group, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    AT: tl.constexpr = section(G, CODEC.name)
    _encode(x, pool, page, start, n, AT.k, AT.k_scale, T, G.k_size, G.k_pad, G)


@triton.jit
def _encode_values(x, pool, page, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    _encode(x, pool, page, start, n, AT.v, AT.v_scale, T, G.v_size, G.v_pad, G)


TRAITS = Traits(
    name="int8",
    pages=("int8",),
    expand_keys=_expand_keys,
    expand_values=_expand_values,
    positions=_positions,
    encode_keys=_encode_keys,
    encode_values=_encode_values,
    query=_query,
    prepare=_prepare,
    scores=_scores,
    values=_values,
    loops=((page_loop, 2, True),),
)
