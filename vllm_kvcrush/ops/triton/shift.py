"""Slots of a batch from its positions: what a step of the V2 model runner calls."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 1024  # of a pass


@triton.jit
def shift_kernel(
    slot_lens, slots, seq_lens, positions, states, query_start, evicted, most, ROWS: tl.constexpr
):
    """One program a request; the last one clears the lengths of rows without a request, which full
    graphs read."""
    row, rows = tl.program_id(0), tl.num_programs(0) - 1
    if row == rows:
        for i in tl.range(rows, most, ROWS):
            at = i + tl.arange(0, ROWS)
            tl.store(slot_lens + at, 0, mask=at < most)
        return
    state = tl.load(states + row)
    gone = tl.load(evicted + state, mask=state >= 0, other=0)
    tl.store(slot_lens + row, tl.load(seq_lens + row) - gone)
    end = tl.load(query_start + row + 1)
    for i in tl.range(tl.load(query_start + row), end, ROWS):
        at = i + tl.arange(0, ROWS)
        position = tl.load(positions + at, mask=at < end)
        tl.store(slots + at, position - gone, mask=at < end)


def shift(
    slot_lens: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    states: Tensor,
    query_start: Tensor,
    evicted: Tensor,
) -> None:
    """Subtracts what each request has evicted from its length and from its tokens' positions.

    Nothing waits for the device, and the grid depends on the number of requests alone.

    Args:
        slot_lens: int32 [most], receives slots held; 0 in rows past the batch's.
        slots: int64 [most tokens], receives the tokens' slots, counted within their request.
        seq_lens: int32 [requests or more], tokens with this step's.
        positions: int64 [tokens or more].
        states: int64 [requests], index of each request in `evicted`; -1: nobody's.
        query_start: int32 [requests + 1 or more], rows of `positions` of each request.
        evicted: int32 [states].
    """
    shift_kernel[(len(states) + 1,)](
        slot_lens, slots, seq_lens, positions, states, query_start, evicted, len(slot_lens),
        ROWS=ROWS,
    )  # fmt: skip
