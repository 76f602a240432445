"""AdaKV: heads that look at few tokens lend their room to heads that look at many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Room, View, Wrapper, is_number, protect


@dataclass
class AdaKV(Wrapper):
    """Ada-KV (arXiv 2407.11550 §3.3): within a layer, heads share the budget as their scores do.

    A head's share of the layer's pages is its part of the layer's best scores, taken over all heads
    together as they are, mixed with an equal share so that no head starves. So the base's scores
    must be comparable between heads, as attention is. Layers have equal budgets. Which tokens a
    head keeps is the base's choice. (In kvpress each head is sure of the equal share's part, and
    heads compete for all of the rest.)

    Cost: the base's for every layer before anything is chosen, and a search for a layer's best
    scores.

    Choose it over `kvzip`, or over `keydiff` where no second pass is made: both lose less so.

    Attributes:
        floor: weight of the equal share, `alpha` in the paper.
    """

    name: ClassVar[str] = "adakv"
    allocates: ClassVar[bool] = True

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_alone("divides pages")
        share = is_number(self.floor) and 0 <= self.floor <= 1
        self.require("floor", share, "a number from 0 to 1")

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor:
        layers, heads = room.candidates.shape
        votes = protect(view, scores).mT.reshape(1, -1)  # so that ties favour no head
        tokens = room.pages * int(room.page_tokens.min()) // layers
        best = ops.top_mask(votes, min(tokens, int(view.sizes.sum())))
        return best.view(view.candidates, heads).sum(0)

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        assert demand is not None
        shares = demand / demand.sum(1, keepdim=True).clamp(min=1)
        return (1 - self.floor) * shares + self.floor / shares.shape[1]
