"""KeepKV: what is dropped leaves its weight and its content in what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Merged, View, Wrapper, is_number


@dataclass
class KeepKV(Wrapper):
    """KeepKV (arXiv 2504.09936 §4): every dropped token is merged into the kept one whose key is
    most similar, if it is similar enough.

    A slot counts for exp(log bias) tokens, its votes. A token's weight is its votes times the
    exponential of its logit with the mean of the window's queries. The key and value of a merged
    slot are weighted means, the key's as in the paper's released code, and its log bias keeps the
    sum of the weights, so that attention is exact for the mean query.

    Cost: the base's, and O(n k D) for the cosines with the k kept keys, several times as much.

    Choose it where what is dropped repeats what stays, and must not vanish altogether.

    Attributes:
        threshold: least cosine similarity of two keys that are merged; others are dropped.
    """

    name: ClassVar[str] = "keepkv"
    merges: ClassVar[bool] = True

    threshold: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_alone("merges tokens")
        cosine = is_number(self.threshold) and -1 <= self.threshold <= 1
        self.require("threshold", cosine, "a number from -1 to 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and queries for the weights."""
        return self.base.needs | {"queries"}

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        m, values = view.candidates, view.values
        assert view.queries is not None and values is not None
        keys, values = view.keys[:, :m].float(), values[:, :m].float()
        votes = torch.zeros_like(scores) if view.log_bias is None else view.log_bias
        groups = view.queries.float().reshape(len(keys), -1, keys.shape[2]).mean(1)
        logits = (keys @ groups.unsqueeze(2)).squeeze(2) * view.scale  # of the mean query
        # Dropped tokens that are similar to none go to themselves, as kept ones do.
        target, cosine = ops.nearest_kept(keys, ~kept & view.valid, view.receivers(kept))
        alone = torch.arange(m, device=view.device).expand_as(target)
        target = torch.where(cosine >= self.threshold, target, alone)
        weight = (votes + logits).masked_fill(~view.valid, -torch.inf)
        total = torch.full_like(weight, -torch.inf).scatter_reduce_(1, target, weight, "amax")
        share = (weight - total.gather(1, target)).exp().masked_fill(~view.valid, 0.0)
        sums = torch.zeros_like(share).scatter_add_(1, target, share)
        share = share / sums.gather(1, target).clamp(min=torch.finfo(share.dtype).tiny)
        key, value = (ops.merge(x, target, share) for x in (keys, values))
        # The merged key's logit is the weighted mean of logits; the bias makes up the rest.
        mean = torch.zeros_like(share).scatter_add_(1, target, share * logits)
        bias = (total + sums.log() - mean).masked_fill(~kept, 0.0)
        return Merged(key, value, bias.nan_to_num(posinf=0.0, neginf=0.0))
