"""Re-rotated sinks: attention sinks stay next to what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Merged, Policy, View, Wrapper
from vllm_kvcrush.policies.choice import rope_of
from vllm_kvcrush.policies.streaming import Streaming


@dataclass
class ReRotate(Wrapper):
    """StreamingLLM's positions (arXiv 2309.17453) for any policy: the sinks' keys are rotated as if
    they stood directly before the first other token that stays, so that they are as far from a
    query as they would be in the paper's cache. `rerotate` alone is `rerotate(streaming)`.

    Other keys keep their true positions: of what `streaming` keeps, their distances to queries are
    the paper's already. A sink that was rotated before is rotated by the difference. How far it was
    follows from the positions of what the last compaction left, so nothing else is kept. Sinks must
    all be there: where fewer tokens stay than there are sinks, nothing is rotated.

    Cost: one copy of keys and values, as for policies that merge.

    Choose it with `streaming` to run past the length that a model was trained for.

    Attributes:
        base: policy that chooses.
    """

    name: ClassVar[str] = "rerotate"
    merges: ClassVar[bool] = True

    base: Policy = field(default_factory=Streaming)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and positions."""
        return self.base.needs | {"positions"}

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        m, sinks, rope = view.candidates, view.sinks, rope_of(view)
        values = view.values
        assert values is not None
        merged = Merged(view.keys[:, :m].float(), values[:, :m].float(), view.log_bias)
        if self.base.merges:
            merged = self.base.merge(view, scores, kept)
        if not 0 < sinks < m:
            return merged
        # The first other token is the tail's where none of the candidates is.
        tail = view.computed - (view.keys.shape[1] - m)
        others = kept[:, sinks:]
        first = others.to(torch.uint8).argmax(1, keepdim=True) + sinks
        now = view.positions.gather(1, first).masked_fill(~others.any(1, keepdim=True), tail)
        last = view.positions[:, sinks : sinks + 1]
        last = last.masked_fill(~view.valid[:, sinks : sinks + 1], tail)
        rotated = torch.zeros_like(kept[:, :1]) if view.known is None else view.known[:, :1]
        ahead = (now - torch.where(rotated, last, sinks)).masked_fill(
            ~kept[:, :sinks].all(1, keepdim=True), 0
        )
        turned = rope.rotate(merged.keys[:, :sinks], ahead.expand(-1, sinks))
        return merged._replace(keys=torch.cat((turned, merged.keys[:, sinks:]), 1))
