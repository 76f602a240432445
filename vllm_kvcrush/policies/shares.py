"""What policies that divide a request's pages among layers and heads have in common."""

from __future__ import annotations

from torch import Tensor

from vllm_kvcrush.policies.base import Policy, Room


def average_tokens(room: Room) -> float:
    """Returns how many tokens each head of each layer holds if all hold as many."""
    return room.pages * float(room.page_tokens.double().mean()) / room.candidates.numel()


def evenly(tokens: Tensor, most: Tensor) -> Tensor:
    """Returns the budgets `tokens` [L] with none above `most` [L]; what some cannot use is divided
    among the others in equal parts, as often as it takes (as in the released code of CAKE, arXiv
    2503.12491)."""
    for _ in range(len(tokens)):
        over = (tokens - most).clamp(min=0).sum()
        tokens = tokens.minimum(most)
        below = tokens < most
        if over <= 0 or not bool(below.any()):
            break
        tokens = tokens + below * over / below.sum()
    return tokens.minimum(most)


def layer_shares(tokens: Tensor, room: Room, within: Tensor | None = None) -> Tensor:
    """Returns shares of pages as `Policy.allocate` does, with which a layer's heads hold so many
    tokens.

    Args:
        tokens: float64 [L], tokens of a head, on average over the heads of each layer.
        room: the pages to divide.
        within: [L, H], relative shares of the heads in their layer's tokens; None means equal ones.
    """
    each = tokens.unsqueeze(1).expand(room.candidates.shape)
    if within is not None:
        each = each * within / within.mean(1, keepdim=True)
    return each / room.page_tokens


def shares_within(base: Policy, demand: Tensor | None, room: Room) -> Tensor | None:
    """Returns the relative shares of heads in their layer's tokens by a wrapped policy, [L, H], or
    None if it does not divide pages."""
    return base.allocate(demand, room).double() * room.page_tokens if base.allocates else None
