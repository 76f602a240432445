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
