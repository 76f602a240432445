"""Codecs by layer and head: what a finer ladder than `auto`'s could bring."""

from __future__ import annotations

import numpy as np


def least_loss_codecs(losses: np.ndarray, pages: np.ndarray, total: int) -> np.ndarray | None:
    """Chooses a codec for each layer and head, so that the sum of losses is small and pages
    suffice.

    This is the usual allocation of bits by a Lagrange multiplier: with a price of a page, each
    head takes the codec with the least loss and price together, and the price is the lowest at
    which pages suffice. What is left over buys the steps that save most.

    Args:
        losses: float64 [C, L, H], the expected loss of each head's tokens in each codec.
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
        if gain.max() <= 0:
            return choice
        codec, layer, head = np.unravel_index(np.argmax(gain / np.maximum(more, 0.5)), gain.shape)
        left -= int(more[codec, layer, head])
        choice[layer, head] = codec
