"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number, newest_slots, protect


@dataclass
class H2O(Policy):
    """H2O (arXiv 2306.14048 §4), window form: accumulated attention, and a share of recent tokens.

    The paper adds up the attention that a token receives from *every* query. Flash kernels return
    no weights, so this form adds up what the last w queries give at each compaction, on top of
    what the token had gathered at earlier ones. Queries between two windows are not counted.

    Cost: O(w n D) on the pages themselves, no copy of the keys.

    Choose it for long answers, in which what mattered again and again should stay.

    Attributes:
        recent: share of the kept candidates that are simply the newest; the protected slots and the
            best scores share the rest. If the sinks need more than that, fewer recent ones stay.
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "state"})

    recent: float = 0.5

    def __post_init__(self) -> None:
        share = is_number(self.recent) and 0 <= self.recent <= 1
        self.require("recent", share, "a number from 0 to 1")

    def score(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        scores = view.window_scores(mean=False)
        if (gathered := view.state.get("attention")) is not None:
            scores = scores + gathered
        return scores, {"attention": scores}

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        recent = (self.recent * keep.double()).long().minimum((keep - view.sinks).clamp(min=0))
        best = protect(view, scores).masked_fill(newest_slots(view, recent), float("inf"))
        return ops.top_mask(best, keep)
