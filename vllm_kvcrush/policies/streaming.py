"""StreamingLLM: attention sinks and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, sinks_and_newest


@dataclass
class Streaming(Policy):
    """StreamingLLM (arXiv 2309.17453 §3.2): a few initial tokens and the newest ones stay.

    One difference: kept tokens hold their true positions, as every policy here does. The paper
    numbers positions inside the cache, to run past the length that the model was trained for;
    `rerotate` does so.

    Cost: O(n), no keys, no queries.

    Choose it where only the newest text matters, as in a chat without end.
    """

    name: ClassVar[str] = "streaming"

    def score(self, view: View) -> Tensor:
        # Slots are in position order, so the index is the age; the sinks are protected by select.
        slots = torch.arange(view.candidates, dtype=torch.float32, device=view.device)
        return slots.expand(view.num_kv_heads, -1)

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        return sinks_and_newest(view, keep)  # what the base class would choose
