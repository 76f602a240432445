"""What fits into a page, and where: the sizes of csrc/layout.h, which has the picture.

A page is what one KV head of one layer fills with one block of raw tokens; whatever codec fills
it, its size in bytes is that, so fewer bits mean more tokens. A test asks the compiled library
whether the two descriptions agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

STRIP = 16  # tokens that lie together
GROUP = 64  # tokens that share the scales of int4's keys
HEADER = 32  # bytes at the end of a page that says where its tokens stood
MAX_HEAD_SIZE = 256
MAX_SPAN = 15 * 65536  # positions that one page can span

# Names and numbers of the codecs. "raw" is the model's dtype without positions, as in the tail;
# "exact" is the same with positions.
CODECS = {"raw": 0, "exact": 1, "int8": 2, "int4": 3, "tc4": 4, "tc6": 5, "tc8": 6}
# Codecs that are fitted to a model: pages of each head hold a number of tokens of their own.
FITTED = ("tc4", "tc6", "tc8")
TOKEN_SCALES = 18  # bytes of a strip's value scales and exception bits
MOST_EXCEPTIONS = 128
FEWEST_EXCEPTIONS = 4  # a request's first tokens


@dataclass(frozen=True)
class Layout:
    """Bytes of a page that holds so many tokens.

    Attributes:
        group_strips: strips of 16 tokens that share a header.
        header: bytes of a group before its strips: scales.
        v: bytes of a strip before its V.
        strip: bytes of a strip.
        positions: bytes of the page before the positions, uint16 for each token.
        end: bytes of everything but the page's header, which sits at its end.
    """

    group_strips: int
    header: int
    v: int
    strip: int
    positions: int
    end: int


def layout(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Layout:
    """Where a page that holds `capacity` tokens keeps them.

    Args:
        codec: a name in CODECS.
        capacity: tokens, a multiple of 16.
        k_size, v_size: head sizes.
        itemsize: bytes of an element of the model's dtype.
    """
    bits = {"int8": 8, "int4": 4}.get(codec, 8 * itemsize)
    group_strips, header = 1, 0
    if codec == "int8":
        header = 2 * 2 * STRIP
    elif codec == "int4":
        group_strips = GROUP // STRIP
        header = -(-(2 * 2 * k_size + 2 * GROUP) // 64) * 64
    v = STRIP * k_size * bits // 8
    strip = v + STRIP * v_size * bits // 8
    strips = capacity // STRIP
    positions = -(-strips // group_strips) * header + strips * strip
    end = positions + (0 if codec == "raw" else 2 * capacity)
    return Layout(group_strips, header, v, strip, positions, end)


def capacity(codec: str, page_bytes: int, k_size: int, v_size: int, itemsize: int) -> int:
    """Tokens that a page holds, all metadata included: a multiple of 16, 0 if none fit.

    Args:
        codec: a name in CODECS.
        page_bytes: block_size * (k_size + v_size) * itemsize.
        k_size, v_size: head sizes, multiples of 8 up to 256.
        itemsize: bytes of an element of the model's dtype.
    """
    if codec not in CODECS or codec in FITTED:
        flat = [name for name in CODECS if name not in FITTED]
        raise ValueError(f"codec {codec!r} is not one of {', '.join(flat)}")
    for size in (k_size, v_size):
        if size % 8 or not 0 < size <= MAX_HEAD_SIZE:
            raise ValueError(f"head size {size} is not a multiple of 8 up to {MAX_HEAD_SIZE}")
    room = page_bytes - (0 if codec == "raw" else HEADER)
    low, high = 0, 65520 // STRIP  # counts are 16 bits wide
    while low < high:
        middle = (low + high + 1) // 2
        if layout(codec, middle * STRIP, k_size, v_size, itemsize).end <= room:
            low = middle
        else:
            high = middle - 1
    return low * STRIP


@dataclass(frozen=True)
class FittedLayout:
    """Where a page of a fitted codec keeps its tokens; bytes, as in `Layout`.

    Attributes:
        v: of a strip before its V.
        strip: of a strip.
        scales: of the page before the strips' scales and exception bits.
        exceptions: of the page before the int8 tokens.
        positions: of the page before the positions, uint16 for each strip.
        end: of everything but the page's header.
    """

    v: int
    strip: int
    scales: int
    exceptions: int
    positions: int
    end: int


def fitted_layout(
    tokens: int, exceptions: int, words: int, v_bits: int, k_size: int, v_size: int
) -> FittedLayout:
    """A page of `tokens` tokens, a multiple of 16, of which `exceptions` are int8.

    Args:
        words: 32-bit words of a key's codes.
        v_bits: bits of a value's channel.
        k_size, v_size: head sizes.
    """
    v = STRIP * 4 * words
    strip = v + STRIP * v_size * v_bits // 8
    if v_bits == 3:  # high bits of 8 lanes take the place of 16
        strip += v_size % 16 * 2
    scales = tokens // STRIP * strip
    first = scales + tokens // STRIP * TOKEN_SCALES
    positions = first + exceptions * _exception_bytes(k_size, v_size)
    return FittedLayout(v, strip, scales, first, positions, positions + 2 * (tokens // STRIP))


def _exception_bytes(k_size: int, v_size: int) -> int:
    return k_size + v_size + 4


def fitted_capacity(
    page_bytes: int, words: int, v_bits: int, k_size: int, v_size: int, share: float
) -> tuple[int, int]:
    """Tokens that a page of a fitted codec holds, a multiple of 16, and how many of them are int8.

    At least `share` of them, and the sinks; what the strips leave over is filled with more, so that
    a page has no unused bytes. (0, 0) if none fit.
    """

    def least(tokens: int) -> int:
        wanted = max(FEWEST_EXCEPTIONS, math.ceil(share * tokens))
        return min(tokens, MOST_EXCEPTIONS, wanted)

    def end(tokens: int) -> int:
        return fitted_layout(tokens, least(tokens), words, v_bits, k_size, v_size).end

    room = page_bytes - HEADER
    low, high = 0, 65520 // STRIP
    while low < high:
        middle = (low + high + 1) // 2
        if end(middle * STRIP) <= room:
            low = middle
        else:
            high = middle - 1
    tokens = low * STRIP
    more = (room - end(tokens)) // _exception_bytes(k_size, v_size) if tokens else 0
    return tokens, min(tokens, MOST_EXCEPTIONS, least(tokens) + more)
