"""Composed: the scores of two policies, added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, Wrapper, is_number


@dataclass
class Composed(Wrapper):
    """A weighted sum of two policies' scores, from which the base selects. It is no method of a
    paper; kvpress's `ComposedPress` has the name, and applies one method after the other instead.

    Scores of each head are scaled to [0, 1] over its candidates, without the protected ones: by
    their least and greatest ("minmax"), or by rank ("rank"), which no single high score can
    dominate. Of the second policy only the scores are used. Its options are those that `other`
    says, not the server's, and clients may name only what the server lists for them.

    Cost: both policies' scores.

    Choose it where two policies fail on different texts.

    Attributes:
        other: the second policy, in the grammar of policies, quoted where it has options:
            `composed(snapkv, other=streaming)`, `composed(snapkv, other="h2o(recent=0.2)")`.
        weight: weight of the second policy's scores, from 0 to 1.
        scale: "minmax" or "rank".
    """

    name: ClassVar[str] = "composed"

    other: str = "streaming"
    weight: float = 0.5
    scale: str = "minmax"
    second: Policy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        share = is_number(self.weight) and 0 <= self.weight <= 1
        self.require("weight", share, "a number from 0 to 1")
        self.require_one_of("scale", ("minmax", "rank"))
        from vllm_kvcrush import policies  # which imports this module

        self.require("other", isinstance(self.other, str), "a policy")
        try:
            self.second = policies.get(self.other)
        except ValueError as error:
            self.require("other", False, f"a policy: {error}".rstrip("."))
        whole = self.base.whole_pages or self.second.whole_pages
        self.require("other", not whole, "a policy of single tokens, or the base is none")
        # What is kept of tokens is accounted for as one number each.
        two = "state" in self.base.needs & self.second.needs
        self.require("other", not two, "a policy without running state, as the base has some")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what both policies need."""
        return self.base.needs | self.second.needs

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Returns the shape of the models that one of the two is for."""
        return self.base.made_for or self.second.made_for

    @property
    def head_size(self) -> int | None:
        """Returns the head size of the models that one of the two is for."""
        return self.base.head_size or self.second.head_size

    def score(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.zeros((), device=view.device)
        states: dict[str, Tensor] = {}
        for policy, share in ((self.base, 1 - self.weight), (self.second, self.weight)):
            found = policy.score(view)
            scores, state = found if isinstance(found, tuple) else (found, {})
            states |= state
            total = total + share * self._scaled(view, scores)
        return total, states

    def _scaled(self, view: View, scores: Tensor) -> Tensor:
        """Returns scores from 0 to 1; of what is protected or padding, 1 and 0."""
        free = view.valid & ~view.staying
        scores = scores.float().nan_to_num()
        if self.scale == "rank":
            order = scores.masked_fill(~free, -torch.inf).argsort(dim=1, stable=True).argsort(1)
            least = (~free).sum(1, keepdim=True)
            scaled = (order - least) / (free.sum(1, keepdim=True) - 1).clamp(min=1)
        else:
            low = scores.masked_fill(~free, torch.inf).amin(1, keepdim=True)
            high = scores.masked_fill(~free, -torch.inf).amax(1, keepdim=True)
            scaled = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
        return scaled.clamp(0, 1).masked_fill(view.staying, 1.0).masked_fill(~view.valid, 0.0)
