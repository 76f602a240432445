"""Slots of a batch from its positions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl


@triton.jit
def shift_kernel(
    slot_lens, slots, row_states, places, seq_lens, positions, states, query_start, slot_shift,
    observed, window, most, most_tokens, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (requests + 1): a program a request, and one that clears the lengths, states and places
    of the rows after them, which full graphs read."""
    row, rows = tl.program_id(0), tl.num_programs(0) - 1
    if row == rows:
        for i in tl.range(rows, most, ROWS):
            at = i + tl.arange(0, ROWS)
            tl.store(slot_lens + at, 0, mask=at < most)
            tl.store(row_states + at, -1, mask=at < most)
        for i in tl.range(tl.load(query_start + rows), most_tokens, ROWS):
            at = i + tl.arange(0, ROWS)
            tl.store(places + at, -1, mask=at < most_tokens)
        return
    state = tl.load(states + row)
    shift = tl.load(slot_shift + state, mask=state >= 0, other=0)
    tl.store(slot_lens + row, tl.load(seq_lens + row) - shift)
    tl.store(row_states + row, state.to(tl.int32))
    end = tl.load(query_start + row + 1)
    first = end - tl.load(observed + row)
    for i in tl.range(tl.load(query_start + row), end, ROWS):
        at = i + tl.arange(0, ROWS)
        position = tl.load(positions + at, mask=at < end)
        tl.store(slots + at, position - shift, mask=at < end)
        kept = (at >= first) & (state >= 0)
        place = tl.where(kept, state * window + position % window, -1)
        tl.store(places + at, place.to(tl.int32), mask=at < end)
