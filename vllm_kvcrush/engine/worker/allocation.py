"""Divides a request's pages among its layers and heads, for policies that want unequal shares."""

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
