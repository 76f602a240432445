"""The plain-torch oracle of the codecs whose pages are one chunk: "tada" and "gear".

tada follows TaDA (arXiv 2506.04642), which keeps for each token the mean of its KV heads in 16 bits
and of each head what differs from it. Pages are of one head, whose tokens need not be those of
another, and 16 bits over 3 to 8 KV heads are 2 to 5 bits a channel; so the mean here is that of the
page's tokens, and what differs from it is rotated, as the values of "int4" are.

gear follows GEAR (arXiv 2403.05527): X ≈ Q + A Bᵀ + S with a grid for each channel of keys and for
each value, a product of low rank and a few single channels as they are. Here A Bᵀ is taken off
before quantising, not made of what quantising leaves, since that is close to noise; values are
rotated, which leaves no channels to stand apart; and S has equally many entries in each strip.

Shapes use n tokens of a page and head sizes D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_kvcrush.codecs.layout import GEAR, STRIP, TADA, Chunk
from vllm_kvcrush.codecs.reference import _half, _inverse, rotation, signs, token_grids

if TYPE_CHECKING:
    from vllm_kvcrush.codecs.transform.tables import HeadTables

LOOPS = 4  # of the power iteration


def tada_side(x: Tensor, chunk: Chunk = TADA) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes one side of a page.

    Args:
        x: float32 [n, D].

    Returns:
        Codes [n, D] in 0..2^bits - 1, scales [n, 1] and the mean [D]; R x ≈ mean + (codes -
        middle) * scales, where R is the rotation.
    """
    turned = x.double() @ rotation(x.shape[1]).T
    mean = _half((x.double().mean(0) @ rotation(x.shape[1]).T).float())
    return *token_grids((turned - mean).float(), chunk.bits), mean


def tada_kept(x: Tensor, chunk: Chunk = TADA) -> Tensor:
    """Returns what is read back of one side [n, D] of a page, float64."""
    if not len(x):
        return x.double()
    codes, scales, mean = tada_side(x, chunk)
    y = mean.double() + (codes.double() - (2**chunk.bits - 1) / 2) * scales.double()
    return y @ rotation(x.shape[1])


def keep_tada(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for "tada"."""
    return tada_kept(keys), tada_kept(values)


def directions(x: Tensor, rank: int) -> Tensor:
    """Returns the main directions of rows, of unit length: float64 [rank, D].

    They are found by power iteration, one after the other, each in what those before leave over.

    Args:
        x: [n, D].
    """
    rest, found = x.double(), []
    for _ in range(rank):
        one = signs(x.shape[1]).double()
        for _ in range(LOOPS):
            one = rest.T @ (rest @ one)
            length = one.norm()
            one = one / length if 1e-30 < length < 1e30 else torch.zeros_like(one)
        found.append(one)
        rest = rest - (rest @ one)[:, None] * one
    return torch.stack(found) if found else rest.new_zeros(0, x.shape[1])


def weights(x: Tensor, along: Tensor) -> Tensor:
    """Returns how much rows [n, D] have of directions [rank, D], as float16 numbers, in
    float64 [n, rank]."""
    rest, found = x.double(), []
    for one in along:
        found.append(rest @ one)
        rest = rest - found[-1][:, None] * one
    if not found:
        return rest.new_zeros(len(x), 0)
    return _half(torch.stack(found, 1).float()).double()


def gear_keys(x: Tensor, chunk: Chunk = GEAR) -> tuple[Tensor, Tensor]:
    """Encodes the keys of a page.

    Args:
        x: float32 [n, D].

    Returns:
        What is read back, float64 [n, D], and where single channels stand apart, bool [n, D].
    """
    centred = x.double() - x.double().mean(0)
    along = directions(centred, chunk.rank)
    low_rank = weights(centred, along) @ _half(along.float()).double()
    rest = (x.double() - low_rank).float()
    mean, spread = rest.double().mean(0), rest.double().var(0, unbiased=False)
    constant = spread <= 1e-12 * mean.square() + 1e-30
    far = ((rest - mean).abs() / spread.sqrt().masked_fill(constant, torch.inf)).float()
    apart = torch.zeros(rest.shape, dtype=torch.bool)
    for part, own in zip(far.split(STRIP), apart.split(STRIP), strict=True):  # type: ignore[no-untyped-call]
        # A stable sort: the first of equal ones.
        order = part.flatten().argsort(descending=True, stable=True)
        count = x.shape[1] // chunk.per_single if chunk.per_single else 0
        own.view(-1)[order[:count]] = True
    top = 2**chunk.bits - 1
    low = rest.masked_fill(apart, torch.inf).amin(0)
    high = rest.masked_fill(apart, -torch.inf).amax(0)
    low, high = (torch.where(apart.all(0), mean.float(), end) for end in (low, high))
    zero = _half(low)
    scale = _half(((high - zero) / top).clamp(min=0))
    codes = ((rest - zero) * _inverse(scale)).clamp(0, top).round()
    read = zero.double() + codes.double() * scale.double()
    single = read + _half((rest.double() - read).float()).double()
    return torch.where(apart, single, read) + low_rank, apart


def gear_values(x: Tensor, chunk: Chunk = GEAR) -> Tensor:
    """Returns what is read back of the values [n, D] of a page, float64."""
    turn = rotation(x.shape[1])
    along = directions(x, chunk.rank)
    low_rank = weights(x, along) @ _half((along @ turn.T).float()).double()
    codes, scales = token_grids((x.double() @ turn.T - low_rank).float(), chunk.bits)
    read = (codes.double() - (2**chunk.bits - 1) / 2) * scales.double()
    return (read + low_rank) @ turn


def keep_gear(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for "gear"."""
    if not len(keys):
        return keys.double(), values.double()
    return gear_keys(keys)[0], gear_values(values)
