"""The maths that policies share, one name per operation.

Policies call these names, never an implementation, so that a faster one can stand behind a name
without touching a policy. `reference` is plain torch and the oracle of every other one; `cpu`, C++,
serves what lies in CPU memory. Both choose the same slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvcrush.ops import reference
from vllm_kvcrush.ops.reference import (
    ANCHORS,
    LayerKV,
    anchor_bits,
    pool_scores,
    reduce_groups,
    window_attention,
    window_scores,
)

__all__ = [
    "ANCHORS",
    "LayerKV",
    "anchor_bits",
    "keep_bits",
    "mask_slots",
    "pool_scores",
    "reduce_groups",
    "represent",
    "top_mask",
    "top_slots",
    "window_attention",
    "window_scores",
]


def top_mask(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Marks each head's `keep` best slots; ties go to the lower slot.

    Args:
        scores: [H, m]; NaN counts as the worst.
        keep: 0 <= keep <= m, of every head or int64 [H].

    Returns:
        bool [H, m] with exactly `keep` ones in each row.
    """
    if _in_cpp(scores) and scores.dtype != torch.float64:
        from vllm_kvcrush.ops import cpu

        return cpu.top_mask(scores, keep)
    return reference.top_mask(scores, _alike(keep))


def mask_slots(mask: Tensor, count: int | Tensor) -> Tensor:
    """Slots that a mask marks.

    Args:
        mask: bool [H, m] with exactly `count` ones in each row.
        count: of every head, or int64 [H].

    Returns:
        int64 [H, count], ascending; where heads differ as many columns as the largest count, and
        -1 past a head's own.
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


def top_slots(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Each head's `keep` best slots, of the same arguments as `top_mask`: int64 [H, keep],
    ascending."""
    return mask_slots(top_mask(scores, keep), keep)


def keep_bits(scores: Tensor, share: float, sizes: Tensor | None = None) -> Tensor:
    """KVCrush's binary features: would this head keep this token (arXiv 2503.00022)?

    Args:
        scores: [H, m].
        share: part of a head's tokens that get a one; round(share·m) of them.
        sizes: int64 [H], tokens of each head where they differ; None: m.

    Returns:
        bool [H, m].
    """
    if sizes is None:
        return top_mask(scores, round(share * scores.shape[-1]))
    return top_mask(scores, (share * sizes.double()).round().long())


def _alike(count: int | Tensor) -> int | Tensor:
    """One number where all heads have the same."""
    if isinstance(count, Tensor):
        numbers = count.tolist()
        return numbers[0] if len(set(numbers)) == 1 else count
    return count


# The library is loaded at its first use: processes that only check options do without it.
def _in_cpp(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
