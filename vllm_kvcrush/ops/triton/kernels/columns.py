"""Codes of 2 to 4 bits in columns of four channels: how tokens' rows of them are read and stored.

Of 4 bits a column is a word of 16 bits, of others a byte with the low two bits of each code; the
third bits are beside them, half a byte a column. `page` is one or [T], `index` [T] are tokens'
places in it, and shapes use T tokens and C columns.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.kernels.tiles import code_steps


@triton.jit
def columns(
    pool, page, index, mask, LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr,
    SIZE: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """int16 [T, C], for `plane`: rows of sections at bytes LOW and HIGH."""
    c = tl.arange(0, C)[None, :]
    row: tl.constexpr = SIZE // 4
    inside = mask[:, None] & (c < row)
    if BITS == 4:
        at = page * (G.page_bytes // 2) + LOW // 2 + index * row
        x = tl.load(pool.words + at[:, None] + c, mask=inside, other=0)
    else:
        at = page * G.page_bytes + LOW + index * row
        x = tl.load(pool.codes + at[:, None] + c, mask=inside, other=0).to(tl.int32)
        if BITS == 3:
            at = page * G.page_bytes + HIGH + index * (row // 2)
            top = tl.load(pool.codes + at[:, None] + c // 2, mask=inside, other=0).to(tl.int32)
            top = top >> (c % 2 * 4)
            # To a nibble for each code.
            x = (x & 0xF) | ((x & 0xF0) << 4)
            x = (x & 0x0303) | ((x & 0x0C0C) << 2)
            top = (top & 3) | ((top & 12) << 6)
            top = (top & 0x0101) | ((top & 0x0202) << 3)
            x = x | (top << 2)
        x = x.to(tl.int16)
    return x


@triton.jit
def plane(words, S: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """2 code - (2^BITS - 1) of channels 4c + S of `columns`: DTYPE [T, C], exact."""
    return code_steps(words, S * (2 if BITS == 2 else 4), BITS, DTYPE, PTX)


@triton.jit
def store_columns(
    code, pool, page, index, mask, LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr,
    SIZE: tl.constexpr, T: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Stores codes, float32 [T, 4 C], of tokens that `mask` has."""
    row: tl.constexpr = SIZE // 4
    code = tl.reshape(code.to(tl.int32), [T, C, 4])
    s = tl.arange(0, 4)[None, None, :]
    c = tl.arange(0, C)[None, :]
    inside = mask[:, None] & (c < row)
    if BITS == 4:
        packed = tl.sum(code << (4 * s), 2).to(tl.int16)
        at = page * (G.page_bytes // 2) + LOW // 2 + index * row
        tl.store(pool.words + at[:, None] + c, packed, mask=inside)
    else:
        packed = tl.sum((code & 3) << (2 * s), 2).to(tl.uint8)
        at = page * G.page_bytes + LOW + index * row
        tl.store(pool.codes + at[:, None] + c, packed, mask=inside)
        if BITS == 3:
            top = tl.reshape(tl.sum((code >> 2) << s, 2), [T, C // 2, 2])
            top = tl.sum(top << (4 * tl.arange(0, 2)[None, None, :]), 2).to(tl.uint8)
            at = page * G.page_bytes + HIGH + index * (row // 2)
            half = tl.arange(0, C // 2)[None, :]
            inside = mask[:, None] & (half < row // 2)
            tl.store(pool.codes + at[:, None] + half, top, mask=inside)


@triton.jit
def channel_plane(
    half, at, mask, S: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """float32 [C], or [T, C] of `at` and `mask` [T, 1]: float16 numbers of channels 4c + S from
    `at` on."""
    c = tl.arange(0, C) * 4 + S
    if len(at.shape) == 2:
        c = c[None, :]
    return tl.load(half + at + c, mask=mask & (c < SIZE), other=0.0).to(tl.float32)
