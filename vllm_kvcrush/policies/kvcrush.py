"""KVCrush: a cheap sample of what another policy would drop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import (
    OptionError,
    Policy,
    View,
    is_number,
    is_whole,
    protect,
)


@dataclass
class KVCrush(Policy):
    """KVCrush (arXiv 2503.00022): important tokens by a base policy, and representatives of the
    others.

    A token is described by one bit per KV head, over the heads of all ranks: is it in the top
    `share` of that head's scores? The tokens that a head would drop are put in order of their
    Hamming distance to one anchor vector, and evenly spaced ones of them stay, so that every
    kind of dropped token keeps a few members. At page level the unit is a page: its vector is
    the bits of its tokens, head after head, and its score their sum.

    The budget is total: important and representative tokens together are what the plan allows
    (in OpenVINO GenAI the representatives come on top). Each head leaves its *own* important
    tokens out of its own list. Of the base only the scores are used, not a `select` of its own
    such as H2O's recent share.

    Attributes:
        base: policy that scores.
        base_options: its hyperparameters.
        ratio: share of the budget for representatives.
        anchor: "random", "zeros", "ones", "mean" (majority of the vectors in a head's list) or
            "alternate" (0101...).
        level: "token" or "page".
        share: part of a head's candidates whose bit is one.
        seed: of the random anchor.
    """

    name: ClassVar[str] = "kvcrush"

    base: str = "snapkv"
    base_options: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 0.25
    anchor: str = "alternate"
    level: str = "token"
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        # Here, because the registry itself imports this module.
        from vllm_kvcrush import policies

        scorers = tuple(n for n in policies.names() if n != self.name)
        self.require_one_of("base", scorers)
        options = isinstance(self.base_options, Mapping)
        self.require("base_options", options, f"an object with options of {self.base}")
        ratio = is_number(self.ratio) and 0 <= self.ratio < 1
        self.require("ratio", ratio, "a number from 0 to below 1")
        self.require_one_of("anchor", ops.ANCHORS)
        self.require_one_of("level", ("token", "page"))
        share = is_number(self.share) and 0 < self.share < 1
        self.require("share", share, "a number between 0 and 1")
        seed = is_whole(self.seed) and 0 <= self.seed < 2**63
        self.require("seed", seed, "a whole number from 0 to 2**63 - 1")
        try:
            self._scorer = policies.get(self.base, self.base_options)
        except OptionError as error:  # name the option as the operator wrote it
            path = error.path.replace(self.base, f"{self.name}.base_options", 1)
            raise OptionError(path, error.problem) from None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Whatever the base needs."""
        return self._scorer.needs

    def score(self, view: View) -> Tensor:
        return self._scorer.score(view)

    def running(self, view: View, scores: Tensor) -> Tensor | None:
        return self._scorer.running(view, scores)

    def select(self, view: View, scores: Tensor, keep: int) -> Tensor:
        if self.level == "token":
            return self._select(view, scores, keep, 1)
        page = view.page_size
        assert view.candidates % page == 0 and keep % page == 0
        pages = self._select(view, scores, keep // page, page)
        slots = pages.unsqueeze(-1) * page + torch.arange(page, device=pages.device)
        return slots.flatten(1)

    def _select(self, view: View, scores: Tensor, keep: int, unit: int) -> Tensor:
        """Selects `keep` units of `unit` tokens each: int64 [H, keep]."""
        sinks = -(-view.sinks // unit)
        representatives = round(self.ratio * keep)
        if self.level == "page" and self.ratio > 0:
            representatives = max(1, representatives)
        # The most important unit is never given up for a representative, nor is a sink.
        representatives = max(0, min(representatives, keep - max(1, sinks)))
        totals = scores.reshape(scores.shape[0], -1, unit).sum(-1)
        important = ops.top_mask(protect(totals, sinks), keep - representatives)
        if representatives:
            # Every rank gets here or none does: the counts are the same on all of them.
            bits = view.all_heads(ops.keep_bits(scores, self.share))
            anchor = ops.anchor_bits(self.anchor, len(bits) * unit, self.seed, bits.device)
            important = ops.represent(bits, important, representatives, anchor, unit)
        return ops.mask_slots(important, keep)
