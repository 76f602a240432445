"""CaM: the values of dropped tokens are spread over the kept ones that follow them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Merged, Policy, View, Wrapper, is_whole
from vllm_kvcrush.policies.h2o import H2O


@dataclass
class CaM(Wrapper):
    """CaM, "Cache Merging" (ICML 2024, openreview LCTmppB165, Eq. 8-9, and its released code): the
    value of a dropped token is added, in equal parts, to the values of the next `width` kept
    tokens, with probability a / b, at most 1, where a is the attention that the token received and
    b the mean of theirs. So the expected output of attention stays what it was. Keys stay.

    Differences: attention is that of the observation window, summed over it. All tokens that a
    compaction drops are merged at once, where the paper drops one at each step. Draws depend on
    `seed`, layer, head and slot alone, so that a request that is prefilled again gets the same
    result. Near the end of the candidates there are fewer than `width` kept tokens to spread over,
    and after the last none.

    Every dropped token adds to values and nothing to the weights, which sum to one over what is
    kept. At a budget of b a kept value takes in up to 1 / b - 1 others: one at a half, as in the
    paper, whose window moves by a token at a time; three at a quarter, and there it loses more than
    dropping alone.

    Cost: the base's, the window's attention, and O(n D).

    Choose it to compare with the paper, at budgets of a half and more: nowhere here did it lose
    less than its base alone. `keepkv`, whose log biases carry the weights, can.

    Attributes:
        base: the policy that chooses; H2O unless another one is named.
        width: number of kept tokens over which a value is spread, `m` in the paper.
        seed: seed of the draws.
    """

    name: ClassVar[str] = "cam"
    merges: ClassVar[bool] = True

    base: Policy = field(default_factory=H2O)
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_alone("merges tokens")
        width = is_whole(self.width) and 1 <= self.width <= 2**20
        self.require("width", width, "a whole number from 1 to 2**20")
        seed = is_whole(self.seed) and 0 <= self.seed < 2**31
        self.require("seed", seed, "a whole number from 0 to 2**31 - 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and queries for the attention."""
        return self.base.needs | {"queries"}

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        m, values = view.candidates, view.values
        assert values is not None
        attention = view.window_scores(mean=False).double()
        part = torch.zeros(kept.shape, device=view.device)
        into = view.receivers(kept)
        for head, n in enumerate(view.sizes.tolist()):
            stay = into[head, :n].nonzero().squeeze(1)
            gone = (~kept[head, :n]).nonzero().squeeze(1)
            first = torch.searchsorted(stay, gone)
            end = (first + self.width).clamp(max=len(stay))
            count = end - first
            sums = _running(attention[head, stay])
            mean = (sums[end] - sums[first]) / count.clamp(min=1)
            chance = attention[head, gone] / mean.clamp(min=1e-300)
            merged = self._draws(view, head, n)[gone] < chance
            part[head, gone] = (merged & (count > 0)).float() / count.clamp(min=1)
        spread = ops.spread(values[:, :m], into, part, self.width)
        return Merged(view.keys[:, :m].float(), spread, view.log_bias)

    def _draws(self, view: View, head: int, count: int) -> Tensor:
        """Returns a number from 0 to 1 for each slot of a head, the same on every device."""
        place = f"{self.seed} {view.layer} {view.first_head + head}"
        # torch's generators take the lower 32 bits of a seed.
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "little")
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(count, generator=draw, dtype=torch.float64).to(view.device)


def _running(x: Tensor) -> Tensor:
    """Returns the sums of the first 0, 1, ... elements."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))
