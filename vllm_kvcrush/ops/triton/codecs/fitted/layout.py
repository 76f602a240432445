"""What fitted pages look like inside; what is in them differs by head.

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
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcrush.codecs import layout

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
