"""G-KV: attention that fades, less what is said again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number


@dataclass
class GKV(Policy):
    """G-KV (arXiv 2512.00504): a global score, which fades over the compactions, less redundancy.

    The local score of a token is the mean over the window of the greatest weight among the query
    heads of its KV head, divided by the head's greatest. The global score is the greater of that
    and `decay` times the last global score. The rank is `weight` times it, less 1 - `weight` times
    R-KV's redundancy (`ops.redundancy`, softmax over the held tokens), divided by its greatest.

    The softmax is over all held tokens, the raw tail's too, the greatest those of the candidates.

    Cost: O(w n D) for attention; O(n² D) at worst for redundancy, far less where keys have similar
    ones near the end.

    Choose it for long chains of thought, which come back to early steps and repeat themselves.

    Attributes:
        decay: what is left of a score at the next compaction, `alpha` in the paper.
        weight: part of the global score in the rank, `lambda` in the paper.
        threshold: least cosine of similar keys.
    """

    name: ClassVar[str] = "gkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "state"})

    decay: float = 0.8
    weight: float = 0.5
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for option in ("decay", "weight", "threshold"):
            value = getattr(self, option)
            self.require(option, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")

    def score(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        local = _of_greatest(view, view.window_scores(reduce="greatest"))
        score = ops.decayed_max(view.state.get("global"), local, self.decay)
        alike = _of_greatest(view, redundancy_of(view, self.threshold))
        return self.weight * score - (1 - self.weight) * alike, {"global": score}


def _of_greatest(view: View, x: Tensor) -> Tensor:
    """Returns the candidates' part of `x` [H, n], divided by each head's greatest, [H, m]."""
    x = x[:, : view.candidates].masked_fill(~view.valid, 0.0)
    return x / x.amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def redundancy_of(view: View, threshold: float) -> Tensor:
    """Returns the softmax of `ops.redundancy` over the held slots of each head, [H, n]."""
    counts = view.lengths if view.ragged else None
    alike = ops.redundancy(view.keys, counts, threshold)
    if counts is not None:
        alike = alike.masked_fill(~view.held_valid, -torch.inf)
    return alike.softmax(1)
