"""Which requests give blocks back under pressure, in which order, and how far."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_kvcrush.engine.pressure import Holder, Step, levels, may_score, relieve, shape_at
from vllm_kvcrush.plan import Packing, Plan, cdiv

BLOCK = 16
# Codecs that hold 2, 4 and 6 times as many tokens as raw pages do.
PACKINGS = tuple(
    Packing(name, (((BLOCK * ratio, 6),),)) for name, ratio in (("a", 2), ("b", 4), ("c", 6))
)


def holder(n: int, packings: tuple[Packing, ...] = PACKINGS, **other: object) -> Holder:
    """Returns a request of n tokens that nothing was taken from yet."""
    plan = Plan(other.pop("budget", 0.2), n, BLOCK, packings=packings, decode_interval=64)  # type: ignore[arg-type]
    own = (n - plan.tail(n)) // BLOCK
    made = Holder(plan, level=0, n=n, held=n, region=(0, 0), own=own)
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


def after(request: Holder, level: int, more: int = 0) -> Holder:
    """Returns a request after a compaction to a level, and some tokens later."""
    shape = shape_at(request, level)
    kept = request.plan.kept(shape.compressed, request.candidates)
    held = shape.compressed * BLOCK + shape.tail_tokens + more
    return dataclasses.replace(
        request,
        level=level,
        n=request.n + more,
        held=held,
        region=(shape.compressed, kept),
        own=(held - request.plan.tail(held)) // BLOCK,
    )


def test_steps_lead_from_codec_to_codec_down_to_the_budget() -> None:
    request = holder(1024)
    raw = request.own
    shapes = [shape_at(request, level).compressed for level in range(1, levels(request.plan) + 1)]
    assert shapes == [cdiv(raw, 2), cdiv(raw, 4), cdiv(raw, 6), shapes[-1]]
    # A fifth of 64 blocks, less the tail: codec "c" would hold all in fewer than that.
    assert shapes[-1] == 12 - 1 and shapes[2] == max(cdiv(raw, 6), shapes[-1])
    assert [step.freed for step in request.steps()] == [raw - s for s in shapes]


def test_raw_tokens_are_halved() -> None:
    request = holder(1024, packings=(), budget=0.2)
    assert levels(request.plan) == 3
    assert [shape_at(request, level).compressed for level in (1, 2, 3)] == [32, 16, 11]


def test_everybody_takes_the_finest_step_before_anybody_takes_a_coarser_one() -> None:
    requests = {"long": holder(2048), "middle": holder(1024), "short": holder(256)}
    finest = {name: next(iter(r.steps())).freed for name, r in requests.items()}
    assert set(relieve(requests, 1)) == {"long"}
    assert set(relieve(requests, finest["long"] + 1)) == {"long", "middle"}
    everyone = relieve(requests, sum(finest.values()))
    assert {name: step.level for name, step in everyone.items()} == dict.fromkeys(requests, 1)
    more = relieve(requests, sum(finest.values()) + 1)
    assert {name: step.level for name, step in more.items()} == {"long": 2, "middle": 1, "short": 1}


def test_nobody_is_squeezed_below_the_budget() -> None:
    request = holder(1024)
    (step,) = relieve({"r": request}, 10**6).values()
    assert request.own - step.freed == request.plan.shape(1024, 1024).compressed
    assert not relieve({"r": after(request, step.level)}, 10**6, small=True)


def test_what_grew_since_is_compacted_when_it_is_worth_while() -> None:
    request = after(holder(1024), 1)
    for more, worth in ((32, False), (256, True)):
        grown = after(holder(1024), 1)
        grown = dataclasses.replace(grown, n=grown.n + more, held=grown.held + more)
        grown = dataclasses.replace(grown, own=(grown.held - grown.plan.tail(grown.held)) // BLOCK)
        same = [step for step in grown.steps() if step.level == request.level]
        assert [step.worth_while for step in same] == [worth]


def test_a_step_that_drops_tokens_waits_for_the_queries_that_choose() -> None:
    request = holder(1024, packings=PACKINGS[:1], budget=0.2, ready=False)
    assert [step.level for step in request.steps()] == [1]  # all tokens fit in codec "a"
    assert may_score(dataclasses.replace(request, level=1)) and not may_score(request)
    assert not list(dataclasses.replace(request, asks=True).steps())


def test_short_requests_are_left_alone() -> None:
    request = holder(128)
    spared = dataclasses.replace(request.plan, min_tokens=200)
    assert not list(dataclasses.replace(request, plan=spared).steps())


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(40, 4000), min_size=1, max_size=6),
    budget=st.sampled_from([0.05, 0.2, 0.6, 640]),
    packed=st.integers(0, 3),
    missing=st.integers(1, 900),
    small=st.booleans(),
)
@example(lengths=[49, 368, 432, 753, 1377], budget=0.05, packed=0, missing=169, small=False)
def test_enough_is_given_back_and_no_more(
    lengths: list[int], budget: float | int, packed: int, missing: int, small: bool
) -> None:
    requests = {
        str(i): holder(n, packings=PACKINGS[:packed], budget=budget) for i, n in enumerate(lengths)
    }
    chosen = relieve(requests, missing, small)
    freed = sum(step.freed for step in chosen.values())
    most = {
        name: [s.freed for s in r.steps() if small or s.worth_while] for name, r in requests.items()
    }
    if freed < missing:
        assert freed == sum(max(steps) for steps in most.values() if steps)
    for name, step in chosen.items():
        assert (
            step.freed == requests[name].own - shape_at(requests[name], step.level).compressed > 0
        )

    # Without the step that was taken last it would not have been enough.
    def place(name: str, step: Step) -> tuple[bool, int, int, str]:
        return not step.worth_while, step.level, -step.freed, name

    if chosen:
        name, step = max(chosen.items(), key=lambda item: place(*item))
        before = [
            s.freed
            for s in requests[name].steps()
            if (small or s.worth_while) and place(name, s) < place(name, step)
        ]
        assert freed - step.freed + max(before, default=0) < missing


def test_levels_are_in_order() -> None:
    for budget in (0.1, 0.3, 700):
        for packed in range(4):
            request = holder(3000, packings=PACKINGS[:packed], budget=budget)
            held = [shape_at(request, i).compressed for i in range(1, levels(request.plan) + 1)]
            assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("budget", [0.2, 900])
def test_a_request_that_grows_under_pressure_stays_within_its_budget(budget: float | int) -> None:
    """What pressure leaves it is never less than its budget, and at the end no more."""
    request = holder(2048, packings=PACKINGS, budget=budget)
    for level in (1, 2, 3, 4, 4, 4):
        request = after(request, level, more=96)
        shape = shape_at(request, level)
        tight = request.plan.shape(request.n, request.held)
        assert shape.compressed >= tight.compressed
    assert shape_at(request, levels(request.plan)) == tight
