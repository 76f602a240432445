"""Attention over mixed pages: one program for a block of query rows, a KV head and a split.

A program walks over its sequence's pages by codec, then over the raw tail; each codec has a loop of
its own, since loads under a run-time branch are not made asynchronous. Tiles are dealt out to the
splits in turn. Everything that depends on lengths is read on the device.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.fitted.attention import exceptions_run, fitted_run
from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.pages import (
    int4_key_plane,
    int4_key_words,
    int4_value_words,
    int8_key_words,
    int8_value_words,
    plane_signs,
    raw_keys,
    raw_values,
    token_scales,
)
from vllm_kvcrush.ops.triton.kernels.tiles import (
    LOG2E,
    codes8,
    dot,
    half_steps,
    interleave,
    planes_hadamard,
    softmax_step,
)


@triton.jit
def find_sequence(query_start, block, seqs, QUERIES: tl.constexpr):
    """The sequence that a block of query rows belongs to. Sequence i's blocks start at
    query_start[i] // QUERIES + i, which leaves each of them at least as many as it needs."""
    low, high = 0, seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _bias(logits, bias, log_bias, entry, first, n, T: tl.constexpr, BIAS: tl.constexpr):
    """Adds the log bias of T tokens of a directory entry, from `first`, to logits [M, T]."""
    if BIAS:
        t = tl.arange(0, T)
        start = tl.load(bias + entry)
        biased = tl.where(start >= 0, n, 0)
        added = tl.load(log_bias + start + first + t, mask=t < biased, other=0.0)
        logits += added[None, :] * LOG2E
    return logits


@triton.jit
def _query_planes4(query, at, mask, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query's channels 4i + s for s = 0 .. 3: each DTYPE [M, k_pad / 4]."""
    c = tl.arange(0, G.k_pad // 4) * 4
    inside = mask[:, None] & (c < G.k_size)[None, :]
    at = query + at[:, None] + c[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    b = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
    d = tl.load(at + 2, mask=inside, other=0.0).to(DTYPE)
    e = tl.load(at + 3, mask=inside, other=0.0).to(DTYPE)
    return a, b, d, e


@triton.jit
def _query_planes2(query, at, mask, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query's even and odd channels: each DTYPE [M, k_pad / 2]."""
    c = tl.arange(0, G.k_pad // 2) * 2
    inside = mask[:, None] & (c < G.k_size)[None, :]
    at = query + at[:, None] + c[None, :]
    even = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    odd = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
    return even, odd


@triton.jit
def _int4_run(
    query, query_at, row_mask, words, grid, half, begin, end, pages, counts, bias, log_bias, scale,
    split, splits, a0, a1, a2, a3, peak, total,
    G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.int4
    PER: tl.constexpr = (G.int4.capacity + T - 1) // T
    t = tl.arange(0, T)
    q0, q1, q2, q3 = _query_planes4(query, query_at, row_mask, G, DTYPE)
    for i in range(begin * PER + split, end * PER, splits):
        entry = i // PER
        first = i % PER * T
        page = tl.load(pages + entry).to(tl.int64)
        n = tl.load(counts + entry) - first
        # Two bytes a token are no asynchronous copy: asked for early, they arrive in time.
        steps = token_scales(half, page, first, n, G.int4.v_scale, T, G)
        k = int4_key_words(words, page, first, n, T, G)
        logits = tl.zeros([M, T], tl.float32)
        logits = dot(q0, tl.trans(int4_key_plane(k, grid, page, first, 0, G, DTYPE, PTX)), logits)
        logits = dot(q1, tl.trans(int4_key_plane(k, grid, page, first, 1, G, DTYPE, PTX)), logits)
        logits = dot(q2, tl.trans(int4_key_plane(k, grid, page, first, 2, G, DTYPE, PTX)), logits)
        logits = dot(q3, tl.trans(int4_key_plane(k, grid, page, first, 3, G, DTYPE, PTX)), logits)
        logits = _bias(logits * scale, bias, log_bias, entry, first, n, T, BIAS)
        logits = tl.where((t < n)[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v = int4_value_words(words, page, first, n, T, G)
            # Half steps of scale / 2, times 8: about the largest value, so that what is rounded to
            # float16 is as far from its least number as a raw page's weights are.
            weights = (weights * (4.0 * steps)[None, :]).to(DTYPE)
            a0 = dot(weights, half_steps(v, 0, DTYPE, PTX), a0 * factor[:, None])
            a1 = dot(weights, half_steps(v, 1, DTYPE, PTX), a1 * factor[:, None])
            a2 = dot(weights, half_steps(v, 2, DTYPE, PTX), a2 * factor[:, None])
            a3 = dot(weights, half_steps(v, 3, DTYPE, PTX), a3 * factor[:, None])
    return a0, a1, a2, a3, peak, total


@triton.jit
def _rotated_back(a0, a1, a2, a3, M: tl.constexpr, G: tl.constexpr):
    """Sums of values [M, v_pad] from those in the rotated space, in planes and times 8."""
    C: tl.constexpr = G.v_pad // 4
    a0, a1, a2, a3 = planes_hadamard(a0, a1, a2, a3, M, C, G.rotation)
    a0 *= 0.125 * plane_signs(0, G)[None, :]
    a1 *= 0.125 * plane_signs(1, G)[None, :]
    a2 *= 0.125 * plane_signs(2, G)[None, :]
    a3 *= 0.125 * plane_signs(3, G)[None, :]
    return interleave(a0, a1, a2, a3, M, C)


@triton.jit
def _int8_run(
    query, query_at, row_mask, words, half, begin, end, pages, counts, bias, log_bias, scale,
    split, splits, acc, peak, total,
    G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.int8
    PER: tl.constexpr = (G.int8.capacity + T - 1) // T
    C: tl.constexpr = G.v_pad // 2
    t = tl.arange(0, T)
    q0, q1 = _query_planes2(query, query_at, row_mask, G, DTYPE)
    # What was added up before goes on in planes: beside them it would not fit the registers.
    a0, a1 = tl.split(tl.reshape(acc * 128.0, [M, C, 2]))
    for i in range(begin * PER + split, end * PER, splits):
        entry = i // PER
        first = i % PER * T
        page = tl.load(pages + entry).to(tl.int64)
        n = tl.load(counts + entry) - first
        k_steps = token_scales(half, page, first, n, G.int8.k_scale, T, G) * scale
        v_steps = token_scales(half, page, first, n, G.int8.v_scale, T, G)
        k = int8_key_words(words, page, first, n, T, G)
        logits = dot(q0, tl.trans(codes8(k, 0, DTYPE, PTX)), tl.zeros([M, T], tl.float32))
        logits = dot(q1, tl.trans(codes8(k, 1, DTYPE, PTX)), logits)
        logits = _bias(logits * k_steps[None, :], bias, log_bias, entry, first, n, T, BIAS)
        logits = tl.where((t < n)[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v = int8_value_words(words, page, first, n, T, G)
            # Times 128 for the same reason as int4's.
            weights = (weights * (128.0 * v_steps)[None, :]).to(DTYPE)
            a0 = dot(weights, codes8(v, 0, DTYPE, PTX), a0 * factor[:, None])
            a1 = dot(weights, codes8(v, 1, DTYPE, PTX), a1 * factor[:, None])
    return tl.reshape(tl.join(a0, a1), [M, 2 * C]) * 0.0078125, peak, total


@triton.jit
def _raw_run(
    q, raw, begin, end, pages, counts, bias, log_bias, scale, split, splits, acc, peak, total,
    G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.raw
    PER: tl.constexpr = (G.block_size + T - 1) // T
    t = tl.arange(0, T)
    for i in range(begin * PER + split, end * PER, splits):
        entry = i // PER
        first = i % PER * T
        page = tl.load(pages + entry).to(tl.int64)
        n = tl.load(counts + entry) - first
        k = raw_keys(raw, page, first, n, T, G)
        logits = dot(q, tl.trans(k), tl.zeros([M, T], tl.float32)) * scale
        logits = _bias(logits, bias, log_bias, entry, first, n, T, BIAS)
        logits = tl.where((t < n)[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v = raw_values(raw, page, first, n, T, G)
            acc = dot(weights.to(DTYPE), v, acc * factor[:, None])
    return acc, peak, total


@triton.jit
def _tail_run(
    q, raw, table, block_pages, first_page, length, seen, scale, split, splits, acc, peak, total,
    G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """`length`: tokens that any row sees; `seen`: int32 [M], tokens that each row sees."""
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.raw
    PER: tl.constexpr = (G.block_size + T - 1) // T
    t = tl.arange(0, T)
    blocks = (length + G.block_size - 1) // G.block_size
    # Dealt out from the other end than the pages, so that no split gets every odd tile.
    for i in range(splits - 1 - split, blocks * PER, splits):
        first = i % PER * T
        start = i // PER * G.block_size + first
        page = tl.load(table + i // PER).to(tl.int64) * block_pages + first_page
        n = tl.minimum(length - start, G.block_size - first)
        k = raw_keys(raw, page, first, n, T, G)
        logits = dot(q, tl.trans(k), tl.zeros([M, T], tl.float32)) * scale
        mask = (t < n)[None, :] & ((start + t)[None, :] < seen[:, None])
        logits = tl.where(mask, logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v = raw_values(raw, page, first, n, T, G)
            acc = dot(weights.to(DTYPE), v, acc * factor[:, None])
    return acc, peak, total


@triton.jit(
    do_not_specialize=(
        *("splits", "seqs", "block_pages", "first_page", "limit", "table_stride", "runs_stride"),
    ),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def attention_kernel(
    out, lse, query, raw, grid, half, words, wide, codes,
    query_start, tail_length, tail_table,
    runs, pages, counts, bias, log_bias,
    info, fields, inverse, base, coarse, fine, limit,
    scale, splits, seqs, block_pages, first_page,
    query_stride, out_stride, table_stride, runs_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr,
    DTYPE: tl.constexpr, UNIFORM: tl.constexpr, SPLIT: tl.constexpr,
    LOOPS: tl.constexpr, INT4: tl.constexpr, INT8: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of query rows, KV heads, splits).

    Args:
        out: [rows, HEADS, v_size], or with SPLIT float32 [rows, HEADS, splits, v_size].
        lse: float32 [rows, HEADS], or with SPLIT [rows, HEADS, splits] in powers of two; -inf of
            no tokens.
        runs: int32 [seqs, KV heads, 7]: where the entries of a head begin that are in each of
            RUNS, and where the last end; `runs_stride` from one sequence to the next.
        pages, counts: int32 [entries].
        bias: int64 [entries], where an entry's tokens start in log_bias, or -1.
        info to limit: of `Fitted`.
        scale: of q·k.
        UNIFORM: every sequence has at most TILES.queries query rows: block i is sequence i.
        SPLIT: several programs, `splits`, share the context of a row.
        LOOPS: a `fitted.Loop` for each kind of fitted pages that there may be.
        INT4, INT8, RAW: there may be such pages. VALUES: else only lse is written.
    """
    M: tl.constexpr = TILES.rows
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIFORM:
        seq = block
        first_row = 0
    else:
        seq = find_sequence(query_start, block, seqs, TILES.queries)
        first_row = tl.load(query_start + seq) // TILES.queries + seq
        first_row = (block - first_row) * TILES.queries
    start = tl.load(query_start + seq)
    rows = tl.load(query_start + seq + 1) - start
    if first_row >= rows:
        return
    m = tl.arange(0, M)
    row = first_row + m // GROUP
    row_mask = (m < TILES.queries * GROUP) & (row < rows)
    head_at = head * GROUP + m % GROUP
    query_at = (start + row).to(tl.int64) * query_stride + head_at * G.k_size
    factor = scale * LOG2E
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, G.v_pad], 0.0, tl.float32)
    at = runs + seq * runs_stride + head * 7
    if INT4 or len(LOOPS) > 0:
        C: tl.constexpr = G.v_pad // 4
        a0 = tl.zeros([M, C], tl.float32)
        a1 = tl.zeros([M, C], tl.float32)
        a2 = tl.zeros([M, C], tl.float32)
        a3 = tl.zeros([M, C], tl.float32)
        for i in tl.static_range(len(LOOPS)):
            a0, a1, a2, a3, peak, total = fitted_run(
                query, query_at, row_mask, words, wide, codes, info, fields, inverse, base,
                coarse, fine, limit, head, at, pages, counts, bias, log_bias, factor, split, splits,
                a0, a1, a2, a3, peak, total,
                LOOPS, i, HEADS // GROUP, G, TILES, DTYPE, BIAS, VALUES, PTX,
            )  # fmt: skip
        if INT4:
            a0, a1, a2, a3, peak, total = _int4_run(
                query, query_at, row_mask, words, grid, half, tl.load(at + 3), tl.load(at + 4),
                pages, counts, bias, log_bias, factor, split, splits, a0, a1, a2, a3, peak, total,
                G, TILES, DTYPE, BIAS, VALUES, PTX,
            )  # fmt: skip
        if VALUES:
            acc = _rotated_back(a0, a1, a2, a3, M, G)
    if len(LOOPS) > 0:
        q0, q1 = _query_planes2(query, query_at, row_mask, G, DTYPE)
        a0, a1 = tl.split(tl.reshape(acc * 128.0, [M, G.v_pad // 2, 2]))
        for i in tl.static_range(len(LOOPS)):
            a0, a1, peak, total = exceptions_run(
                q0, q1, words, half, info, head, at, pages, counts, bias, log_bias, factor, split,
                splits, a0, a1, peak, total,
                LOOPS, i, HEADS // GROUP, G, TILES, DTYPE, BIAS, VALUES, PTX,
            )  # fmt: skip
        acc = tl.reshape(tl.join(a0, a1), [M, G.v_pad]) * 0.0078125
    if INT8:
        acc, peak, total = _int8_run(
            query, query_at, row_mask, words, half, tl.load(at + 4), tl.load(at + 5), pages,
            counts, bias, log_bias, factor, split, splits, acc, peak, total,
            G, TILES, DTYPE, BIAS, VALUES, PTX,
        )  # fmt: skip
    channel = tl.arange(0, G.k_pad)
    q_mask = row_mask[:, None] & (channel < G.k_size)[None, :]
    q = tl.load(query + query_at[:, None] + channel[None, :], mask=q_mask, other=0.0).to(DTYPE)
    if RAW:
        acc, peak, total = _raw_run(
            q, raw, tl.load(at + 5), tl.load(at + 6), pages, counts, bias, log_bias,
            factor, split, splits, acc, peak, total, G, TILES, DTYPE, BIAS, VALUES,
        )  # fmt: skip
    length = tl.load(tail_length + seq)
    seen = tl.maximum(length - rows + row + 1, 0)
    length = tl.minimum(length, tl.maximum(length - rows + first_row + TILES.queries, 0))
    acc, peak, total = _tail_run(
        q, raw, tail_table + seq.to(tl.int64) * table_stride, block_pages, first_page + head,
        length, seen, factor, split, splits, acc, peak, total, G, TILES, DTYPE, VALUES,
    )  # fmt: skip
    row_at = (start + row).to(tl.int64)
    sums = peak + tl.log2(tl.where(total > 0, total, 1.0))
    where = row_at * HEADS + head_at
    if SPLIT:
        where = where * splits + split
    else:
        sums = sums / LOG2E
    tl.store(lse + where, sums, mask=row_mask)
    if VALUES:
        v = tl.arange(0, G.v_pad)
        at = where * G.v_size if SPLIT else row_at * out_stride + head_at * G.v_size
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_mask = row_mask[:, None] & (v < G.v_size)[None, :]
        tl.store(out + at[:, None] + v[None, :], acc.to(out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["splits", "seqs"], do_not_specialize_on_alignment=ANY_ADDRESS)
def merge_kernel(
    out, lse, partial, partial_lse, query_start, splits, seqs, out_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Merges the splits of `attention_kernel`, up to MOST, TILE at a time: all at once would not
    fit the registers. Grid (rows, HEADS); rows of no sequence are left alone."""
    row, head = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(query_start + seqs):
        return
    at = (row.to(tl.int64) * HEADS + head) * splits
    s = tl.arange(0, MOST)
    sums = tl.load(partial_lse + at + s, mask=s < splits, other=float("-inf"))
    peak = tl.max(sums, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(sums - base), 0)
    total = tl.where(total > 0, total, 1.0)
    tl.store(lse + row.to(tl.int64) * HEADS + head, (peak + tl.log2(total)) / LOG2E)
    if VALUES:
        c = tl.arange(0, PAD)
        mean = tl.zeros([PAD], tl.float32)
        for first in range(0, splits, TILE):
            i = first + tl.arange(0, TILE)
            own = tl.load(partial_lse + at + i, mask=i < splits, other=float("-inf"))
            weights = tl.exp2(own - base)
            mask = (weights > 0)[:, None] & (c < SIZE)[None, :]
            parts = tl.load(partial + (at + i)[:, None] * SIZE + c[None, :], mask=mask, other=0.0)
            mean += tl.sum(parts * weights[:, None], 0)
        to = out + row.to(tl.int64) * out_stride + head * SIZE + c
        tl.store(to, (mean / total).to(out.dtype.element_ty), mask=c < SIZE)
