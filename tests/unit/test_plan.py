"""The plan, against a simulated request that is read in chunks and then decoded."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvcrush.plan import Plan, cdiv, min_blocks


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block_size = draw(st.sampled_from([1, 8, 16, 32, 128]))
    window = draw(st.integers(1, 64))
    sinks = draw(st.integers(0, 40))
    smallest = min_blocks(block_size, window, sinks) * block_size
    budget = draw(
        st.one_of(
            st.floats(0.01, 0.99),
            # The settings refuse budgets below the smallest.
            st.integers(smallest, smallest + 1500),
        )
    )
    return Plan(
        budget=budget,
        num_prompt_tokens=draw(st.integers(1, 3000)),
        block_size=block_size,
        window=window,
        sinks=sinks,
        prefill_interval=draw(st.integers(16, 1024)),
        decode_interval=draw(st.integers(1, 300)),
        capacity=draw(st.sampled_from([None, None, 2 * block_size, 7 * block_size])),
    )


def simulate(plan: Plan, length: int, seed: int) -> tuple[list[tuple[int, int]], int, int]:
    """Grows a request to `length` tokens in chunks of any size, as a scheduler would: chunks end
    at compaction positions. Returns the compactions as (position, blocks after), the most blocks
    held at any time, and the slots held at the end."""
    rng = random.Random(seed)
    n = held = most = 0
    compactions = []
    while n < length:
        limit = n + rng.choice([1, 7, 64, 512]) if n < plan.num_prompt_tokens else n + 1
        limit = min(limit, length)
        stop = plan.next_compaction(n, held, limit)
        grown = (limit if stop is None else stop) - n
        assert grown > 0
        n, held = n + grown, held + grown
        most = max(most, cdiv(held, plan.block_size))
        assert most <= plan.bound(n)
        if stop is not None:
            before, shape = cdiv(held, plan.block_size), plan.shape(n, held)
            assert plan.is_check(n)
            assert plan.due(n, held)
            # What stays raw: at least the window, from a block boundary on.
            assert plan.window <= shape.tail_tokens < plan.window + plan.block_size
            assert (held - shape.tail_tokens) % plan.block_size == 0
            assert shape.compressed * (plan.capacity or plan.block_size) >= max(1, plan.sinks)
            held = plan.held_after(n, held)
            after = cdiv(held, plan.block_size)
            assert after <= plan.blocks(n) < before
            # No more than what all tokens fill, and all of the budget where they fill it.
            room = plan.capacity or plan.block_size
            assert (shape.compressed - 1) * room < n - shape.tail_tokens
            full = shape.compressed * room >= n - shape.tail_tokens
            assert full or after == plan.blocks(n)
            assert plan.keep(shape.compressed, n - shape.tail_tokens) <= shape.compressed * room
            compactions.append((n, after))
    return compactions, most, held


@settings(deadline=None, max_examples=150)
@given(plans(), st.integers(0, 1500), st.integers(0, 2**16))
@example(Plan(0.25, 1, 16), 500, 0)
@example(Plan(0.25, 3000, 128), 700, 1)
@example(Plan(48, 3000, 16, prefill_interval=16, decode_interval=1), 300, 2)
def test_a_request_keeps_its_bound(plan: Plan, output: int, seed: int) -> None:
    simulate(plan, plan.num_prompt_tokens + output, seed)


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(1, 600), st.integers(0, 2**16), st.data())
def test_reading_again_compacts_at_the_same_places(
    plan: Plan, output: int, seed: int, data: st.DataObject
) -> None:
    length = plan.num_prompt_tokens + output
    first = simulate(plan, length, seed)
    # Other chunks, as after a preemption; and a request that was interrupted half-way.
    again = simulate(plan, length, seed + 1)
    assert again == first
    stop = data.draw(st.integers(1, length))
    partial, _, _ = simulate(plan, stop, seed)
    assert partial == [c for c in first[0] if c[0] <= stop]
    assert plan.first_compaction(length) == (first[0][0][0] if first[0] else None)


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 600))
def test_after_the_first_compaction_the_budget_holds(plan: Plan, output: int) -> None:
    length = plan.num_prompt_tokens + output
    compactions, _, held = simulate(plan, length, 0)
    floor = min_blocks(plan.block_size, plan.window, plan.sinks)
    for n, blocks in compactions:
        assert blocks <= max(floor, plan.tokens(n) // plan.block_size)
    # Over budget at the end by no more than what may grow between two compactions.
    checked = max((c for c in range(1, length + 1) if plan.is_check(c)), default=0)
    allowed = plan.blocks(checked) * plan.block_size if checked else 0
    assert held <= allowed + length - checked


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 600))
def test_a_budget_never_exceeded_never_compacts(plan: Plan, output: int) -> None:
    length = plan.num_prompt_tokens + output
    floor = min_blocks(plan.block_size, plan.window, plan.sinks)
    enough = max(floor, cdiv(length, plan.block_size)) * plan.block_size
    for budget in (1.0, enough):
        roomy = replace(plan, budget=budget)
        compactions, most, held = simulate(roomy, length, 0)
        assert compactions == []
        assert roomy.first_compaction(length) is None
        assert held == length
        assert most == cdiv(length, plan.block_size) == roomy.bound(length)


def test_a_fraction_by_hand() -> None:
    plan = Plan(0.25, 1000, 16, prefill_interval=256, decode_interval=128)
    # 0.25 × 1000 = 250 tokens: 15 blocks of 16, and 256 tokens more while reading.
    assert plan.blocks(1) == plan.blocks(1000) == 15
    assert plan.first_compaction(2000) == 15 * 16 + 256
    compactions, most, _ = simulate(plan, 1400, 3)
    assert compactions[:3] == [(496, 15), (752, 15), (1000, 15)]
    assert most == 31 == plan.bound(1000)
    # Then every 128 tokens, by which time the budget has grown by 32.
    assert compactions[3:] == [(1128, 17), (1256, 19), (1384, 21)]


def test_an_absolute_budget_by_hand() -> None:
    plan = Plan(512, 1000, 16, prefill_interval=1000, decode_interval=64)
    assert plan.blocks(10) == plan.blocks(10**6) == 32
    # Too short to outgrow the budget while it is read, so compacted once at its end.
    compactions, most, held = simulate(plan, 1130, 4)
    assert compactions == [(1000, 32), (1064, 32), (1128, 32)]
    # 1000 tokens: 62 blocks and 8 tokens, so the tail of at least 16 is 24 tokens long.
    assert plan.shape(1000, 1000) == (30, 24)
    assert most == 63
    assert held == 32 * 16 - (16 - 8) + 2


def test_a_tail_that_fills_its_blocks() -> None:
    plan = Plan(64, 160, 16)
    assert plan.shape(160, 160) == (3, 16)
    assert plan.held_after(160, 160) == 64
    assert min_blocks(16, 16, 4) == 3
    assert min_blocks(16, 1, 0) == 2
    assert min_blocks(16, 17, 33) == 5
