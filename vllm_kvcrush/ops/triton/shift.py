"""Slots of a batch from its positions: what a step of the V2 model runner calls."""

from __future__ import annotations

from torch import Tensor

from vllm_kvcrush.ops.triton.kernels.shift import shift_kernel

ROWS = 1024  # of a pass


def shift(
    slot_lens: Tensor,
    slots: Tensor,
    row_states: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    states: Tensor,
    query_start: Tensor,
    slot_shift: Tensor,
) -> None:
    """Subtracts each request's slot shift from its length and from its tokens' positions.

    Nothing waits for the device, and the grid depends on the number of requests alone.

    Args:
        slot_lens: int32 [most], receives slots held; 0 in rows past the batch's.
        slots: int64 [most tokens], receives the tokens' slots, counted within their request.
        row_states: int32 [most], receives `states`; -1 in rows past the batch's.
        seq_lens: int32 [requests or more], tokens with this step's.
        positions: int64 [tokens or more].
        states: int64 [requests], index of each request in `slot_shift`; -1: nobody's.
        query_start: int32 [requests + 1 or more], rows of `positions` of each request.
        slot_shift: int32 [states].
    """
    shift_kernel[(len(states) + 1,)](
        slot_lens, slots, row_states, seq_lens, positions, states, query_start, slot_shift,
        len(slot_lens), ROWS=ROWS,
    )  # fmt: skip
