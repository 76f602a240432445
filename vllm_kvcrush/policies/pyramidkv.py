"""PyramidKV: lower layers keep more tokens than higher ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Room, Wrapper, is_number
from vllm_kvcrush.policies.shares import average_tokens, layer_shares, shares_within


@dataclass
class PyramidKV(Wrapper):
    """PyramidKV (arXiv 2406.02069 §4.2): budgets fall from the first layer to the last in equal
    steps. With b tokens a head on average, the last layer's heads keep b / beta, the first one's
    2·b - b / beta; where that is more than there is, the first layer keeps all and the last one as
    many more.

    Which tokens stay is the base's choice, in the paper SnapKV's. If the base divides pages itself,
    as in `pyramidkv(adakv)`, it says how a layer's pages are divided among its heads, but not among
    layers. The raw tail, which has the observation window, counts in no budget. Budgets are made
    anew at every compaction, and are rounded to whole pages; a layer that was cut to few tokens
    cannot use a larger budget later. (In kvpress the window counts in each layer's budget.)

    Cost: the base's.

    Choose it where lower layers of a model attend widely and higher ones to few tokens.

    Attributes:
        beta: how many times the average budget is that of the last layer.
    """

    name: ClassVar[str] = "pyramidkv"
    allocates: ClassVar[bool] = True

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", is_number(self.beta) and self.beta >= 1, "a number, 1 or more")

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        layers, there = len(room.candidates), float(room.candidates.max())
        average = min(average_tokens(room), there)
        most = min(2 * average - average / self.beta, there)
        tokens = torch.linspace(most, 2 * average - most, layers, dtype=torch.float64)
        return layer_shares(tokens, room, shares_within(self.base, demand, room))
