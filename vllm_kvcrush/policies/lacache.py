"""LaCache: a ladder of layers, each of which keeps other tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, is_whole

# Tokens that passes are made for, whatever is held, so that a head does not depend on others; and a
# turn after all others'.
_MOST, _LAST = 2.0**16, 2.0**19


@dataclass
class LaCache(Policy):
    """LaCache (arXiv 2507.14204): what a layer keeps depends on positions alone, so that a token
    stays in `span` consecutive layers and each pair of steps has `overlap` layers in common.

    Tokens are taken in groups of b = 1 + ⌈(L - span) / (span - overlap)⌉, of which layer i keeps a
    = min(⌈span / (span - overlap)⌉, b - 1) from place i mod (b - a + 1) on. A compaction takes one
    group after the other from a cursor on, the next goes on where it ended, and after the newest it
    starts over at the oldest, among what is left. The newest L tokens stay out. A score is when a
    token's turn comes, and the cursor is at the survivor whose turn would have come next.

    Deviations: true positions instead of those in the cache; passes that follow each other in one
    compaction all have groups of b, where the released code makes the second one's larger; all
    layers keep equally many tokens, so its larger cache makes up for nothing. A model with no more
    layers than `span` has a span of half its layers.

    Cost: O(n log n), no keys, no queries.

    Choose it where queries tell nothing yet and all of a long text counts for something.

    Attributes:
        span: consecutive layers that keep a token.
        overlap: layers that two steps of the ladder share.
    """

    name: ClassVar[str] = "lacache"
    needs: ClassVar[frozenset[str]] = frozenset({"state"})

    span: int = 16
    overlap: int = 0

    def __post_init__(self) -> None:
        self.require("span", is_whole(self.span) and self.span >= 1, "a whole number, 1 or more")
        overlap = is_whole(self.overlap) and 0 <= self.overlap < self.span
        self.require("overlap", overlap, "a whole number from 0 to below the span")

    def ladder(self, layers: int) -> tuple[int, int]:
        """Returns how many tokens a group has, and how many of them stay."""
        span = self.span if self.span < layers else max(1, layers // 2)
        step = span - min(self.overlap, span - 1)
        before = max(2, 1 + math.ceil((layers - span) / step))
        return before, min(math.ceil(span / step), before - 1)

    def score(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        m = view.candidates
        before, after = self.ladder(view.layers)
        offset = view.layer % (before - after + 1)
        at = torch.arange(m, device=view.device)
        newest = view.sizes.to(view.device).unsqueeze(1) - view.layers
        within = ~view.staying & view.valid & (at < newest)
        place = within.cumsum(1) - 1
        left, members = within, within & (place >= self._cursor(view, place, offset, after))
        turn = torch.zeros(left.shape, dtype=torch.float32, device=view.device)
        begun = torch.zeros(len(left), 1, device=view.device)
        rest = _MOST
        while rest > 1:
            # Whole numbers as floats, whose division is far faster.
            place = members.cumsum(1, dtype=torch.float32) - 1
            group = torch.floor(place / before)
            inside = place - group * before
            stays = (inside >= offset) & (inside < offset + after)
            turn = torch.where(members, begun + group, turn)
            begun = begun + group[:, -1:] + 1
            left = members = left & (stays | ~members)
            rest = rest * after / before
        # What no group takes goes last, the oldest of it first.
        turn = torch.where(left | ~within, _LAST + at, turn)
        return turn, {"turn": turn}

    def _cursor(self, view: View, place: Tensor, offset: int, after: int) -> Tensor:
        """Returns at which place of those within reach the next group begins, [H, 1]."""
        turn = view.state.get("turn")
        if turn is None or view.known is None:
            return place.new_zeros(len(place), 1)
        held = view.known & ~view.staying & view.valid
        first = turn.masked_fill(~held, torch.inf).argmin(1, keepdim=True)
        # The first of a group that goes has those before it that stay, where they come first.
        return place.gather(1, first) - (after if offset == 0 else 0)
