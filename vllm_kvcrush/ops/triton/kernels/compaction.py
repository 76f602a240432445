"""Gathering a request's tokens out of pages of any codec, and encoding tokens into pages.

Between the two the tokens lie in a scratch buffer, because target pages may be among the sources.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.tiles import hadamard, rotation_sign
from vllm_kvcrush.ops.triton.kernels.tokens import (
    INT4,
    INT8,
    RAW,
    STEP_COUNT,
    keys_of,
    positions_at,
    positions_of,
    reads,
    values_of,
)
from vllm_kvcrush.ops.triton.layout import NEVER

NO_STEP = tl.constexpr(NEVER)
HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def rounded(x):
    """float32 to the nearest whole number, ties to even; |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_half(x):
    """float32 rounded to float16, saturated."""
    return tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def inverse(x):
    """1 / x, and 0 of zero and of less."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def rotate(x, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transforms over blocks of channels: [ROWS, SIZE]."""
    rows: tl.constexpr = ROWS * SIZE // BLOCK
    y = hadamard(tl.reshape(x, [rows, BLOCK]), rows, BLOCK)
    return tl.reshape(y, [ROWS, SIZE]) / tl.sqrt(float(BLOCK))


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
        *("count", "slot_stride", "steps", "block_pages", "first_page", "tail_position"),
    ),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def gather_kernel(
    key, value, position, slots, raw, grid, half, words, wide,
    begins, ends, pages, codecs, firsts, tail_slot, tail_table,
    count, slot_stride, steps, block_pages, first_page, tail_position,
    T: tl.constexpr, CODEC: tl.constexpr, VALUES: tl.constexpr,
    POSITIONS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T slots, KV heads). Writes float32 key [heads, count, k_size], value likewise
    and int32 position [heads, count] of slots int64 [heads, count] that lie in pages of CODEC, as
    the tail does in RAW's; -1 skips."""
    head = tl.program_id(1)
    i = tl.program_id(0) * T + tl.arange(0, T)
    slot = tl.load(slots + head * slot_stride + i, mask=i < count, other=-1).to(tl.int32)
    mask = slot >= 0
    before = tl.load(tail_slot + head)
    in_tail = slot >= before
    entry = locate(slot, tl.load(begins + head), tl.load(ends + head), firsts, steps)
    paged = mask & (in_tail == 0)
    codec = tl.load(codecs + entry, mask=paged, other=RAW)
    mask = mask & reads(codec, CODEC)
    if tl.max(mask.to(tl.int32), 0) == 0:
        return
    index = slot - tl.load(firsts + entry, mask=paged, other=0)
    page = tl.load(pages + entry, mask=paged, other=0).to(tl.int64)
    place = slot - before
    if CODEC == RAW:
        block = tl.load(tail_table + place // G.block_size, mask=mask & in_tail, other=0)
        at = block.to(tl.int64) * block_pages + first_page + head
        page = tl.where(in_tail, at, page)
        index = tl.where(in_tail, place % G.block_size, index)
    row = (head.to(tl.int64) * count + i)[:, None]
    c = tl.arange(0, G.k_pad)[None, :]
    x = keys_of(raw, grid, half, words, page, index, mask, T, CODEC, G)
    tl.store(key + row * G.k_size + c, x, mask=mask[:, None] & (c < G.k_size))
    if VALUES:
        c = tl.arange(0, G.v_pad)[None, :]
        x = values_of(raw, half, words, page, index, mask, T, CODEC, G)
        tl.store(value + row * G.v_size + c, x, mask=mask[:, None] & (c < G.v_size))
    if POSITIONS:
        kept = positions_of(words, wide, page, index, mask & (codec != RAW), CODEC, G)
        if CODEC == RAW:
            kept = tl.where(in_tail, tail_position + place, tl.where(codec == RAW, -1, kept))
        tl.store(position + head.to(tl.int64) * count + i, kept, mask=mask)


@triton.jit
def _pack(codes, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Codes 0..15, float32 [ROWS, SIZE], as bytes [ROWS, SIZE / 2]."""
    low, high = tl.split(tl.reshape(codes.to(tl.uint8), [ROWS, SIZE // 2, 2]))
    return low | (high << 4)


@triton.jit
def _encode_int8(
    x, codes, half, at, scale_at, n, T: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr
):
    t, c = tl.arange(0, T), tl.arange(0, PAD)[None, :]
    scale = to_half(tl.max(tl.abs(x), 1) / 127.0)
    levels = tl.minimum(tl.maximum(x * inverse(scale)[:, None], -127.0), 127.0)
    at = codes + at + t[:, None] * SIZE + c
    mask = (t < n)[:, None] & (c < SIZE)
    tl.store(at, rounded(levels).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    tl.store(half + scale_at + t, scale.to(tl.float16), mask=t < n)


@triton.jit
def _encode_int4_keys(x, grid, codes, page, group, n, T: tl.constexpr, G: tl.constexpr):
    t, c = tl.arange(0, T), tl.arange(0, G.k_pad)
    least = tl.min(tl.where((t < n)[:, None], x, float("inf")), 0)
    most = tl.max(tl.where((t < n)[:, None], x, float("-inf")), 0)
    zero = to_half(least)
    scale = to_half((most - zero) / 15.0)
    levels = (x - zero[None, :]) * inverse(scale)[None, :]
    levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 15.0))
    b = tl.arange(0, G.k_pad // 2)[None, :]
    row: tl.constexpr = G.k_size // 2
    at = codes + page * G.page_bytes + G.int4.k + (group * T + t)[:, None] * row + b
    tl.store(at, _pack(levels, T, G.k_pad), mask=(t < n)[:, None] & (b < row))
    at = page * (G.page_bytes // 2) + group * G.k_size + c % 4 * (G.k_size // 4) + c // 4
    kind = grid.dtype.element_ty
    tl.store(grid + at + G.int4.k_scale // 2, (0.5 * scale).to(kind), mask=c < G.k_size)
    middle = tl.minimum(tl.maximum(zero + 7.5 * scale, -HALF_MAX), HALF_MAX)
    tl.store(grid + at + G.int4.k_middle // 2, middle.to(kind), mask=c < G.k_size)


@triton.jit
def _encode_int4_values(x, half, codes, page, start, n, T: tl.constexpr, G: tl.constexpr):
    t, c = tl.arange(0, T), tl.arange(0, G.v_pad)
    y = rotate(x * rotation_sign(c)[None, :], T, G.v_pad, G.rotation)
    peak = tl.max(tl.abs(y), 1)
    best = tl.zeros([T], tl.float32)
    scale = tl.zeros([T], tl.float32)
    for k in range(4):
        # The fractions of the peak that csrc/encode.h tries. Not unrolled: that would spill.
        clip = tl.where(k == 0, 1.0, tl.where(k == 1, 0.88, tl.where(k == 2, 0.76, 0.66)))
        levels = y * inverse(peak * clip / 7.5)[:, None] + 7.5
        levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 15.0)) - 7.5
        levels = tl.where((c < G.v_size)[None, :], levels, 0.0)
        product = tl.sum(y * levels, 1)
        fitted = product / tl.sum(levels * levels, 1)
        gain = fitted * product
        scale = tl.where(gain > best, fitted, scale)
        best = tl.maximum(gain, best)
    scale = to_half(scale)
    levels = y * inverse(scale)[:, None] + 7.5
    levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 15.0))
    b = tl.arange(0, G.v_pad // 2)[None, :]
    row: tl.constexpr = G.v_size // 2
    at = codes + page * G.page_bytes + G.int4.v + (start + t)[:, None] * row + b
    tl.store(at, _pack(levels, T, G.v_pad), mask=(t < n)[:, None] & (b < row))
    at = half + page * (G.page_bytes // 2) + G.int4.v_scale // 2 + start + t
    tl.store(at, scale.to(tl.float16), mask=t < n)


@triton.jit
def _encode_positions(
    position, words, wide, page, first, n, group, START: tl.constexpr, T: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """Low halves of a group's positions, to byte START of the page; the first group also writes the
    page's header."""
    t = tl.arange(0, T)
    base = tl.load(position + first) // 65536 * 65536
    page_at = page * (G.page_bytes // 2)
    i = group * T + t
    mine = tl.load(position + first + i, mask=i < n, other=0)
    tl.store(words + page_at + START // 2 + i, mine.to(tl.int16), mask=i < n)
    if group == 0:
        j = tl.arange(0, 16)
        before = tl.zeros([16], tl.int32)
        for start in range(0, n, T):
            i = start + t
            steps = (tl.load(position + first + i, mask=i < n, other=0) - base) // 65536
            counted = (i < n)[:, None] & (steps[:, None] <= j[None, :])
            before += tl.sum(counted.to(tl.int32), 0)
        before = tl.where(before == n, NO_STEP, before).to(tl.int16)
        tl.store(wide + page * (G.page_bytes // 4) + G.header // 4, base)
        tl.store(words + page_at + (G.header + 4) // 2 + j, before, mask=j < STEP_COUNT)


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
    if (total <= group * T) | (reads(codec, CODEC) == 0):
        return
    page = tl.load(pages + entry).to(tl.int64)
    first = tl.load(heads + entry).to(tl.int64) * count + tl.load(firsts + entry)
    # Branches use no name of their own twice: Triton wants one type of what both of them name.
    if part == 0:
        start = group * T
        n = total - start
        k = _load_rows(key, first + start, n, G.k_size, G.k_pad, T)
        if CODEC == INT4:
            _encode_int4_keys(k, grid, codes, page, group, n, T, G)
        elif CODEC == INT8:
            k_at = page * G.page_bytes + G.int8.k + start * G.k_size
            k_scale = page * (G.page_bytes // 2) + G.int8.k_scale // 2 + start
            _encode_int8(k, codes, half, k_at, k_scale, n, T, G.k_size, G.k_pad)
        else:
            _store_rows(k, raw, page, start, n, 0, G.k_size, G.k_pad, T, G)
        if POSITIONS:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if codec != RAW:
                _encode_positions(
                    position, words, wide, page, first, total, group, positions_at(CODEC, G), T, G
                )
    else:
        begin = group * T + (part - 1) * V
        left = total - begin
        v = _load_rows(value, first + begin, left, G.v_size, G.v_pad, V)
        if CODEC == INT4:
            _encode_int4_values(v, half, codes, page, begin, left, V, G)
        elif CODEC == INT8:
            v_at = page * G.page_bytes + G.int8.v + begin * G.v_size
            v_scale = page * (G.page_bytes // 2) + G.int8.v_scale // 2 + begin
            _encode_int8(v, codes, half, v_at, v_scale, left, V, G.v_size, G.v_pad)
        else:
            _store_rows(v, raw, page, begin, left, G.k_size, G.v_size, G.v_pad, V, G)
