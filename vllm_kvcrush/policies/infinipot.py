"""InfiniPot-V: what a video shows anew, and what its values weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number


@dataclass
class InfiniPot(Policy):
    """InfiniPot-V (arXiv 2506.15745): temporal-axis redundancy (TaR) and value norm (VaN).

    A request's spans are frames. In TaR the frames that make up the newest share `newest` come
    first; a patch of an earlier frame is worth minus the mean cosine of its key with those at the
    same place in them, 0 with those that are gone. VaN is the norm of a token's value. Tokens
    outside of frames come before all others. Without spans the whole text is one frame after the
    other of one token each: a token is compared with the newest share of the held tokens, which
    then have no precedence, as the raw tail stays in any case.

    The budget is filled by the next best of TaR and of VaN in turns, TaR's turns being the share
    `redundancy`, and what both want counts once. The paper fills TaR's half first and lets VaN take
    what is left, which is the same unless both want a token. Its pooling of value norms, off in
    the released code, is left out.

    Cost: O(n D), three passes over keys and values, and two sorts.

    Choose it for videos, with each frame as a span, and where queries tell nothing yet.

    Attributes:
        newest: share of the frames, or of the text, that others are compared with.
        redundancy: share of the budget that TaR fills.
    """

    name: ClassVar[str] = "infinipot"
    needs: ClassVar[frozenset[str]] = frozenset({"positions"})
    uses_spans: ClassVar[bool] = True
    scores_spans: ClassVar[bool] = True

    newest: float = 0.25
    redundancy: float = 0.5

    def __post_init__(self) -> None:
        for option in ("newest", "redundancy"):
            value = getattr(self, option)
            self.require(option, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")

    def score(self, view: View) -> Tensor:
        m = view.candidates
        assert view.values is not None
        keys = view.keys.float()
        keys = keys / keys.norm(dim=2, keepdim=True).clamp(min=1e-12)
        weight = view.values[:, :m].float().norm(dim=2)
        frames = [(first, end) for first, end in view.spans if first < view.computed]
        if frames:
            novelty, inside = self._of_frames(view, keys, frames)
        else:
            novelty, inside = self._of_text(view, keys), view.valid
        turns = torch.full_like(weight, torch.inf)
        for share, worth in ((self.redundancy, novelty), (1 - self.redundancy, weight)):
            if share:
                place = ops.ranks(worth.masked_fill(~inside, -torch.inf)) + 1
                turns = torch.minimum(turns, place / share)
        return -turns.masked_fill(~inside, 0.0)

    def _of_text(self, view: View, keys: Tensor) -> Tensor:
        lengths = torch.tensor(view.lengths).unsqueeze(1)
        first = lengths - (self.newest * lengths).long().clamp(min=1)
        at = torch.arange(keys.shape[1], device=view.device)
        chosen = ((at >= first.to(view.device)) & view.held_valid).to(keys.dtype)
        mean = (chosen.unsqueeze(1) @ keys) / chosen.sum(1, keepdim=True).unsqueeze(2)
        return -(keys[:, : view.candidates] @ mean.mT).squeeze(2)

    def _of_frames(
        self, view: View, keys: Tensor, frames: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Returns TaR's worth of the candidates, and which of them are in frames, both [H, m]."""
        m, device = view.candidates, view.device
        firsts, ends = (torch.tensor(x, device=device) for x in zip(*frames, strict=True))
        where = view.held_positions.long()
        frame = torch.bucketize(where, firsts, right=True) - 1
        own = frame.clamp(min=0)
        inside = (frame >= 0) & (where < ends[own]) & view.held_valid
        recent = inside & (frame >= len(frames) - max(1, int(self.newest * len(frames))))
        patch = torch.where(inside, where - firsts[own], 0)
        size = max(end - first for first, end in frames)
        # The mean cosine with several keys is the product with the mean of their directions.
        total = keys.new_zeros(len(keys), size, keys.shape[2])
        there = keys.new_zeros(len(keys), size)
        total.scatter_add_(1, patch.unsqueeze(2).expand_as(keys), keys * recent.unsqueeze(2))
        there.scatter_add_(1, patch, recent.to(keys.dtype))
        mean = total / there.clamp(min=1).unsqueeze(2)
        like = mean.gather(1, patch[:, :m].unsqueeze(2).expand(-1, -1, keys.shape[2]))
        novelty = -(keys[:, :m] * like).sum(2)
        return novelty.masked_fill(recent[:, :m], 2.0), inside[:, :m] & view.valid
