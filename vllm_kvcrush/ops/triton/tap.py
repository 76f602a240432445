"""Keeping chosen queries of a step: what a layer calls before attention."""

from __future__ import annotations

from torch import Tensor

from vllm_kvcrush.ops.triton.kernels.tap import tap_kernel

TILE = 1024  # elements


def tap(ring: Tensor, query: Tensor, places: Tensor) -> None:
    """Copies rows of the query to their places in `ring`. Can be captured in a graph: one launch
    whatever is to be kept, which the device alone knows.

    Args:
        ring: [places, heads, size], contiguous, of the query's dtype.
        query: [rows, heads, size], rows may be strided.
        places: int32 [rows or more], where in `ring` each row goes; negative: nowhere. No two rows
            have one place.
    """
    _, heads, size = ring.shape
    if query.shape[1:] != (heads, size) or query.stride()[1:] != (size, 1):
        raise ValueError(f"query {tuple(query.shape)} does not fit a ring of {(heads, size)}")
    if query.dtype != ring.dtype or len(places) < len(query):
        raise ValueError(f"{query.dtype} for {ring.dtype}, {len(places)} places")
    if len(query):
        tap_kernel[(len(query),)](
            ring, query, places, query.stride(0), SIZE=heads * size, TILE=TILE
        )
