"""What kernels do with the tiles of a page: unpacking, online softmax, rotation.

Shapes use M query rows, T tokens and C channels.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"
# ruff: noqa: SIM300
# triton.jit reads the source of these functions; their types are tl.tensor and tl.constexpr.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# PTX that unpacks the words of two neighbours ($1) at a time, which the compiler does not find out
# by itself. tests/gpu/test_ptx.py executes it on all words.


def _codes_ptx(shift: int, bits: int, bf16: bool, scaled: bool) -> str:
    # A code becomes the middle of a mantissa whose exponent makes it 128 + 2 code (1024 + 2 code in
    # float16); less 128 (1024) and the largest code that is 2 code - (2^bits - 1).
    top = (1 << bits) - 1
    kind, base, less, one = (
        ("bf16x2", "0x43004300", 0xC300C300, "0x3F803F80")
        if bf16
        else ("f16x2", "0x64006400", 0xE400E400, "0x3C003C00")
    )
    return (
        "{ .reg .b32 t, o, z; "
        + (f"shr.b32 t, $1, {shift - 1}; " if shift else "shl.b32 t, $1, 1; ")
        + f"lop3.b32 t, t, {2 * top * 0x10001:#010x}, {base}, 0xEA; mov.b32 o, {one}; "
        + f"mov.b32 z, {less | top * 0x10001:#010x}; "
        + (
            f"fma.rn.{kind} t, t, o, z; fma.rn.{kind} $0, t, $2, $3; }}"
            if scaled
            else f"fma.rn.{kind} $0, t, o, z; }}"
        )
    )


def _int8_ptx(shift: int, bf16: bool) -> str:
    # Low seven bits and sign bit alike: (128 + low) - (128 or 256); 1024 and 1152 in float16.
    kind, base, minus = (
        ("bf16x2", "0x43004300", "0xBF80BF80") if bf16 else ("f16x2", "0x64006400", "0xBC00BC00")
    )
    return (
        "{ .reg .b32 a, b, m; "
        f"shr.b32 b, $1, {shift}; lop3.b32 a, b, 0x007F007F, {base}, 0xEA; "
        f"lop3.b32 b, b, 0x00800080, {base}, 0xEA; "
        f"mov.b32 m, {minus}; fma.rn.{kind} $0, b, m, a; }}"
    )


# Of codes of 2, 3 and 4 bits at bits 0, 2, ... 14.
STEPS_PTX = {
    bf16: tl.constexpr(
        tuple(
            _codes_ptx(shift, bits, bf16, False) for bits in (2, 3, 4) for shift in range(0, 16, 2)
        )
    )
    for bf16 in (False, True)
}
KEYS_PTX = {
    bf16: tl.constexpr(tuple(_codes_ptx(4 * s, 4, bf16, True) for s in range(4)))
    for bf16 in (False, True)
}
INT8_PTX = {
    bf16: tl.constexpr(tuple(_int8_ptx(8 * s, bf16) for s in range(2))) for bf16 in (False, True)
}
BF16_STEPS, BF16_KEYS = STEPS_PTX[True], KEYS_PTX[True]
FP16_STEPS, FP16_KEYS = STEPS_PTX[False], KEYS_PTX[False]
BF16_CODES, FP16_CODES = INT8_PTX[True], INT8_PTX[False]


@triton.jit
def exact(x, DTYPE: tl.constexpr):
    """Small whole float32 numbers as DTYPE. In bfloat16 they lose only zeros, so nothing need be
    rounded, which takes some devices many instructions."""
    if DTYPE == tl.bfloat16:
        x = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def code_steps(
    words, SHIFT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """2 code - (2^BITS - 1) of codes of 2 to 4 bits at bit SHIFT, an even one: int16 -> DTYPE of
    the same shape, exact."""
    if PTX and DTYPE != tl.float32:
        ptx: tl.constexpr = BF16_STEPS if DTYPE == tl.bfloat16 else FP16_STEPS
        x = tl.inline_asm_elementwise(
            ptx[(BITS - 2) * 8 + SHIFT // 2], "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        top: tl.constexpr = (1 << BITS) - 1
        x = exact((2 * ((words >> SHIFT) & top) - top).to(tl.float32), DTYPE)
    return x


@triton.jit
def half_steps(words, S: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """2 code - 15 of plane S of int4 words: int16 [T, C] -> DTYPE [T, C], exact."""
    return code_steps(words, 4 * S, 4, DTYPE, PTX)


@triton.jit
def grid_plane(words, half_scale, middle, S: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """middle + half_scale (2 code - 15) of plane S: int16 [T, C], grids [C] -> DTYPE [T, C]."""
    if PTX and DTYPE != tl.float32:
        ptx: tl.constexpr = BF16_KEYS if DTYPE == tl.bfloat16 else FP16_KEYS
        half_scale = tl.broadcast_to(half_scale[None, :], words.shape)
        middle = tl.broadcast_to(middle[None, :], words.shape)
        x = tl.inline_asm_elementwise(
            ptx[S], "=r,r,r,r", [words, half_scale, middle], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        x = 2.0 * ((words >> (4 * S)) & 15).to(tl.float32) - 15.0
        x = x * half_scale[None, :].to(tl.float32) + middle[None, :].to(tl.float32)
        if DTYPE == tl.bfloat16:
            # To the nearest, ties away from zero, and finite: a third of the instructions.
            x = ((x.to(tl.int32, bitcast=True) + 0x8000) >> 16).to(tl.int16)
            x = x.to(tl.bfloat16, bitcast=True)
        x = x.to(DTYPE)
    return x


@triton.jit
def codes8(words, S: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes of plane S (channels 2i + S) of int8 words: int16 [T, C] -> DTYPE [T, C], exact."""
    if PTX and DTYPE != tl.float32:
        ptx: tl.constexpr = BF16_CODES if DTYPE == tl.bfloat16 else FP16_CODES
        x = tl.inline_asm_elementwise(
            ptx[S], "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        x = exact(((words << (8 - 8 * S)) >> 8).to(tl.float32), DTYPE)
    return x


@triton.jit
def dot(a, b, acc):
    """acc + a b, without rounding float32 to TF32."""
    if a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def softmax_step(logits, peak, total):
    """One step of the online softmax, in powers of two.

    Args:
        logits: float32 [M, T] times log2(e); -inf where nothing is seen.
        peak, total: float32 [M], largest logit so far and sum of 2^(logit - peak).

    Returns:
        Weights [M, T], the factor [M] of everything summed before, and the new peak and total.
    """
    new = tl.maximum(peak, tl.max(logits, 1))
    # A row that has seen nothing yet must not compute inf - inf.
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - base[:, None])
    factor = tl.exp2(peak - base)
    return weights, factor, new, total * factor + tl.sum(weights, 1)


@triton.jit
def rotation_sign(channel):
    """Sign of a channel before the Hadamard transform, as csrc/layout.h draws it: float32."""
    mask = 0xFFFFFFFF
    x = (channel.to(tl.int64) * 2654435769 + 0x9E3779B9) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return tl.where(((x ^ (x >> 16)) & 1) != 0, -1.0, 1.0)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Hadamard transform of each row of [ROWS, N], not normalised; N is a power of two."""
    n: tl.constexpr = N
    if N > 1:
        for k in tl.static_range(8):
            if (1 << k) < n:
                # Sums of neighbours go to the first half, differences to the second: log2(N) times
                # that is the whole transform.
                a, b = tl.split(tl.reshape(x, [ROWS, n // 2, 2]))
                x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, n])
    return x


@triton.jit
def planes_hadamard(a, b, c, d, ROWS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transforms over blocks of BLOCK channels that lie in four planes
    [ROWS, C]: channel 4i + s is column i of plane s."""
    part: tl.constexpr = BLOCK // 4
    rows: tl.constexpr = ROWS * C // part
    norm = 1.0 / tl.sqrt(float(BLOCK))
    p, q, r, s = a + b, a - b, c + d, c - d
    a = tl.reshape(hadamard(tl.reshape((p + r) * norm, [rows, part]), rows, part), [ROWS, C])
    b = tl.reshape(hadamard(tl.reshape((q + s) * norm, [rows, part]), rows, part), [ROWS, C])
    c = tl.reshape(hadamard(tl.reshape((p - r) * norm, [rows, part]), rows, part), [ROWS, C])
    d = tl.reshape(hadamard(tl.reshape((q - s) * norm, [rows, part]), rows, part), [ROWS, C])
    return a, b, c, d


@triton.jit
def interleave(a, b, c, d, ROWS: tl.constexpr, C: tl.constexpr):
    """Four planes [ROWS, C] in channel order: [ROWS, 4C]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, 4 * C])


@triton.jit
def deinterleave(x, ROWS: tl.constexpr, C: tl.constexpr):
    """The planes of [ROWS, 4C]."""
    even, odd = tl.split(tl.reshape(x, [ROWS, C, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d
