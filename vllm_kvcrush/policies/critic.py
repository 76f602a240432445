"""CRITIC: attention, how evenly it is given, and what a token means for the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, is_number


@dataclass
class Critic(Policy):
    """CRITIC (arXiv 2504.01281): importance is a weighted sum of attention, entropy and gradient,
    each scaled from 0 to 1 among the candidates.

    Attention is the sum of what a token receives from the window's queries and the query heads of a
    KV head. Gradient is the sum of the absolute derivatives with respect to a token's key and value
    of the mean square difference between the outputs of the last two queries, in closed form, where
    the earlier output is a constant.

    The paper's entropy is of the attention that a token *gives*, which is known of the window's
    tokens only, and those stay in any case; here it is of the attention that it *receives*, over
    the window's queries, so that a token that all of them look at counts more than one that only
    one does. Importance is of each KV head, not of the layer. The paper's ratio that follows the
    memory in use is `--kv-pressure`.

    Cost: O(w n D), one pass over keys and values more than attention.

    Choose it where a token must matter to the output, not only be looked at.

    Attributes:
        attention, entropy, gradient: weights of the three terms; they are divided by their sum. The
            defaults are ours.
    """

    name: ClassVar[str] = "critic"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    attention: float = 0.5
    entropy: float = 0.25
    gradient: float = 0.25

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("attention", "entropy", "gradient")}
        for option, value in weights.items():
            self.require(option, is_number(value) and value >= 0, "a number, 0 or more")
        self.require("attention", sum(weights.values()) > 0, "above 0, and no other weight is")

    def score(self, view: View) -> Tensor:
        weights = view.window_logits().softmax(3)  # [H, g, w, n]
        given = weights.sum(2)
        terms = [(self.attention, given.sum(1))]
        if self.entropy:
            # -Σ p ln p of p = A / ΣA, without a division for each query.
            logs = torch.xlogy(weights, weights).sum(2)
            tiny = torch.finfo(given.dtype).tiny
            spread = given.clamp(min=tiny).log() - logs / given.clamp(min=tiny)
            terms.append((self.entropy, spread.mean(1)))
        if self.gradient:
            terms.append((self.gradient, self._gradient(view, weights)))
        total = self.attention + self.entropy + self.gradient
        m = view.candidates
        scaled = [weight / total * ops.min_max(x[:, :m], view.valid) for weight, x in terms]
        return torch.stack(scaled).sum(0)

    def _gradient(self, view: View, weights: Tensor) -> Tensor:
        """Returns Σ |∂l/∂k| + |∂l/∂v| of each held slot, over channels and query heads, [H, n]."""
        heads, group, window, _ = weights.shape
        assert view.queries is not None and view.values is not None
        values = view.values.float()
        if window < 2:
            return torch.zeros_like(values[:, :, 0])
        outputs = (weights[:, :, -2:].flatten(1, 2) @ values).view(heads, group, 2, -1)
        change = 2 / values.shape[2] * (outputs[:, :, 1] - outputs[:, :, 0])  # ∂l/∂output
        own = weights[:, :, -1]  # [H, g, n]
        along = change @ values.mT - (change * outputs[:, :, 1]).sum(2, keepdim=True)
        last = view.queries[:, -1].float().view(heads, group, -1).abs().sum(2, keepdim=True)
        of_key = along.abs() * (last * view.scale)
        return (own * (of_key + change.abs().sum(2, keepdim=True))).sum(1)
