"""Launches of the kernels that fill fitted pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from vllm_kvcrush.codecs.transform.bits import quantiser
from vllm_kvcrush.ops.triton.codecs.fitted.encoding import (
    fitted_components_kernel,
    fitted_keys_kernel,
    fitted_values_kernel,
)
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.config import gather_warps
from vllm_kvcrush.ops.triton.layout import Geometry

if TYPE_CHECKING:
    from vllm_kvcrush.ops.triton.cache import Layer, Source

TOKENS = 32  # of a program that finds or packs keys' codes
STAGES = 1  # of the former: with more, heads of 256 do not fit an AMD processor's shared memory
KEYS_WARPS = 4  # of a program that packs codes: with 8, heads of 256 spill on sm_80
VALUES = 32  # of a program that encodes values


def warps(geometry: Geometry) -> int:
    """Of the other programs: a thread's share of a tile is its registers."""
    return gather_warps(geometry.k_pad, geometry.v_pad)


def encode(
    layer: Layer,
    codec: Traits,
    target: Source,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
) -> None:
    """The part of `compaction.encode` that goes into pages of one fitted codec."""
    fitted, geometry, device = layer.fitted, layer.geometry, key.device
    assert fitted is not None and positions is not None
    variants = fitted.variants[codec.name]
    place = variants[0].place
    entries, count = len(target.page), key.shape[1]
    most = max(section.capacity for section in fitted.sections[codec.name])
    component = torch.empty(entries, most, geometry.k_pad, dtype=torch.uint8, device=device)
    loss = torch.full((entries, most), -torch.inf, device=device)
    where = (target.head, target.page, target.count, target.codec, target.first)
    groups = triton.cdiv(min(most, count), TOKENS)
    fitted_components_kernel[(entries, groups)](
        key, positions, component, loss, target.head, target.count, target.codec, target.first,
        fitted.mean[place], fitted.forward[place], fitted.cost[place], fitted.top[place],
        fitted.coarse, fitted.fine, fitted.positions, count, most,
        T=TOKENS, CODEC=codec.number, LOCAL=variants[0].local, G=geometry,
        num_warps=warps(geometry), num_stages=STAGES,
    )  # fmt: skip
    numbers = _exceptions(loss, fitted.exceptions[place][target.head.long()])
    fitted_keys_kernel[(entries, groups)](
        key, positions, component.view(torch.int32), numbers,
        layer.half, layer.words, layer.wide, layer.pool,
        *where, fitted.info[place], fitted.fields, count, most,
        T=TOKENS, CODEC=codec.number, G=geometry, num_warps=KEYS_WARPS,
    )  # fmt: skip
    for variant in variants:
        fitted_values_kernel[(entries, triton.cdiv(min(most, count), VALUES))](
            value, numbers, layer.half, layer.pool, *where, fitted.info[place], count, most,
            T=VALUES, CODEC=codec.number, BITS=variant.bits, STEP=quantiser(variant.bits).step,
            G=geometry, num_warps=warps(geometry),
        )  # fmt: skip


def _exceptions(loss: Tensor, most: Tensor) -> Tensor:
    """Numbers of the tokens [entries, n] that lose most, up to `most` of each entry, the first of
    equal ones; -1 of the others, and of those whose loss is -inf."""
    order = loss.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(loss.shape[1], device=loss.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    chosen = (rank < most.unsqueeze(1)) & (loss > -torch.inf)
    numbers = chosen.cumsum(1, dtype=torch.int32) - 1
    return torch.where(chosen, numbers, -1).contiguous()
