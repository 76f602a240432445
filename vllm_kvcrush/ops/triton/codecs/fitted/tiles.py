"""What kernels do with the tiles of fitted pages: components of keys, turns, values, exceptions.

Shapes use T tokens, S strips, P pieces, C planes' columns and H channels of half a key. Pointers
are those of a `Pool`; `info` points to the FIELDS of one head, the other tables to its rows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.fitted.layout import CHUNK, FIELDS
from vllm_kvcrush.ops.triton.kernels.tiles import code_steps, dot, exact, interleave
from vllm_kvcrush.ops.triton.kernels.tokens import STEP_COUNT

(
    CAPACITY,
    EXCEPTIONS,
    WORDS,
    V_BITS,
    V,
    V_HIGH,
    V_SCALE,
    X_K,
    X_V,
    X_SCALE,
    BITS,
    POSITIONS,
    CHUNKS,
    DECODE,
    INVERSE,
    ENCODE,
    SLOTS,
) = (tl.constexpr(i) for i in range(len(FIELDS)))
ROW, PIECES = tl.constexpr(len(FIELDS)), tl.constexpr(CHUNK)


@triton.jit
def components(words, T: tl.constexpr, DTYPE: tl.constexpr):
    """The bytes of fields int32 [T, P], codes below 16: DTYPE [T, 4 P], exact."""
    a = exact((words & 15).to(tl.float32), DTYPE)
    b = exact(((words >> 8) & 15).to(tl.float32), DTYPE)
    c = exact(((words >> 16) & 15).to(tl.float32), DTYPE)
    d = exact(((words >> 24) & 15).to(tl.float32), DTYPE)
    return interleave(a, b, c, d, T, PIECES)


@triton.jit
def fitted_keys(
    rows, mask, info, fields, inverse, base, T: tl.constexpr, PART: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys as they were coded, float32 [T, 2 H]: channel c in column 2 c, beside the one that it
    turns with, c + k_size / 2. Both are then in one thread.

    Args:
        rows: [T], pointers to the tokens' codes as int32. mask: bool [T]; else codes are 0.
        PART: 0: with the inverse rounded to the model's dtype; 1: with what that left over, too.
    """
    N: tl.constexpr = 2 * G.half
    p, row, c = tl.arange(0, PIECES), tl.arange(0, 4 * PIECES), tl.arange(0, N)
    chunks = tl.load(info + CHUNKS)
    fields += tl.load(info + DECODE)
    inverse += tl.load(info + INVERSE).to(tl.int64) * (2 * N)
    keys = tl.zeros([T, N], tl.float32) + tl.load(base + PART * N + c)[None, :]
    # Not read ahead: the tables are in the caches, and registers are what is short.
    for i in tl.range(0, chunks, num_stages=1):
        at = fields + i * PIECES + p
        word = tl.load(at)
        first = tl.load(at + chunks * PIECES)
        kept = tl.load(at + 2 * chunks * PIECES)
        x = tl.load(rows[:, None] + word[None, :], mask=mask[:, None], other=0)
        x = (x >> first[None, :]) & kept[None, :]
        x = components(x, T, DTYPE)
        at = inverse + (row + i * 4 * PIECES)[:, None] * (2 * N) + c[None, :]
        keys = dot(x, tl.load(at), keys)
        if PART == 1:
            keys = dot(x, tl.load(at + N), keys)
    return keys


@triton.jit
def halves(keys, T: tl.constexpr, G: tl.constexpr):
    """Channels c and c + k_size / 2 of `fitted_keys`: [T, H] each."""
    return tl.split(tl.reshape(keys, [T, G.half, 2]))


@triton.jit
def angles(position, c, coarse, fine, limit, G: tl.constexpr):
    """Cosines and sines of pairs `c` at positions int32 [N]: float32 [N, len(c)] each."""
    H: tl.constexpr = G.half
    # What a wrong directory finds may be anything.
    p = tl.minimum(tl.maximum(position, 0), limit - 1)
    at = coarse + (p // 256)[:, None] * (2 * H) + c[None, :]
    a, b = tl.load(at), tl.load(at + H)
    at = fine + (p % 256)[:, None] * (2 * H) + c[None, :]
    x, y = tl.load(at), tl.load(at + H)
    return a * x - b * y, b * x + a * y


@triton.jit
def turn(low, high, cos, sin, T: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
    """Turns halves [T, H] of keys by the angles of their strips, [S, H]."""
    low, high = tl.reshape(low, [S, T // S, H]), tl.reshape(high, [S, T // S, H])
    cos, sin = cos[:, None, :], sin[:, None, :]
    a, b = low * cos - high * sin, high * cos + low * sin
    return tl.reshape(a, [T, H]), tl.reshape(b, [T, H])


@triton.jit
def strip_positions(words, wide, page, strip, mask, info, G: tl.constexpr):
    """int32 [S], where the first tokens of a page's strips stand."""
    at = words + page * (G.page_bytes // 2)
    low = tl.load(at + tl.load(info + POSITIONS) // 2 + strip, mask=mask, other=0)
    low = low.to(tl.int32) & 0xFFFF
    base = tl.load(wide + page * (G.page_bytes // 4) + G.header // 4)
    j = tl.arange(0, 16)
    first = tl.load(at + (G.header + 4) // 2 + j, mask=j < STEP_COUNT, other=-1).to(tl.int32)
    stepped = (first & 0xFFFF)[None, :] <= strip[:, None]
    return base + low + 65536 * tl.sum(stepped.to(tl.int32), 1)


@triton.jit
def exceptional(words, page, index, mask, info, G: tl.constexpr):
    """Whether tokens [T] of a page are exceptions; `page` is one or [T]."""
    at = words + page * (G.page_bytes // 2) + tl.load(info + BITS) // 2 + index // 16
    return ((tl.load(at, mask=mask, other=0).to(tl.int32) >> (index % 16)) & 1) != 0


@triton.jit
def value_bytes(codes, page, index, mask, info, G: tl.constexpr):
    """int32 [T], the scale bytes of tokens' values; of exceptions, the numbers of their rows."""
    at = codes + page * G.page_bytes + tl.load(info + V_SCALE) + index
    return tl.load(at, mask=mask, other=0).to(tl.int32)


@triton.jit
def value_scales(byte):
    """float32, the distance of two codes of a value."""
    return tl.where(byte > 0, tl.exp2((byte - 128).to(tl.float32) * 0.0625), 0.0)


@triton.jit
def value_words(words, codes, page, index, mask, info, BITS: tl.constexpr, G: tl.constexpr):
    """int16 [T, C]: four codes of BITS bits each, of channels 4 c to 4 c + 3, for `plane`."""
    row: tl.constexpr = G.v_size // (4 if BITS == 4 else 8)
    c = tl.arange(0, G.v_pad // 4)[None, :]
    at = page * (G.page_bytes // 2) + tl.multiple_of(tl.load(info + V), 16) // 2 + index * row
    inside = mask[:, None] & (c < G.v_size // 4)
    if BITS == 4:
        x = tl.load(words + at[:, None] + c, mask=inside, other=0)
    else:
        # A word has the codes of two columns that are half a row apart.
        place = tl.where(c < row, c, c - row)
        second = tl.where(c < row, 0, 8)
        x = tl.load(words + at[:, None] + place, mask=inside, other=0).to(tl.int32) >> second
        if BITS == 3:
            at = page * G.page_bytes + tl.multiple_of(tl.load(info + V_HIGH), 16) + index * row
            top = tl.load(codes + at[:, None] + place, mask=inside, other=0).to(tl.int32)
            top = top >> (second // 2)
            # To a nibble for each code.
            x = (x & 0xFF | (x << 4)) & 0x0F0F
            x = (x | (x << 2)) & 0x3333
            top = (top | (top << 6)) & 0x0303
            top = (top | (top << 3)) & 0x1111
            x = x | (top << 2)
        x = x.to(tl.int16)
    return x


@triton.jit
def value_plane(words, S: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """2 code - (2^BITS - 1) of plane S of `value_words`: DTYPE [T, C], exact."""
    return code_steps(words, S * (2 if BITS == 2 else 4), BITS, DTYPE, PTX)


@triton.jit
def exception_rows(
    words, half, page, number, mask, info, SIDE: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """int16 words [T, PAD / 2] and float32 scales [T] of the rows of exceptions.

    Args:
        page: int64 [T] or one, number: of the rows, [T].
        SIDE: 0: keys, 1: values; SIZE, PAD: channels.
    """
    c = tl.arange(0, PAD // 2)[None, :]
    at = page * (G.page_bytes // 2)
    scale = half + at + tl.load(info + X_SCALE) // 2 + 2 * number + SIDE
    scale = tl.load(scale, mask=mask, other=0.0).to(tl.float32)
    at += tl.load(info + X_K + SIDE) // 2 + number * (SIZE // 2)
    inside = mask[:, None] & (c < SIZE // 2)
    return tl.load(words + at[:, None] + c, mask=inside, other=0), scale


@triton.jit
def exception_tokens(words, page, number, mask, info, T: tl.constexpr, G: tl.constexpr):
    """int32 [T], the places in their pages of exceptions by number."""
    at = words + page * (G.page_bytes // 2) + tl.load(info + BITS) // 2
    token = tl.zeros([T], tl.int32)
    left = number
    for strip in range(tl.load(info + CAPACITY) // 16):
        own = tl.load(at + strip, mask=mask, other=0).to(tl.int32)
        for t in tl.static_range(16):
            bit = (own >> t) & 1
            token = tl.where((bit != 0) & (left == 0), strip * 16 + t, token)
            left -= bit
    return token
