"""What codecs share in reading single tokens: T tokens of any pages.

`page` is int64 [T], `index` [T] a token's place in its page, and what `mask` [T] leaves out is read
as zero.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.layout import STEPS

STEP_COUNT = tl.constexpr(STEPS)


@triton.constexpr_function
def section(geometry, codec):
    """Where a codec's pages keep things."""
    return geometry.section(codec)


@triton.jit
def code_words(
    words, page, index, mask, OFFSET: tl.constexpr, ROW: tl.constexpr, PAD: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """int16 [T, PAD]: rows of ROW words of a section at byte OFFSET."""
    c = tl.arange(0, PAD)[None, :]
    at = words + (page * (G.page_bytes // 2) + index * ROW)[:, None] + OFFSET // 2 + c
    return tl.load(at, mask=mask[:, None] & (c < ROW), other=0)


@triton.jit
def token_scales(half, page, index, mask, OFFSET: tl.constexpr, G: tl.constexpr):
    """float32 [T, 1], one scale per token from a section at byte OFFSET."""
    at = half + page * (G.page_bytes // 2) + OFFSET // 2 + index
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def stored_positions(pool, page, index, mask, OFFSET: tl.constexpr, G: tl.constexpr):
    """int32 [T], from a section at byte OFFSET."""
    at = page * (G.page_bytes // 2)
    low = tl.load(pool.words + at + OFFSET // 2 + index, mask=mask, other=0)
    base = tl.load(pool.wide + page * (G.page_bytes // 4) + G.header // 4, mask=mask, other=0)
    steps = tl.zeros_like(base)
    for j in tl.static_range(STEP_COUNT):
        first = tl.load(pool.words + at + (G.header + 4) // 2 + j, mask=mask, other=-1)
        steps += ((first.to(tl.int32) & 0xFFFF) <= index).to(tl.int32)
    return base + (low.to(tl.int32) & 0xFFFF) + 65536 * steps
