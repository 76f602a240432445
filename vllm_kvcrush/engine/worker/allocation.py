"""Divides a request's pages among its layers and heads: by the shares that a policy wants, or by
what each loses in which codec."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vllm_kvcrush.policies.base import Room


def page_counts(shares: Tensor, room: Room, least: np.ndarray) -> np.ndarray:
    """Turns relative shares into whole pages.

    Every head gets the pages that its protected tokens need, and no more than its candidates fill;
    between these limits, pages follow the shares, and what some heads cannot use goes to others.

    Args:
        shares: float64 [L, H], at least 0.
        room: the pages to divide.
        least: int64 [L, H], pages that each head needs; together at most `room.pages`.

    Returns:
        int64 [L, H], pages of each head; their sum is `room.pages`, or as many as all candidates
        fill.
    """
    rooms, candidates = room.page_tokens.numpy(), room.candidates.numpy()
    most = -(-candidates // rooms)
    least = np.minimum(least, most)
    total = min(room.pages, int(most.sum()))
    assert int(least.sum()) <= total, f"{least.sum()} pages are protected and there are {total}"
    weights = shares.numpy().astype(np.float64)
    # Heads without a share come last, all alike. Shares are scaled so that nothing overflows.
    weights = np.maximum(weights / (weights.max(initial=0.0) or 1.0), 1e-9)

    def given(scale: float) -> np.ndarray:
        return np.clip(np.floor(np.minimum(weights * scale, 2**62)).astype(np.int64), least, most)

    low, high = 0.0, float((most + 1).max()) / float(weights.min())
    for _ in range(128):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if int(given(middle).sum()) <= total:
            low = middle
        else:
            high = middle
    pages = given(low)
    # What is left over goes to those that are nearest to one more page.
    wanting = np.where(pages < most, weights * high - pages, -np.inf).ravel()
    for pair in np.argsort(-wanting, kind="stable"):
        left = total - int(pages.sum())
        if left <= 0:
            break
        pages.flat[pair] += min(left, 1, int(most.flat[pair] - pages.flat[pair]))
    left = total - int(pages.sum())
    for pair in np.argsort(-weights.ravel(), kind="stable") if left > 0 else ():
        more = min(left, int(most.flat[pair] - pages.flat[pair]))
        pages.flat[pair] += more
        left -= more
    return pages


def least_loss_codecs(losses: np.ndarray, pages: np.ndarray, total: int) -> np.ndarray | None:
    """Chooses a codec for each layer and head, so that the sum of losses is small and pages
    suffice.

    This is the usual allocation of bits by a Lagrange multiplier: with a price of a page, each
    head takes the codec with the least loss and price together, and the price is the lowest at
    which pages suffice. What is left over buys the steps that save most.

    Args:
        losses: float64 [C, L, H], the expected loss of each head's tokens in each codec. Where some
            are NaN the choice is any that pages suffice for.
        pages: int64 [C, L, H], pages that they take.
        total: pages that there are.

    Returns:
        int64 [L, H], indices of codecs; or None if no choice has room.
    """
    if int(pages.min(0).sum()) > total:
        return None

    def chosen(price: float) -> np.ndarray:
        return np.argmin(losses + price * pages, 0)

    def taken(choice: np.ndarray) -> int:
        return int(np.take_along_axis(pages, choice[None], 0).sum())

    # Of codecs that lose alike, the one that takes fewest pages.
    low, high = 1e-12 * float(losses.max(initial=1e-300)), 1.0
    while taken(chosen(high)) > total and high < 1e30:
        high *= 16
    if taken(chosen(low)) <= total:
        return chosen(low)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if taken(chosen(middle)) > total else (low, middle)
    choice = chosen(high)
    if (left := total - taken(choice)) < 0:
        return np.argmin(pages, 0)
    while True:
        mine = np.take_along_axis(losses, choice[None], 0)
        more = pages - np.take_along_axis(pages, choice[None], 0)
        gain = np.where(more <= left, mine - losses, 0.0)
        if not gain.max() > 0:  # also if it is NaN
            return choice
        codec, layer, head = np.unravel_index(np.argmax(gain / np.maximum(more, 0.5)), gain.shape)
        left -= int(more[codec, layer, head])
        choice[layer, head] = codec
