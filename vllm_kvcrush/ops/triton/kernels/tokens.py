"""Reading single tokens: keys, values and positions of T tokens of any pages of one codec.

A kernel that knows several codecs needs the registers of all of them at once, and spills. So the
kernels that read or write pages of any codec are compiled once for each, `CODEC`, and all variants
are launched that a request may need; a program that finds no token of its codec leaves at once.

A new codec needs its number here and a branch in `reads` (if it is not the plain one), `keys_of`,
`values_of` and `positions_of`, one in `compaction.encode_kernel`, and its name in
`cache.RUNS`.

`raw`, `grid`, `half`, `words` and `wide` are the pool as the model's dtype, that of int4's grids,
float16, int16 and int32. `page` is int64 [T], `index` [T] a token's place in its page, and what
`mask` [T] leaves out is read as zero.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton.kernels.pages import plane_signs
from vllm_kvcrush.ops.triton.kernels.tiles import codes8, half_steps, interleave, planes_hadamard
from vllm_kvcrush.ops.triton.layout import STEPS

RAW, EXACT = tl.constexpr(CODECS["raw"].number), tl.constexpr(CODECS["exact"].number)
INT8, INT4 = tl.constexpr(CODECS["int8"].number), tl.constexpr(CODECS["int4"].number)
STEP_COUNT = tl.constexpr(STEPS)


@triton.jit
def reads(codec, CODEC: tl.constexpr):
    """Whether the variant for CODEC is the one for pages of `codec`: RAW's has exact ones too."""
    if CODEC == RAW:
        mine = codec <= EXACT
    else:
        mine = codec == CODEC
    return mine


@triton.constexpr_function
def positions_at(codec, geometry):
    """Byte of a page where positions begin; raw pages, which have none, count as exact."""
    return {INT8.value: geometry.int8, INT4.value: geometry.int4}.get(
        codec, geometry.exact
    ).positions


@triton.jit
def _elements(
    raw, page, index, mask, OFFSET: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PAD)[None, :]
    row: tl.constexpr = G.k_size + G.v_size
    at = raw + (page * (G.page_bytes // G.itemsize) + index * row)[:, None] + OFFSET + c
    return tl.load(at, mask=mask[:, None] & (c < SIZE), other=0.0).to(tl.float32)


@triton.jit
def _words(
    words, page, index, mask, OFFSET: tl.constexpr, ROW: tl.constexpr, PAD: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, PAD)[None, :]
    at = words + (page * (G.page_bytes // 2) + index * ROW)[:, None] + OFFSET // 2 + c
    return tl.load(at, mask=mask[:, None] & (c < ROW), other=0)


@triton.jit
def _scales(half, page, index, mask, OFFSET: tl.constexpr, G: tl.constexpr):
    at = half + page * (G.page_bytes // 2) + OFFSET // 2 + index
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _codes8(
    words, half, page, index, mask, OFFSET: tl.constexpr, SCALES: tl.constexpr,
    SIZE: tl.constexpr, PAD: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    w = _words(words, page, index, mask, OFFSET, SIZE // 2, PAD // 2, G)
    scale = _scales(half, page, index, mask, SCALES, G)
    even = codes8(w, 0, tl.float32, False) * scale
    odd = codes8(w, 1, tl.float32, False) * scale
    return tl.reshape(tl.join(even, odd), [T, PAD])


@triton.jit
def _key_plane4(w, grid, page, index, mask, S: tl.constexpr, G: tl.constexpr):
    """Plane S of the keys in words [T, k_pad / 4]: float32."""
    row: tl.constexpr = G.k_size // 4
    c = tl.arange(0, G.k_pad // 4)[None, :]
    at = page * (G.page_bytes // 2) + index // 64 * G.k_size + S * row
    at = grid + at[:, None] + G.int4.k_scale // 2 + c
    inside = mask[:, None] & (c < row)
    steps = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at += (G.int4.k_middle - G.int4.k_scale) // 2
    middle = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return half_steps(w, S, tl.float32, False) * steps + middle


@triton.jit
def keys_of(
    raw, grid, half, words, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """float32 [T, k_pad]."""
    if CODEC == INT8:
        x = _codes8(
            words, half, page, index, mask, G.int8.k, G.int8.k_scale, G.k_size, G.k_pad, T, G
        )
    elif CODEC == INT4:
        w = _words(words, page, index, mask, G.int4.k, G.k_size // 4, G.k_pad // 4, G)
        a = _key_plane4(w, grid, page, index, mask, 0, G)
        b = _key_plane4(w, grid, page, index, mask, 1, G)
        c = _key_plane4(w, grid, page, index, mask, 2, G)
        d = _key_plane4(w, grid, page, index, mask, 3, G)
        x = interleave(a, b, c, d, T, G.k_pad // 4)
    else:
        x = _elements(raw, page, index, mask, 0, G.k_size, G.k_pad, G)
    return x


@triton.jit
def values_of(
    raw, half, words, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    """float32 [T, v_pad]."""
    if CODEC == INT8:
        x = _codes8(
            words, half, page, index, mask, G.int8.v, G.int8.v_scale, G.v_size, G.v_pad, T, G
        )
    elif CODEC == INT4:
        C: tl.constexpr = G.v_pad // 4
        w = _words(words, page, index, mask, G.int4.v, G.v_size // 4, C, G)
        # Half steps; and past v_size, where words are zero, there is nothing to rotate back.
        scale = 0.5 * _scales(half, page, index, mask, G.int4.v_scale, G)
        a = half_steps(w, 0, tl.float32, False) * scale
        b = half_steps(w, 1, tl.float32, False) * scale
        c = half_steps(w, 2, tl.float32, False) * scale
        d = half_steps(w, 3, tl.float32, False) * scale
        a, b, c, d = planes_hadamard(a, b, c, d, T, C, G.rotation)
        a *= plane_signs(0, G)[None, :]
        b *= plane_signs(1, G)[None, :]
        c *= plane_signs(2, G)[None, :]
        d *= plane_signs(3, G)[None, :]
        x = interleave(a, b, c, d, T, C)
    else:
        x = _elements(raw, page, index, mask, G.k_size, G.v_size, G.v_pad, G)
    return x


@triton.jit
def positions_of(words, wide, page, index, mask, CODEC: tl.constexpr, G: tl.constexpr):
    """int32 [T]. RAW stands for exact pages here: raw ones know no positions."""
    start: tl.constexpr = positions_at(CODEC, G) // 2
    at = page * (G.page_bytes // 2)
    low = tl.load(words + at + start + index, mask=mask, other=0)
    base = tl.load(wide + page * (G.page_bytes // 4) + G.header // 4, mask=mask, other=0)
    steps = tl.zeros_like(base)
    for j in tl.static_range(STEP_COUNT):
        first = tl.load(words + at + (G.header + 4) // 2 + j, mask=mask, other=-1)
        steps += ((first.to(tl.int32) & 0xFFFF) <= index).to(tl.int32)
    return base + (low.to(tl.int32) & 0xFFFF) + 65536 * steps
