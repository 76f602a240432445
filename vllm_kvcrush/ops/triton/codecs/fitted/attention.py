"""Attention over fitted pages: those functions of a `codecs.traits.Traits`, and a loop over the
exceptions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.fitted import tiles
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import CAPACITY, EXCEPTIONS, ROW, V_BITS, WORDS
from vllm_kvcrush.ops.triton.kernels.pages import entry_at, query_pairs
from vllm_kvcrush.ops.triton.kernels.tiles import LOG2E, codes8, dot, softmax_step
from vllm_kvcrush.ops.triton.kernels.views import Tables


@triton.jit
def head(tables, head, CODEC: tl.constexpr, G: tl.constexpr):
    """A head's rows of its codec's tables."""
    own = head + CODEC.own.place * CODEC.own.kv_heads
    return Tables(
        tables.info + own * ROW, tables.fields, tables.inverse, tables.base + own * (4 * G.half),
        tables.coarse, tables.fine, tables.limit,
    )  # fmt: skip


@triton.jit
def serves(tables, CODEC: tl.constexpr):
    """Whether the head's values have the variant's bits."""
    alone: tl.constexpr = not CODEC.own.shared
    mine = alone
    if CODEC.own.shared:
        mine = tl.load(tables.info + V_BITS) == CODEC.own.bits
    return mine


@triton.jit
def capacity(tables, CODEC: tl.constexpr, G: tl.constexpr):
    """Tokens of the head's pages."""
    return tl.load(tables.info + CAPACITY)


@triton.jit
def query(rows, tables, CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query in the order of `fitted_keys`, DTYPE [M, 2 H], and words of a token's key."""
    column = tl.arange(0, 2 * G.half)
    at = rows.query + rows.at[:, None] + (column // 2 + column % 2 * (G.k_size // 2))[None, :]
    inside = rows.mask[:, None] & (column < G.k_size)[None, :]
    q = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    return q, tl.load(tables.info + WORDS)


@triton.jit
def prepare(
    q, pool, tables, page, first, n, scale, T: tl.constexpr, VALUES: tl.constexpr,
    CODEC: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Exceptions do not count here. The tile: keys float32 [T, 2 H]; value bytes and words."""
    info = tables.info
    t, c = tl.arange(0, T), tl.arange(0, G.half)
    mask = t < n
    plain = mask & (tiles.exceptional(pool.words, page, first + t, mask, info, G) == 0)
    byte = plain
    v = plain
    if VALUES:
        byte = tiles.value_bytes(pool.codes, page, first + t, mask, info, G)
        v = tiles.value_words(
            pool.words, pool.codes, page, first + t, mask, info, CODEC.own.bits, G
        )
    rows = pool.wide + page * (G.page_bytes // 4) + (first + t) * q[1]
    k = tiles.fitted_keys(
        rows, mask, info, tables.fields, tables.inverse, tables.base, T, 0, G, DTYPE
    )
    if CODEC.own.local:
        strip = first // 16 + tl.arange(0, T // 16)
        position = tiles.strip_positions(
            pool.words, pool.wide, page, strip, 16 * strip < first + n, info, G
        )
        cos, sin = tiles.angles(position, c, tables.coarse, tables.fine, tables.limit, G)
        low, high = tiles.halves(k, T, G)
        low, high = tiles.turn(low, high, cos, sin, T, T // 16, G.half)
        k = tl.reshape(tl.join(low, high), [T, 2 * G.half])
    return plain, (k, byte, v)


@triton.jit
def scores(
    q, tile, pool, page, first, n, scale, M: tl.constexpr, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """See `Traits`, as for all of these."""
    return dot(q[0], tl.trans(tile[0].to(DTYPE)), tl.zeros([M, T], tl.float32)) * scale


@triton.jit
def values(
    acc, weights, factor, tile, pool, page, first, n, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = CODEC.own.bits
    v = tile[2]
    weights = (weights * (4.0 * tiles.value_scales(tile[1]))[None, :]).to(DTYPE)
    a0 = dot(weights, tiles.value_plane(v, 0, BITS, DTYPE, PTX), acc[0] * factor[:, None])
    a1 = dot(weights, tiles.value_plane(v, 1, BITS, DTYPE, PTX), acc[1] * factor[:, None])
    a2 = dot(weights, tiles.value_plane(v, 2, BITS, DTYPE, PTX), acc[2] * factor[:, None])
    a3 = dot(weights, tiles.value_plane(v, 3, BITS, DTYPE, PTX), acc[3] * factor[:, None])
    return a0, a1, a2, a3


@triton.jit
def exceptions_loop(
    rows, pool, tables, entries, head, scale, split, splits, acc, peak, total,
    LOOP: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What `page_loop` does, with the exceptions, those of several pages in one tile."""
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = LOOP.tokens
    t = tl.arange(0, T)
    info = LOOP.codec.head(tables, head, LOOP.codec, G).info
    q0, q1 = query_pairs(rows, G, DTYPE)
    begin = tl.load(entries.runs + LOOP.run * 2)
    end = tl.load(entries.runs + LOOP.run * 2 + 1)
    most = tl.maximum(tl.load(info + EXCEPTIONS), 1)
    for i in range(split, ((end - begin) * most + T - 1) // T, splits):
        entry = begin + (i * T + t) // most
        number = (i * T + t) % most
        block = tl.load(entries.table + (entry >> entries.shift), mask=entry < end, other=0)
        at = entry_at(entries, entry, block)
        mask = number < tl.load(entries.counts + at, mask=entry < end, other=0)
        page = tl.load(entries.pages + at, mask=mask, other=0).to(tl.int64)
        k, k_scale = tiles.exception_rows(
            pool.words, pool.half, page, number, mask, info, 0, G.k_size, G.k_pad, G
        )
        logits = dot(q0, tl.trans(codes8(k, 0, DTYPE, PTX)), tl.zeros([M, T], tl.float32))
        logits = dot(q1, tl.trans(codes8(k, 1, DTYPE, PTX)), logits)
        logits *= (k_scale * scale)[None, :]
        if BIAS:
            address = tl.load(entries.bias + at, mask=mask, other=0)
            token = tiles.exception_tokens(pool.words, page, number, mask, info, T, G)
            log_bias = address.to(tl.pointer_type(tl.float32))
            added = tl.load(log_bias + token, mask=mask & (address != 0), other=0.0)
            logits += added[None, :] * LOG2E
        logits = tl.where(mask[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v, v_scale = tiles.exception_rows(
                pool.words, pool.half, page, number, mask, info, 1, G.v_size, G.v_pad, G
            )
            weights = (weights * (128.0 * v_scale)[None, :]).to(DTYPE)
            a0 = dot(weights, codes8(v, 0, DTYPE, PTX), acc[0] * factor[:, None])
            a1 = dot(weights, codes8(v, 1, DTYPE, PTX), acc[1] * factor[:, None])
            acc = (a0, a1)
    return acc, peak, total
