"""What a page looks like inside on a GPU. Defined here once.

A page has the size and holds the number of tokens that `vllm_kvcrush.codecs.layout` says, so plans
and directories are the same on every device. Only the order of the bytes differs: csrc/layout.h is
made for CPU vectors, this for loads of 128 bits and tensor cores. Everything is token-major.

    raw     [K row | V row] of token 0, of token 1, ...          what vLLM's own GPU backends store
            in a block-outermost cache (KVCacheLayout.BLHNC): one token of one head is k_size, then
            v_size elements of the model's dtype, the tokens of a (block, head) are one run
    exact   the same for fewer tokens, then positions

    int8    | K codes     | V codes     | K scales | V scales | positions |     | header |
            | cap x k_size| cap x v_size| cap f16  | cap f16  | cap u16   |     | 32 B   |
    int4    | K codes       | V codes       | V scales | K grids | positions |  | header |
            | cap x k_size/2| cap x v_size/2| cap f16  | below   | cap u16   |  | 32 B   |
            K grids: half scales of group 0, of group 1, ..., then middles; k_size x 2 B each

Codes are those of csrc/layout.h: int8 has one scale per token and side, code in -127..127; int4
keys are zero + scale * code per channel and group of 64 tokens, code in 0..15; int4 values are
rotated (R = Hadamard blocks times signs), R v = scale * (code - 7.5) with one scale per token.
int4's keys are read as middle + half scale * (2 code - 15), so scale / 2 and zero + 7.5 scale are
what is stored, in bfloat16 for bfloat16 models and float16 for others: no conversion in the loop.

Kernels read 16-bit words, whose codes are unpacked as planes: word i of an int8 row holds channels
2i (low byte) and 2i + 1, of an int4 row 4i (lowest bits) to 4i + 3, and plane s is the channels
2i + s or 4i + s. One shift and a few logical and float operations turn two words into two 16-bit
floats. A group's half scales (and middles) are stored plane by plane. A Hadamard transform over 2^n
channels is one of 4 between the planes and one of 2^(n-2) within each.

    tc4, tc6, tc8 (fitted to a model; what is in them differs by head)
            | K codes         | V codes              | V high         | V scales |
            | cap x words x 4 | cap x v_size/4 or /2 | cap x v_size/8 | cap x u8 |
            | exceptions' K | exceptions' V | their scales     | exception bits | positions   |
            | n x k_size    | n x v_size    | K, V f16 of each | u16 a strip    | u16 a strip |
            and the header

Keys of fitted codecs are words of fields (`kvc_piece` of csrc/kvcrush.h), in byte j component j of
a quad. Values are rotated, R v = scale * (code - (2^bits - 1) / 2) with scale = 2^((byte - 128) /
16), 0 of byte 0. Of 4 bits they lie as int4's do. Of 2, a 16-bit word j of a row holds channels 4j
to 4j + 3 in its low byte and 4 (j + v_size / 8) to the third after it in its high byte; of 3, these
are the low bits, and byte j of "V high" holds the high bits of the same channels, in its low and
its high half. Exceptions are int8 as in int8 pages; a token that is one has its bit, and in place
of its value's scale the number of its row.

positions and header are those of csrc/layout.h, where index i is a strip's in fitted pages:
position(i) = base + low[i] + 65536 * #{j : first[j] <= i}.
Every section starts at a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcrush import codecs
from vllm_kvcrush.codecs import layout

STEPS = 14  # of the high bits of positions, in a page's header
NEVER = 65535  # a step that a page does not reach
PLANES = 4  # codes of int4 in a word
CODECS = ("raw", "exact", "int8", "int4")  # whose pages are alike in all heads

# Of fitted codecs:
CHUNK = 16  # pieces that are multiplied together
WORD_FIELDS = 8  # most fields of a word
# What kernels are told of a head's pages and tables: offsets in bytes as in FittedSection, then
# chunks of pieces, and where the head's rows are among all.
FIELDS = (
    *("capacity", "exceptions", "words", "v_bits"),
    *("v", "v_high", "v_scale", "x_k", "x_v", "x_scale", "bits", "positions"),
    *("chunks", "decode", "inverse", "encode", "slots"),
)


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

    def __post_init__(self) -> None:
        starts = (self.k_scale, self.k_middle, self.v_scale, self.positions)
        assert all(start % 16 == 0 for start in starts), self


def _section(codec: str, capacity: int, k_size: int, v_size: int, itemsize: int) -> Section:
    if codec in ("raw", "exact"):
        row = (k_size + v_size) * itemsize
        end = capacity * row
        kept = 0 if codec == "raw" else 2 * capacity
        return Section(capacity, 0, row, k_size * itemsize, row, 0, 0, 0, end, end + kept)
    halves = 2 if codec == "int8" else 1  # half bytes of a code
    k_row, v_row = k_size * halves // 2, v_size * halves // 2
    v = capacity * k_row
    scales = v + capacity * v_row
    if codec == "int8":
        end = scales + 4 * capacity
        return Section(
            capacity, 0, k_row, v, v_row, scales, 0, scales + 2 * capacity, end, end + 2 * capacity
        )
    grids = 2 * k_size * -(-capacity // layout.GROUP)
    k_scale = scales + 2 * capacity
    end = k_scale + 2 * grids
    return Section(
        capacity, 0, k_row, v, v_row, k_scale, k_scale + grids, scales, end, end + 2 * capacity
    )


@dataclass(frozen=True)
class FittedSection:
    """Where a head's pages of a fitted codec keep things: byte offsets in a page.

    Attributes:
        capacity, exceptions: tokens, and how many of them are int8.
        words: 32-bit words of a key's codes, which come first.
        v_bits: of a value's channel.
        v, v_high, v_scale: codes of values, their highest bits if there are 3, and scales.
        x_k, x_v, x_scale: exceptions' keys, values and scales.
        bits: which tokens are exceptions.
        end: of all but the header.
    """

    capacity: int
    exceptions: int
    words: int
    v_bits: int
    v: int
    v_high: int
    v_scale: int
    x_k: int
    x_v: int
    x_scale: int
    bits: int
    positions: int
    end: int

    @classmethod
    def of(
        cls, capacity: int, exceptions: int, words: int, v_bits: int, k_size: int, v_size: int
    ) -> FittedSection:
        """Sections for as many tokens as `layout.fitted_capacity` says."""
        strips = capacity // layout.STRIP
        v = 4 * words * capacity
        v_high = v + capacity * v_size * (4 if v_bits == 4 else 2) // 8
        v_scale = v_high + (capacity * v_size // 8 if v_bits == 3 else 0)
        x_k = v_scale + capacity
        x_v = x_k + exceptions * k_size
        x_scale = x_v + exceptions * v_size
        bits = x_scale + 4 * exceptions
        positions = bits + 2 * strips
        end = positions + 2 * strips
        most = layout.fitted_layout(capacity, exceptions, words, v_bits, k_size, v_size)
        assert end <= most.end and not (v | v_high | v_scale | x_k) % 16
        return cls(
            *(capacity, exceptions, words, v_bits, v, v_high, v_scale),
            *(x_k, x_v, x_scale, bits, positions, end),
        )


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
        rotation: channels of one Hadamard transform of int4's values.
        raw, exact, int8, int4: the codecs' sections.
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
    raw: Section
    exact: Section
    int8: Section
    int4: Section

    @classmethod
    def of(cls, block_size: int, k_size: int, v_size: int, itemsize: int) -> Geometry:
        """Raises ValueError where no kernel can read such pages."""
        if block_size % 16 or block_size < 16:
            raise ValueError(f"block size {block_size} is not a multiple of 16")
        page_bytes = block_size * (k_size + v_size) * itemsize
        header = page_bytes - layout.HEADER
        sections = {}
        for codec in CODECS:
            capacity = codecs.CODECS[codec].capacity(page_bytes, k_size, v_size, itemsize)
            section = _section(codec, capacity, k_size, v_size, itemsize)
            assert section.end <= (page_bytes if codec == "raw" else header)
            sections[codec] = section
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
            **sections,
        )

    def section(self, codec: str) -> Section:
        """The section of a codec, by its name in CODECS."""
        found: Section = getattr(self, codec)
        return found


def _pad(size: int) -> int:
    # A product's inner dimension is at least 16, in each of int4's planes too.
    return max(16 * PLANES, 1 << (size - 1).bit_length())


def half_pad(k_size: int) -> int:
    """Columns of a tile of half the channels of a key."""
    return max(16, 1 << (k_size // 2 - 1).bit_length())


# Pages of 128 tokens of two heads of 64, as in csrc/layout.h.
_example = Geometry.of(128, 64, 64, 2)
assert (_example.page_bytes, _example.raw.capacity, _example.raw.end) == (32768, 128, 32768)
assert (_example.exact.capacity, _example.exact.end) == (112, 112 * (256 + 2))
assert (_example.int8.capacity, _example.int8.end) == (240, 240 * (128 + 4 + 2))
assert (_example.int4.capacity, _example.int4.end) == (448, 448 * (64 + 2 + 2) + 7 * 64 * 4)
