"""What fits into a page, and where: the sizes of csrc/layout.h, which has a picture.

A page has as many bytes as one block of raw tokens of one KV head of one layer, whatever codec
fills it, so that fewer bits mean more tokens. A test checks that the compiled library agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

STRIP = 16  # tokens that are stored together
GROUP = 64  # tokens that share the scales of int4's keys
HEADER = 32  # bytes at the end of a page that keeps positions
MAX_HEAD_SIZE = 256
MAX_SPAN = 15 * 65536  # positions that one page can span
MAX_TOKENS = 65520  # tokens in a page: counts are 16 bits wide

TOKEN_SCALES = 18  # bytes of a strip's value scales and exception bits
MOST_EXCEPTIONS = 128
# A request's first tokens draw attention whatever the query: they are always exceptions.
SINKS = 4


@dataclass(frozen=True)
class Chunk:
    """How the tokens of a page are coded that is one chunk.

    Attributes:
        bits: of a channel, 2 to 4.
        rank: of the product beside the codes of either side.
        per_single: channels of a key for each one that a strip keeps apart; 0: none.
    """

    bits: int
    rank: int = 0
    per_single: int = 0


TADA = Chunk(3)
GEAR = Chunk(4, rank=1, per_single=8)


class Widths(NamedTuple):
    """How wide the tokens of one head are in the pages of a codec that needs tables.

    Attributes:
        words: number of 32-bit words of a key's codes.
        value_bits: bits of a value's channel.
        exceptions: least share of a page's tokens that are int8 instead.
    """

    words: int
    value_bits: int
    exceptions: float


@dataclass(frozen=True)
class PageLayout:
    """Where a page keeps its tokens, in bytes.

    Attributes:
        v: bytes of a strip before its values.
        strip: bytes of a strip.
        positions: bytes of the page before the positions, which are uint16.
        end: bytes of everything but the page's header, which is at the page's end.
    """

    v: int
    strip: int
    positions: int
    end: int


@dataclass(frozen=True)
class FlatLayout(PageLayout):
    """A page of a codec that is alike in all heads; it has a position for each token.

    Attributes:
        group_strips: strips of 16 tokens that share a header.
        header: bytes of a group's scales, which come before its strips.
        first: bytes of what a page's tokens share, which come before its groups.
    """

    group_strips: int
    header: int
    first: int = 0


@dataclass(frozen=True)
class FittedLayout(PageLayout):
    """A page of a fitted codec; it has a position for each strip.

    Attributes:
        scales: bytes of the page before the strips' scales and exception bits.
        exceptions: bytes of the page before the int8 tokens.
    """

    scales: int
    exceptions: int


def check_head_sizes(*sizes: int) -> None:
    """Raises ValueError for a head size that no kernel reads."""
    for size in sizes:
        if size % 8 or not 0 < size <= MAX_HEAD_SIZE:
            raise ValueError(f"head size {size} is not a multiple of 8 up to {MAX_HEAD_SIZE}")


def most_tokens(end: Callable[[int], int], room: int) -> int:
    """Returns the most tokens, a multiple of 16, that take up to `room` bytes; `end` returns the
    bytes of a number of tokens."""
    low, high = 0, MAX_TOKENS // STRIP
    while low < high:
        middle = (low + high + 1) // 2
        if end(middle * STRIP) <= room:
            low = middle
        else:
            high = middle - 1
    return low * STRIP


# -- pages that are alike in all heads ------------------------------------------------------------
# Arguments are those of `Codec.layout`.


def _flat(
    tokens: int,
    k_size: int,
    v_size: int,
    bits: int,
    *,
    header: int = 0,
    group_strips: int = 1,
    position_bytes: int = 2,
) -> FlatLayout:
    v = STRIP * k_size * bits // 8
    strip = v + STRIP * v_size * bits // 8
    strips = tokens // STRIP
    positions = -(-strips // group_strips) * header + strips * strip
    end = positions + position_bytes * tokens
    return FlatLayout(v, strip, positions, end, group_strips, header)


def plain(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page in the model's dtype without positions."""
    return _flat(tokens, k_size, v_size, 8 * itemsize, position_bytes=0)


def exact(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page in the model's dtype."""
    return _flat(tokens, k_size, v_size, 8 * itemsize)


def int8(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page in 8 bits a channel, with a float16 scale for each key and
    value."""
    return _flat(tokens, k_size, v_size, 8, header=2 * 2 * STRIP)


def int4(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page in 4 bits a channel. Each 64 tokens have a float16 scale and
    zero for each key channel and a float16 scale for each value, padded to a multiple of 64
    bytes."""
    header = -(-(2 * 2 * k_size + 2 * GROUP) // 64) * 64
    return _flat(tokens, k_size, v_size, 4, header=header, group_strips=GROUP // STRIP)


# -- pages that are one chunk ----------------------------------------------------------------------


def _lines(size: int, line: int = 64) -> int:
    return -(-size // line) * line


def code_bytes(bits: int, channels: int) -> int:
    """Returns the bytes of the codes of a strip's values. The high bits of 8 left-over channels of
    3 bits take as much room as those of 16."""
    return STRIP * channels * bits // 8 + (channels % 16 * 2 if bits == 3 else 0)


def _chunk(
    tokens: int, k_size: int, v_size: int, bits: int, shared: int, each: int, more: int = 0
) -> FlatLayout:
    # Float16 numbers that all tokens of a page share, those of each token, and further bytes of
    # each strip.
    first, header = _lines(2 * shared), _lines(2 * STRIP * each + more, 32)
    v = code_bytes(bits, _lines(k_size, 16))
    strip = v + code_bytes(bits, v_size)
    positions = (first if tokens else 0) + tokens // STRIP * (header + strip)
    return FlatLayout(v, strip, positions, positions + 2 * tokens, 1, header, first)


def tada_pages(chunk: Chunk, tokens: int, k_size: int, v_size: int) -> FlatLayout:
    """Returns the layout of a page that keeps the mean of its keys and of its values in float16,
    and what each token adds in codes with a float16 scale a side."""
    return _chunk(tokens, k_size, v_size, chunk.bits, k_size + v_size, 2)


def gear_pages(chunk: Chunk, tokens: int, k_size: int, v_size: int) -> FlatLayout:
    """Returns the layout of a page in codes with a float16 scale and zero for each key channel and
    a float16 scale for each value; beside them, in float16, products of low rank, and the rests of
    some channels of each strip's keys with their places."""
    shared = (2 + chunk.rank) * k_size + chunk.rank * v_size
    singles = 4 * (k_size // chunk.per_single) if chunk.per_single else 0
    return _chunk(tokens, k_size, v_size, chunk.bits, shared, 1 + 2 * chunk.rank, singles)


def tada(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page of "tada"."""
    return tada_pages(TADA, tokens, k_size, v_size)


def gear(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FlatLayout:
    """Returns the layout of a page of "gear"."""
    return gear_pages(GEAR, tokens, k_size, v_size)


# -- pages that are fitted to a model -------------------------------------------------------------


def fitted_layout(
    tokens: int, exceptions: int, words: int, v_bits: int, k_size: int, v_size: int
) -> FittedLayout:
    """Returns the layout of a page of `tokens` tokens, a multiple of 16, of which `exceptions` are
    int8.

    Args:
        words: number of 32-bit words of a key's codes.
        v_bits: bits of a value's channel.
        k_size, v_size: head sizes.
    """
    v = STRIP * 4 * words
    strip = v + code_bytes(v_bits, v_size)
    scales = tokens // STRIP * strip
    first = scales + tokens // STRIP * TOKEN_SCALES
    positions = first + exceptions * _exception_bytes(k_size, v_size)
    end = positions + 2 * (tokens // STRIP)
    return FittedLayout(v, strip, positions, end, scales, first)


def _exception_bytes(k_size: int, v_size: int) -> int:
    return k_size + v_size + 4


def _fewest_exceptions(tokens: int, share: float) -> int:
    wanted = max(SINKS, math.ceil(share * tokens))
    return min(tokens, MOST_EXCEPTIONS, wanted)


def fitted(
    tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
) -> FittedLayout:
    """Returns the layout of a page of a fitted codec with the fewest exceptions that it may
    have."""
    assert widths is not None
    fewest = _fewest_exceptions(tokens, widths.exceptions)
    return fitted_layout(tokens, fewest, widths.words, widths.value_bits, k_size, v_size)


def fitted_capacity(
    page_bytes: int, words: int, v_bits: int, k_size: int, v_size: int, share: float
) -> tuple[int, int]:
    """Returns how many tokens a page of a fitted codec holds, a multiple of 16, and how many of
    them are int8: (0, 0) if none fit.

    At least the share `share` of them is int8, and the sinks; bytes that are left over are filled
    with further int8 tokens.
    """

    def end(tokens: int) -> int:
        fewest = _fewest_exceptions(tokens, share)
        return fitted_layout(tokens, fewest, words, v_bits, k_size, v_size).end

    room = page_bytes - HEADER
    tokens = most_tokens(end, room)
    more = (room - end(tokens)) // _exception_bytes(k_size, v_size) if tokens else 0
    fewest = _fewest_exceptions(tokens, share)
    return tokens, min(tokens, MOST_EXCEPTIONS, fewest + more)
