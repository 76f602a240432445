"""Reading single tokens of fitted pages: those functions of a `codecs.traits.Traits`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.codecs.fitted import tiles
from vllm_kvcrush.ops.triton.codecs.fitted.tiles import POSITIONS, WORDS, X_K, X_SCALE
from vllm_kvcrush.ops.triton.kernels.pages import plane_signs
from vllm_kvcrush.ops.triton.kernels.tiles import codes8, interleave, planes_hadamard
from vllm_kvcrush.ops.triton.kernels.tokens import STEP_COUNT


@triton.jit
def strip_origins(pool, page, index, mask, info, G: tl.constexpr):
    """int32 [T], where the strips' first tokens stand that tokens of any pages are in."""
    strip = index // 16
    at = pool.words + page * (G.page_bytes // 2)
    low = tl.load(at + tl.load(info + POSITIONS) // 2 + strip, mask=mask, other=0)
    base = tl.load(pool.wide + page * (G.page_bytes // 4) + G.header // 4, mask=mask, other=0)
    for j in tl.static_range(STEP_COUNT):
        first = tl.load(at + (G.header + 4) // 2 + j, mask=mask, other=-1).to(tl.int32) & 0xFFFF
        base += 65536 * (first <= strip).to(tl.int32)
    return base + (low.to(tl.int32) & 0xFFFF)


@triton.jit
def expand_keys(
    pool, tables, page, index, mask, T: tl.constexpr, EXACT: tl.constexpr, CODEC: tl.constexpr,
    G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys of tokens: both halves of their channels, float32 [T, H]."""
    H: tl.constexpr = G.half
    PART: tl.constexpr = 1 if EXACT else 0
    info = tables.info
    c = tl.arange(0, H)
    rows = pool.wide + page * (G.page_bytes // 4) + index * tl.load(info + WORDS)
    keys = tiles.fitted_keys(
        rows, mask, info, tables.fields, tables.inverse, tables.base, T, PART, G, DTYPE
    )
    low, high = tiles.halves(keys, T, G)
    if CODEC.own.local:
        position = strip_origins(pool, page, index, mask, info, G)
        cos, sin = tiles.angles(position, c, tables.coarse, tables.fine, tables.limit, G)
        low, high = low * cos - high * sin, high * cos + low * sin
    special = mask & tiles.exceptional(pool.words, page, index, mask, info, G)
    number = tiles.value_bytes(pool.codes, page, index, special, info, G)
    scale = pool.half + page * (G.page_bytes // 2) + tl.load(info + X_SCALE) // 2 + 2 * number
    scale = tl.load(scale, mask=special, other=0.0).to(tl.float32)[:, None]
    at = pool.codes + page * G.page_bytes + tl.load(info + X_K) + number * G.k_size
    at = at[:, None] + c[None, :]
    inside = special[:, None] & (c < G.k_size // 2)[None, :]
    x = tl.load(at, mask=inside, other=0).to(tl.int8, bitcast=True)
    y = tl.load(at + G.k_size // 2, mask=inside, other=0).to(tl.int8, bitcast=True)
    low = tl.where(special[:, None], x.to(tl.float32) * scale, low)
    high = tl.where(special[:, None], y.to(tl.float32) * scale, high)
    return low, high


@triton.jit
def expand_values(
    pool, tables, page, index, mask, T: tl.constexpr, CODEC: tl.constexpr, G: tl.constexpr
):
    """Values of tokens, float32 [T, v_pad]."""
    BITS: tl.constexpr = CODEC.own.bits
    C: tl.constexpr = G.v_pad // 4
    info = tables.info
    special = mask & tiles.exceptional(pool.words, page, index, mask, info, G)
    byte = tiles.value_bytes(pool.codes, page, index, mask, info, G)
    x = tiles.value_words(pool.words, pool.codes, page, index, mask, info, BITS, G)
    # Half steps; nothing past v_size, where there is nothing to rotate back.
    inside = (tl.arange(0, C) < G.v_size // 4)[None, :]
    scale = tl.where(inside, 0.5 * tiles.value_scales(byte)[:, None], 0.0)
    a = tiles.value_plane(x, 0, BITS, tl.float32, False) * scale
    b = tiles.value_plane(x, 1, BITS, tl.float32, False) * scale
    c = tiles.value_plane(x, 2, BITS, tl.float32, False) * scale
    d = tiles.value_plane(x, 3, BITS, tl.float32, False) * scale
    a, b, c, d = planes_hadamard(a, b, c, d, T, C, G.rotation)
    a *= plane_signs(0, G)[None, :]
    b *= plane_signs(1, G)[None, :]
    c *= plane_signs(2, G)[None, :]
    d *= plane_signs(3, G)[None, :]
    rows, scale = tiles.exception_rows(
        pool.words, pool.half, page, byte, special, info, 1, G.v_size, G.v_pad, G
    )
    even = codes8(rows, 0, tl.float32, False) * scale[:, None]
    odd = codes8(rows, 1, tl.float32, False) * scale[:, None]
    exact = tl.reshape(tl.join(even, odd), [T, G.v_pad])
    return tl.where(special[:, None], exact, interleave(a, b, c, d, T, C))


@triton.jit
def positions(pool, tables, page, index, mask, codec, CODEC: tl.constexpr, G: tl.constexpr):
    """int32 [T]. Those of the tokens that follow a strip's first one are taken to be its
    neighbours'."""
    return strip_origins(pool, page, index, mask, tables.info, G) + index % 16
