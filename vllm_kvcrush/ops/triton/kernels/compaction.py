"""Gathering a request's tokens out of pages of any codec, and encoding tokens into pages.

Between the two the tokens lie in a scratch buffer, because target pages may be among the sources.
A kernel that knows several codecs needs the registers of all of them at once, and spills. So these
are compiled once for each, and all variants are launched that a request may need; a program that
finds no token of its codec leaves at once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.encoding import store_positions
from vllm_kvcrush.ops.triton.kernels.tokens import section
from vllm_kvcrush.ops.triton.kernels.views import Pool, Tables


@triton.jit
def locate(slots, begin, end, firsts, steps):
    """Entry of each slot: the last of [begin, end), fewer than 2^steps, whose first slot is not
    after it. int32 [T]."""
    low = tl.zeros_like(slots) + begin
    high = tl.zeros_like(slots) + end
    for _ in range(steps):
        middle = (low + high) // 2
        inside = high - low > 1
        before = tl.load(firsts + middle, mask=inside, other=0) <= slots
        low = tl.where(inside & before, middle, low)
        high = tl.where(inside & (before == 0), middle, high)
    return low


@triton.jit(
    do_not_specialize=(
        *("count", "slot_stride", "steps", "block_pages", "first_page", "tail_position", "limit"),
    ),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def gather_kernel(
    key, value, position, slots, raw, grid, half, words, wide, codes,
    begins, ends, pages, codecs, firsts, tail_slot, tail_table,
    info, fields, inverse, base, coarse, fine, limit,
    count, slot_stride, steps, block_pages, first_page, tail_position,
    T: tl.constexpr, CODEC: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    POSITIONS: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T slots, KV heads). Writes key [heads, count, k_size] of any float type, value
    likewise and int32 position [heads, count], those that are wanted, of slots int64 [heads, count]
    that lie in pages of CODEC, or in the tail if CODEC has it, which also writes 0 where the slot
    is negative."""
    head = tl.program_id(1)
    i = tl.program_id(0) * T + tl.arange(0, T)
    pool = Pool(raw, grid, half, words, wide, codes)
    tables = Tables(info, fields, inverse, base, coarse, fine, limit)
    tables = CODEC.head(tables, head, CODEC, G)
    slot = tl.load(slots + head * slot_stride + i, mask=i < count, other=-1).to(tl.int32)
    before = tl.load(tail_slot + head)
    in_tail = slot >= before
    entry = locate(slot, tl.load(begins + head), tl.load(ends + head), firsts, steps)
    mask = slot >= 0
    paged = mask & (in_tail == 0)
    TAIL: tl.constexpr = CODEC.number if CODEC.tail else -1
    codec = tl.load(codecs + entry, mask=paged, other=TAIL)
    mask = mask & CODEC.reads(codec, CODEC) & CODEC.serves(tables, CODEC)
    kept = mask
    if CODEC.tail:
        kept = kept | ((slot < 0) & (i < count))
    if tl.max(kept.to(tl.int32), 0) == 0:
        return
    index = slot - tl.load(firsts + entry, mask=paged, other=0)
    page = tl.load(pages + entry, mask=paged, other=0).to(tl.int64)
    place = slot - before
    if CODEC.tail:
        block = tl.load(tail_table + place // G.block_size, mask=mask & in_tail, other=0)
        at = block.to(tl.int64) * block_pages + first_page + head
        page = tl.where(in_tail, at, page)
        index = tl.where(in_tail, place % G.block_size, index)
    row = (head.to(tl.int64) * count + i)[:, None]
    if KEYS:
        parts = CODEC.expand_keys(pool, tables, page, index, mask, T, True, CODEC, G, DTYPE)
        PARTS: tl.constexpr = len(parts)
        SIZE: tl.constexpr = G.k_size // PARTS
        for part in tl.static_range(PARTS):
            x = parts[part]
            c = tl.arange(0, x.shape[1])[None, :]
            tl.store(key + row * G.k_size + (c + part * SIZE), x, mask=kept[:, None] & (c < SIZE))
    if VALUES:
        v = tl.arange(0, G.v_pad)[None, :]
        y = CODEC.expand_values(pool, tables, page, index, mask, T, CODEC, G)
        tl.store(value + row * G.v_size + v, y, mask=kept[:, None] & (v < G.v_size))
    if POSITIONS:
        where = CODEC.positions(pool, tables, page, index, mask, codec, CODEC, G)
        if CODEC.tail:
            where = tl.where(in_tail, tail_position + place, where)
            where = tl.where(slot < 0, 0, where)
        tl.store(position + head.to(tl.int64) * count + i, where, mask=kept)


@triton.jit
def _load_rows(x, first, n, SIZE: tl.constexpr, PAD: tl.constexpr, T: tl.constexpr):
    t, c = tl.arange(0, T), tl.arange(0, PAD)[None, :]
    mask = (t < n)[:, None] & (c < SIZE)
    return tl.load(x + (first + t)[:, None] * SIZE + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=ANY_ADDRESS)
def encode_kernel(
    key, value, position, raw, grid, half, words, wide, codes,
    heads, pages, counts, codecs, firsts, count,
    T: tl.constexpr, V: tl.constexpr, CODEC: tl.constexpr, POSITIONS: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """Fills the page of each entry of CODEC with counts[entry] rows of its head, from row
    firsts[entry], of float32 key [heads, count, k_size], value likewise and int32 position [heads,
    count]. Grid (entries, groups of T = 64 tokens of CODEC's pages, 1 + T / V): a program has a
    group's keys, or values of V of its tokens, for all would not fit its registers."""
    entry, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.load(counts + entry)
    codec = tl.load(codecs + entry)
    if (total <= group * T) | (CODEC.reads(codec, CODEC) == 0):
        return
    pool = Pool(raw, grid, half, words, wide, codes)
    page = tl.load(pages + entry).to(tl.int64)
    first = tl.load(heads + entry).to(tl.int64) * count + tl.load(firsts + entry)
    # Branches use no name of their own twice: Triton wants one type of what both of them name.
    if part == 0:
        start = group * T
        n = total - start
        k = _load_rows(key, first + start, n, G.k_size, G.k_pad, T)
        CODEC.encode_keys(k, pool, page, group, start, n, T, CODEC, G)
        if POSITIONS:  # noqa: SIM102 (one is known to the compiler, the other perhaps not)
            if CODEC.keeps_positions(codec, CODEC):
                AT: tl.constexpr = section(G, CODEC.pages[-1])
                store_positions(position, pool, page, first, total, group, AT.positions, T, G)
    else:
        begin = group * T + (part - 1) * V
        left = total - begin
        v = _load_rows(value, first + begin, left, G.v_size, G.v_pad, V)
        CODEC.encode_values(v, pool, page, begin, left, V, CODEC, G)
