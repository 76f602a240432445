"""SnapKV: the tokens that the last queries attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, is_whole


@dataclass
class SnapKV(Policy):
    """SnapKV (arXiv 2404.14469 §4): pooled attention of an observation window.

    Scores are the attention weights of the last w queries, averaged over them, pooled along the
    slots, then merged over the query heads of a KV head (the paper predates GQA and has scores for
    each query head).

    Cost: O(w n D) on the pages themselves, no copy of the keys.

    Choose it where the last tokens of a prompt are the question.

    Attributes:
        pool: width of the pooling window, odd.
        pool_kind: "max" or "avg".
        reduce: "mean" or "max" over the query heads of a group.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    pool: int = 7
    pool_kind: str = "max"
    reduce: str = "mean"

    def __post_init__(self) -> None:
        odd = is_whole(self.pool) and self.pool >= 1 and self.pool % 2 == 1
        self.require("pool", odd, "an odd whole number, 1 or more")
        self.require_one_of("pool_kind", ("avg", "max"))
        self.require_one_of("reduce", ("mean", "max"))

    def score(self, view: View) -> Tensor:
        return view.window_scores(pool=self.pool, pool_kind=self.pool_kind, reduce=self.reduce)
