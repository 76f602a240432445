"""The plain-torch oracle of csrc/ and ops/triton/: what each codec keeps of K and V, and attention.

It is slow and exact: float64 throughout, float32 only where the format itself rounds. Shapes use n
tokens, H KV heads, Hq query heads and head sizes D.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_kvcrush.codecs.layout import GROUP

if TYPE_CHECKING:
    from vllm_kvcrush.codecs.transform.tables import HeadTables

_WORD = 0xFFFFFFFF
CLIPS = (1.0, 0.88, 0.76, 0.66)
HALF_MAX = 65504.0


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, torch.zeros(()))


def int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes each token on a symmetric grid.

    Args:
        x: float32 [n, D].

    Returns:
        Codes [n, D] in -127..127 and scales [n, 1]; x ≈ codes * scales.
    """
    scale = _half(x.abs().amax(-1, keepdim=True) / 127)
    return (x * _inverse(scale)).clamp(-127, 127).round(), scale


def int4_keys(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes each channel on a grid from its least to its largest value over 64 tokens.

    Args:
        x: float32 [n, D].

    Returns:
        Codes [n, D] in 0..15, scales and zeros [n, D]; x ≈ zeros + codes * scales.
    """
    codes, scales, zeros = [], [], []
    for group in x.split(GROUP):  # type: ignore[no-untyped-call]
        zero = _half(group.amin(0))
        scale = _half((group.amax(0) - zero) / 15)
        codes.append(((group - zero) * _inverse(scale)).clamp(0, 15).round())
        scales.append(scale.expand_as(group))
        zeros.append(zero.expand_as(group))
    return torch.cat(codes), torch.cat(scales), torch.cat(zeros)


@functools.cache
def signs(size: int) -> Tensor:
    """Returns the random signs that are applied before the Hadamard matrix, int8 [size]: the same
    hash of the channel as `rotation_sign` in csrc/layout.h."""
    x = (torch.arange(size) * 2654435769 + 0x9E3779B9) & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return (1 - 2 * ((x ^ (x >> 16)) & 1)).to(torch.int8)


def hadamard(x: Tensor) -> Tensor:
    """Returns `x` with the last dimension multiplied by an orthonormal, symmetric Hadamard matrix,
    block by block; a block is the largest power of two that divides the dimension."""
    size = x.shape[-1]
    block = size & -size
    y = x.reshape(-1, size // block, block)
    step = 1
    while step < block:
        y = y.view(-1, size // block, block // (2 * step), 2, step)
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2)
        step *= 2
    return (y / math.sqrt(block)).reshape(x.shape)


def rotation(size: int) -> Tensor:
    """Returns the orthonormal matrix R of rotated values, y = R v: random signs, then Hadamard
    transforms over blocks. float64 [size, size]."""
    return hadamard(torch.eye(size, dtype=torch.float64)) * signs(size)


def int4_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes rotated values, with the best of a few clipping points for each token.

    Args:
        x: [n, D].

    Returns:
        Codes [n, D] in 0..15 and scales [n, 1]; R x ≈ (codes - 7.5) * scales.
    """
    return token_grids((x.double() @ rotation(x.shape[1]).T).float(), 4)


def token_grids(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Encodes each token on a grid around 0, with the best of a few clipping points.

    Args:
        y: float32 [n, D].

    Returns:
        Codes [n, D] in 0..2^bits - 1 and scales [n, 1]; y ≈ (codes - middle) * scales.
    """
    top = 2**bits - 1
    middle = top / 2
    peak = y.abs().amax(-1, keepdim=True)
    best, scale = torch.zeros_like(peak), torch.zeros_like(peak)
    for clip in CLIPS:
        levels = (y * _inverse(peak * clip / middle) + middle).clamp(0, top).round() - middle
        fitted = (y * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        gain = fitted * (y * levels).sum(-1, keepdim=True)
        scale = torch.where(gain > best, fitted, scale)
        best = torch.maximum(best, gain)
    scale = _half(scale)
    return (y * _inverse(scale) + middle).clamp(0, top).round(), scale


def keep_plain(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for "raw" and "exact"."""
    return keys.to(dtype).double(), values.to(dtype).double()


def keep_int8(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for "int8"."""
    (k, k_scale), (v, v_scale) = int8(keys), int8(values)
    return k.double() * k_scale.double(), v.double() * v_scale.double()


def keep_int4(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for "int4"."""
    k, k_scale, zero = int4_keys(keys)
    v, v_scale = int4_values(values)
    rotated = (v.double() - 7.5) * v_scale.double()
    return zero.double() + k.double() * k_scale.double(), rotated @ rotation(values.shape[1])


def attention(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    tail: int,
    log_bias: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes attention of one sequence over what its heads hold, compressed tokens first.

    Args:
        query: [rows, Hq, D].
        keys, values: [n, D] and [n, Dv] of each KV head; n may differ between heads.
        tail: number of tokens at the end to which attention is causal; the last one belongs to the
            last row.
        log_bias: [n] of each KV head, added to the logits.

    Returns:
        float64 [rows, Hq, Dv] and log-sum-exp [rows, Hq]; a row that sees no token is 0 and -inf.
    """
    rows, heads, _ = query.shape
    group = heads // len(keys)
    out = query.new_zeros(rows, heads, values[0].shape[1], dtype=torch.float64)
    lse = query.new_full((rows, heads), -torch.inf, dtype=torch.float64)
    for head, (key, value) in enumerate(zip(keys, values, strict=True)):
        own = slice(head * group, (head + 1) * group)
        logits = scale * torch.einsum("rgd,nd->rgn", query[:, own].double(), key.double())
        if log_bias is not None:
            logits += log_bias[head].double()
        seen = len(key) - rows + 1 + torch.arange(rows).clamp(min=rows - 1 - tail)
        hidden = torch.arange(len(key)) >= seen.unsqueeze(1)
        logits.masked_fill_(hidden.unsqueeze(1), -torch.inf)
        if len(key):
            lse[:, own] = logits.logsumexp(-1)
            out[:, own] = logits.softmax(-1).nan_to_num(0) @ value.double()
    return out, lse
