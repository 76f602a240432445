"""Scores and chooses tokens with the CPU kernels, which choose as `ops.reference` does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcrush.ops.cpu.cache import Layer, Source
from vllm_kvcrush.ops.cpu.library import DTYPES, LIBRARY, ScoringStruct, address, check, per_row

REDUCTIONS = {None: 0, "mean": 1, "max": 2, "greatest": 3}


def window_scores(
    layer: Layer,
    source: Source,
    queries: Tensor,
    candidates: int | Sequence[int] | Tensor,
    *,
    mean: bool = True,
    pool: int = 1,
    pool_kind: str = "max",
    reduce: str | None = "mean",
) -> Tensor:
    """Returns what `reference.window_scores` does, for the tokens of a request, without copies of
    their keys.

    Args:
        queries: [heads, w, k_size], unscaled, any dtype of DTYPES, any strides of the first two
            dimensions; row i is the query of the tail's token tail_length - w + i, and
            w <= tail_length.
        candidates: m, for all KV heads or for each: slots [0, m) are scored, and pooled together.
            Log biases of the source are added to the logits.
        mean: whether to take the mean over the window instead of the sum.
        pool, pool_kind: width of the pooling window, 1 for none; "avg" or "max".
        reduce: "mean" or "max" over the query heads of a KV head, or "greatest", the maximum for
            each query, before the sum over the window; or None.

    Returns:
        float32 [kv_heads, m], or [heads, m] without reduction; m is the largest, and scores past a
        head's own are -inf.
    """
    window = queries.shape[1]
    if tuple(queries.shape) != (layer.heads, window, layer.k_size) or queries.stride(2) != 1:
        raise ValueError(
            f"queries are {tuple(queries.shape)} with strides {queries.stride()}; "
            f"[{layer.heads}, w, {layer.k_size}] with contiguous rows is needed"
        )
    if pool_kind not in ("avg", "max"):
        raise ValueError(f"pool_kind={pool_kind!r} is not one of avg, max")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not one of mean, max, greatest, None")
    own = per_row(candidates, layer.kv_heads)
    rows = layer.heads if reduce is None else layer.kv_heads
    out = torch.empty(rows, max(0, int(own.max())))
    factor = 1 / max(1, window) if mean else 1.0
    scoring = ScoringStruct(window, pool, pool_kind == "max", REDUCTIONS[reduce], factor)
    check(
        LIBRARY.kvc_window_scores(
            layer._pointer,
            source._pointer,
            queries.data_ptr(),
            DTYPES[queries.dtype],
            queries.stride(0),
            queries.stride(1),
            ctypes.addressof(scoring),
            own.data_ptr(),
            out.data_ptr(),
        )
    )
    return out


def top_mask(scores: Tensor, keep: int | Sequence[int] | Tensor) -> Tensor:
    """Marks the best slots of each row, as `reference.top_mask` does.

    Args:
        scores: [H, m] of any float dtype; NaN counts as the worst.
        keep: 0 <= keep <= m, one number for all rows or one for each.

    Returns:
        bool [H, m].
    """
    rows = scores.to(torch.float32).contiguous()
    own = per_row(keep, len(rows))
    mask = torch.empty(rows.shape, dtype=torch.bool)
    check(LIBRARY.kvc_top_mask(*rows.shape, rows.data_ptr(), own.data_ptr(), mask.data_ptr()))
    return mask


def mask_slots(mask: Tensor, count: int | Sequence[int] | Tensor) -> Tensor:
    """Lists the slots that a mask marks.

    Args:
        mask: bool [H, m].
        count: number of ones in all rows, or in each.

    Returns:
        int64 [H, count], ascending; where counts differ, the columns are as many as the largest
        count, and -1 past a row's own.
    """
    rows = mask.contiguous()
    own = per_row(count, len(rows))
    slots = torch.empty(len(rows), max(0, int(own.max())), dtype=torch.int64)
    check(LIBRARY.kvc_mask_slots(*rows.shape, rows.data_ptr(), own.data_ptr(), slots.data_ptr()))
    return slots


def represent(
    bits: Tensor, important: Tensor, count: int, anchor: Tensor | None, unit: int = 1
) -> Tensor:
    """Adds representatives to each head's important units, as `reference.represent` does.

    Args:
        bits: bool [b, u * unit], a row for each head that describes tokens.
        important: bool [H, u], equally many ones in each row.
        count: number of representatives of each head.
        anchor: bool [b * unit], or None for the majority of each head's other units.
        unit: tokens in a unit; its vector is the bits of its tokens, head after head.

    Returns:
        bool [H, u], the important units and the representatives.
    """
    rows, mask = bits.contiguous(), important.clone().contiguous()
    units = mask.shape[1]
    if rows.dtype != torch.bool or rows.shape[1] != units * unit:
        raise ValueError(f"bits are {rows.dtype} {tuple(rows.shape)} for {units} units of {unit}")
    if anchor is not None and tuple(anchor.shape) != (rows.shape[0] * unit,):
        raise ValueError(f"an anchor of {tuple(anchor.shape)} for {rows.shape[0]} heads of {unit}")
    check(
        LIBRARY.kvc_represent(
            rows.shape[0],
            units,
            unit,
            rows.data_ptr(),
            address(None if anchor is None else anchor.contiguous(), torch.bool),
            mask.shape[0],
            mask.data_ptr(),
            count,
        )
    )
    return mask
