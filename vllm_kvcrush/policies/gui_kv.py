"""GUI-KV: screenshots lose what the newest one shows again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number, is_whole


@dataclass
class GUIKV(Policy):
    """GUI-KV (arXiv 2510.00536): attention, with spatial saliency in the newest screenshot and
    without what is redundant in earlier ones.

    A request's spans are its screenshots. Scores are the sums of the window's attention, pooled,
    the mean over the query heads of a KV head. Tokens of the newest screenshot gain `saliency`
    times the softmax of their standardised norms divided by `temperature`. Keys of earlier ones are
    projected on the space of the first `rank` keys of the newest; the share `redundant` of them
    with the smallest residuals, over all earlier ones, has score 0. Without spans it is SnapKV.

    The norms are of values, as hidden states are not at hand. `redundant` is 1 less the budget in
    the paper. The first keys are those that the last compaction left. Pooling has no padding at
    the edges.

    Cost: O(w n D) for attention, O(n D rank) for residuals.

    Choose it for agents that look at one screenshot after the other; mark each as a span.

    Attributes:
        saliency: weight of the spatial term, `alpha` in the paper.
        temperature: of its softmax.
        redundant: share of earlier screenshots' tokens that is redundant.
        rank: keys of the newest screenshot that span its space.
        pool: width of the pooling window, odd.
    """

    name: ClassVar[str] = "gui_kv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "positions"})
    uses_spans: ClassVar[bool] = True
    scores_spans: ClassVar[bool] = True

    saliency: float = 2.0
    temperature: float = 3.5
    redundant: float = 0.75
    rank: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        saliency = is_number(self.saliency) and self.saliency >= 0
        self.require("saliency", saliency, "a number, 0 or more")
        temperature = is_number(self.temperature) and self.temperature > 0
        self.require("temperature", temperature, "a number above 0")
        redundant = is_number(self.redundant) and 0 <= self.redundant <= 1
        self.require("redundant", redundant, "a number from 0 to 1")
        self.require("rank", is_whole(self.rank) and self.rank >= 1, "a whole number, 1 or more")
        odd = is_whole(self.pool) and self.pool >= 1 and self.pool % 2 == 1
        self.require("pool", odd, "an odd whole number, 1 or more")

    def score(self, view: View) -> Tensor:
        scores = view.window_scores(mean=False, pool=self.pool, pool_kind="avg")
        begun = [span for span in view.spans if span[0] < view.computed]
        if not begun:
            return scores
        m, where = view.candidates, view.held_positions
        newest = (where >= begun[-1][0]) & (where < begun[-1][1]) & view.held_valid
        scores = scores + self.saliency * self._salient(view, newest)[:, :m]
        earlier = torch.zeros_like(newest[:, :m])
        for first, end in begun[:-1]:
            earlier |= (where[:, :m] >= first) & (where[:, :m] < end) & view.valid
        if self.redundant == 0 or len(begun) == 1:
            return scores
        residual = self._residual(view.keys.float(), newest)[:, :m]
        rank = ops.ranks(-residual.masked_fill(~earlier, torch.inf))
        least = (self.redundant * earlier.sum(1, keepdim=True)).long()
        return scores.masked_fill(earlier & (rank < least), 0.0)

    def _salient(self, view: View, newest: Tensor) -> Tensor:
        """Returns the saliency of the newest screenshot's tokens, [H, n], 0 elsewhere."""
        assert view.values is not None
        norm = view.values.float().norm(dim=2).masked_fill(~newest, 0.0)
        count = newest.sum(1, keepdim=True)
        mean = norm.sum(1, keepdim=True) / count.clamp(min=1)
        deviation = (norm - mean).masked_fill(~newest, 0.0)
        spread = (deviation.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        standard = deviation / (spread + 1e-8) / self.temperature
        return standard.masked_fill(~newest, -torch.inf).softmax(1).nan_to_num()

    def _residual(self, keys: Tensor, newest: Tensor) -> Tensor:
        """Returns the norms of what the first keys of the newest screenshot do not span, [H, n]."""
        rank = min(self.rank, keys.shape[2], keys.shape[1])
        order = newest.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :rank]
        there = newest.gather(1, order).unsqueeze(2)
        first = keys.gather(1, order.unsqueeze(2).expand(-1, -1, keys.shape[2])) * there
        basis, triangle = torch.linalg.qr(first.mT)
        size = triangle.diagonal(dim1=1, dim2=2).abs()
        spans = size > 1e-5 * size.amax(1, keepdim=True)  # not of absent or dependent keys
        basis = basis * spans.unsqueeze(1)
        return (keys - (keys @ basis) @ basis.mT).norm(dim=2)
