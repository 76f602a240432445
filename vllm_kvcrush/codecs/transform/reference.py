"""The plain-torch oracle of transform coding in csrc/ and ops/triton/: keys, values, and pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcrush.codecs import layout
from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.codecs.reference import hadamard, int8, signs
from vllm_kvcrush.codecs.transform.bits import quantiser
from vllm_kvcrush.codecs.transform.tables import HeadTables, Tables

SCALE_STEPS = 16  # value scales: steps per octave
SCALE_ZERO = 128  # the byte that means 1


def origins(positions: Tensor) -> Tensor:
    """Returns the position of the first token of each token's strip, [n].

    Args:
        positions: [n], of tokens from a strip's first on.
    """
    return positions[torch.arange(len(positions)) // layout.STRIP * layout.STRIP]


def encode_keys(
    keys: Tensor, positions: Tensor, tables: Tables, layer: int, head: int
) -> tuple[Tensor, Tensor]:
    """Encodes one head's keys.

    Args:
        keys: [n, D] with RoPE.
        positions: [n].

    Returns:
        Codes, uint8 [n, D], of components in the order of the tables, 0 where one has no bits; and
        each token's loss [n], what its error costs in the measure of `fit`.
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
    """Returns the keys [n, D], with RoPE, that codes stand for."""
    middle = (2 ** tables.bits[layer, head].long() - 1).to(dtype) / 2
    x = (codes.to(dtype) - middle) @ tables.inverse[layer, head].to(dtype).mT
    x = x + tables.key_mean[layer, head].to(x)
    return tables.rope.rotate(x, origins(positions)) if tables.point.local else x


def encode_values(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Encodes one head's values.

    Args:
        values: [n, Dv].

    Returns:
        Codes, uint8 [n, Dv], and scales, uint8 [n]. A byte b > 0 says that two codes are
        2^((b - 128) / 16) apart; 0 says that all channels are 0.
    """
    y = hadamard(values * signs(values.shape[-1]).to(values))
    norm = y.square().mean(-1, keepdim=True).sqrt()
    tiny = torch.finfo(values.dtype).tiny
    q = quantiser(bits)
    codes = (y / (norm.clamp(min=tiny) * q.step) + q.middle).round().clamp(0, 2 * q.middle)
    c = codes - q.middle
    # What is read back is as long as the value. The scale with the least error, y·c / c·c, shrinks
    # all values alike, which adds up over many tokens; y·y / y·c, which shrinks no sum, is too loud
    # where bits are few. This is the geometric mean of the two.
    scale = (y.square().sum(-1) / c.square().sum(-1).clamp(min=tiny)).sqrt()
    byte = SCALE_ZERO + (SCALE_STEPS * scale.clamp(min=tiny).log2()).round()
    byte = byte.clamp(1, 255).where(norm[..., 0] > 0, torch.zeros_like(scale))
    return codes.to(torch.uint8), byte.to(torch.uint8)


def decode_values(
    codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the values [n, Dv] that codes stand for."""
    scale = torch.exp2((scales.to(dtype) - SCALE_ZERO) / SCALE_STEPS) * (scales > 0)
    y = (codes.to(dtype) - quantiser(bits).middle) * scale[:, None]
    return hadamard(y) * signs(codes.shape[-1]).to(y)


@dataclass(frozen=True)
class Page:
    """One head's n tokens as a page holds them; x of them are exceptions.

    Attributes:
        positions: [n], ascending.
        key_codes: uint8 [n, D].
        value_codes: uint8 [n, Dv].
        value_scales: uint8 [n].
        slots: [x], the exceptions' places among the n. The codes there are not used.
        keys, values: float64 [x, D] and [x, Dv], the exceptions after int8.
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
    """Encodes the tokens of one page of one head, in float64 except for int8.

    Exceptions are the first SINKS tokens of a request, then the tokens whose keys lose most. They
    depend on the page's content alone, so that equal tokens give equal pages.

    Args:
        keys: [n, D] with RoPE.
        values: [n, Dv].
        positions: [n], ascending.
        exceptions: number of exceptions; all tokens are exceptions if there are fewer.
    """
    key_codes, loss = encode_keys(keys.double(), positions, tables, layer, head)
    value_codes, scales = encode_values(values.double(), int(tables.value_bits[layer, head]))
    # topk returns equal values in any order; a stable sort prefers the lower slot everywhere.
    order = loss.masked_fill(positions < SINKS, torch.inf).sort(descending=True, stable=True)
    slots = order.indices[:exceptions].sort().values
    exact_keys, exact_values = (
        codes.double() * scale.double() for codes, scale in (int8(keys[slots]), int8(values[slots]))
    )
    return Page(positions, key_codes, value_codes, scales, slots, exact_keys, exact_values)


def decode_page(page: Page, tables: Tables, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Returns keys [n, D], with RoPE, and values [n, Dv] of a page, float64."""
    keys = decode_keys(page.key_codes, page.positions, tables, layer, head, torch.float64)
    bits = int(tables.value_bits[layer, head])
    values = decode_values(page.value_codes, page.value_scales, bits, torch.float64)
    keys[page.slots], values[page.slots] = page.keys, page.values
    return keys, values


def keep(
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    positions: Tensor | None,
    tables: HeadTables | None,
) -> tuple[Tensor, Tensor]:
    """Implements `Codec.kept` for fitted codecs."""
    assert positions is not None and tables is not None
    page = encode_page(keys, values, positions, *tables)
    return decode_page(page, *tables[:3])
