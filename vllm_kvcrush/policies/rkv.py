"""R-KV: attention, less what is said again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number, is_whole
from vllm_kvcrush.policies.gkv import redundancy_of


@dataclass
class RKV(Policy):
    """R-KV (arXiv 2505.24133): importance less redundancy.

    Importance is the attention of the window over the candidates: the greatest logit among the
    query heads of a KV head, softmax, mean over the window, greatest among neighbours. Redundancy
    is the softmax over the held tokens of the mean cosine of a key with the others, where the
    latest of those that are alike does not count (`ops.redundancy`). The score is `weight` times
    importance, less 1 - `weight` times redundancy.

    The released code also leaves out the first token's cosine with keys that are similar to none;
    here they leave out nothing.

    Cost: O(w n D) for attention; O(n² D) at worst for redundancy, far less where keys have similar
    ones near the end.

    Choose it for long chains of thought that repeat themselves.

    Attributes:
        weight: part of importance in the score, `lambda` in the paper.
        pool: width of the pooling window, odd.
        threshold: least cosine of similar keys.
    """

    name: ClassVar[str] = "rkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    weight: float = 0.1
    pool: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for option in ("weight", "threshold"):
            value = getattr(self, option)
            self.require(option, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        odd = is_whole(self.pool) and self.pool >= 1 and self.pool % 2 == 1
        self.require("pool", odd, "an odd whole number, 1 or more")

    def score(self, view: View) -> Tensor:
        m = view.candidates
        logits = view.window_logits()[..., :m].amax(1)
        if view.ragged:
            logits = logits.masked_fill(~view.valid.unsqueeze(1), -torch.inf)
        attention = ops.pool_scores(logits.softmax(2).nan_to_num().mean(1), self.pool, "max")
        return (
            self.weight * attention - (1 - self.weight) * redundancy_of(view, self.threshold)[:, :m]
        )
