"""Fair eviction: every span of the prompt loses the same share of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import View, Wrapper, is_number, protect


@dataclass
class Fair(Wrapper):
    """Fair eviction ("The Pitfalls of KV Cache Compression", arXiv 2510.00231 §5): the base chooses
    within each span, and each span keeps its share of the budget, so that one instruction is not
    forgotten for another. Tokens between spans belong to the span before them.

    Without spans the base chooses as it does alone. Protected slots count towards their span.

    Attributes:
        fairness: 1 gives each span its share, 0 what the base would give it.
    """

    name: ClassVar[str] = "fair"
    uses_spans: ClassVar[bool] = True

    fairness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        share = is_number(self.fairness) and 0 <= self.fairness <= 1
        self.require("fairness", share, "a number from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and positions to know the spans by."""
        return self.base.needs | {"positions"}

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        free = self.base.select(view, scores, keep)
        if not view.spans:
            return free
        starts = torch.tensor([first for first, _ in view.spans[1:]], device=view.device)
        span = torch.bucketize(view.positions.contiguous(), starts, right=True)
        member = torch.nn.functional.one_hot(span, len(view.spans)).bool()  # [H, m, spans]
        member &= view.valid.unsqueeze(2)
        there, alone = member.sum(1).double(), (member & free.unsqueeze(2)).sum(1).double()
        sizes = view.sizes.to(view.device).unsqueeze(1)
        wanted = keep.to(view.device).unsqueeze(1)
        quota = self.fairness * there * wanted / sizes + (1 - self.fairness) * alone
        quota = _whole(quota, there, wanted).long().cpu()
        kept = torch.zeros_like(free)
        for index in range(len(view.spans)):
            own = member[..., index]
            # The base sees only this span's scores; what it must keep elsewhere is not its to pay.
            inside = replace(view, protected=self._protected(view) & own)
            choice = self.base.select(inside, scores.masked_fill(~own, -torch.inf), quota[:, index])
            best = protect(inside, scores).masked_fill(choice, torch.finfo(scores.dtype).max)
            kept |= ops.top_mask(best.masked_fill(~own, -torch.inf), quota[:, index])
        return kept

    @staticmethod
    def _protected(view: View) -> Tensor:
        if view.protected is not None:
            return view.protected
        return (torch.arange(view.candidates, device=view.device) < view.sinks).expand_as(
            view.valid
        )


def _whole(quota: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Whole numbers near `quota` [H, s], at most `most` each, that sum to `total` [H, 1]: largest
    remainders first."""
    down = quota.floor().minimum(most)
    left = total - down.sum(1, keepdim=True)
    rank = (quota - down).masked_fill(down >= most, -torch.inf).argsort(1, descending=True)
    return down + (rank.argsort(1) < left)
