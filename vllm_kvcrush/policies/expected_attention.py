"""Expected attention: what queries to come will attend to, by the statistics of the last ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, is_number, is_whole
from vllm_kvcrush.policies.choice import rope_of
from vllm_kvcrush.policies.queries import QueryStatistics, load


@dataclass
class ExpectedAttention(Policy):
    """Expected Attention (arXiv 2510.00636): the attention that a token will receive from queries
    that are distributed as the last ones, at the next positions.

    With μ and Σ, mean and covariance of a head's queries without rotary embedding, and R, the mean
    rotation of the next `future` positions, a key's expected logit is z = kᵀRμ/√D + kᵀRΣRᵀk/2D. The
    weights softmax(z), the mean over the query heads of a KV head, are multiplied by the norms of
    the values. Sinks do not take part.

    The paper takes μ and Σ over the whole prompt, or from a text; here they are the observation
    window's, or those of a file. So Σ has the rank of the window at most, or that of the file, 32,
    and kᵀRΣRᵀk is the sum of the squares of the products with as many rotated deviations, which
    takes no D x D matrix.

    Cost: O(w n D), that of the window's attention.

    Choose it where what comes next is like what came last, as in long answers; with a file, where
    the last queries tell nothing of what comes. Take it with `epsilon=0.01`, as kvpress evaluates
    it, which loses a sixth of what 0 does at half of the tokens: few tokens have nearly all of the
    weight, and with it the others are ranked by the norms of their values.

    Attributes:
        future: number of the next positions.
        covariance: whether Σ counts.
        value_norm: whether weights are multiplied by the norms of the values.
        epsilon: added to the weights before that.
        statistics: file of `vllm-kvcrush calibrate MODEL --queries`, whose μ and Σ are taken
            instead of the window's.
    """

    name: ClassVar[str] = "expected_attention"

    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    statistics: str | None = None
    known: QueryStatistics | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        future = is_whole(self.future) and self.future >= 1
        self.require("future", future, "a whole number, 1 or more")
        self.require("covariance", isinstance(self.covariance, bool), "true or false")
        self.require("value_norm", isinstance(self.value_norm, bool), "true or false")
        epsilon = is_number(self.epsilon) and self.epsilon >= 0
        self.require("epsilon", epsilon, "a number, 0 or more")
        if self.statistics is None:
            return
        self.require("statistics", isinstance(self.statistics, str), "a path")
        try:
            self.known = load(self.statistics)
        except ValueError as error:
            self.require("statistics", False, f"a file of query statistics: it {error}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns that queries are needed, unless there is a file."""
        return frozenset({"queries"} if self.known is None else ())

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Returns the shape of the file's model."""
        return None if self.known is None else (len(self.known.mean), self.known.kv_heads)

    @property
    def head_size(self) -> int | None:
        """Returns the head size of the file's model."""
        return None if self.known is None else self.known.mean.shape[2]

    def score(self, view: View) -> Tensor:
        keys, m = view.keys.float(), view.candidates
        # A head that holds nothing but sinks has no weights.
        weights = self._logits(view, keys).softmax(2).nan_to_num().mean(1)[:, :m] + self.epsilon
        if not self.value_norm:
            return weights
        assert view.values is not None
        return weights * view.values[:, :m].float().norm(dim=2)

    def _logits(self, view: View, keys: Tensor) -> Tensor:
        """Returns the expected logits, [H, g, n], the least number at the sinks and -inf past a
        head's own slots."""
        heads, n, size = keys.shape
        rows = self._of_window(view) if self.known is None else self._of_file(view, self.known)
        rows = rows.view(heads, -1, rows.shape[1], size)
        products = (rows.flatten(1, 2) @ keys.mT).view(heads, -1, rows.shape[2], n)
        logits = products[:, :, 0]
        if self.covariance:
            logits = logits + 0.5 * products[:, :, 1:].square().sum(2)
        if view.log_bias is not None:
            logits[..., : view.candidates] += view.log_bias.unsqueeze(1)
        # Not -inf, as a head may hold nothing but sinks.
        logits[..., : view.sinks] = torch.finfo(logits.dtype).min
        if view.ragged:
            logits = logits.masked_fill(~view.held_valid.unsqueeze(1), -torch.inf)
        return logits

    def _of_window(self, view: View) -> Tensor:
        """Returns the mean of the last queries, then, if it counts, rows whose outer products with
        themselves add up to their covariance, all rotated to the next positions and scaled,
        [Hq, 1 + w, D]."""
        queries = view.queries
        assert queries is not None
        window = queries.shape[1]
        # Rotations add up, so a query's way to the next positions does not depend on its own.
        ahead = torch.arange(window, 0, -1, device=view.device)
        turned = rope_of(view).averaged(queries.float() * view.scale, ahead, self.future)
        mean = turned.mean(1, keepdim=True)
        return torch.cat((mean, (turned - mean) / window**0.5), 1) if self.covariance else mean

    def _of_file(self, view: View, known: QueryStatistics) -> Tensor:
        """Returns the same of the file's statistics, [Hq, 1 + r, D]."""
        group = known.mean.shape[1] // known.kv_heads
        own = slice(view.first_head * group, (view.first_head + view.num_kv_heads) * group)
        rows = known.mean[view.layer, own].unsqueeze(1)
        if self.covariance:
            rows = torch.cat((rows, known.deviations[view.layer, own]), 1)
        rows = rows.to(view.device) * view.scale
        first = torch.full(rows.shape[1:2], view.computed, device=view.device)
        return rope_of(view).averaged(rows, first, self.future)
