"""Encoding tokens into fitted pages: three kernels, and after the first a sort picks exceptions.

A launch has one codec, and one number of bits for values; programs that find another leave at once.
`info` to `limit` are those of `Fitted`, the codec's rows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.ops.triton.codecs.fitted import tiles
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import BITS as BITS_AT
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import (
    ENCODE,
    ROW,
    SLOTS,
    V_BITS,
    V_HIGH,
    V_SCALE,
    WORDS,
    X_K,
    X_SCALE,
    X_V,
    V,
)
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import POSITIONS as POSITIONS_AT
from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.encoding import NO_STEP, inverse, rotate, rounded, to_half
from vllm_kvcrush.ops.triton.kernels.tiles import dot, rotation_sign
from vllm_kvcrush.ops.triton.kernels.tokens import STEP_COUNT

FIRST = tl.constexpr(SINKS)


@triton.jit(
    do_not_specialize=["count", "most", "limit"], do_not_specialize_on_alignment=ANY_ADDRESS
)
def fitted_components_kernel(
    key, position, component, loss, heads, counts, codecs, firsts,
    mean, forward, cost, top, coarse, fine, limit, count, most,
    T: tl.constexpr, CODEC: tl.constexpr, LOCAL: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Codes of keys before they are packed. Grid (entries, groups of T tokens).

    Args:
        key: float32 [heads, count, k_size], position: int32 [heads, count]; entries have their next
            counts[entry] rows from firsts[entry].
        component: uint8 [entries, most, k_pad]. loss: float32 [entries, most], of each token; the
            first tokens of a request lose most.
    """
    H: tl.constexpr = G.half
    entry = tl.program_id(0)
    i = tl.program_id(1) * T + tl.arange(0, T)
    n = tl.load(counts + entry)
    if (tl.program_id(1) * T >= n) | (tl.load(codecs + entry) != CODEC):
        return
    head = tl.load(heads + entry)
    first = head.to(tl.int64) * count + tl.load(firsts + entry)
    strips: tl.constexpr = T // 16
    strip = tl.program_id(1) * T + tl.arange(0, strips) * 16
    origin = tl.load(position + first + strip, mask=strip < n, other=0)
    mean += head * (2 * H)
    forward += head.to(tl.int64) * (2 * H * G.k_pad)
    column = tl.arange(0, G.k_pad)
    x = tl.full([T, G.k_pad], 0.0, tl.float32)
    for j in range(0, H, 16):
        c = j + tl.arange(0, 16)
        at = key + (first + i)[:, None] * G.k_size + c[None, :]
        inside = (i < n)[:, None] & (c < G.k_size // 2)[None, :]
        low = tl.load(at, mask=inside, other=0.0)
        high = tl.load(at + G.k_size // 2, mask=inside, other=0.0)
        if LOCAL:
            cos, sin = tiles.angles(origin, c, coarse, fine, limit, G)
            low, high = tiles.turn(low, high, cos, -sin, T, strips, 16)
        low -= tl.load(mean + c)[None, :]
        high -= tl.load(mean + H + c)[None, :]
        at = forward + c[:, None] * G.k_pad + column[None, :]
        x = dot(low, tl.load(at), x)
        x = dot(high, tl.load(at + H * G.k_pad), x)
    largest = tl.load(top + head * G.k_pad + column)[None, :]
    code = rounded(tl.minimum(tl.maximum(x + 0.5 * largest, 0.0), largest))
    error = x - (code - 0.5 * largest)
    lost = tl.sum(error * error * tl.load(cost + head * G.k_pad + column)[None, :], 1)
    spread = tl.reshape(origin[:, None] + tl.arange(0, 16)[None, :], [T])
    lost = tl.where(spread < FIRST, float("inf"), lost)
    row = entry.to(tl.int64) * most + i
    tl.store(loss + row, lost, mask=i < n)
    at = component + row[:, None] * G.k_pad + column[None, :]
    tl.store(at, code.to(tl.uint8), mask=(i < n)[:, None])


@triton.jit
def _exception_row(
    x, codes, half, page, number, info, AT: tl.constexpr, SIDE: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Stores float32 rows [T, PAD] as int8 where they have a number of at least 0."""
    c = tl.arange(0, PAD)[None, :]
    scale = to_half(tl.max(tl.abs(x), 1) / 127.0)
    level = tl.minimum(tl.maximum(x * inverse(scale)[:, None], -127.0), 127.0)
    at = codes + page * G.page_bytes + tl.load(info + AT) + number * SIZE
    mask = (number >= 0)[:, None] & (c < SIZE)
    tl.store(at[:, None] + c, rounded(level).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    at = half + page * (G.page_bytes // 2) + tl.load(info + X_SCALE) // 2 + 2 * number + SIDE
    tl.store(at, scale.to(tl.float16), mask=number >= 0)


@triton.jit
def _strip_positions(
    position, words, wide, page, first, n, group, info, T: tl.constexpr, G: tl.constexpr
):
    """Low halves of the positions of a group's strips; the first group also writes the header."""
    base = tl.load(position + first) // 65536 * 65536
    s = tl.arange(0, T // 16)
    strip = group * (T // 16) + s
    mine = tl.load(position + first + 16 * strip, mask=16 * strip < n, other=0)
    at = words + page * (G.page_bytes // 2)
    kept = at + tl.load(info + POSITIONS_AT) // 2 + strip
    tl.store(kept, mine.to(tl.int16), mask=16 * strip < n)
    if group == 0:
        j = tl.arange(0, 16)
        t = tl.arange(0, 64)
        before = tl.zeros([16], tl.int32)
        strips = (n + 15) // 16
        for begin in range(0, strips, 64):
            i = begin + t
            at_strip = position + first + 16 * i
            steps = (tl.load(at_strip, mask=i < strips, other=0) - base) // 65536
            counted = (i < strips)[:, None] & (steps[:, None] <= j[None, :])
            before += tl.sum(counted.to(tl.int32), 0)
        before = tl.where(before == strips, NO_STEP, before).to(tl.int16)
        tl.store(wide + page * (G.page_bytes // 4) + G.header // 4, base)
        tl.store(at + (G.header + 4) // 2 + j, before, mask=j < STEP_COUNT)


@triton.jit(do_not_specialize=["count", "most"], do_not_specialize_on_alignment=ANY_ADDRESS)
def fitted_keys_kernel(
    key, position, component, numbers, half, words, wide, codes,
    heads, pages, counts, codecs, firsts, info, fields, count, most,
    T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Packs keys into pages, with their exceptions and positions. Grid (entries, groups of T).

    Args:
        component: int32 [entries, most, k_pad / 4], four codes in each.
        numbers: int32 [entries, most], of a token's row among the exceptions, or negative.
    """
    entry, group = tl.program_id(0), tl.program_id(1)
    n = tl.load(counts + entry)
    if (group * T >= n) | (tl.load(codecs + entry) != CODEC):
        return
    head, page = tl.load(heads + entry), tl.load(pages + entry).to(tl.int64)
    info += head * ROW
    first = head.to(tl.int64) * count + tl.load(firsts + entry)
    i = group * T + tl.arange(0, T)
    mask = i < n
    row = entry.to(tl.int64) * most + i
    held, slots = tl.load(info + WORDS), tl.load(info + SLOTS)
    fields += tl.load(info + ENCODE)
    for word in range(0, held, 4):
        at = fields + word * 8 + tl.arange(0, 32)
        quad, weight = tl.load(at), tl.load(at + slots)
        kept, shift = tl.load(at + 2 * slots), tl.load(at + 3 * slots)
        at = component + row[:, None] * (G.k_pad // 4) + quad[None, :]
        x = tl.load(at, mask=mask[:, None], other=0)
        x = ((x >> weight[None, :]) & kept[None, :]) << shift[None, :]
        x = tl.sum(tl.reshape(x, [T, 4, 8]), 2)
        w = word + tl.arange(0, 4)[None, :]
        at = wide + page * (G.page_bytes // 4) + i[:, None] * held + w
        tl.store(at, x, mask=mask[:, None] & (w < held))
    number = tl.load(numbers + row, mask=mask, other=-1)
    c = tl.arange(0, G.k_pad)[None, :]
    inside = (number >= 0)[:, None] & (c < G.k_size)
    x = tl.load(key + (first + i)[:, None] * G.k_size + c, mask=inside, other=0.0)
    _exception_row(x, codes, half, page, number, info, X_K, 0, G.k_size, G.k_pad, G)
    bit = (number >= 0).to(tl.int32) << (tl.arange(0, T) % 16)
    bit = tl.sum(tl.reshape(bit, [T // 16, 16]), 1)
    strip = group * (T // 16) + tl.arange(0, T // 16)
    at = words + page * (G.page_bytes // 2) + tl.load(info + BITS_AT) // 2 + strip
    tl.store(at, bit.to(tl.int16), mask=16 * strip < n)
    _strip_positions(position, words, wide, page, first, n, group, info, T, G)


@triton.jit(do_not_specialize=["count", "most"], do_not_specialize_on_alignment=ANY_ADDRESS)
def fitted_values_kernel(
    value, numbers, half, codes, heads, pages, counts, codecs, firsts, info, count, most,
    T: tl.constexpr, CODEC: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """Values and their scales, with exceptions: the rest of what `fitted_keys_kernel` writes.
    STEP: between the levels of a value of unit variance."""
    entry, group = tl.program_id(0), tl.program_id(1)
    n = tl.load(counts + entry)
    if (group * T >= n) | (tl.load(codecs + entry) != CODEC):
        return
    head, page = tl.load(heads + entry), tl.load(pages + entry).to(tl.int64)
    info += head * ROW
    if tl.load(info + V_BITS) != BITS:
        return
    C: tl.constexpr = G.v_pad // 4
    top: tl.constexpr = (1 << BITS) - 1
    first = head.to(tl.int64) * count + tl.load(firsts + entry)
    i = group * T + tl.arange(0, T)
    mask = i < n
    c = tl.arange(0, G.v_pad)
    real = (c < G.v_size)[None, :]
    at = value + (first + i)[:, None] * G.v_size + c[None, :]
    x = tl.load(at, mask=mask[:, None] & real, other=0.0)
    number = tl.load(numbers + entry.to(tl.int64) * most + i, mask=mask, other=-1)
    _exception_row(x, codes, half, page, number, info, X_V, 1, G.v_size, G.v_pad, G)
    y = rotate(x * rotation_sign(c)[None, :], T, G.v_pad, G.rotation)
    rms = tl.sqrt(tl.sum(y * y, 1) / G.v_size)
    usual = (rms > 1e-30) & (rms < 1e30)
    by = tl.where(usual, 1.0 / (tl.where(usual, rms, 1.0) * STEP), 0.0)
    code = rounded(tl.minimum(tl.maximum(y * by[:, None] + 0.5 * top, 0.0), 1.0 * top))
    level = tl.where(real, code - 0.5 * top, 0.0)
    # With it a value keeps its length.
    scale = tl.where(by > 0, tl.sum(y * y, 1) / tl.sum(level * level, 1), 0.0)
    byte = 128.5 + 8.0 * tl.log2(tl.where(scale > 0, scale, 1.0))
    byte = tl.minimum(tl.maximum(byte, 1.0), 255.0).to(tl.int32)
    byte = tl.where(scale > 0, byte, 0)
    at = codes + page * G.page_bytes
    to = at + tl.load(info + V_SCALE) + i
    tl.store(to, tl.where(number >= 0, number, byte).to(tl.uint8), mask=mask)
    # Columns of four channels.
    code = tl.reshape(code.to(tl.int32), [T, C, 4])
    s = tl.arange(0, 4)[None, None, :]
    column = tl.arange(0, C)[None, :]
    inside = mask[:, None] & (column < G.v_size // 4)
    at += tl.load(info + V)
    if BITS == 4:
        packed = tl.sum(code << (4 * s), 2)
        to = at + i[:, None] * (G.v_size // 2) + 2 * column
        tl.store(to, packed.to(tl.uint8), mask=inside)
        tl.store(to + 1, (packed >> 8).to(tl.uint8), mask=inside)
    else:
        row: tl.constexpr = G.v_size // 8
        place = tl.where(column < row, 2 * column, 2 * (column - row) + 1)
        packed = tl.sum((code & 3) << (2 * s), 2)
        tl.store(at + i[:, None] * (2 * row) + place, packed.to(tl.uint8), mask=inside)
        if BITS == 3:
            high = tl.sum((code >> 2) << s, 2)
            other = tl.broadcast_to(tl.minimum(column + row, C - 1), [T, C])
            high = high | (tl.gather(high, other, 1) << 4)
            to = codes + page * G.page_bytes + tl.load(info + V_HIGH) + i[:, None] * row + column
            tl.store(to, high.to(tl.uint8), mask=mask[:, None] & (column < row))
