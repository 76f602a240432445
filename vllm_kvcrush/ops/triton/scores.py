"""Scores of slots from a window of queries.

What follows in a policy (the best slots, KVCrush's bits, Hamming distances and representatives) are
the torch operations of `vllm_kvcrush.ops.reference`: they read a few bytes per token and are bound
by sorting, for which torch has kernels; none of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.cache import DTYPES, Batch, Directory, Layer, Source, on_device
from vllm_kvcrush.ops.triton.config import product_options
from vllm_kvcrush.ops.triton.kernels.scores import scores_kernel

ROWS = 64  # query rows of a product


def window_scores(
    layer: Layer,
    source: Source,
    queries: Tensor,
    candidates: int | Sequence[int],
    *,
    mean: bool = True,
    pool: int = 1,
    pool_kind: str = "max",
    reduce: str | None = "mean",
) -> Tensor:
    """Softmax attention of a window of queries over a request's slots, summed over the window, then
    pooled along the slots and reduced over the query heads of a KV head; see `cpu.window_scores`.

    Args:
        queries: [heads, w, k_size], unscaled; row i is the query of the tail's token
            tail_length - w + i, and w <= tail_length.
        candidates: m, or as many as each KV head has: scores are wanted, and pooled, for slots
            [0, m). Log biases of the source count.
        mean: the mean over the window instead of the sum.
        pool, pool_kind: width of the pooling window, 1 for none; "avg" or "max".
        reduce: "mean" or "max" over the query heads of a KV head, or "greatest", the maximum for
            each query, before the sum over the window; or None.

    Returns:
        float32 [kv_heads, m], or [heads, m] without reduction; m is the largest, and scores past a
        head's own are -inf.
    """
    window = queries.shape[1]
    if queries.shape != (layer.heads, window, layer.k_size) or window > source.tail_length:
        raise ValueError(f"queries {tuple(queries.shape)} for {source.tail_length} tail tokens")
    device, geometry = queries.device, layer.geometry
    rows = queries.transpose(0, 1).contiguous()
    start = torch.arange(2, dtype=torch.int32, device=device) * window
    length = torch.full((1,), source.tail_length, dtype=torch.int32, device=device)
    table = source.tail_table.view(1, -1)
    batch = Batch.of(start, length, table, Directory.ordered(source), window, layer.block_size)
    lse = torch.empty(window, layer.heads, dtype=torch.float32, device=device)
    attention(layer, batch, rows, None, lse)
    own = [candidates] * layer.kv_heads if isinstance(candidates, int) else list(candidates)
    if len(own) != layer.kv_heads:
        raise ValueError(f"candidates of {len(own)} heads for {layer.kv_heads} KV heads")
    most = max(own)
    limits = on_device(tuple(own), device)
    greatest = reduce == "greatest"
    rows_out = layer.kv_heads if greatest else layer.heads
    out = torch.zeros(rows_out, most, dtype=torch.float32, device=device)
    biased = source.bias is not None and source.log_bias is not None
    width = min(ROWS, max(16, triton.next_power_of_2(window)))
    # The tail's slots, then the pages' of each codec. Keys are the same in all variants of a codec.
    launches = [(True, "raw", codec) for codec in layer.variants("raw")]
    for run in source.runs if len(source.page) else ():
        launches += [(False, run, codec) for codec in layer.variants(run)[:1]]
    for tail, run, codec in launches:
        tokens, warps, stages = codec.scores_tiles(geometry)
        if tail:
            grid = (triton.cdiv(source.tail_length, tokens), layer.kv_heads)
        else:
            grid = (len(source.page), triton.cdiv(layer.most(run), tokens))
        scores_kernel[grid](
            out, rows, lse, *layer.views(),
            source.head, source.page, source.count, source.codec, source.first,
            source.tail_slot, source.tail_table, limits,
            source.bias if biased else limits, source.log_bias if biased else lse,
            *layer.tables(), most, source.tail_length, layer.scale, window, layer.block_pages,
            layer.first_page, T=tokens, W=width, GROUP=layer.group, HEADS=layer.heads, TAIL=tail,
            CODEC=codec, BIAS=biased, DTYPE=DTYPES[layer.dtype], G=geometry, GREATEST=greatest,
            num_warps=warps, num_stages=stages, **product_options(layer.wave),
        )  # fmt: skip
    if mean:
        out /= window
    # None where all heads have equally many.
    past = None
    if min(own) < most:
        past = torch.arange(most, device=device) >= limits.unsqueeze(1)
        past = past.repeat_interleave(rows_out // layer.kv_heads, 0)
    out = _pooled(out, pool, pool_kind, past)
    if past is not None:
        out = out.masked_fill(past, -torch.inf)
    if greatest:
        return out
    groups = out.view(layer.kv_heads, layer.group, most)
    return groups.mean(1) if reduce == "mean" else groups.amax(1) if reduce == "max" else out


def _pooled(scores: Tensor, size: int, kind: str, past: Tensor | None) -> Tensor:
    """Scores [heads, m] pooled along the slots as `reference.pool_scores` does, without those of
    `past`."""
    if size == 1 or not scores.shape[1]:
        return scores
    pad = size // 2
    if kind == "max":
        scores = scores if past is None else scores.masked_fill(past, -torch.inf)
        return F.max_pool1d(scores, size, 1, pad)
    if past is None:
        return F.avg_pool1d(scores, size, 1, pad, count_include_pad=False)
    there = (~past).to(scores.dtype)
    return F.avg_pool1d(scores * there, size, 1, pad) / F.avg_pool1d(there, size, 1, pad)
