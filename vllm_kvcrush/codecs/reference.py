"""Plain-torch oracle of csrc/: what each codec keeps of K and V, and attention over it.

Slow and exact: float64 throughout, float32 only where the format itself rounds. Shapes use n
tokens, H KV heads, Hq query heads and head sizes D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_kvcrush.codecs.layout import GROUP
from vllm_kvcrush.codecs.transform.points import SINKS
from vllm_kvcrush.codecs.transform.reference import (
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    signs,
)
from vllm_kvcrush.codecs.transform.tables import Tables

CLIPS = (1.0, 0.88, 0.76, 0.66)
HALF_MAX = 65504.0


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, torch.zeros(()))


def int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each token.

    Args:
        x: float32 [n, D].

    Returns:
        Codes [n, D] in -127..127 and scales [n, 1]; x ≈ codes * scales.
    """
    scale = _half(x.abs().amax(-1, keepdim=True) / 127)
    return (x * _inverse(scale)).clamp(-127, 127).round(), scale


def int4_keys(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes on a grid of each channel, from its least to its largest value over 64 tokens.

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


def rotation(size: int) -> Tensor:
    """The orthonormal matrix R of rotated values, y = R v: random signs, then Hadamard transforms
    over blocks of the largest power of two that divides `size`. float64 [size, size]."""
    block = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    stack = [hadamard / math.sqrt(block)] * (size // block)
    blocks: Tensor = torch.block_diag(*stack)  # type: ignore[no-untyped-call]
    return blocks * signs(size)


def int4_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rotated values, with the best of a few clipping points for each token.

    Args:
        x: [n, D].

    Returns:
        Codes [n, D] in 0..15 and scales [n, 1]; R x ≈ (codes - 7.5) * scales.
    """
    y = (x.double() @ rotation(x.shape[1]).T).float()
    peak = y.abs().amax(-1, keepdim=True)
    best, scale = torch.zeros_like(peak), torch.zeros_like(peak)
    for clip in CLIPS:
        levels = (y * _inverse(peak * clip / 7.5) + 7.5).clamp(0, 15).round() - 7.5
        fitted = (y * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        gain = fitted * (y * levels).sum(-1, keepdim=True)
        scale = torch.where(gain > best, fitted, scale)
        best = torch.maximum(best, gain)
    scale = _half(scale)
    return (y * _inverse(scale) + 7.5).clamp(0, 15).round(), scale


def kept(codec: str, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a page of a codec gives back of float32 K [n, D] and V [n, Dv]: float64, same shapes.

    Args:
        codec: a name in pages.CODECS.
        dtype: of raw pages.
    """
    if codec == "int8":
        (k, k_scale), (v, v_scale) = int8(key), int8(value)
        return k.double() * k_scale.double(), v.double() * v_scale.double()
    if codec == "int4":
        k, k_scale, zero = int4_keys(key)
        v, v_scale = int4_values(value)
        rotated = (v.double() - 7.5) * v_scale.double()
        return zero.double() + k.double() * k_scale.double(), rotated @ rotation(value.shape[1])
    return key.to(dtype).double(), value.to(dtype).double()


def kept_fitted(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    exceptions: int,
) -> tuple[Tensor, Tensor]:
    """What a page of a fitted codec gives back of one head's K [n, D] and V [n, Dv]: float64.

    The `exceptions` tokens that lose most are int8, a request's first ones before all others.

    Args:
        positions: int [n], ascending.
        tables, layer, head: the codec's tables and which of them.
    """
    exact, bits = key.double(), int(tables.value_bits[layer, head])
    codes, loss = encode_keys(exact, positions, tables, layer, head)
    keys = decode_keys(codes, positions, tables, layer, head, torch.float64)
    values = decode_values(*encode_values(value.double(), bits), bits, torch.float64)
    loss = loss.masked_fill(positions < SINKS, torch.inf)
    worst = loss.sort(descending=True, stable=True).indices[:exceptions]
    keys[worst], values[worst] = kept("int8", key[worst], value[worst], key.dtype)
    return keys, values


def attention(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    tail: int,
    log_bias: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence over what its heads hold, compressed tokens first.

    Args:
        query: [rows, Hq, D].
        keys, values: for each KV head [n, D] and [n, Dv]; n may differ between heads.
        tail: tokens at the end that are causal; the last one belongs to the last row.
        log_bias: for each KV head [n], added to the logits.

    Returns:
        float64 [rows, Hq, Dv] and log-sum-exp [rows, Hq]; a row that sees nothing is 0 and -inf.
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
