"""The maths that policies share, one name per operation.

Policies call these names, never an implementation, so that a faster one can be put behind a name
without a change in any policy. `reference` is plain torch and the oracle of the others; `cpu`, in
C++, is used for tensors in CPU memory. Both choose the same slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.ops import reference
from vllm_kvcrush.ops.reference import (
    ANCHORS,
    LayerKV,
    WindowMoments,
    anchor_bits,
    attend_and_score,
    decayed_max,
    min_max,
    pool_scores,
    ranks,
    reduce_groups,
    window_attention,
    window_logits,
    window_moments,
    window_scores,
)

__all__ = [
    "ANCHORS",
    "LayerKV",
    "WindowMoments",
    "anchor_bits",
    "attend_and_score",
    "decayed_max",
    "keep_bits",
    "mask_slots",
    "merge",
    "min_max",
    "nearest_kept",
    "pool_scores",
    "ranks",
    "reduce_groups",
    "redundancy",
    "represent",
    "spread",
    "top_mask",
    "top_slots",
    "window_attention",
    "window_logits",
    "window_moments",
    "window_scores",
]


def top_mask(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Marks each head's `keep` best slots; ties go to the lower slot.

    Args:
        scores: [H, m]; NaN counts as the worst.
        keep: 0 <= keep <= m, one number for all heads or int64 [H].

    Returns:
        bool [H, m] with exactly `keep` ones in each row.
    """
    if _in_cpp(scores) and scores.dtype != torch.float64:
        from vllm_kvcrush.ops import cpu

        return cpu.top_mask(scores, keep)
    return reference.top_mask(scores, _alike(keep))


def mask_slots(mask: Tensor, count: int | Tensor) -> Tensor:
    """Lists the slots that a mask marks.

    Args:
        mask: bool [H, m] with exactly `count` ones in each row.
        count: one number for all heads, or int64 [H].

    Returns:
        int64 [H, count], ascending; where heads differ, the columns are as many as the largest
        count, and -1 past a head's own.
    """
    if _in_cpp(mask):
        from vllm_kvcrush.ops import cpu

        return cpu.mask_slots(mask, count)
    return reference.mask_slots(mask, _alike(count))


def represent(
    bits: Tensor, important: Tensor, count: int, anchor: Tensor | None, unit: int = 1
) -> Tensor:
    """Adds KVCrush's representatives to the important units: see `reference.represent`."""
    if _in_cpp(bits):
        from vllm_kvcrush.ops import cpu

        return cpu.represent(bits, important, count, anchor, unit)
    return reference.represent(bits, important, count, anchor, unit)


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the most similar kept slot of each dropped one: see `reference.nearest_kept`."""
    return _comparing(keys).nearest_kept(keys, gone, kept)


def redundancy(keys: Tensor, counts: Sequence[int] | None = None, threshold: float = 0.5) -> Tensor:
    """Returns how similar each key is to the others: see `reference.redundancy`."""
    return _comparing(keys).redundancy(keys, counts, threshold)


def merge(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted sums of what goes to each slot: see `reference.merge`."""
    return _merging(x).merge(x, target, weight)


def spread(values: Tensor, kept: Tensor, part: Tensor, width: int) -> Tensor:
    """Returns values with those of dropped slots added to the next kept ones: see
    `reference.spread`."""
    return _merging(values).spread(values, kept, part, width)


def top_slots(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Returns each head's `keep` best slots as `mask_slots` does, int64 [H, keep], ascending.
    Arguments are those of `top_mask`."""
    return mask_slots(top_mask(scores, keep), keep)


def keep_bits(scores: Tensor, share: float, sizes: Tensor | None = None) -> Tensor:
    """Returns KVCrush's binary features (arXiv 2503.00022): whether a head would keep a token.

    Args:
        scores: [H, m].
        share: share of a head's tokens that get a one, which is round(share·m) tokens.
        sizes: int64 [H], tokens of each head where they differ; None means m.

    Returns:
        bool [H, m].
    """
    if sizes is None:
        return top_mask(scores, round(share * scores.shape[-1]))
    return top_mask(scores, (share * sizes.double()).round().long())


def _alike(count: int | Tensor) -> int | Tensor:
    """Returns one number instead of a tensor if all heads have the same number."""
    if isinstance(count, Tensor):
        numbers = count.tolist()
        return numbers[0] if len(set(numbers)) == 1 else count
    return count


def _merging(x: Tensor) -> Any:
    """Returns the module whose forms of `merge` and `spread` fit tensors [H, m, D] like this."""
    # Head sizes of caches are such; the kernels are made for them.
    if _in_cpp(x) and x.dtype != torch.float64 and x.shape[2] % 8 == 0 and 0 < x.shape[2] <= 256:
        from vllm_kvcrush.ops import cpu

        return cpu
    return reference


def _comparing(x: Tensor) -> Any:
    """Returns the module whose forms of `nearest_kept` and `redundancy` fit keys like these."""
    if x.device.type == "cuda" and x.dtype != torch.float64:
        from vllm_kvcrush.ops.triton import similar

        return similar
    return _merging(x)


# The C++ library is loaded at its first use, because processes that only check options need none.
def _in_cpp(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
