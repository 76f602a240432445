"""The plan, against a simulated request that is read in chunks and then decoded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvcrush.plan import Packing, Part, Plan, cdiv, min_blocks

CODECS = ("int8", "tc4", "tc8")


@st.composite
def packings(draw: st.DrawFn, block_size: int, most: int = 3) -> tuple[Packing, ...]:
    """Up to `most` codecs of one model: in the later ones heads differ, and ranks do."""
    ranks, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    found = []
    for i, codec in enumerate(CODECS[: draw(st.integers(0, most))]):
        if i == 0:
            room = draw(st.sampled_from([2, 3])) * block_size
            found.append(Packing(codec, (((room, pairs),),) * ranks))
            continue
        rooms = st.integers(block_size + 1, (8 if i == 1 else 16) * block_size)
        pages = []
        for _ in range(ranks):
            heads = draw(st.lists(rooms, min_size=pairs, max_size=pairs))
            pages.append(tuple((room, heads.count(room)) for room in sorted(set(heads))))
        found.append(Packing(codec, tuple(pages)))
    return tuple(found)


def pages_of(parts: tuple[Part, ...], plan: Plan) -> int:
    """Most pages of a pair of layer and KV head, on average over a rank's, that parts take,
    counted one by one."""
    by_codec = {p.codec: p for p in plan.packings}
    most = 0
    for rank in range(len(plan.packings[0].pages)):
        pairs, taken = 0, 0
        for part in parts:
            rooms = [r for r, heads in by_codec[part.codec].pages[rank] for _ in range(heads)]
            pairs = len(rooms)
            for room in rooms:
                left = part.tokens
                while left > 0:
                    left, taken = left - room, taken + 1
        most = max(most, cdiv(taken, pairs))
    return most


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
        packings=draw(st.one_of(st.just(()), packings(block_size))),
    )


def check_parts(plan: Plan, compressed: int, candidates: int) -> int:
    """Checks what `compressed` blocks are to hold of so many tokens; returns how many stay."""
    parts = plan.parts(compressed, candidates)
    kept = sum(part.tokens for part in parts)
    assert parts == replace(plan).parts(compressed, candidates)
    assert all(part.tokens > 0 for part in parts) and 0 < kept <= candidates
    if not plan.packings:
        assert parts == (Part("raw", min(candidates, compressed * plan.block_size)),)
        return kept
    assert pages_of(parts, plan) <= compressed
    fitting = [p for p in plan.packings if p.blocks(candidates) <= compressed]
    if not fitting:
        # Evicts no more than it must, in the codec that holds most.
        last = plan.packings[-1]
        assert parts == (Part(last.codec, kept),)
        assert last.blocks(kept + 1) > compressed
        return kept
    assert kept == candidates
    # In slot order: most in the first codec in which all fit, the newest in the one before it.
    place = plan.packings.index(fitting[0])
    codecs = [p.codec for p in plan.packings[: place + 1]]
    assert [part.codec for part in parts] == codecs[::-1][: len(parts)]
    assert len(parts) == 1 or (len(parts) == 2 and place > 0)
    return kept


def simulate(plan: Plan, length: int, seed: int) -> tuple[list[tuple[int, int]], int, int]:
    """Grows a request to `length` tokens in chunks of any size, as a scheduler would: chunks end
    at compaction positions. Returns the compactions as (position, blocks after), the most blocks
    held at any time, and the slots held at the end."""
    rng = random.Random(seed)
    n = held = most = 0
    compactions = []
    region = region_tokens = 0
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
            assert shape.compressed >= 1
            # What the region is made of: its old tokens and the raw ones up to the tail.
            raw = held - shape.tail_tokens - region * plan.block_size
            candidates = region_tokens + raw
            assert raw >= 0 and candidates <= n - shape.tail_tokens
            kept = check_parts(plan, shape.compressed, candidates)
            assert kept >= min(candidates, max(1, plan.sinks))
            region, region_tokens = shape.compressed, kept
            held = plan.held_after(n, held)
            after = cdiv(held, plan.block_size)
            assert after <= plan.blocks(n) < before
            # No more than what all tokens fill, and all of the budget where they fill it.
            room = plan.packings[0].tokens if plan.packings else plan.block_size.__mul__
            assert room(shape.compressed - 1) < n - shape.tail_tokens
            full = room(shape.compressed) >= n - shape.tail_tokens
            assert full or after == plan.blocks(n)
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


# -- packings -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([8, 16, 128]), st.integers(0, 5000), st.integers(0, 3000))
def test_blocks_count_the_pages_of_every_head(
    data: st.DataObject, block_size: int, tokens: int, more: int
) -> None:
    found = data.draw(packings(block_size).filter(len))
    plan = Plan(0.5, 100, block_size, packings=found)
    for packing in found:
        assert packing.blocks(tokens) == pages_of((Part(packing.codec, tokens),), plan)
        assert packing.blocks(0) == 0
    own, other = found[-1], found[0]
    both = (Part(own.codec, tokens), Part(other.codec, more))
    assert own.blocks(tokens, other, more) == pages_of(both, plan)
    assert own.blocks(tokens, other, 0) == own.blocks(tokens)
    assert own.blocks(0, other, more) == other.blocks(more)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([8, 16, 128]), st.integers(0, 200))
def test_tokens_are_the_inverse_of_blocks(
    data: st.DataObject, block_size: int, blocks: int
) -> None:
    for packing in data.draw(packings(block_size).filter(len)):
        tokens = packing.tokens(blocks)
        assert packing.blocks(tokens) <= blocks < packing.blocks(tokens + 1)
        assert packing.tokens(blocks + 1) > tokens
        some = data.draw(st.integers(0, tokens))
        assert packing.blocks(some) <= packing.blocks(tokens)
        assert packing.tokens(packing.blocks(some)) >= some


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([8, 16, 128]), st.integers(1, 30), st.integers(1, 3000))
def test_parts_fit_and_keep_what_they_can(
    data: st.DataObject, block_size: int, compressed: int, candidates: int
) -> None:
    plan = Plan(0.5, 100, block_size, packings=data.draw(packings(block_size)))
    kept = check_parts(plan, compressed, candidates)
    assert kept >= check_parts(plan, compressed, max(1, candidates - 1))
    assert check_parts(plan, compressed + 1, candidates) >= kept
    parts = plan.parts(compressed, candidates)
    if kept < candidates or not plan.packings or parts[0].codec == plan.packings[0].codec:
        return
    # How many of the newest are in the finer codec: one more does not fit. More may, where it
    # empties a page of the other one; by no more than the ends of all pages can tell.
    place = [p.codec for p in plan.packings].index(parts[0].codec)
    own, finer = plan.packings[place], plan.packings[place - 1]
    newest = candidates - parts[0].tokens

    def fits(t: int) -> bool:
        return own.blocks(candidates - t, finer, t) <= compressed

    assert fits(newest) and not fits(newest + 1)
    best = max(t for t in range(newest, candidates + 1) if fits(t))
    slack = 0.0
    for pages, finer_pages in zip(own.pages, finer.pages, strict=True):
        gain = sum(h / r for r, h in finer_pages) - sum(h / r for r, h in pages)
        if gain <= 0:  # a rank on which the finer codec takes less: it does not say anything
            return
        slack = max(slack, 1 + 2 * sum(h for _, h in pages) / gain)
    assert best - newest <= slack


def test_packings_by_hand() -> None:
    even = Packing("int8", (((20, 4),),))
    assert [even.blocks(n) for n in (0, 1, 20, 21, 40)] == [0, 1, 1, 2, 2]
    assert [even.tokens(n) for n in (0, 1, 3)] == [0, 20, 60]
    # Two heads whose pages hold 30 tokens, two whose hold 60: 61 tokens take 3 + 3 + 2 + 2 pages.
    uneven = Packing("tc4", (((30, 2), (60, 2)),))
    assert [uneven.blocks(n) for n in (30, 31, 60, 61)] == [1, 2, 2, 3]
    assert [uneven.tokens(n) for n in (1, 2, 3)] == [30, 60, 120]
    # Of several ranks the fullest one counts.
    ranks = Packing("tc4", (((30, 2), (60, 2)), ((30, 4),)))
    assert [ranks.tokens(n) for n in (1, 2, 3)] == [30, 60, 90]
    # 40 tokens in 2 + 2 + 1 + 1 pages, and 20 more in one for each head: 10 pages of 4 heads.
    assert uneven.blocks(40, even, 20) == 3


@pytest.mark.parametrize(
    ("candidates", "parts"),
    [
        (1, (("int8", 1),)),
        (60, (("int8", 60),)),
        # Pages of 40 and of 20: the newest 40 of 61 take two of the three.
        (61, (("tc4", 21), ("int8", 40))),
        (80, (("tc4", 40), ("int8", 40))),
        (81, (("tc4", 61), ("int8", 20))),
        (101, (("tc4", 101),)),
        (120, (("tc4", 120),)),
        (121, (("tc8", 41), ("tc4", 80))),
        (299, (("tc8", 299),)),
        (300, (("tc8", 300),)),
        (301, (("tc8", 300),)),
        (9000, (("tc8", 300),)),
    ],
)
def test_parts_by_hand(candidates: int, parts: tuple[tuple[str, int], ...]) -> None:
    rooms = {"int8": 20, "tc4": 40, "tc8": 100}
    found = tuple(Packing(codec, (((room, 1),),)) for codec, room in rooms.items())
    assert Plan(0.5, 100, 10, packings=found).parts(3, candidates) == parts


def test_a_plan_with_codecs_by_hand() -> None:
    found = (Packing("int8", (((30, 2),),)), Packing("tc8", (((48, 1), (96, 1)),)))
    plan = Plan(0.25, 1000, 16, prefill_interval=256, packings=found)
    compactions, most, held = simulate(plan, 1100, 3)
    # At 496 tokens: 480 of them in 14 blocks of int8, of which 420 fit, so in tc8.
    assert compactions == [(496, 15), (752, 15), (1000, 15)]
    assert plan.shape(496, 496) == (14, 16)
    assert plan.parts(14, 480)[0].codec == "tc8" and plan.parts(14, 420) == (("int8", 420),)
    assert (most, held) == (31, 13 * 16 + 24 + 100)
    # Few tokens take no more blocks than they fill.
    roomy = Plan(40 * 16, 1000, 16, packings=found)
    assert roomy.shape(1000, 1000) == (33, 24)
