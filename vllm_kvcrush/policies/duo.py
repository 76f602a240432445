"""DuoAttention: heads that look back keep everything, the others sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, Room, View, is_number, is_whole, protect
from vllm_kvcrush.policies.heads import ByHeads
from vllm_kvcrush.policies.shares import average_tokens


@dataclass
class Duo(ByHeads):
    """DuoAttention (arXiv 2410.10819 §2.3): streaming heads hold sinks and recent tokens, retrieval
    heads all tokens. The `sparsity` share of the model's heads with the lowest scores are streaming
    heads.

    The paper's scores are gates that were trained; here they are kvpress's, which need no
    training. Budgets are requests' own: retrieval heads share what streaming ones leave, and where
    that is too little for all tokens, the base chooses among them; where it is more, streaming
    heads hold more recent tokens. A streaming head holds at most half of an equal share, so that
    memory moves at any budget, and of few tokens no more than the share
    `sink` / (`sink` + `recent`) are sinks. Without a pattern, each tensor-parallel rank divides its
    own heads into two kinds, at each compaction.

    Cost: that of the base with a pattern of `vllm-kvcrush calibrate --heads`; without one, head
    scores are made anew from the request's own tokens at each compaction.

    Choose it for models of which a pattern was made, and long prompts that are asked about.

    Attributes:
        sparsity: share of streaming heads.
        sink, recent: first and newest tokens that a streaming head holds beside the raw tail.
    """

    name: ClassVar[str] = "duo"
    kind: ClassVar[str] = "retrieval"

    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        share = is_number(self.sparsity) and 0 <= self.sparsity < 1
        self.require("sparsity", share, "a number from 0 to below 1")
        for option, least in (("sink", 0), ("recent", 1)):
            value = getattr(self, option)
            self.require(option, is_whole(value) and value >= least, f"a number from {least} on")

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        assert demand is not None
        equal, streams = average_tokens(room), self._streams(demand)
        few = min(float(self.sink + self.recent), equal / 2)
        rest = (equal * demand.numel() - few * int(streams.sum())) / max(1, int((~streams).sum()))
        return torch.full_like(demand, rest).masked_fill(streams, few) / room.page_tokens

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        kept = self.base.select(view, scores, keep)
        if view.demands is None:  # pages were not divided, so all heads are alike
            return kept
        streams = self._streams(view.demands)[view.layer].to(view.device).unsqueeze(1)
        at = torch.arange(view.candidates, device=view.device)
        share = self.sink / (self.sink + self.recent)
        sinks = (keep.double() * share).long().clamp(max=self.sink).to(view.device).unsqueeze(1)
        age = at + view.candidates * (at < sinks)
        return torch.where(streams, ops.top_mask(protect(view, age.float()), keep), kept)

    split = Policy.split  # Wrapper's would be the base's, for what the base selects

    def _streams(self, scores: Tensor) -> Tensor:
        """Returns which heads are streaming ones, bool [L, H], given their scores."""
        every = (scores if self.known is None else self.known).flatten()
        count = round(self.sparsity * len(every))
        # Equal ones are alike, so that ranks agree; there may be fewer streaming heads then.
        limit = every.sort().values[count] if count < len(every) else torch.inf
        return scores < limit
