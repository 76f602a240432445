"""The plan, against a simulated request that is read in chunks and then decoded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvcrush.plan import (
    NO_LOSS,
    Packing,
    Part,
    Plan,
    PlannedCompaction,
    cdiv,
    expected,
    min_blocks,
)

CODECS = ("int8", "tc4", "tc8")


@st.composite
def packings(draw: st.DrawFn, block_size: int, most: int = 3) -> tuple[Packing, ...]:
    """Draws packings of up to `most` codecs of one model. In the later ones heads and ranks
    differ."""
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
    """Returns the blocks that parts take, counted page by page: the pages of a rank, averaged over
    its pairs of layer and KV head, of the rank that needs most."""
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
    sinks, protected = draw(st.integers(0, 40)), draw(st.sampled_from([0, 0, 1, 50, 700]))
    smallest = min_blocks(block_size, window, sinks + protected) * block_size
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
        min_tokens=draw(st.sampled_from([0, 0, 1, 500, 2000])),
        packings=draw(st.one_of(st.just(()), packings(block_size))),
        tiers=draw(st.booleans()),
        protected=protected,
    )


def check_parts(plan: Plan, compressed: int, candidates: int) -> int:
    """Checks the parts of `candidates` tokens in `compressed` blocks, and returns how many tokens
    stay."""
    parts = plan.parts(compressed, candidates)
    kept = sum(part.tokens for part in parts)
    assert parts == replace(plan).parts(compressed, candidates)
    assert all(part.tokens > 0 for part in parts) and 0 < kept <= candidates
    assert plan.kept(compressed, candidates) == kept
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
    # In slot order: the first codec in which all fit, and for the newest, or the most important,
    # the one before it.
    place = plan.packings.index(fitting[0])
    codecs = [p.codec for p in plan.packings[max(0, place - 1) : place + 1]]
    by_codec = {part.codec: part.tokens for part in parts}
    order = codecs if plan.tiers else codecs[::-1]
    assert [part.codec for part in parts] == [codec for codec in order if codec in by_codec]
    if place:
        assert by_codec.get(codecs[0], 0) == most_beside(
            fitting[0], plan.packings[place - 1], candidates, compressed
        )
    return kept


def most_beside(own: Packing, finer: Packing, tokens: int, blocks: int) -> int:
    """Returns the optimum that `Packing.most_beside` finds: the largest of all numbers that fit."""
    # Any larger number starts or fills a page that this one does not, in one of the codecs.
    ends = {tokens, *(tokens - t for t in page_ends(own, tokens)), *page_ends(finer, tokens)}
    return max(t for t in ends if own.blocks(tokens - t, finer, t) <= blocks)


def page_ends(packing: Packing, tokens: int) -> set[int]:
    """Returns the numbers of tokens, up to `tokens`, that fill whole pages of some head."""
    rooms = {room for pages in packing.pages for room, _ in pages}
    return {t for room in rooms for t in range(0, tokens + 1, room)}


def simulate(plan: Plan, length: int, seed: int) -> tuple[list[tuple[int, int]], int, int]:
    """Grows a request to `length` tokens in chunks of any size, as a scheduler would: chunks end
    at compaction positions. Returns the compactions as (position, blocks after), the most blocks
    held at any time, and the slots held at the end."""
    rng = random.Random(seed)
    n = held = most = 0
    compactions: list[tuple[int, int]] = []
    planned: list[PlannedCompaction] = []
    choices: list[bool] = []
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
            assert kept >= min(candidates, max(1, plan.sinks + plan.protected))
            choices.append(plan.needs_scores(shape.compressed, candidates))
            planned.append(
                PlannedCompaction(n, candidates, plan.parts(shape.compressed, candidates), shape)
            )
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
    # What was to be expected, without having seen the request.
    assert list(plan.compactions(length)) == planned
    chosen = [each.n for each, choice in zip(planned, choices, strict=True) if choice]
    assert plan.first_scoring(length) == (chosen[0] if chosen else None)
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
    floor = min_blocks(plan.block_size, plan.window, plan.sinks + plan.protected)
    for n, blocks in compactions:
        assert blocks <= max(floor, plan.tokens(n) // plan.block_size)
    if not compactions:
        assert held == length
        return
    # Over budget at the end by no more than what may grow between two compactions.
    checked = max((c for c in range(1, length + 1) if plan.is_check(c)), default=0)
    allowed = plan.blocks(checked) * plan.block_size if checked else 0
    assert held <= allowed + length - checked


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 600))
def test_a_budget_never_exceeded_never_compacts(plan: Plan, output: int) -> None:
    length = plan.num_prompt_tokens + output
    floor = min_blocks(plan.block_size, plan.window, plan.sinks + plan.protected)
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


def test_short_requests_are_left_alone() -> None:
    plan = Plan(0.25, 38, 16, min_tokens=512)
    assert [plan.due(n, n) for n in (166, 511, 512)] == [False, False, True]
    # Looked at every 128 tokens after the prompt: 550 is the first place that is long enough.
    assert plan.first_compaction(549) is None
    assert plan.first_compaction(550) == 550
    assert [plan.bound(n) for n in (38, 512, 550)] == [3, 32, 35]
    assert simulate(plan, 549, 5) == ([], 35, 549)
    assert simulate(plan, 700, 5)[:2] == ([(550, 8), (678, 10)], 35)
    assert replace(plan, min_tokens=0).first_compaction(549) == 38 + 128
    # A long prompt is known to be one: its first chunks are compacted as if there were no floor.
    long = Plan(0.25, 1000, 16, prefill_interval=64, min_tokens=512)
    assert long.first_compaction(1000) == 15 * 16 + 64
    assert long.bound(1000) == replace(long, min_tokens=0).bound(1000) == 19
    # A number of tokens is kept to.
    assert replace(plan, budget=64).first_compaction(549) == 38 + 128


def test_compactions_that_keep_every_token_need_no_scores() -> None:
    found = (Packing("int8", (((32, 1),),)), Packing("tc8", (((64, 1),),)))
    plan = Plan(0.25, 1000, 16, packings=found)
    assert [(c.n, c.candidates, c.parts) for c in plan.compactions(1300)] == [
        (1000, 976, (("tc8", 832),)),
        (1128, 960, (("tc8", 960),)),
        (1256, 1088, (("tc8", 1088),)),
    ]
    assert plan.first_scoring(1300) == 1000
    roomy = replace(plan, budget=0.5)
    assert next(roomy.compactions(1400)).parts == (("tc8", 112), ("int8", 864))
    assert roomy.first_scoring(1400) is None
    # Where the important ones are to be finer, it must be known which they are.
    assert replace(roomy, tiers=True).first_scoring(1400) == 1000
    assert replace(roomy, packings=()).first_scoring(1400) == 1000


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


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from([8, 16]), st.integers(1, 12), st.integers(1, 400))
def test_as_many_as_possible_are_in_the_finer_codec(
    data: st.DataObject, block_size: int, compressed: int, candidates: int
) -> None:
    own, finer = data.draw(packings(block_size).filter(lambda found: len(found) > 1))[-2:][::-1]
    candidates = min(candidates, own.tokens(compressed))
    counts = range(candidates + 1)
    fits = [t for t in counts if own.blocks(candidates - t, finer, t) <= compressed]
    assert own.most_beside(finer, candidates, compressed) == fits[-1]
    assert most_beside(own, finer, candidates, compressed) == fits[-1]


def test_the_optimum_where_fitting_is_not_monotone() -> None:
    """Any finer page is one too many until one of the other codec's is empty, so that bisecting
    would find none."""
    own, finer = Packing("tc6", (((1376, 4),),)), Packing("tc4", (((1056, 4),),))
    fits = [t for t in range(2433) if own.blocks(2432 - t, finer, t) <= 2]
    assert fits == [0, 1056]
    assert own.most_beside(finer, 2432, 2) == 1056
    plan = Plan(0.25, 100, 128, packings=(finer, own))
    assert plan.parts(2, 2432) == (("tc6", 1376), ("tc4", 1056))


def test_long_contexts_have_few_places_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Packing("tc8", ((*((400 + 16 * i, 20) for i in range(16)),),))
    finer = Packing("tc4", ((*((240 + 16 * i, 20) for i in range(16)),),))
    tried = 0
    blocks = Packing.blocks

    def counted(self: Packing, *args: object) -> int:
        nonlocal tried
        tried += 1
        return blocks(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Packing, "blocks", counted)
    for tokens in (1_000_000, 1_000_001):
        room = own.blocks(tokens) + 30
        tried = 0
        newest = own.most_beside(finer, tokens, room)
        assert 0 < newest < tokens and tried < 200, tried
        assert own.blocks(tokens - newest, finer, newest) <= room


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


# -- expected losses ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_codec_is_expected_to_lose_less_in_the_same_blocks(data: st.DataObject) -> None:
    """Whatever codecs lose and however much their pages hold, alone or two together."""
    block_size = data.draw(st.sampled_from([16, 32, 128]))
    found = data.draw(packings(block_size).filter(len))
    losses = {p.codec: data.draw(st.floats(0, 10) | st.sampled_from([0.0, 1.0])) for p in found}
    plan = Plan(0.5, 100, block_size, packings=found, least_loss=True)
    known = plan.with_losses(losses)
    blocks, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12 * block_size))

    def lost(parts: tuple[Part, ...]) -> float:
        return sum(losses[part.codec] * part.tokens for part in parts)

    parts = known.parts(blocks, tokens)
    # Block counts must not depend on what workers alone may know.
    assert known.kept(blocks, tokens) == plan.kept(blocks, tokens) == sum(p.tokens for p in parts)
    assert known.shape(3000, 3000) == plan.shape(3000, 3000)
    assert pages_of(parts, known) <= blocks
    assert all(part.tokens > 0 for part in parts) and len(parts) <= 2
    if all(packing.blocks(tokens) > blocks for packing in found):
        assert parts == plan.parts(blocks, tokens)
        return
    slack = (1e-9 + len(found) * NO_LOSS) * tokens
    for own in found:
        if own.blocks(tokens) > blocks:
            continue
        assert lost(parts) <= losses[own.codec] * tokens + slack
        for other in found:
            newest = own.most_beside(other, tokens, blocks)
            mixed = Part(own.codec, tokens - newest), Part(other.codec, newest)
            assert lost(parts) <= lost(mixed) + slack
    # The newest tokens lose least, and with more room no more is lost.
    own = [losses[part.codec] for part in parts]
    assert own[0] >= own[-1] - len(found) * NO_LOSS
    assert lost(known.parts(blocks + 1, tokens)) <= lost(parts) + slack
    assert plan.with_losses({}) is plan
    assert replace(plan, least_loss=False).with_losses(losses).packings == found


def test_codecs_that_lose_more_for_their_size_are_passed_over() -> None:
    """What suits one model badly is left out there, and used on another."""
    rooms = {"int8": 60, "int4": 112, "tc4": 128, "tc6": 208, "tc8": 256}

    def parts(blocks: int, **losses: float) -> list[tuple[str, int]]:
        found = tuple(Packing(c, (((room, 1),),), losses[c]) for c, room in rooms.items())
        plan = Plan(0.5, 100, 32, packings=found, least_loss=True)
        return [tuple(part) for part in plan.parts(blocks, 8 * 208)]

    biased = {"int8": 0.0, "int4": 0.001, "tc4": 0.019, "tc6": 0.02, "tc8": 0.05}
    demo = {"int8": 0.0, "int4": 0.044, "tc4": 0.011, "tc6": 0.04, "tc8": 0.1}
    assert parts(15, **biased) == [("int4", 1664)]
    assert parts(13, **biased) == [("tc6", 544), ("int4", 1120)]
    assert parts(13, **demo) == [("tc4", 1664)]
    assert parts(8, **biased) == parts(8, **demo) == [("tc6", 1664)]
    assert parts(40, **demo) == [("int8", 1664)]
    # Where nothing can be told apart, more bits are better.
    noise = {"int8": 3e-7, "int4": 1e-7, "tc4": 2e-7, "tc6": 0.0, "tc8": 1e-7}
    assert parts(20, **noise)[-1][0] == "int8" and parts(40, **noise) == [("int8", 1664)]
    whole = tuple(Packing(c, (((room, 1),),), demo[c]) for c, room in rooms.items())
    loss, shares = expected(whole, 32, 0.2) or (1.0, ())
    assert 0.02 < loss < 0.04 and [part.codec for part in shares] == ["tc6", "tc4"]
    assert sum(part.tokens for part in shares) == 100
    assert expected(whole, 32, 0.1) is None, "tokens would be evicted"
    assert expected([replace(p, loss=None) for p in whole], 32, 0.5) is None
