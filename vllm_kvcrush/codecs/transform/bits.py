"""Quantisers of components, how their codes fill words, and how bits are allocated."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Components that share fields of bits: each has one byte of a word.
QUAD = 4
# Bits that each component of a quad has in a 32-bit word.
WORD_BITS = 32 // QUAD
MAX_BITS = 8
PIECE_BITS = 4  # most bits of a field
VALUE_BITS = (2, 4)  # fewest and most bits of a value's channel


class Quantiser(NamedTuple):
    """A uniform scalar quantiser of a unit Gaussian: code c stands for step * (c - middle).

    Uniform levels cost a few percent more error than Lloyd-Max ones (Max 1960) and let kernels
    multiply codes instead of looking levels up.

    Attributes:
        step: distance between levels.
        middle: (2**bits - 1) / 2.
        distortion: mean squared error on a unit Gaussian.
    """

    step: float
    middle: float
    distortion: float


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _error(x: Tensor) -> Tensor:
    """Returns the mean squared error of a unit Gaussian that is rounded to the nearest of the
    ascending levels `x`."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    cuts = torch.cat([-edge, (x[1:] + x[:-1]) / 2, edge])
    mass, first = _cumulative(cuts).diff(), -_density(cuts).diff()
    return 1.0 + (x * x * mass - 2 * x * first).sum()


@functools.cache
def quantiser(bits: int) -> Quantiser:
    """Returns the best quantiser with 0 to MAX_BITS bits; with 0 bits, everything is 0. Raises
    ValueError for other numbers."""
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r} is not one of 0..{MAX_BITS}")
    if not bits:
        return Quantiser(1.0, 0.0, 1.0)
    levels = torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float64) / 2
    # The error has one minimum between overload and granularity.
    low, high = 0.0, 4.0
    for _ in range(80):
        third = (high - low) / 3
        if _error(levels * (low + third)) < _error(levels * (high - third)):
            high -= third
        else:
            low += third
    return Quantiser(low, (2**bits - 1) / 2, float(_error(levels * low)))


class Piece(NamedTuple):
    """A field that holds some bits of one quad's codes, as in csrc/kvcrush.h.

    Attributes:
        quad: index of the quad.
        weight: exponent: the field's value is multiplied by 2**weight.
        word: index of the 32-bit word that holds the field.
        first: the field's lowest bit in each byte of the word.
        bits: width of the field.
    """

    quad: int
    weight: int
    word: int
    first: int
    bits: int


def pieces(bits: Tensor) -> list[Piece]:
    """Returns where a token's key codes lie: fields of up to 4 bits that fill words.

    Args:
        bits: [D], equal within quads; the sum over quads is a multiple of WORD_BITS.
    """
    left: list[tuple[int, int, int]] = []  # (bits, weight, quad), most bits first
    for quad, width in enumerate(bits.view(-1, QUAD)[:, 0].tolist()):
        high = max(0, int(width) - PIECE_BITS)
        left += [(int(width) - high, high, quad)] * (width > 0) + [(high, 0, quad)] * (high > 0)
    assert sum(field[0] for field in left) % WORD_BITS == 0, "key codes do not fill words"
    left.sort(key=lambda field: (-field[0], field[2]))
    found, word = [], 0
    while left:
        room = WORD_BITS
        while room:
            fits = next((i for i, field in enumerate(left) if field[0] <= room), None)
            if fits is None:
                # No field is that small: a part of the smallest one fills the word.
                width, weight, quad = left.pop()
                rest = width - room
                left.append((room, weight + rest, quad))
                left.append((rest, weight, quad))
                left.sort(key=lambda field: (-field[0], field[2]))
                continue
            width, weight, quad = left.pop(fits)
            found.append(Piece(quad, weight, word, WORD_BITS - room, width))
            room -= width
        word += 1
    # Fields of equal weight are neighbours: kernels round the weights of a few together.
    return sorted(found, key=lambda piece: (-piece.weight, piece.quad))


def pooled_bits(variances: Tensor, mean_bits: float, most: int = MAX_BITS) -> Tensor:
    """Returns the bits of each component, `mean_bits` on average, allocated where they lower the
    error most. The components of a quad get the same number, each head gets whole words, and all
    leading dimensions share one pool.

    Args:
        variances: [..., D], descending.
        mean_bits: 0 <= mean_bits <= most.
        most: no component gets more.

    Returns:
        uint8, of the same shape. Among equals the first get the bits.
    """
    if not 0 <= mean_bits <= most:
        raise ValueError(f"mean_bits={mean_bits!r} is not between 0 and {most}")
    errors = torch.tensor([quantiser(b).distortion for b in range(most + 1)], dtype=torch.float64)
    size = variances.shape[-1]
    quads = variances.double().reshape(-1, size // QUAD, QUAD).sum(-1)
    # Errors fall convexly with bits, so taking the largest gains first, of a quad's bits, a head's
    # words and all words, is optimal.
    gains = (quads[..., None] * -errors.diff()).flatten(1)
    order = gains.sort(dim=-1, descending=True, stable=True)
    whole = gains.shape[1] // WORD_BITS * WORD_BITS
    words = order.values[:, :whole].view(len(gains), -1, WORD_BITS).sum(-1)
    given = torch.zeros_like(words)
    chosen = words.flatten().sort(descending=True, stable=True).indices
    given.view(-1)[chosen[: round(mean_bits * variances.numel() / 32)]] = 1
    rank = order.indices.argsort(-1)
    held = (rank < given.sum(-1, keepdim=True) * WORD_BITS).view(*quads.shape, most).sum(-1)
    return held.to(torch.uint8).repeat_interleave(QUAD, -1).view(variances.shape)


def head_bits(costs: Tensor, mean_bits: float) -> Tensor:
    """Returns the bits of each head's value channels, 2 to 4 and `mean_bits` on average, uint8
    [L, H], allocated where they lower the cost of errors most.

    Args:
        costs: [L, H], what an error as large as the value costs.
        mean_bits: mean number of bits of a channel.
    """
    few, most = VALUE_BITS
    errors = torch.tensor([quantiser(b).distortion for b in range(few, most + 1)])
    # Errors fall convexly with bits: a head's second bit gains less than its first.
    gains = (costs.double().flatten()[:, None] * -errors.diff()).flatten()
    spare = round((mean_bits - few) * costs.numel())
    taken = gains.sort(descending=True, stable=True).indices[:spare] // (most - few)
    given = torch.bincount(taken, minlength=costs.numel())
    return (few + given).to(torch.uint8).view(costs.shape)
