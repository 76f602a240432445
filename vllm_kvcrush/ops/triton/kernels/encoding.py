"""What codecs share in filling pages: rounding, rotation, positions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.kernels.tiles import hadamard
from vllm_kvcrush.ops.triton.kernels.tokens import STEP_COUNT
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
def fit_tokens(y, T: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    """Grids of tokens in codes around 0: codes [T, PAD] of float32 [T, PAD], of which SIZE columns
    count, and scales [T]. y is about scale (code - middle)."""
    top: tl.constexpr = (1 << BITS) - 1
    real = (tl.arange(0, PAD) < SIZE)[None, :]
    peak = tl.max(tl.where(real, tl.abs(y), 0.0), 1)
    best = tl.zeros([T], tl.float32)
    scale = tl.zeros([T], tl.float32)
    for k in range(4):
        # The fractions of the peak that csrc/kernels/codes.h tries. Not unrolled: that would spill.
        clip = tl.where(k == 0, 1.0, tl.where(k == 1, 0.88, tl.where(k == 2, 0.76, 0.66)))
        levels = y * inverse(peak * clip / (0.5 * top))[:, None] + 0.5 * top
        levels = rounded(tl.minimum(tl.maximum(levels, 0.0), 1.0 * top)) - 0.5 * top
        levels = tl.where(real, levels, 0.0)
        product = tl.sum(y * levels, 1)
        fitted = product / tl.sum(levels * levels, 1)
        gain = fitted * product
        scale = tl.where(gain > best, fitted, scale)
        best = tl.maximum(gain, best)
    scale = to_half(scale)
    levels = y * inverse(scale)[:, None] + 0.5 * top
    return rounded(tl.minimum(tl.maximum(levels, 0.0), 1.0 * top)), scale


@triton.jit
def store_positions(
    position, pool, page, first, n, group, OFFSET: tl.constexpr, T: tl.constexpr, G: tl.constexpr
):
    """Low halves of a group's positions, to byte OFFSET of the page; the first group also writes
    the page's header."""
    t = tl.arange(0, T)
    base = tl.load(position + first) // 65536 * 65536
    page_at = page * (G.page_bytes // 2)
    i = group * T + t
    mine = tl.load(position + first + i, mask=i < n, other=0)
    tl.store(pool.words + page_at + OFFSET // 2 + i, mine.to(tl.int16), mask=i < n)
    if group == 0:
        j = tl.arange(0, 16)
        before = tl.zeros([16], tl.int32)
        for start in range(0, n, T):
            i = start + t
            steps = (tl.load(position + first + i, mask=i < n, other=0) - base) // 65536
            counted = (i < n)[:, None] & (steps[:, None] <= j[None, :])
            before += tl.sum(counted.to(tl.int32), 0)
        before = tl.where(before == n, NO_STEP, before).to(tl.int16)
        tl.store(pool.wide + page * (G.page_bytes // 4) + G.header // 4, base)
        tl.store(pool.words + page_at + (G.header + 4) // 2 + j, before, mask=j < STEP_COUNT)
