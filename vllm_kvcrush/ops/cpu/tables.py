"""Transform tables as the CPU kernels read them: `kvc_table` of csrc/kvcrush.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.bits import QUAD, pieces, quantiser
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.cpu.library import HeadTableStruct, PieceStruct, TableStruct


class LayerTable:
    """The tables of one fitted codec in one layer.

    Args:
        tables: the model's tables.
        layer: index of the layer.
        heads: KV heads of this rank.
        page_bytes: size of a page.
        v_size: head size of values.
        angles: angles of the model's rotary embedding.

    Attributes:
        capacity: by head, the number of tokens that a page holds.
        exceptions: by head, how many of them are int8.
        address: address of the structure, for the library.
    """

    def __init__(
        self,
        tables: Tables,
        layer: int,
        heads: range,
        page_bytes: int,
        v_size: int,
        angles: Angles,
    ) -> None:
        self._kept: list[object] = [angles]
        table = (HeadTableStruct * len(heads))()
        self.capacity: list[int] = []
        self.exceptions: list[int] = []
        for own, head in zip(table, heads, strict=True):
            bits = tables.bits[layer, head]
            fields = pieces(bits)
            capacity, exceptions = tables.capacity(layer, head, page_bytes, v_size)
            components = int((bits > 0).sum())
            assert components % QUAD == 0
            stride = max(1, -(-components // 16)) * 16
            inverse = torch.zeros(len(bits), stride)
            inverse[:, :components] = tables.inverse[layer, head][:, :components]
            own.capacity, own.exceptions = capacity, exceptions
            own.words = int(tables.words[layer, head])
            own.v_bits = int(tables.value_bits[layer, head])
            own.v_step = quantiser(own.v_bits).step
            own.pieces, own.components, own.stride = len(fields), components, stride
            array = (PieceStruct * max(1, len(fields)))(*(PieceStruct(*f) for f in fields))
            self._kept.append(array)
            own.piece = ctypes.addressof(array)
            own.mean = self._keep(tables.key_mean[layer, head])
            own.forward = self._keep(tables.forward[layer, head])
            own.inverse = self._keep(inverse)
            own.cost = self._keep(tables.cost[layer, head])
            own.fields = -(-QUAD * len(fields) // 16) * 16
            weight = torch.zeros(len(bits), own.fields or 16)
            middle = torch.zeros(own.fields + 16)
            for i, field in enumerate(fields):
                here, quad = slice(QUAD * i, QUAD * (i + 1)), slice(QUAD * field.quad, None)
                weight[:, here] = tables.inverse[layer, head][:, quad][:, :QUAD] * 2**field.weight
                middle[here] = (2**field.bits - 1) / 2
            words, step = in_words(weight)
            own.weight, own.step = self._keep(words, torch.int32), self._keep(step)
            own.middle = self._keep(middle)
            self.capacity.append(capacity)
            self.exceptions.append(exceptions)
        self._kept.append(table)
        self._struct = TableStruct(
            int(tables.point.local),
            angles.positions,
            ctypes.addressof(table),
            angles.coarse.data_ptr(),
            angles.fine.data_ptr(),
        )
        self.address = ctypes.addressof(self._struct)

    def _keep(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        kept = tensor.to(dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


# The largest weight of a column in steps: with queries of as many as csrc/codecs/fitted_query.h
# gives them, sums of products fit 32 bits.
WEIGHT_STEPS = 4095


def in_words(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns columns in steps of their own, as `kvc_head_table` has them.

    Args:
        weight: float32 [k_size, fields].

    Returns:
        Words [k_size / 2, fields] of two signed 16-bit integers, the second half of the channels in
        the high halves, int64 within 32 bits; and the steps, float32 [fields].
    """
    step = weight.abs().amax(0) / WEIGHT_STEPS
    low, high = (weight / step.clamp(min=1e-30)).round().long().chunk(2)
    return high * 65536 + (low & 65535), step
