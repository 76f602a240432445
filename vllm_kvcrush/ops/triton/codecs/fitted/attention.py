"""Attention's loops over the pages of one fitted codec: its tokens, then its exceptions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.fitted import tiles
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import CAPACITY, EXCEPTIONS, ROW, V_BITS, WORDS
from vllm_kvcrush.ops.triton.kernels.tiles import LOG2E, codes8, dot, softmax_step


@triton.jit
def fitted_run(
    query, query_at, row_mask, words, wide, codes, info, fields, inverse, base, coarse, fine,
    limit, head, runs, pages, counts, bias, log_bias, scale, split, splits,
    a0, a1, a2, a3, peak, total,
    LOOPS: tl.constexpr, INDEX: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
    TILES: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Adds the tokens that are no exceptions; values in the rotated space, in planes a0 to a3,
    times 8 as int4's are. `runs` points to those of a sequence and head."""
    # Here, since Triton 3.6 takes no element of a tuple of dataclasses for a constant.
    LOOP: tl.constexpr = LOOPS[INDEX]
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.fitted
    H: tl.constexpr = G.half
    t, c = tl.arange(0, T), tl.arange(0, H)
    own = head + LOOP.place * KV_HEADS
    info += own * ROW
    base += own * (4 * H)
    begin, end = tl.load(runs + LOOP.run), tl.load(runs + LOOP.run + 1)
    if LOOP.shared:
        end = tl.where(tl.load(info + V_BITS) == LOOP.bits, end, begin)
    # In the order of `fitted_keys`.
    column = tl.arange(0, 2 * H)
    at = query + query_at[:, None] + (column // 2 + column % 2 * (G.k_size // 2))[None, :]
    inside = row_mask[:, None] & (column < G.k_size)[None, :]
    q = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    held = tl.load(info + WORDS)
    tiles_of_page = (tl.load(info + CAPACITY) + T - 1) // T
    for i in range(begin * tiles_of_page + split, end * tiles_of_page, splits):
        entry = i // tiles_of_page
        first = i % tiles_of_page * T
        page = tl.load(pages + entry).to(tl.int64)
        n = tl.load(counts + entry) - first
        mask = t < n
        plain = mask & (tiles.exceptional(words, page, first + t, mask, info, G) == 0)
        if VALUES:
            byte = tiles.value_bytes(codes, page, first + t, mask, info, G)
            v = tiles.value_words(words, codes, page, first + t, mask, info, LOOP.bits, G)
        rows = wide + page * (G.page_bytes // 4) + (first + t) * held
        k = tiles.fitted_keys(rows, mask, info, fields, inverse, base, T, 0, G, DTYPE)
        if LOOP.local:
            strip = first // 16 + tl.arange(0, T // 16)
            position = tiles.strip_positions(
                words, wide, page, strip, 16 * strip < first + n, info, G
            )
            cos, sin = tiles.angles(position, c, coarse, fine, limit, G)
            low, high = tiles.halves(k, T, G)
            low, high = tiles.turn(low, high, cos, sin, T, T // 16, H)
            k = tl.reshape(tl.join(low, high), [T, 2 * H])
        logits = dot(q, tl.trans(k.to(DTYPE)), tl.zeros([M, T], tl.float32)) * scale
        if BIAS:
            where = tl.load(bias + entry)
            added = tl.load(
                log_bias + where + first + t, mask=t < tl.where(where >= 0, n, 0), other=0.0
            )
            logits += added[None, :] * LOG2E
        logits = tl.where(plain[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            weights = (weights * (4.0 * tiles.value_scales(byte))[None, :]).to(DTYPE)
            a0 = dot(weights, tiles.value_plane(v, 0, LOOP.bits, DTYPE, PTX), a0 * factor[:, None])
            a1 = dot(weights, tiles.value_plane(v, 1, LOOP.bits, DTYPE, PTX), a1 * factor[:, None])
            a2 = dot(weights, tiles.value_plane(v, 2, LOOP.bits, DTYPE, PTX), a2 * factor[:, None])
            a3 = dot(weights, tiles.value_plane(v, 3, LOOP.bits, DTYPE, PTX), a3 * factor[:, None])
    return a0, a1, a2, a3, peak, total


@triton.jit
def exceptions_run(
    q0, q1, words, half, info, head, runs, pages, counts, bias, log_bias, scale, split, splits,
    a0, a1, peak, total,
    LOOPS: tl.constexpr, INDEX: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr,
    TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Adds the exceptions, those of several pages in one tile; `q0`, `q1`: the query's even and odd
    channels, a0 and a1 the sums of such channels of values, times 128 as int8's are."""
    LOOP: tl.constexpr = LOOPS[INDEX]
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.fitted
    t = tl.arange(0, T)
    info += (head + LOOP.place * KV_HEADS) * ROW
    begin = tl.load(runs + LOOP.run)
    # Another of the codec's loops would add the same.
    end = tl.load(runs + LOOP.run + 1) if LOOP.first else begin
    most = tl.maximum(tl.load(info + EXCEPTIONS), 1)
    for i in range(split, ((end - begin) * most + T - 1) // T, splits):
        entry = begin + (i * T + t) // most
        number = (i * T + t) % most
        mask = number < tl.load(counts + entry, mask=entry < end, other=0)
        page = tl.load(pages + entry, mask=mask, other=0).to(tl.int64)
        k, k_scale = tiles.exception_rows(
            words, half, page, number, mask, info, 0, G.k_size, G.k_pad, G
        )
        logits = dot(q0, tl.trans(codes8(k, 0, DTYPE, PTX)), tl.zeros([M, T], tl.float32))
        logits = dot(q1, tl.trans(codes8(k, 1, DTYPE, PTX)), logits)
        logits *= (k_scale * scale)[None, :]
        if BIAS:
            where = tl.load(bias + entry, mask=mask, other=-1)
            token = tiles.exception_tokens(words, page, number, mask, info, T, G)
            added = tl.load(log_bias + where + token, mask=mask & (where >= 0), other=0.0)
            logits += added[None, :] * LOG2E
        logits = tl.where(mask[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v, v_scale = tiles.exception_rows(
                words, half, page, number, mask, info, 1, G.v_size, G.v_pad, G
            )
            weights = (weights * (128.0 * v_scale)[None, :]).to(DTYPE)
            a0 = dot(weights, codes8(v, 0, DTYPE, PTX), a0 * factor[:, None])
            a1 = dot(weights, codes8(v, 1, DTYPE, PTX), a1 * factor[:, None])
    return a0, a1, peak, total
