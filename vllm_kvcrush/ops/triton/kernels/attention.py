"""Attention over mixed pages: one program for a block of query rows, a KV head and a split.

A program walks over its sequence's pages by codec, then over the raw tail. Tiles are dealt out to
the splits in turn. Everything that depends on lengths is read on the device.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.raw import tile_keys, tile_values
from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.pages import plane_signs, query_row
from vllm_kvcrush.ops.triton.kernels.tiles import (
    LOG2E,
    dot,
    interleave,
    planes_hadamard,
    softmax_step,
)
from vllm_kvcrush.ops.triton.kernels.views import Entries, Pool, Rows, Tables


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
def attend(
    rows, pool, tables, entries, head, scale, split, splits, acc, peak, total,
    LOOPS: tl.constexpr, INDEX: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr,
    DTYPE: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Runs the loop LOOPS[INDEX]: arguments of `pages.page_loop`."""
    LOOP: tl.constexpr = LOOPS[INDEX]
    acc, peak, total = LOOP.attend(
        rows, pool, tables, entries, head, scale, split, splits, acc, peak, total,
        LOOP, G, TILES, DTYPE, BIAS, VALUES, PTX,
    )  # fmt: skip
    return acc, peak, total


@triton.jit
def _rotated_back(four, M: tl.constexpr, G: tl.constexpr):
    """Sums of values [M, v_pad] from those in the rotated space, in planes and times 8."""
    C: tl.constexpr = G.v_pad // 4
    a0, a1, a2, a3 = planes_hadamard(four[0], four[1], four[2], four[3], M, C, G.rotation)
    a0 *= 0.125 * plane_signs(0, G)[None, :]
    a1 *= 0.125 * plane_signs(1, G)[None, :]
    a2 *= 0.125 * plane_signs(2, G)[None, :]
    a3 *= 0.125 * plane_signs(3, G)[None, :]
    return interleave(a0, a1, a2, a3, M, C)


@triton.jit
def _tail_run(
    q, raw, table, block_pages, first_page, length, seen, scale, split, splits, acc, peak, total,
    G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """`length`: tokens that any row sees; `seen`: int32 [M], tokens that each row sees."""
    M: tl.constexpr = TILES.rows
    T: tl.constexpr = TILES.tail
    PER: tl.constexpr = (G.block_size + T - 1) // T
    t = tl.arange(0, T)
    blocks = (length + G.block_size - 1) // G.block_size
    # Dealt out from the other end than the pages, so that no split gets every odd tile.
    for i in range(splits - 1 - split, blocks * PER, splits):
        first = i % PER * T
        start = i // PER * G.block_size + first
        page = tl.load(table + i // PER).to(tl.int64) * block_pages + first_page
        n = tl.minimum(length - start, G.block_size - first)
        k = tile_keys(raw, page, first, n, T, G)
        logits = dot(q, tl.trans(k), tl.zeros([M, T], tl.float32)) * scale
        mask = (t < n)[None, :] & ((start + t)[None, :] < seen[:, None])
        logits = tl.where(mask, logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            v = tile_values(raw, page, first, n, T, G)
            acc = dot(weights.to(DTYPE), v, acc * factor[:, None])
    return acc, peak, total


@triton.jit(
    do_not_specialize=(
        *("splits", "seqs", "block_pages", "first_page", "limit", "table_stride", "runs_stride"),
        "shift",
    ),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def attention_kernel(
    out, lse, query, raw, grid, half, words, wide, codes,
    query_start, lengths, table, states,
    region_blocks, runs, pages, counts, bias,
    info, fields, inverse, base, coarse, fine, limit,
    scale, splits, seqs, block_pages, first_page,
    query_stride, out_stride, table_stride, runs_stride, shift,
    HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr,
    DTYPE: tl.constexpr, UNIFORM: tl.constexpr, SPLIT: tl.constexpr,
    PAGED: tl.constexpr, RUNS: tl.constexpr, FOUR: tl.constexpr, TWO: tl.constexpr,
    ONE: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of query rows, KV heads, splits).

    Args:
        out: [rows, HEADS, v_size], or with SPLIT float32 [rows, HEADS, splits, v_size].
        lse: float32 [rows, HEADS], or with SPLIT [rows, HEADS, splits] in powers of two; -inf of
            no tokens.
        lengths: int32 [seqs], slots held: each block of a region counts as a full one.
        table: int32 [seqs, ...], block ids, those of the region first; `table_stride` from one
            sequence to the next.
        states to bias: of `cache.Directory`, if PAGED; `runs_stride` from one state to the next.
        info to limit: of `Fitted`.
        scale: of q·k.
        UNIFORM: every sequence has at most TILES.queries query rows: block i is sequence i.
        SPLIT: several programs, `splits`, share the context of a row.
        FOUR, TWO, ONE: a `codecs.traits.Loop` for each kind of pages that there may be, by the
            planes in which it adds up values: in four, rotated and times 8; in two, times 128.
        VALUES: else only lse is written.
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
    pool = Pool(raw, grid, half, words, wide, codes)
    tables = Tables(info, fields, inverse, base, coarse, fine, limit)
    blocks = table + seq.to(tl.int64) * table_stride
    length = tl.load(lengths + seq)
    taken = 0
    at = runs
    if PAGED:
        state = tl.load(states + seq)
        taken = tl.load(region_blocks + state, mask=state >= 0, other=0)
        own = tl.where(taken > 0, state + 1, 0)  # the first row is empty
        at = runs + own.to(tl.int64) * runs_stride + head * (RUNS * 2)
        length -= taken * G.block_size
    entries = Entries(at, blocks, shift, pages, counts, bias)
    query_rows = Rows(query, query_at, row_mask)
    acc = tl.full([M, G.v_pad], 0.0, tl.float32)
    if len(FOUR) > 0:
        C: tl.constexpr = G.v_pad // 4
        zeros = tl.zeros([M, C], tl.float32)
        four = (zeros, zeros, zeros, zeros)
        for i in tl.static_range(len(FOUR)):
            four, peak, total = attend(
                query_rows, pool, tables, entries, head, factor, split, splits, four, peak, total,
                FOUR, i, G, TILES, DTYPE, BIAS, VALUES, PTX,
            )  # fmt: skip
        if VALUES:
            acc = _rotated_back(four, M, G)
    if len(TWO) > 0:
        # What was added up before goes on in planes: beside them it would not fit the registers.
        two = tl.split(tl.reshape(acc * 128.0, [M, G.v_pad // 2, 2]))
        for i in tl.static_range(len(TWO)):
            two, peak, total = attend(
                query_rows, pool, tables, entries, head, factor, split, splits, two, peak, total,
                TWO, i, G, TILES, DTYPE, BIAS, VALUES, PTX,
            )  # fmt: skip
        acc = tl.reshape(tl.join(two[0], two[1]), [M, G.v_pad]) * 0.0078125
    one = (acc,)
    for i in tl.static_range(len(ONE)):
        one, peak, total = attend(
            query_rows, pool, tables, entries, head, factor, split, splits, one, peak, total,
            ONE, i, G, TILES, DTYPE, BIAS, VALUES, PTX,
        )  # fmt: skip
    acc = one[0]
    q = query_row(query_rows, G, DTYPE)
    seen = tl.maximum(length - rows + row + 1, 0)
    length = tl.minimum(length, tl.maximum(length - rows + first_row + TILES.queries, 0))
    acc, peak, total = _tail_run(
        q, raw, blocks + taken, block_pages, first_page + head,
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
