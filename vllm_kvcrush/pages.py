"""What fits into a page, and where: the sizes of csrc/layout.h, which has the picture.

A page is what one KV head of one layer fills with one block of raw tokens; whatever codec fills
it, its size in bytes is that, so fewer bits mean more tokens. A test asks the compiled library
whether the two descriptions agree.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIP = 16  # tokens that lie together
GROUP = 64  # tokens that share the scales of int4's keys
HEADER = 32  # bytes at the end of a page that says where its tokens stood
MAX_HEAD_SIZE = 256
MAX_SPAN = 15 * 65536  # positions that one page can span

# Names and numbers of the codecs. "raw" is the model's dtype without positions, as in the tail;
# "exact" is the same with positions.
CODECS = {"raw": 0, "exact": 1, "int8": 2, "int4": 3}


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
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is not one of {', '.join(CODECS)}")
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
