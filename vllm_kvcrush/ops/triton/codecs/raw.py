"""raw: pages in the model's dtype, as vLLM stores them; and exact ones, which know positions.

raw     [K row | V row] of token 0, of token 1, ...          what vLLM's own GPU backends store
        in a block-outermost cache (KVCacheLayout.BLHNC): one token of one head is k_size, then
        v_size elements of the model's dtype, the tokens of a (block, head) are one run
exact   the same for fewer tokens, then positions
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

import triton
import triton.language as tl

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.kernels.pages import page_loop, query_row, token_mask
from vllm_kvcrush.ops.triton.kernels.tiles import dot
from vllm_kvcrush.ops.triton.kernels.tokens import section, stored_positions

# -- tiles -----------------------------------------------------------------------------------------


@triton.jit
def tile_keys(raw, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """[T, k_pad] of the model's dtype."""
    row: tl.constexpr = G.k_size + G.v_size
    base = raw + page * (G.page_bytes // G.itemsize) + first * row
    at = tl.arange(0, T)[:, None] * row + tl.arange(0, G.k_pad)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, G.k_size, G.k_pad), other=0.0)


@triton.jit
def tile_values(raw, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """[T, v_pad] of the model's dtype."""
    row: tl.constexpr = G.k_size + G.v_size
    base = raw + page * (G.page_bytes // G.itemsize) + first * row + G.k_size
    at = tl.arange(0, T)[:, None] * row + tl.arange(0, G.v_pad)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, G.v_size, G.v_pad), other=0.0)


@triton.jit
def _query(rows, tables, CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    return query_row(rows, G, DTYPE)


@triton.jit
def _prepare(
    q, pool, tables, page, first, n, scale, T: tl.constexpr, VALUES: tl.constexpr,
    CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    return tl.arange(0, T) < n, (first,)


@triton.jit
def _scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    k = tile_keys(pool.raw, page, first, n, T, G)
    return dot(q, tl.trans(k), tl.zeros([M, T], tl.float32)) * scale


@triton.jit
def _values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    v = tile_values(pool.raw, page, first, n, T, G)
    return (dot(weights.to(DTYPE), v, acc[0] * factor[:, None]),)


# -- single tokens ---------------------------------------------------------------------------------


@triton.jit
def _reads(codec, CODEC: tl.constexpr):
    return codec <= CODEC.own  # the larger of the two numbers


@triton.jit
def _elements(
    raw, page, index, mask, OFFSET: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PAD)[None, :]
    row: tl.constexpr = G.k_size + G.v_size
    at = raw + (page * (G.page_bytes // G.itemsize) + index * row)[:, None] + OFFSET + c
    return tl.load(at, mask=mask[:, None] & (c < SIZE), other=0.0).to(tl.float32)


@triton.jit
def _expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    return (_elements(pool.raw, page, index, mask, 0, G.k_size, G.k_pad, G),)


@triton.jit
def _expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    return _elements(pool.raw, page, index, mask, G.k_size, G.v_size, G.v_pad, G)


@triton.jit
def _keeps_positions(codec, CODEC: tl.constexpr):
    return codec != CODEC.number


@triton.jit
def _positions(pool, tables, page, index, mask, codec, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.pages[-1])
    exact = _keeps_positions(codec, CODEC)
    where = stored_positions(pool, page, index, mask & exact, AT.positions, G)
    return tl.where(exact, where, -1)


# -- encoding --------------------------------------------------------------------------------------


@triton.jit
def _store_rows(
    x, raw, page, start, n, OFFSET: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    t, c = tl.arange(0, T), tl.arange(0, PAD)[None, :]
    row: tl.constexpr = G.k_size + G.v_size
    at = raw + page * (G.page_bytes // G.itemsize) + (start + t)[:, None] * row + OFFSET + c
    tl.store(at, x.to(raw.dtype.element_ty), mask=(t < n)[:, None] & (c < SIZE))


@triton.jit
def _encode_keys(
    x, pool, page, group, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    _store_rows(x, pool.raw, page, start, n, 0, G.k_size, G.k_pad, T, G)


@triton.jit
def _encode_values(x, pool, page, start, n, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr):
    _store_rows(x, pool.raw, page, start, n, G.k_size, G.v_size, G.v_pad, T, G)


TRAITS = Traits(
    name="raw",
    pages=("raw", "exact"),
    tail=True,
    reads=_reads,
    expand_keys=_expand_keys,
    expand_values=_expand_values,
    keeps_positions=_keeps_positions,
    positions=_positions,
    encode_keys=_encode_keys,
    encode_values=_encode_values,
    query=_query,
    prepare=_prepare,
    scores=_scores,
    values=_values,
    loops=((page_loop, 1, True),),
    own=CODECS["exact"].number,
)
