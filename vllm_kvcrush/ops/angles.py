"""Angles of a rotary embedding as kernels of every device read them."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.rope import Rope

COARSE = 256  # positions between two rows of the coarse angles


class Angles:
    """Cosines and sines of a rotary embedding, shared by all layers.

    Args:
        rope: the rotary embedding.
        positions: number of positions that are needed.

    Attributes:
        positions: number of positions that there are, a multiple of COARSE.
        coarse: float32 [positions / COARSE, D], cosines and then sines of every COARSE-th position.
        fine: float32 [COARSE, D], cosines and then sines of the positions below COARSE.
    """

    def __init__(self, rope: Rope, positions: int) -> None:
        rows = -(-positions // COARSE)
        self.positions = rows * COARSE
        self.coarse = self._rows(rope, torch.arange(rows) * COARSE)
        self.fine = self._rows(rope, torch.arange(COARSE))

    @staticmethod
    def _rows(rope: Rope, positions: Tensor) -> Tensor:
        angle = positions.double()[:, None] * rope.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1).float()
