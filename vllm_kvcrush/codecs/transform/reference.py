"""The plain-torch oracle of transform coding in csrc/: keys, values, pages."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcrush.codecs import layout
from vllm_kvcrush.codecs.transform.bits import quantiser
from vllm_kvcrush.codecs.transform.points import SINKS
from vllm_kvcrush.codecs.transform.tables import Tables

MAX_INT8 = 127
SCALE_STEPS = 16  # value scales: steps per octave
SCALE_ZERO = 128  # the byte that means 1
_WORD = 0xFFFFFFFF


def origins(positions: Tensor) -> Tensor:
    """The position of each token's strip, [n]: that of its first token."""
    return positions[torch.arange(len(positions)) // layout.STRIP * layout.STRIP]


def encode_keys(
    keys: Tensor, positions: Tensor, tables: Tables, layer: int, head: int
) -> tuple[Tensor, Tensor]:
    """Codes of one head's keys.

    Args:
        keys: [n, D] with RoPE.
        positions: [n] of the tokens.

    Returns:
        Codes, uint8 [n, D], components in the order of the tables, 0 where one has no bits; and
        each token's loss [n], what its error costs (`fit` says in what).
    """
    x = tables.rope.rotate(keys, -origins(positions)) if tables.point.local else keys
    x = (x - tables.key_mean[layer, head].to(x)) @ tables.forward[layer, head].to(x).mT
    top = (2 ** tables.bits[layer, head].long() - 1).to(x)
    codes = (x + top / 2).round().clamp(torch.zeros_like(top), top)
    loss = (x - (codes - top / 2)).square() @ tables.cost[layer, head].to(x)
    return codes.to(torch.uint8), loss


def decode_keys(
    codes: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The keys [n, D], with RoPE, that codes stand for."""
    middle = (2 ** tables.bits[layer, head].long() - 1).to(dtype) / 2
    x = (codes.to(dtype) - middle) @ tables.inverse[layer, head].to(dtype).mT
    x = x + tables.key_mean[layer, head].to(x)
    return tables.rope.rotate(x, origins(positions)) if tables.point.local else x


@functools.cache
def signs(size: int) -> Tensor:
    """The random signs that go before the Hadamard matrix: int8 [size]. The same hash of the
    channel as `rotation_sign` in csrc/layout.h."""
    x = (torch.arange(size) * 2654435769 + 0x9E3779B9) & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return (1 - 2 * ((x ^ (x >> 16)) & 1)).to(torch.int8)


def hadamard(x: Tensor) -> Tensor:
    """Multiplies the last dimension by an orthonormal, symmetric Hadamard matrix, block by block:
    blocks are the largest power of two that divides it."""
    size = x.shape[-1]
    block = size & -size
    y = x.reshape(-1, size // block, block)
    step = 1
    while step < block:
        y = y.view(-1, size // block, block // (2 * step), 2, step)
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2)
        step *= 2
    return (y / math.sqrt(block)).reshape(x.shape)


def encode_values(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of values.

    Args:
        values: [n, Dv].

    Returns:
        Codes, uint8 [n, Dv], and scales, uint8 [n]: byte b > 0 means 2^((b - 128) / 16) between
        two codes, and 0 means a value of nothing but zeros.
    """
    y = hadamard(values * signs(values.shape[-1]).to(values))
    norm = y.square().mean(-1, keepdim=True).sqrt()
    tiny = torch.finfo(values.dtype).tiny
    q = quantiser(bits)
    codes = (y / (norm.clamp(min=tiny) * q.step) + q.middle).round().clamp(0, 2 * q.middle)
    c = codes - q.middle
    # The scale that loses least with these codes.
    scale = (y * c).sum(-1) / c.square().sum(-1).clamp(min=tiny)
    byte = SCALE_ZERO + (SCALE_STEPS * scale.clamp(min=tiny).log2()).round()
    byte = byte.clamp(1, 255).where(norm[..., 0] > 0, torch.zeros_like(scale))
    return codes.to(torch.uint8), byte.to(torch.uint8)


def decode_values(
    codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values [n, Dv] that codes stand for."""
    scale = torch.exp2((scales.to(dtype) - SCALE_ZERO) / SCALE_STEPS) * (scales > 0)
    y = (codes.to(dtype) - quantiser(bits).middle) * scale[:, None]
    return hadamard(y) * signs(codes.shape[-1]).to(y)


def to_int8(x: Tensor) -> Tensor:
    """What int8 codes with one float16 scale a row leave of `x` [..., D]."""
    scale = (x.abs().amax(-1, keepdim=True) / MAX_INT8).half().to(x.dtype)
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny)
    return (x / scale).round().clamp(-MAX_INT8, MAX_INT8) * scale


@dataclass(frozen=True)
class Page:
    """One head's n tokens as a page holds them; x of them are exceptions.

    Attributes:
        positions: [n], ascending.
        key_codes: uint8 [n, D].
        value_codes: uint8 [n, Dv].
        value_scales: uint8 [n].
        slots: [x], the exceptions' places among the n. What the codes say there does not count.
        keys, values: [x, D] and [x, Dv], the exceptions after int8.
    """

    positions: Tensor
    key_codes: Tensor
    value_codes: Tensor
    value_scales: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor


def encode_page(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    exceptions: int,
) -> Page:
    """Encodes the tokens of one page of one head.

    Exceptions are the first SINKS tokens of a request, then the tokens whose keys lose most: a
    function of the page's content alone, so that equal tokens give equal pages.

    Args:
        keys: [n, D] with RoPE.
        values: [n, Dv].
        positions: [n], ascending.
        exceptions: how many; all if there are fewer tokens.
    """
    key_codes, loss = encode_keys(keys, positions, tables, layer, head)
    value_codes, scales = encode_values(values, int(tables.value_bits[layer, head]))
    # topk returns equal values in any order; a stable sort prefers the lower slot everywhere.
    order = loss.masked_fill(positions < SINKS, torch.inf).sort(descending=True, stable=True)
    slots = order.indices[:exceptions].sort().values
    exact_keys, exact_values = to_int8(keys[slots]), to_int8(values[slots])
    return Page(positions, key_codes, value_codes, scales, slots, exact_keys, exact_values)


def decode_page(
    page: Page, tables: Tables, layer: int, head: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys [n, D], with RoPE, and values [n, Dv] of a page."""
    keys = decode_keys(page.key_codes, page.positions, tables, layer, head, dtype)
    bits = int(tables.value_bits[layer, head])
    values = decode_values(page.value_codes, page.value_scales, bits, dtype)
    keys[page.slots] = page.keys.to(dtype)
    values[page.slots] = page.values.to(dtype)
    return keys, values
