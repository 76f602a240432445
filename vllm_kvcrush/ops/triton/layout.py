"""What a page looks like inside on a GPU; imports no Triton. The codecs' modules have pictures.

A page has the size and holds the number of tokens that `vllm_kvcrush.codecs.layout` says, so plans
and directories are the same on every device. Only the order of the bytes differs: csrc/layout.h is
made for CPU vectors, this for loads of 128 bits and tensor cores. Everything is token-major.

Positions and the header at a page's end are those of csrc/layout.h, where index i is a strip's in
fitted pages: position(i) = base + low[i] + 65536 * #{j : first[j] <= i}.
Every section starts at a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_kvcrush import codecs
from vllm_kvcrush.codecs import layout

STEPS = 14  # of the high bits of positions, in a page's header
NEVER = 65535  # a step that a page does not reach
PLANES = 4  # codes of int4 in a word


@dataclass(frozen=True)
class Section:
    """Where a codec keeps things: byte offsets in a page, and bytes from one token to the next."""

    capacity: int  # tokens
    k: int
    k_row: int
    v: int
    v_row: int
    k_scale: int
    k_middle: int
    v_scale: int
    positions: int
    end: int  # of all but the header
    # Where a page is one chunk: third bits of codes, what tokens share, weights, single channels.
    k_high: int = 0
    v_high: int = 0
    shared: int = 0
    weights: int = 0
    singles: int = 0

    def __post_init__(self) -> None:
        starts = (
            *(self.k_scale, self.k_middle, self.v_scale, self.positions),
            *(self.shared, self.weights, self.singles),
        )
        assert all(start % 16 == 0 for start in starts), self


def _plain(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    row = (k_size + v_size) * itemsize
    end = capacity * row
    kept = 0 if codec == "raw" else 2 * capacity
    return Section(capacity, 0, row, k_size * itemsize, row, 0, 0, 0, end, end + kept)


def _int8(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    v = capacity * k_size
    scales = v + capacity * v_size
    end = scales + 4 * capacity
    return Section(
        *(capacity, 0, k_size, v, v_size, scales, 0, scales + 2 * capacity),
        *(end, end + 2 * capacity),
    )


def _int4(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    v = capacity * k_size // 2
    scales = v + capacity * v_size // 2
    k_scale = scales + 2 * capacity
    grids = 2 * k_size * -(-capacity // layout.GROUP)
    end = k_scale + 2 * grids
    return Section(
        *(capacity, 0, k_size // 2, v, v_size // 2, k_scale, k_scale + grids, scales),
        *(end, end + 2 * capacity),
    )


def _column_bytes(bits: int, size: int) -> tuple[int, int]:
    # Of a token's codes, and of their third bits beside them.
    return size * (4 if bits == 4 else 2) // 8, size // 8 if bits == 3 else 0


def _chunk(
    chunk: layout.Chunk, capacity: int, k_size: int, v_size: int, sizes: tuple[int, ...]
) -> Section:
    # sizes: bytes of what tokens share, of scales of K, of V, of weights, and of single channels.
    (k_row, k_more), (v_row, v_more) = (_column_bytes(chunk.bits, s) for s in (k_size, v_size))
    starts = [0]
    rows = (k_row, v_row, k_more, v_more)
    for size in (*(capacity * row for row in rows), *sizes):
        starts.append(starts[-1] + -(-size // 16) * 16)
    k, v, k_high, v_high, shared, k_scale, v_scale, weights, singles, end = starts
    return Section(
        *(capacity, k, k_row, v, v_row, k_scale, 0, v_scale, end, end + 2 * capacity),
        *(k_high, v_high, shared, weights, singles),
    )


def _tada(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    sizes = (2 * (k_size + v_size), 2 * capacity, 2 * capacity, 0, 0)
    return _chunk(layout.TADA, capacity, k_size, v_size, sizes)


def _gear(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    own = layout.GEAR
    shared = 2 * ((2 + own.rank) * k_size + own.rank * v_size)
    singles = capacity // layout.STRIP * 4 * (k_size // own.per_single)
    return _chunk(
        own, capacity, k_size, v_size, (shared, 0, 2 * capacity, 4 * own.rank * capacity, singles)
    )


# Of the codecs whose pages are alike in all heads; of (codec, capacity, k_size, v_size, itemsize).
SECTIONS: dict[str, Callable[[str, int, int, int, int], Section]] = {
    "raw": _plain,
    "exact": _plain,
    "int8": _int8,
    "int4": _int4,
    "tada": _tada,
    "gear": _gear,
}


@dataclass(frozen=True)
class Geometry:
    """One page, for every codec: a compile-time constant of the kernels.

    Attributes:
        block_size: tokens of a raw page, a multiple of 16.
        k_size, v_size: head sizes, multiples of 8 up to 256.
        itemsize: bytes of the model's dtype.
        page_bytes: of every page.
        header: byte offset of the header.
        k_pad, v_pad: head sizes rounded up to what a tile can have.
        half: the same of half a key, whose channels turn with those of the other.
        rotation: channels of one Hadamard transform of rotated values.
        sections: of the codecs whose pages are alike in all heads, by name.
    """

    block_size: int
    k_size: int
    v_size: int
    itemsize: int
    page_bytes: int
    header: int
    k_pad: int
    v_pad: int
    half: int
    rotation: int
    sections: tuple[tuple[str, Section], ...]

    @property
    def padded(self) -> bool:
        """Whether tiles are wider than heads, so that loads have masks for it."""
        return (self.k_pad, self.v_pad) != (self.k_size, self.v_size)

    @classmethod
    def of(cls, block_size: int, k_size: int, v_size: int, itemsize: int) -> Geometry:
        """Raises ValueError where no kernel can read such pages."""
        if block_size % 16 or block_size < 16:
            raise ValueError(f"block size {block_size} is not a multiple of 16")
        page_bytes = block_size * (k_size + v_size) * itemsize
        header = page_bytes - layout.HEADER
        found = []
        for codec, section_of in SECTIONS.items():
            capacity = codecs.CODECS[codec].capacity(page_bytes, k_size, v_size, itemsize)
            section = section_of(codec, capacity, k_size, v_size, itemsize)
            assert section.end <= (page_bytes if codec == "raw" else header)
            found.append((codec, section))
        return cls(
            block_size,
            k_size,
            v_size,
            itemsize,
            page_bytes,
            header,
            _pad(k_size),
            _pad(v_size),
            half_pad(k_size),
            v_size & -v_size,
            tuple(found),
        )

    def section(self, codec: str) -> Section:
        """The section of a codec, by its name."""
        return dict(self.sections)[codec]


def _pad(size: int) -> int:
    # A product's inner dimension is at least 16, in each of int4's planes too.
    return max(16 * PLANES, 1 << (size - 1).bit_length())


def half_pad(k_size: int) -> int:
    """Columns of a tile of half the channels of a key."""
    return max(16, 1 << (k_size // 2 - 1).bit_length())


# Pages of 128 tokens of two heads of 64, as in csrc/layout.h.
_example = Geometry.of(128, 64, 64, 2)
_of = _example.section
assert (_example.page_bytes, _of("raw").capacity, _of("raw").end) == (32768, 128, 32768)
assert (_of("exact").capacity, _of("exact").end) == (112, 112 * (256 + 2))
assert (_of("int8").capacity, _of("int8").end) == (240, 240 * (128 + 4 + 2))
assert (_of("int4").capacity, _of("int4").end) == (448, 448 * (64 + 2 + 2) + 7 * 64 * 4)
