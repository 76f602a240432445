"""D2O: layers that attend evenly keep more, and dropped tokens are merged into similar ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Merged, Room, View, is_number
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.shares import average_tokens, evenly, layer_shares

_NEVER = -2.0  # a threshold that no cosine can be


@dataclass
class D2O(H2O):
    """D2O (arXiv 2406.13035 §3.2-3.3, and its released code): layers that attend evenly keep more
    tokens, H2O chooses within a layer, and dropped tokens are merged into kept ones.

    A layer's density F is the variance over tokens of the attention that each gathered, scaled to
    [0, 1] over the layer's heads, and averaged over them; budgets are softmax(-F) times the average
    one, at least 1 % of what there is. Layers 0, 1 and the last keep everything. A dropped key
    whose cosine u to the most similar kept one is no less than the threshold is merged into it: a
    kept key is the mean of itself and of u · k of those that join it, a value likewise. The
    threshold is a running mean: the mean u at first, then alpha · threshold + beta · mean u.

    Differences: gathered attention is that of the observation windows, as in `h2o`. Where the
    layers that keep everything would take more than half of the budget, they have budgets like
    others. Heads drop different tokens, so each compares its own cosines with a threshold of its
    own, where the code averages those of all heads. Budgets are made anew at each compaction. Every
    dropped key is compared with every kept one, so that the cost grows with their product.

    Cost: O(w n D) for attention, and O(n k D) for the cosines with the k kept keys.

    Choose it where dropped text repeats what stays, and answers need its values.

    Attributes:
        recent: share of a layer's budget for its newest tokens.
        alpha, beta: weights of the old threshold and of the new mean.
        dense: whether layers 0, 1 and the last keep everything.
    """

    name: ClassVar[str] = "d2o"
    allocates: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    alpha: float = 0.5
    beta: float = 0.5
    dense: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("alpha", "beta"):
            value = getattr(self, option)
            self.require(option, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        self.require("dense", isinstance(self.dense, bool), "true or false")

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor:
        count = view.valid.sum(1).clamp(min=1)
        gathered = scores.double().masked_fill(~view.valid, 0)
        centred = (gathered - gathered.sum(1, keepdim=True) / count.unsqueeze(1)) * view.valid
        variance = centred.square().sum(1) / (count - 1).clamp(min=1)
        every = view.all_heads(variance.float().unsqueeze(1)).double().squeeze(1)
        low, high = every.amin(), every.amax()
        density = (every - low) / (high - low + 1e-6)
        return density.mean().expand(view.num_kv_heads)

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        assert demand is not None
        there = room.candidates.double().amax(1)
        layers, total = len(there), average_tokens(room) * len(there)
        everything = torch.zeros(layers, dtype=torch.bool)
        if self.dense:
            everything[[0, min(1, layers - 1), layers - 1]] = True
        if float(there[everything].sum()) > total / 2:
            everything[:] = False
        rest = total - float(there[everything].sum())
        weights = (-demand[~everything, 0]).softmax(0)
        tokens, others = there.clone(), there[~everything]
        tokens[~everything] = evenly((weights * rest).maximum(0.01 * others), others)
        return layer_shares(tokens, room)

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        m, values = view.candidates, view.values
        assert values is not None
        keys, values = view.keys[:, :m].float(), values[:, :m].float()
        gone = ~kept & view.valid
        target, cosine = ops.nearest_kept(keys, gone, view.receivers(kept))
        gone &= cosine > _NEVER  # where nothing is kept, nothing is merged
        mean = (cosine * gone).sum(1, keepdim=True) / gone.sum(1, keepdim=True).clamp(min=1)
        old = view.layer_state.get("threshold", torch.full_like(mean, _NEVER))
        new = torch.where(old == _NEVER, mean, self.alpha * old + self.beta * mean)
        threshold = torch.where(gone.any(1, keepdim=True), new, old)
        joins = gone & (cosine >= threshold)
        weight = torch.where(joins, cosine, 0.0).masked_fill(kept, 1.0)
        count = torch.zeros_like(weight).scatter_add_(1, target, (joins | kept).float())
        # The mean is over as many as join, not over their weights.
        share = weight / count.gather(1, target).clamp(min=1)
        key, value = (ops.merge(x, target, share) for x in (keys, values))
        return Merged(key, value, view.log_bias, {"threshold": threshold})
