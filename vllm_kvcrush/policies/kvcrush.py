"""KVCrush: a cheap sample of what another policy would drop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Policy, View, Wrapper, is_number, is_whole, protect
from vllm_kvcrush.policies.keydiff import KeyDiff


@dataclass
class KVCrush(Wrapper):
    """KVCrush (arXiv 2503.00022): important tokens by a base policy, and representatives of the
    others.

    A token is described by one bit per KV head, over the heads of all ranks: whether it is in the
    top `share` of that head's scores. The tokens that a head would drop are ordered by their
    Hamming distance to one anchor vector, and evenly spaced ones of them stay, so that a few of
    every kind of dropped token stay. At page level the unit is a page: its vector is the bits of
    its tokens, head after head, and its score is the sum of their scores.

    The budget is total: important and representative tokens together are what the plan allows
    (in OpenVINO GenAI the representatives come on top). Each head leaves its *own* important
    tokens out of its own list. Only the base's scores are used, not its `select`, such as H2O's
    share of recent tokens.

    Cost: that of the base, and a sort of n Hamming distances.

    Choose it over any scorer where what scorers miss must not vanish altogether.

    Attributes:
        base: policy that scores; KeyDiff unless another one is named: of the cheap ones it loses
            least, whether the question is known or not, and it needs no queries.
        ratio: share of the budget for representatives.
        anchor: "random", "zeros", "ones", "mean" (majority of the vectors in a head's list) or
            "alternate" (0101...).
        level: "token" or "page".
        share: part of a head's candidates whose bit is one.
        seed: seed of the random anchor.
    """

    name: ClassVar[str] = "kvcrush"

    base: Policy = field(default_factory=KeyDiff)
    ratio: float = 0.25
    anchor: str = "alternate"
    level: str = "token"
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # Unlike other wrappers, this one does not ask the base to select, only to score.
        setattr(self, "uses_spans", self.scores_spans)  # noqa: B010
        setattr(self, "tiled", self.base.tiled)  # noqa: B010
        ratio = is_number(self.ratio) and 0 <= self.ratio < 1
        self.require("ratio", ratio, "a number from 0 to below 1")
        self.require_one_of("anchor", ops.ANCHORS)
        self.require_one_of("level", ("token", "page"))
        share = is_number(self.share) and 0 < self.share < 1
        self.require("share", share, "a number between 0 and 1")
        seed = is_whole(self.seed) and 0 <= self.seed < 2**63
        self.require("seed", seed, "a whole number from 0 to 2**63 - 1")

    @property
    def whole_pages(self) -> bool:
        """Returns whether whole pages stay."""
        return self.level == "page" or super().whole_pages

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        if self.level == "token":
            return self._select(view, scores, keep, 1)
        page = view.page_size
        assert view.candidates % page == 0 and not bool((keep % page).any())
        return self._select(view, scores, keep // page, page).repeat_interleave(page, 1)

    def _select(self, view: View, scores: Tensor, keep: Tensor, unit: int) -> Tensor:
        """Returns a mask of `keep` [H] units of `unit` tokens each, bool [H, units]."""
        sinks = -(-view.sinks // unit)
        # The most important unit is never given up for a representative, nor is a sink.
        least = int(self.level == "page" and self.ratio > 0)
        representatives = [
            max(0, min(max(least, round(self.ratio * k)), k - max(1, sinks))) for k in keep.tolist()
        ]
        best = protect(view, scores)
        if unit > 1:
            held = best.reshape(len(best), -1, unit).isposinf().any(-1)
            best = scores.reshape(*held.shape, unit).sum(-1)
            best = best.nan_to_num(nan=torch.finfo(best.dtype).min).masked_fill(held, torch.inf)
        important = ops.top_mask(best, keep - torch.tensor(representatives))
        if self.ratio == 0:
            return important
        # Every rank asks for the others' bits, though its own heads may have no use for them.
        sizes = view.sizes if view.ragged else None
        bits = view.all_heads(ops.keep_bits(scores, self.share, sizes))
        anchor = ops.anchor_bits(self.anchor, len(bits) * unit, self.seed, bits.device)
        if not view.ragged and len(set(representatives)) == 1:
            return ops.represent(bits, important, representatives[0], anchor, unit)
        counts = zip((view.sizes // unit).tolist(), representatives, strict=True)
        for head, (size, count) in enumerate(counts):
            if count:
                own, described = important[head : head + 1, :size], bits[:, : size * unit]
                own.copy_(ops.represent(described.contiguous(), own, count, anchor, unit))
        return important

    split = Policy.split  # Wrapper's would be the base's, for what the base selects
