"""Reading tiles of pages: K and V of T tokens of one page, by codec.

`raw`, `grid`, `half` and `words` are one storage as the model's dtype, that of int4's grids,
float16 and int16; `page` is a page index as int64, `first` the tile's first token and `n` how many
of the page's tokens are left from there. What lies past `n` is read as zero.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.kernels.tiles import grid_plane, rotation_sign


@triton.jit
def token_mask(n, T: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """bool [T, PAD]: tokens below `n`, channels below SIZE."""
    mask = (tl.arange(0, T) < n)[:, None]
    if SIZE != PAD:
        mask = mask & (tl.arange(0, PAD) < SIZE)[None, :]
    return mask


@triton.jit
def raw_keys(raw, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """[T, k_pad] of a raw or exact page."""
    row: tl.constexpr = G.k_size + G.v_size
    base = raw + page * (G.page_bytes // G.itemsize) + first * row
    at = tl.arange(0, T)[:, None] * row + tl.arange(0, G.k_pad)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, G.k_size, G.k_pad), other=0.0)


@triton.jit
def raw_values(raw, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """[T, v_pad] of a raw or exact page."""
    row: tl.constexpr = G.k_size + G.v_size
    base = raw + page * (G.page_bytes // G.itemsize) + first * row + G.k_size
    at = tl.arange(0, T)[:, None] * row + tl.arange(0, G.v_pad)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, G.v_size, G.v_pad), other=0.0)


@triton.jit
def token_scales(half, page, first, n, OFFSET: tl.constexpr, T: tl.constexpr, G: tl.constexpr):
    """float32 [T], one scale per token from a section at byte OFFSET."""
    t = tl.arange(0, T)
    base = half + page * (G.page_bytes // 2) + OFFSET // 2 + first
    return tl.load(base + t, mask=t < n, other=0.0).to(tl.float32)


@triton.jit
def code_words(
    words, page, first, n, OFFSET: tl.constexpr, ROW: tl.constexpr, PAD: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """int16 [T, PAD]: rows of ROW words of a section at byte OFFSET."""
    base = words + page * (G.page_bytes // 2) + OFFSET // 2 + first * ROW
    at = tl.arange(0, T)[:, None] * ROW + tl.arange(0, PAD)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, ROW, PAD), other=0)


@triton.jit
def int8_key_words(words, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """int16 [T, k_pad / 2]."""
    return code_words(words, page, first, n, G.int8.k, G.k_size // 2, G.k_pad // 2, T, G)


@triton.jit
def int8_value_words(words, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """int16 [T, v_pad / 2]."""
    return code_words(words, page, first, n, G.int8.v, G.v_size // 2, G.v_pad // 2, T, G)


@triton.jit
def int4_key_words(words, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """int16 [T, k_pad / 4]."""
    return code_words(words, page, first, n, G.int4.k, G.k_size // 4, G.k_pad // 4, T, G)


@triton.jit
def int4_value_words(words, page, first, n, T: tl.constexpr, G: tl.constexpr):
    """int16 [T, v_pad / 4]."""
    return code_words(words, page, first, n, G.int4.v, G.v_size // 4, G.v_pad // 4, T, G)


@triton.jit
def int4_key_plane(
    words, grid, page, first, S: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Plane S of the keys in `words`: DTYPE [T, k_pad / 4]. `grid` is the pool in the grids'
    dtype."""
    row: tl.constexpr = G.k_size // 4
    c = tl.arange(0, G.k_pad // 4)
    base = grid + page * (G.page_bytes // 2) + first // 64 * G.k_size + S * row
    half_scale = tl.load(base + G.int4.k_scale // 2 + c, mask=c < row, other=0.0)
    middle = tl.load(base + G.int4.k_middle // 2 + c, mask=c < row, other=0.0)
    return grid_plane(words, half_scale, middle, S, DTYPE, PTX)


@triton.jit
def plane_signs(S: tl.constexpr, G: tl.constexpr):
    """float32 [v_pad / 4], rotation_sign of plane S's channels."""
    return rotation_sign(tl.arange(0, G.v_pad // 4) * 4 + S)
