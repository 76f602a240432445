"""What the GPU kernels know of fitted codecs: transforms, fields and page offsets of every head.

`kvc_head_table` of csrc/kvcrush.h in the form that tiles want, with rows in the order in which
kernels read them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.codecs.transform.bits import QUAD, Piece, pieces
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton.codecs.fitted.layout import (
    CHUNK,
    FIELDS,
    WORD_FIELDS,
    FittedSection,
)
from vllm_kvcrush.ops.triton.layout import half_pad


@dataclass(frozen=True)
class LayerTable:
    """One fitted codec in one layer; arguments as `ops.cpu.LayerTable` has them."""

    tables: Tables
    layer: int
    heads: range
    page_bytes: int
    v_size: int
    angles: Angles

    @property
    def sections(self) -> list[FittedSection]:
        """Where each head's pages keep things."""
        t, found = self.tables, []
        for head in self.heads:
            room = t.capacity(self.layer, head, self.page_bytes, self.v_size)
            words, bits = int(t.words[self.layer, head]), int(t.value_bits[self.layer, head])
            found.append(FittedSection.of(*room, words, bits, t.rope.size, self.v_size))
        return found


@dataclass(frozen=True)
class Variant:
    """Pages that one compiled kernel reads: those of heads whose values have equally many bits.

    Attributes:
        place: of the codec among a layer's.
        kv_heads: that the tables are of.
        local: whether keys are coded as seen from their strip's first token.
        bits: of values.
        shared: there are heads whose values have other bits.
    """

    place: int
    kv_heads: int
    local: bool
    bits: int
    shared: bool = False


class Fitted:
    """A layer's tables on its device, or those of several layers.

    Attributes:
        codecs: names of the fitted codecs that there are, in the order of `FITTED`.
        local: by codec, whether keys are coded as seen from their strip's first token.
        sections: by codec, of each head.
        variants: by codec, one for each number of bits that values have.
        info: int32 [codecs, heads, len(FIELDS)].
        exceptions: int32 [codecs, heads], of a full page; a part of `info`.
        fields: int32, rows that `info` points to: word, first bit and mask of each piece; quad,
            weight, mask and first bit of each word's fields.
        inverse: [rows, 2, 2 half], the model's dtype: a key for each piece's components, and what
            rounding to this dtype left over; channels in the order of `tiles.fitted_keys`.
        base: float32 [codecs, heads, 2, 2 half], in the same order: what codes of 0 stand for under
            the rounded inverse, and under both of its parts.
        mean: float32 [codecs, heads, 2 half], of keys.
        forward: float32 [codecs, heads, 2 half, k_pad]: a component is a column.
        cost, top: float32 [codecs, heads, k_pad]: of an error of 1, and the largest code.
        coarse, fine: float32 [rows, 2 half], cosines and sines as `Angles` has them.
        positions: how many are known.
    """

    def __init__(
        self,
        tables: Mapping[str, LayerTable],
        dtype: torch.dtype,
        k_pad: int,
        device: torch.device,
    ):
        self.codecs = tuple(codec for codec in FITTED if codec in tables)
        self.sections = {codec: tables[codec].sections for codec in self.codecs}
        self.local = {codec: tables[codec].tables.point.local for codec in self.codecs}
        self._dtype, self._k_pad = dtype, k_pad
        self._fields: list[Tensor] = []
        self._inverse: list[Tensor] = []
        self._used = self._rows = 0
        heads = []
        for codec in self.codecs:
            own = tables[codec]
            for head, section in zip(own.heads, self.sections[codec], strict=True):
                heads.append(self._head(own.tables, own.layer, head, section))
        angles = tables[self.codecs[0]].angles
        self.positions, (self.coarse, self.fine) = angles.positions, _shared(angles, device)
        shape = (len(self.codecs), len(tables[self.codecs[0]].heads))
        columns = [
            torch.stack(x).view(*shape, *x[0].shape).to(device) for x in zip(*heads, strict=True)
        ]
        self.info, self.base, self.mean, self.forward, self.cost, self.top = columns
        self.exceptions = self.info[..., FIELDS.index("exceptions")].contiguous()
        self.fields = torch.cat(self._fields).to(device)
        self.inverse = torch.cat(self._inverse).to(device)
        del self._fields, self._inverse
        self.variants = self._variants()

    def _variants(self) -> dict[str, tuple[Variant, ...]]:
        heads, found = self.info.stride(0) // self.info.stride(1), {}
        for i, codec in enumerate(self.codecs):
            bits = sorted({section.v_bits for section in self.sections[codec]})
            found[codec] = tuple(
                Variant(i, heads, self.local[codec], b, len(bits) > 1) for b in bits
            )
        return found

    @classmethod
    def joined(cls, layers: Sequence[Fitted]) -> Fitted:
        """The tables of several layers as those of one that has the heads of all, a layer's after
        the other's."""
        whole = copy.copy(layers[0])
        whole.sections = {
            codec: [section for own in layers for section in own.sections[codec]]
            for codec in whole.codecs
        }
        info, rows, used = [], 0, 0
        for own in layers:
            moved = own.info.clone()
            for name, by in (("decode", used), ("encode", used), ("inverse", rows)):
                moved[..., FIELDS.index(name)] += by
            info.append(moved)
            used, rows = used + len(own.fields), rows + len(own.inverse)
        whole.info = torch.cat(info, 1)
        for name in ("base", "mean", "forward", "cost", "top", "exceptions"):
            setattr(whole, name, torch.cat([getattr(own, name) for own in layers], 1))
        for name in ("fields", "inverse"):
            setattr(whole, name, torch.cat([getattr(own, name) for own in layers]))
        whole.variants = whole._variants()
        return whole

    def part(self, first: int, heads: int) -> Fitted:
        """The tables of some of the heads: parts of these."""
        part, own = copy.copy(self), slice(first, first + heads)
        part.sections = {codec: sections[own] for codec, sections in self.sections.items()}
        for name in ("info", "base", "mean", "forward", "cost", "top", "exceptions"):
            setattr(part, name, getattr(self, name)[:, own])
        part.variants = part._variants()
        return part

    def tables(self) -> tuple[object, ...]:
        """What kernels take as `info`, `fields`, `inverse`, `base`, `coarse`, `fine`, `limit`."""
        return (
            *(self.info, self.fields, self.inverse, self.base),
            *(self.coarse, self.fine, self.positions),
        )

    def _head(self, t: Tables, layer: int, head: int, at: FittedSection) -> tuple[Tensor, ...]:
        bits, inverse = t.bits[layer, head].long(), t.inverse[layer, head].double()
        found = pieces(bits)
        padded = -(-max(1, len(found)) // CHUNK) * CHUNK
        decode = torch.zeros(3, padded, dtype=torch.int32)
        rows = torch.zeros(padded, QUAD, len(bits), dtype=torch.float64)
        middle = torch.zeros(padded, QUAD, 1, dtype=torch.float64)
        for i, piece in enumerate(found):
            decode[:, i] = torch.tensor([piece.word, piece.first, _mask(piece)])
            quad = slice(QUAD * piece.quad, QUAD * (piece.quad + 1))
            rows[i] = inverse[:, quad].T * 2**piece.weight
            middle[i] = (2**piece.bits - 1) / 2
        mean = t.key_mean[layer, head].double()
        first = rows.to(self._dtype)
        rest = (rows - first.double()).to(self._dtype)
        start = [mean - (part * middle).sum((0, 1)) for part in (first.double(), rows)]
        parts = _pairs(torch.stack([first, rest], 2))
        words = -(-max(1, at.words) // 4) * 4
        encode = torch.zeros(4, words, WORD_FIELDS, dtype=torch.int32)
        used = [0] * words
        for piece in found:
            field = torch.tensor([piece.quad, piece.weight, _mask(piece), piece.first])
            encode[:, piece.word, used[piece.word]] = field.int()
            used[piece.word] += 1
        own = {
            **{name: getattr(at, name) for name in FIELDS if hasattr(at, name)},
            **{"chunks": padded // CHUNK, "decode": self._used, "inverse": self._rows},
            **{"encode": self._used + decode.numel(), "slots": words * WORD_FIELDS},
        }
        self._fields += [decode.flatten(), encode.flatten()]
        self._inverse.append(parts.flatten(0, 1))
        self._used += decode.numel() + encode.numel()
        self._rows += padded * QUAD
        pad = (0, self._k_pad - len(bits))
        forward = F.pad(_halves(t.forward[layer, head].float()).T, pad)
        return (
            torch.tensor([own[name] for name in FIELDS], dtype=torch.int32),
            _pairs(torch.stack(start)).float(),
            _halves(mean).float(),
            forward.contiguous(),
            F.pad(t.cost[layer, head].float(), pad),
            F.pad((2**bits - 1).float(), pad),
        )


@functools.lru_cache(maxsize=1)
def _shared(angles: Angles, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coarse and fine rows of all layers."""
    return _halves(angles.coarse).to(device), _halves(angles.fine).to(device)


def _mask(piece: Piece) -> int:
    return ((1 << piece.bits) - 1) * 0x01010101


def _halves(x: Tensor) -> Tensor:
    """[..., D] as [..., 2 half]: each half of the channels padded to what a tile can have."""
    size = x.shape[-1] // 2
    parts = x.reshape(*x.shape[:-1], 2, size)
    return F.pad(parts, (0, half_pad(2 * size) - size)).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    """The same with the two halves' channels in turn."""
    parts = _halves(x)
    return parts.reshape(*x.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)
