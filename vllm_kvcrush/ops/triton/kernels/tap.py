"""Keeping queries that window scores are made of."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS


@triton.jit(do_not_specialize_on_alignment=ANY_ADDRESS)
def tap_kernel(ring, query, places, query_stride, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Grid (query rows). Copies a row of SIZE elements to ring [any, SIZE] at its place, int32;
    negative: nowhere."""
    row = tl.program_id(0)
    place = tl.load(places + row)
    if place < 0:
        return
    for first in range(0, SIZE, TILE):
        i = first + tl.arange(0, TILE)
        x = tl.load(query + row.to(tl.int64) * query_stride + i, mask=i < SIZE)
        tl.store(ring + place.to(tl.int64) * SIZE + i, x, mask=i < SIZE)
