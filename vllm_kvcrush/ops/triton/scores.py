"""Scores of slots from a window of queries.

What follows in a policy (the best slots, KVCrush's bits, Hamming distances and representatives) are
the torch operations of `vllm_kvcrush.ops.reference`: they read a few bytes per token and are bound
by sorting, for which torch has kernels; none of them waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.cache import DTYPES, Batch, Directory, Layer, Source
from vllm_kvcrush.ops.triton.config import product_options
from vllm_kvcrush.ops.triton.kernels.scores import scores_kernel

ROWS = 64  # query rows of a product


def window_scores(
    layer: Layer,
    source: Source,
    queries: Tensor,
    candidates: int,
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
        candidates: m; scores are wanted, and pooled, for slots [0, m).

    Returns:
        float32 [kv_heads, m], or [heads, m] without reduction.
    """
    window = queries.shape[1]
    if queries.shape != (layer.heads, window, layer.k_size) or window > source.tail_length:
        raise ValueError(f"queries {tuple(queries.shape)} for {source.tail_length} tail tokens")
    device, geometry = queries.device, layer.geometry
    rows = queries.transpose(0, 1).contiguous()
    start = torch.arange(2, dtype=torch.int32, device=device) * window
    length = torch.full((1,), source.tail_length, dtype=torch.int32, device=device)
    table = source.tail_table.view(1, -1)
    batch = Batch(start, length, table, Directory.ordered(source), window)
    lse = torch.empty(window, layer.heads, dtype=torch.float32, device=device)
    attention(layer, batch, rows, None, lse)
    out = torch.zeros(layer.heads, candidates, dtype=torch.float32, device=device)
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
            source.tail_slot, source.tail_table, *layer.tables(),
            source.tail_length, candidates, layer.scale, window, layer.block_pages,
            layer.first_page, T=tokens, W=width, GROUP=layer.group, HEADS=layer.heads, TAIL=tail,
            CODEC=codec, DTYPE=DTYPES[layer.dtype], G=geometry,
            num_warps=warps, num_stages=stages, **product_options(layer.wave),
        )  # fmt: skip
    if mean:
        out /= window
    if pool > 1:
        if pool_kind == "max":
            out = F.max_pool1d(out, pool, stride=1, padding=pool // 2)
        else:
            out = F.avg_pool1d(out, pool, stride=1, padding=pool // 2, count_include_pad=False)
    groups = out.view(layer.kv_heads, layer.group, candidates)
    return groups.mean(1) if reduce == "mean" else groups.amax(1) if reduce == "max" else out
