"""Slots of a batch from its positions: what a step of the V2 model runner calls."""

from __future__ import annotations

from torch import Tensor

from vllm_kvcrush.ops.triton.kernels.shift import shift_kernel

ROWS = 1024  # of a pass


def shift(
    slot_lens: Tensor,
    slots: Tensor,
    row_states: Tensor,
    places: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    states: Tensor,
    query_start: Tensor,
    slot_shift: Tensor,
    observed: Tensor,
    window: int,
) -> None:
    """Subtracts each request's slot shift from its length and from its tokens' positions, and says
    which queries are kept.

    Nothing waits for the device, and the grid depends on the number of requests alone.

    Args:
        slot_lens: int32 [most], receives slots held; 0 in rows past the batch's.
        slots: int64 [most tokens], receives the tokens' slots, counted within their request.
        row_states: int32 [most], receives `states`; -1 in rows past the batch's.
        places: int32 [most tokens], receives where each query row goes in a ring of the last
            `window` queries of every state, state * window + position % window, if it is among the
            newest `observed` of its request; else, and in rows past the batch's, -1.
        seq_lens: int32 [requests or more], tokens with this step's.
        positions: int64 [tokens or more].
        states: int64 [requests], index of each request in `slot_shift`; -1: nobody's.
        query_start: int32 [requests + 1 or more], rows of `positions` of each request.
        slot_shift: int32 [states].
        observed: int32 [requests or more].
        window: queries kept of a state.
    """
    shift_kernel[(len(states) + 1,)](
        slot_lens, slots, row_states, places, seq_lens, positions, states, query_start, slot_shift,
        observed, window, len(slot_lens), len(places), ROWS=ROWS,
    )  # fmt: skip
