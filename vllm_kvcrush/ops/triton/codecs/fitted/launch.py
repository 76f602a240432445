"""Launches of the kernels that read and write single tokens of fitted pages."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.codecs.transform.bits import quantiser
from vllm_kvcrush.ops.triton.cache import DTYPES, Layer, Source
from vllm_kvcrush.ops.triton.codecs.fitted.kernels import (
    fitted_components_kernel,
    fitted_gather_kernel,
    fitted_keys_kernel,
    fitted_scores_kernel,
    fitted_values_kernel,
)
from vllm_kvcrush.ops.triton.config import gather_warps, product_options
from vllm_kvcrush.ops.triton.layout import Geometry

SLOTS = 32  # of a program that gathers or scores
TOKENS = 32  # of a program that finds or packs keys' codes
STAGES = 1  # of the former: with more, heads of 256 do not fit an AMD processor's shared memory
KEYS_WARPS = 4  # of a program that packs codes: with 8, heads of 256 spill on sm_80
VALUES = 32  # of a program that encodes values


def warps(geometry: Geometry) -> int:
    """Of the other programs: a thread's share of a tile is its registers."""
    return gather_warps(geometry.k_pad, geometry.v_pad)


def scores_options(geometry: Geometry) -> tuple[int, int]:
    """Warps and stages of a program that scores: those with which no target of benchmarks.gpu
    spills or loses its wide loads. ptxas spills some bytes where that fits one block more."""
    size = max(geometry.k_pad, geometry.v_pad)
    return (4, 3) if size <= 64 else (8, 1) if size <= 128 else (4, 1)


def gather(
    layer: Layer, codec: str, source: Source, slots: Tensor, key: Tensor, value: Tensor | None,
    position: Tensor | None,
) -> None:  # fmt: skip
    """The part of `compaction.gather` that lies in pages of one fitted codec."""
    fitted, count = layer.fitted, slots.shape[1]
    assert fitted is not None
    for loop in fitted.loops[codec]:
        fitted_gather_kernel[(triton.cdiv(count, SLOTS), layer.kv_heads)](
            key, key if value is None else value, key if position is None else position, slots,
            layer.half, layer.words, layer.wide, layer.pool,
            source.begin, source.end, source.page, source.codec, source.first, source.tail_slot,
            *fitted.tables(loop.place), count, slots.stride(0),
            len(source.page).bit_length(), T=SLOTS, CODEC=CODECS[codec].number,
            LOCAL=loop.local, BITS=loop.bits, VALUES=value is not None,
            POSITIONS=position is not None, G=layer.geometry, DTYPE=DTYPES[layer.dtype],
            num_warps=warps(layer.geometry), **product_options(layer.wave),
        )  # fmt: skip


def scores(
    layer: Layer, codec: str, source: Source, rows: Tensor, lse: Tensor, out: Tensor, width: int
) -> None:
    """The part of `scores.window_scores` that lies in pages of one fitted codec; `width`: query
    rows of a product."""
    fitted = layer.fitted
    assert fitted is not None
    loop = fitted.loops[codec][0]
    most = max(section.capacity for section in fitted.sections[codec])
    score_warps, score_stages = scores_options(layer.geometry)
    fitted_scores_kernel[(len(source.page), triton.cdiv(most, SLOTS))](
        out, rows, lse, layer.half, layer.words, layer.wide, layer.pool,
        source.head, source.page, source.count, source.codec, source.first,
        *fitted.tables(loop.place), out.shape[1], layer.scale, len(rows),
        T=SLOTS, W=width, GROUP=layer.group, HEADS=layer.heads, CODEC=CODECS[codec].number,
        LOCAL=loop.local, G=layer.geometry, DTYPE=DTYPES[layer.dtype],
        num_warps=score_warps, num_stages=score_stages, **product_options(layer.wave),
    )  # fmt: skip


def encode(
    layer: Layer, codec: str, target: Source, key: Tensor, value: Tensor, positions: Tensor
) -> None:
    """The part of `compaction.encode` that goes into pages of one fitted codec."""
    fitted, geometry, device = layer.fitted, layer.geometry, key.device
    assert fitted is not None
    loops = fitted.loops[codec]
    place = loops[0].place
    entries, count = len(target.page), key.shape[1]
    most = max(section.capacity for section in fitted.sections[codec])
    component = torch.empty(entries, most, geometry.k_pad, dtype=torch.uint8, device=device)
    loss = torch.full((entries, most), -torch.inf, device=device)
    where = (target.head, target.page, target.count, target.codec, target.first)
    groups = triton.cdiv(min(most, count), TOKENS)
    fitted_components_kernel[(entries, groups)](
        key, positions, component, loss, target.head, target.count, target.codec, target.first,
        fitted.mean[place], fitted.forward[place], fitted.cost[place], fitted.top[place],
        fitted.coarse, fitted.fine, fitted.positions, count, most,
        T=TOKENS, CODEC=CODECS[codec].number, LOCAL=loops[0].local, G=geometry,
        num_warps=warps(geometry), num_stages=STAGES,
    )  # fmt: skip
    numbers = _exceptions(loss, fitted.exceptions[place][target.head.long()])
    fitted_keys_kernel[(entries, groups)](
        key, positions, component.view(torch.int32), numbers,
        layer.half, layer.words, layer.wide, layer.pool,
        *where, fitted.info[place], fitted.fields, count, most,
        T=TOKENS, CODEC=CODECS[codec].number, G=geometry, num_warps=KEYS_WARPS,
    )  # fmt: skip
    for loop in loops:
        fitted_values_kernel[(entries, triton.cdiv(min(most, count), VALUES))](
            value, numbers, layer.half, layer.pool, *where, fitted.info[place], count, most,
            T=VALUES, CODEC=CODECS[codec].number, BITS=loop.bits, STEP=quantiser(loop.bits).step,
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
