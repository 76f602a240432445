"""LagKV: tokens that vary where the text after them does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_whole


@dataclass
class LagKV(Policy):
    """LagKV (arXiv 2504.04704): a token counts for how much it varies over its channels, measured
    by the range of the next partition of the text.

    What a head holds after the sinks is cut into partitions of `lag` tokens. In each, keys and
    values are scaled channel by channel to the least and greatest values of the next partition; a
    token's standard deviation over the channels goes through a softmax over the partition, and its
    score is its rank there by the mean of the keys' and the values'. So every partition keeps the
    same share. The last whole partition and what is left after it have no lag to be measured by,
    and come first; where fewer than two partitions are held, the newest do.

    The paper compresses a partition once, when the next is full, and lets the cache grow. Here the
    budget is fixed, so that partitions are cut anew from what is held at each compaction.

    Cost: O(n D), ten passes over keys and values.

    Choose it where queries tell nothing yet, and each part of a text should lose alike.

    Attributes:
        lag: tokens of a partition.
    """

    name: ClassVar[str] = "lagkv"

    lag: int = 128

    def __post_init__(self) -> None:
        self.require("lag", is_whole(self.lag) and self.lag >= 2, "a whole number, 2 or more")

    def score(self, view: View) -> Tensor:
        keys, values, m = view.keys, view.values, view.candidates
        assert values is not None
        if not view.ragged:
            return self._score(keys.float(), values.float(), view.sinks)[:, :m]
        rows = []
        for head, n in enumerate(view.lengths):
            own = slice(head, head + 1)
            found = self._score(keys[own, :n].float(), values[own, :n].float(), view.sinks)
            rows.append(F.pad(found, (0, keys.shape[1] - n)))
        return torch.cat(rows)[:, :m]

    def _score(self, keys: Tensor, values: Tensor, sinks: int) -> Tensor:
        heads, n, _ = keys.shape
        parts = max(0, n - sinks) // self.lag
        if parts < 2:
            newest = torch.arange(n, dtype=torch.float32, device=keys.device)
            return (newest / max(n, 1)).expand(heads, -1)
        last = sinks + (parts - 1) * self.lag
        scores = torch.ones(heads, n, device=keys.device)
        both = self._relative(keys, sinks, parts) + self._relative(values, sinks, parts)
        rank = ops.ranks(-both.flatten(0, 1)).view_as(both)
        scores[:, sinks:last] = (rank.float() / self.lag).flatten(1)
        return scores

    def _relative(self, x: Tensor, sinks: int, parts: int) -> Tensor:
        """Returns what the tokens of all partitions but the last count for, [H, parts - 1, lag]."""
        cut = x[:, sinks : sinks + parts * self.lag].view(len(x), parts, self.lag, -1)
        low, high = cut[:, 1:].amin(2, keepdim=True), cut[:, 1:].amax(2, keepdim=True)
        scale = torch.where(high > low, 1 / (high - low), 0.0)  # a constant channel tells nothing
        # The standard deviation in few passes, as this is most of the cost.
        scaled = torch.addcmul(-low * scale, cut[:, :-1], scale)
        scaled -= scaled.mean(3, keepdim=True)
        return (scaled.norm(dim=3) / (x.shape[2] - 1) ** 0.5).softmax(2)
