"""Fair eviction: every span of the prompt loses the same share of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, Wrapper, is_number
from vllm_kvcrush.policies.choice import in_position_order, reordered, with_protected


@dataclass
class Fair(Wrapper):
    """Fair eviction ("The Pitfalls of KV Cache Compression", arXiv 2510.00231 §5): the base chooses
    within each span, and each span keeps its share of the budget, so that one instruction is not
    forgotten for another. Tokens between spans belong to the span before them, those before the
    first one to the first.

    Without spans the base chooses as it does alone. Protected slots count towards their span, and
    a span keeps them even where its share is smaller. The shares depend on data, so that on a GPU
    the host waits for each layer.

    Cost: that of the base's choice, again for each span.

    Choose it where a prompt has several instructions, with each as a span.

    Attributes:
        base: policy that chooses within a span.
        fairness: 1 gives each span its share, 0 what the base would give it.
    """

    name: ClassVar[str] = "fair"
    uses_spans: ClassVar[bool] = True

    fairness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        single = isinstance(self.base, Policy) and not self.base.whole_pages
        self.require("base", single, "a policy of single tokens")
        share = is_number(self.fairness) and 0 <= self.fairness <= 1
        self.require("fairness", share, "a number from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and positions to know the spans by."""
        return self.base.needs | {"positions"}

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        free = self.base.select(view, scores, keep)
        if not view.spans or self.fairness == 0:
            return free
        starts = [0, *(first for first, _ in view.spans[1:])]
        ends = [*starts[1:], 2**31]
        spans = torch.tensor(starts[1:], device=view.device)
        span = torch.bucketize(view.positions.contiguous(), spans, right=True)
        member = torch.nn.functional.one_hot(span, len(starts)).bool()  # [H, m, spans]
        member &= view.valid.unsqueeze(2)
        there, alone, least = (
            (member & slots.unsqueeze(2)).sum(1).double()
            for slots in (view.valid, free, view.staying)
        )
        wanted = keep.to(view.device).unsqueeze(1)
        share = there * wanted / view.sizes.to(view.device).unsqueeze(1).clamp(min=1)
        share = self.fairness * share + (1 - self.fairness) * alone
        sizes, quota = torch.stack((there, _whole(share, least, there, wanted))).long().cpu()
        kept = torch.nn.functional.pad(torch.zeros_like(free), (0, 1))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # The span's slots lie one after the other. The number of columns is the same on every
            # rank, because a base may ask for the other ranks' heads.
            first = sizes[:, :index].sum(1, keepdim=True)
            at = first + torch.arange(min(view.candidates, end - start))
            order = at.clamp_(max=view.candidates - 1).to(view.device)
            inside = replace(
                in_position_order(view, order),
                counts=sizes[:, index],
                sinks=max(0, min(view.sinks, end) - start),
                spans=(),
            )
            valid = inside.valid
            inside = replace(inside, protected=reordered(view.staying, order) & valid)
            best = reordered(scores, order).masked_fill(~valid, -torch.inf)
            chosen = self.base.select(inside, best, quota[:, index])
            chosen = with_protected(inside, best, chosen, quota[:, index])
            kept.scatter_(1, order.masked_fill(~valid, view.candidates), chosen)
        return kept[:, :-1]

    split = Policy.split  # Wrapper's would be the base's, for what the base selects


def _whole(quota: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Returns whole numbers near `quota` [H, s], from `least` to `most`, that sum to `total`
    [H, 1]. What raises some to `least` is taken from the others in proportion to what they have
    above theirs; the largest remainders are rounded up."""
    zero = torch.zeros_like(total)
    least = (
        least.cumsum(1).minimum(total).diff(dim=1, prepend=zero)
    )  # fewer where even these are too many
    quota = quota.maximum(least)
    spare = quota - least
    over = quota.sum(1, keepdim=True) - total
    quota = quota - spare * over / spare.sum(1, keepdim=True).clamp(min=1e-9)
    down = quota.floor().maximum(least).minimum(most)
    left = total - down.sum(1, keepdim=True)
    # Rounded, so that equal shares tie.
    rest = ((quota - down) * 2**20).round().masked_fill(down >= most, -torch.inf)
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(1)
    return down + (rank < left)
