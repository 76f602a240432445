"""CAKE: layers share memory by how widely, and how changeably, they attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, Room, View, is_number, is_whole
from vllm_kvcrush.policies.shares import average_tokens, evenly, layer_shares


@dataclass
class CAKE(Policy):
    """CAKE (arXiv 2503.12491 §4): a layer's budget is its part of the sum over layers of the
    preferences P = E^(1/tau1) · V^(1/tau2) (Eq. 5-7). E is the entropy of the window's attention,
    V the variance over the window's queries of the attention that a token receives; both are summed
    over tokens and query heads. Within a layer the tokens with the highest mean + gamma · variance
    of attention stay (Eq. 8), averaged over `pool` neighbours and then over the query heads of a KV
    head. No layer gets more than it has; what it cannot use goes to the others in equal parts.

    Differences: all layers are divided at once, since vLLM holds the pages of all layers before the
    forward pass, so the cascade's lower peak is lost. The window is the server's (16 queries;
    the paper has 32). Only candidates count, not the rest of the raw tail. Preferences are made
    anew at each compaction, while decoding too, where the paper keeps budgets and takes the mean
    alone.

    Cost: O(w n D), twice: all layers are scored before any is compacted.

    Choose it where layers of a model attend very differently.

    Attributes:
        gamma: weight of the variance in a token's score.
        tau1, tau2: temperatures of entropy and variance; the paper tunes them for each model and
            budget.
        pool: width of the averaging window, odd.
    """

    name: ClassVar[str] = "cake"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    allocates: ClassVar[bool] = True

    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    pool: int = 5

    def __post_init__(self) -> None:
        self.require("gamma", is_number(self.gamma) and self.gamma >= 0, "a number, 0 or more")
        for option in ("tau1", "tau2"):
            value = getattr(self, option)
            self.require(option, is_number(value) and value > 0, "a number above 0")
        odd = is_whole(self.pool) and self.pool >= 1 and self.pool % 2 == 1
        self.require("pool", odd, "an odd whole number, 1 or more")

    def score(self, view: View) -> Tensor:
        mean, variance, _ = view.window_moments
        scores = mean + self.gamma * variance
        if not view.ragged:
            scores = ops.pool_scores(scores, self.pool, "avg")
            return ops.reduce_groups(scores, view.num_kv_heads)
        pooled, group = torch.full_like(scores, -torch.inf), len(scores) // view.num_kv_heads
        for head, n in enumerate(view.sizes.tolist()):
            if n:
                own = slice(head * group, (head + 1) * group)
                pooled[own, :n] = ops.pool_scores(scores[own, :n], self.pool, "avg")
        return ops.reduce_groups(pooled, view.num_kv_heads)

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor:
        _, variance, entropy = view.window_moments
        heads = view.num_kv_heads
        sums = torch.stack((entropy, variance.sum(1)), 1).view(heads, -1, 2).sum(1)
        entropies, variances = view.all_heads(sums).double().sum(0)
        return (entropies ** (1 / self.tau1) * variances ** (1 / self.tau2)).expand(heads)

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        assert demand is not None
        preference = demand[:, 0]
        if not preference.sum() > 0:  # a window of one query has no variance
            preference = torch.ones_like(preference)
        tokens = preference / preference.sum() * average_tokens(room) * len(preference)
        return layer_shares(evenly(tokens, room.candidates.double().amax(1)), room)
