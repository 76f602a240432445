"""The maths that policies share, one name per operation.

Policies call these names, never an implementation, so that a faster one can stand behind a name
without touching a policy. `reference` is plain torch and the oracle of every other one.
"""

from vllm_kvcrush.ops.reference import (
    ANCHORS,
    anchor_bits,
    hamming,
    keep_bits,
    mask_slots,
    pool_scores,
    reduce_groups,
    spread,
    top_mask,
    top_slots,
    window_attention,
)

__all__ = [
    "ANCHORS",
    "anchor_bits",
    "hamming",
    "keep_bits",
    "mask_slots",
    "pool_scores",
    "reduce_groups",
    "spread",
    "top_mask",
    "top_slots",
    "window_attention",
]
