"""What is wrong with a policy's choice is found before anything is moved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.views import each, make_view, on, ragged, scored, slots_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import Merged, Policy, Room, View
from vllm_kvcrush.policies.choice import (
    Choice,
    PolicyFailure,
    allocated,
    choose,
    demanded,
    dry_run,
    in_position_order,
    newest,
)

HEADS = 3


def view_of(m: int, sinks: int = 4, state: bool = False) -> View:
    seed = random.randrange(2**31)
    view = make_view(m, 1, HEADS, 2, sinks, window=8, tail=8, seed=seed)
    return view if state else replace(view, state={})


def slots(choice: Choice, keep: int) -> list[list[int]]:
    return ops.mask_slots(choice.kept, keep).tolist()


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_stands_a_dry_run(name: str) -> None:
    dry_run(policies.get(name))
    dry_run(policies.get(name), sinks=0, window=1, page_size=128)


@given(m=st.integers(1, 60), sinks=st.integers(0, 70), data=st.data())
@settings(deadline=None)
def test_the_newest_are_the_sinks_and_the_newest(m: int, sinks: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, m))
    finer = data.draw(st.integers(0, keep))
    view = view_of(m, sinks)
    plain = newest(view, each(view, keep))
    first = min(sinks, keep)
    want = [*range(first), *range(m - keep + first, m)]
    assert slots(plain, keep) == [want] * HEADS
    assert plain.finer is None and plain.merged is None and plain.sound
    tiers = newest(view, each(view, keep), each(view, finer))
    assert torch.equal(tiers.kept, plain.kept) and tiers.finer is not None
    first = min(sinks, finer)
    fine = ops.mask_slots(tiers.finer, finer)
    assert fine.tolist() == [want[:first] + want[keep - finer + first :]] * HEADS


@given(data=st.data())
@settings(deadline=None)
def test_the_newest_of_heads_with_unequal_counts(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 30), min_size=HEADS, max_size=HEADS))
    counts[0] = max(1, counts[0])
    keep = [data.draw(st.integers(0, n)) for n in counts]
    finer = [data.draw(st.integers(0, n)) for n in keep]
    sinks = data.draw(st.integers(0, 20))
    view = ragged(view_of(30, sinks), counts)
    choice = newest(view, each(view, keep), each(view, finer))
    assert choice.finer is not None and not bool((choice.finer & ~choice.kept).any())
    for mask, count in ((choice.kept, keep), (choice.finer, finer)):
        for row, n, k in zip(mask.tolist(), counts, count, strict=True):
            held = [slot for slot in range(len(row)) if row[slot]]
            first = min(sinks, k)
            assert held[:first] == list(range(first)) and len(held) == k
            if mask is choice.kept:
                assert held[first:] == list(range(n - k + first, n))


@dataclass
class Wrong(Policy):
    name: ClassVar[str] = "wrong"
    needs: ClassVar[frozenset[str]] = frozenset({"state"})
    how: str = ""

    def __post_init__(self) -> None:
        vars(self)["merges"] = self.how.startswith("merge")

    def score(self, view: View) -> Any:
        scores = torch.rand(view.num_kv_heads, view.candidates)
        if self.how == "raises":
            raise OSError("disk full")
        if self.how == "exits":
            raise SystemExit
        if self.how == "nothing":
            return None
        if self.how == "NaN":
            scores[1, 2] = torch.nan
        if self.how == "a list of states":
            return scores, [scores]
        if self.how == "a state of text":
            return scores, {"votes": "many"}
        if self.how == "a state of other slots":
            return scores, {"votes": scores[:, 1:]}
        if self.how == "a state of numbers":
            return scores, {"votes": scores.int()}
        return scores.half() if self.how == "half" else scores

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Any:
        kept = super().select(view, scores, keep)
        if self.how == "int32":
            return kept.int()
        if self.how == "slots":
            return ops.mask_slots(kept, keep)
        if self.how == "too many":
            kept[-1] = True
        if self.how == "too few":
            kept[0, int(kept[0].nonzero()[-1])] = False
        if self.how == "padding":
            kept[1, int(kept[1].nonzero()[-1])] = False
            kept[1, -1] = True
        return kept

    def split(self, view: View, scores: Tensor, kept: Tensor, *args: Any) -> Any:
        high = super().split(view, scores, kept, *args)
        if self.how == "two parts":
            return high, kept & ~high
        if self.how == "other slots":
            return ops.top_mask((~kept).float(), int(high[0].sum()))
        if self.how == "short":
            return high[:, 1:]
        if self.how == "fewer finer":
            return torch.zeros_like(high)
        return high

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Any:
        assert view.values is not None
        keys, values = (x[:, : view.candidates].clone() for x in (view.keys, view.values))
        if self.how == "merge nothing":
            return keys, values
        if self.how == "merge too little":
            return Merged(keys[:, 1:], values, None)
        if self.how == "merge a bias of heads":
            return Merged(keys, values, scores[:, 0])
        if self.how == "merge to infinity":
            return Merged(keys, values, torch.full_like(scores, torch.inf))
        if self.how == "merge and remember too little":
            return Merged(keys, values, None, {"threshold": scores[0]})
        if self.how == "merge and remember a list":
            return Merged(keys, values, None, {"threshold": [1.0]})  # type: ignore[dict-item]
        if self.how == "merge and remember infinity":
            return Merged(keys, values, None, {"threshold": torch.full((HEADS, 1), torch.inf)})
        return Merged(keys, values, None, {"threshold": scores[:, :1]})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "OSError: disk full"),
        ("nothing", "score returned NoneType, not a tensor"),
        ("a list of states", "score returned list as state, not tensors"),
        ("a state of text", "score's state 'votes' returned str, not a tensor"),
        ("a state of other slots", r"'votes' returned torch\.float32 \(3, 39\), not floats"),
        ("a state of numbers", r"'votes' returned torch\.int32 \(3, 40\), not floats \(3, 40\)"),
        ("int32", r"select returned torch\.int32 \(3, 40\), not bool \(3, 40\)"),
        ("slots", r"select returned torch\.int64 \(3, 20\), not bool \(3, 40\)"),
        ("two parts", "split returned tuple, not a tensor"),
        ("short", r"split returned torch\.bool \(3, 39\), not bool \(3, 40\)"),
        ("merge nothing", "merge returned tuple, not a Merged"),
        ("merge too little", r"merge's keys returned torch\.float32 \(3, 39, 16\), not floats"),
        ("merge a bias of heads", r"merge's log bias returned torch\.float32 \(3,\), not floats"),
        ("merge to infinity", "merge returned values that are not finite"),
        (
            "merge and remember too little",
            r"merge's layer state 'threshold' returned torch\.float32 \(40,\), not floats \(3, 1\)",
        ),
        ("merge and remember a list", "merge's layer state 'threshold' returned list"),
        ("merge and remember infinity", "merge returned values that are not finite"),
    ],
)
def test_what_cannot_be_used_is_a_failure(how: str, says: str) -> None:
    view, demoted = view_of(40), torch.zeros(HEADS, 40, dtype=torch.bool)
    with pytest.raises(PolicyFailure, match=says):
        choose(Wrong(how), view, each(view, 20), each(view, 9), demoted)


def test_whoever_ends_the_process_may() -> None:
    view = view_of(40)
    with pytest.raises(SystemExit):
        choose(Wrong("exits"), view, each(view, 20))


@pytest.mark.parametrize(
    "how", ["NaN", "too many", "too few", "other slots", "fewer finer", "padding"]
)
def test_useless_values_are_replaced_and_told(how: str) -> None:
    view, demoted, tiers = view_of(40), None, None
    if how in ("other slots", "fewer finer"):
        demoted, tiers = torch.zeros(HEADS, 40, dtype=torch.bool), each(view, 9)
    if how == "padding":
        view = ragged(view, [40, 30, 20])
    choice = choose(Wrong(how), view, each(view, 20), tiers, demoted)
    assert not choice.sound
    instead = newest(view, each(view, 20), tiers)
    assert torch.equal(choice.kept, instead.kept)
    if tiers is not None:
        assert choice.finer is not None and instead.finer is not None
        assert torch.equal(choice.finer, instead.finer)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "disk full"),
        ("too many", "did not choose as many slots"),
        ("NaN", "its scores have NaN"),
        ("int32", "not bool"),
        ("merge nothing", "not a Merged"),
    ],
)
def test_a_dry_run_finds_what_is_wrong(how: str, says: str) -> None:
    with pytest.raises(PolicyFailure, match=says):
        dry_run(Wrong(how))


def test_a_dry_run_of_who_shares_pages_out_has_unequal_heads() -> None:
    @dataclass
    class Even(Sharing):
        def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
            return ops.top_mask(scores, int(keep[0]))

    dry_run(Sharing())
    with pytest.raises(PolicyFailure, match="did not choose as many slots"):
        dry_run(Even())
    with pytest.raises(PolicyFailure, match="shares that are negative"):
        dry_run(Sharing("negative"))


def test_a_sound_choice_is_the_policys() -> None:
    view = view_of(40)
    for how in ("", "half", "merge"):
        choice = choose(Wrong(how), view, each(view, 20))
        assert choice.sound and choice.kept.sum(1).tolist() == [20] * HEADS
        assert (choice.merged is not None) == (how == "merge")
        assert list(choice.layer_state) == (["threshold"] if how == "merge" else [])
    h2o = policies.get("h2o")
    view = view_of(40, state=True)
    choice, (scores, state) = choose(h2o, view, each(view, 24)), scored(h2o, view)
    assert slots(choice, 24) == slots_of(h2o, view, scores, 24).tolist()
    assert torch.equal(choice.state["attention"], state["attention"])
    # Scores that were made before are not made again.
    given_ = scores.flip(1), {"mine": scores}
    choice = choose(h2o, view, each(view, 24), given=given_)
    assert slots(choice, 24) == slots_of(h2o, view, given_[0], 24).tolist()
    assert choice.state is given_[1]


# Protected slots


@dataclass
class Spiteful(Policy):
    """A third party's policy that drops exactly the slots that it must not drop."""

    name: ClassVar[str] = "spiteful"

    def score(self, view: View) -> Tensor:
        return torch.rand(view.num_kv_heads, view.candidates) - 10.0 * view.staying.float()

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        return ops.top_mask(scores.masked_fill(~view.valid, -torch.inf), keep)


@st.composite
def protected_views(draw: st.DrawFn) -> tuple[View, Tensor]:
    """Draws a view, ragged or not, with protected slots or only sinks, and how many slots stay,
    which are at least as many."""
    view = make_view(
        pages=draw(st.integers(2, 6)), sinks=draw(st.integers(0, 9)), seed=draw(st.integers(0, 99))
    )
    m = view.candidates
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(1, m), min_size=HEADS, max_size=HEADS))
        view = ragged(view, counts)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.05, 0.3, 0.9]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        more = torch.rand(view.valid.shape, generator=generator) < share
        view = replace(view, protected=(view.staying | more) & view.valid)
    if draw(st.booleans()):
        cut = sorted(draw(st.sets(st.integers(0, m), min_size=2, max_size=6)))
        view = replace(view, spans=tuple(itertools.pairwise(cut)))
    least = view.staying.sum(1).tolist()
    keep = [draw(st.integers(low, n)) for low, n in zip(least, view.sizes.tolist(), strict=True)]
    return view, torch.tensor(keep)


EVERYONE = [
    *("streaming", "snapkv", "h2o", "kvcrush", "kvcrush(anchor=mean, ratio=0.9)", "mikv"),
    *("adakv", "keepkv", "fair", "fair(h2o, fairness=0.5)", "fair(kvcrush(h2o))", "keepkv(fair)"),
]


@pytest.mark.parametrize("text", [*EVERYONE, "spiteful"])
@given(case=protected_views())
@settings(deadline=None, max_examples=40)
def test_no_policy_can_drop_a_protected_slot(text: str, case: tuple[View, Tensor]) -> None:
    view, keep = case
    policy = Spiteful() if text == "spiteful" else policies.get(text)
    finer = demoted = None
    if policy.tiers:
        finer, demoted = keep // 2, torch.rand(view.valid.shape) < 0.3
    choice = choose(policy, view, keep, finer, demoted)
    assert choice.sound
    assert torch.equal(choice.kept.sum(1), keep)
    assert not bool((view.staying & ~choice.kept).any())
    assert not bool((choice.kept & ~view.valid).any())
    if text == "spiteful":
        # Nothing but the worst of what it chose had to go.
        scores = policy.score(view)
        again = choose(policy, view, keep, given=(scores, {}))
        best = scores.masked_fill(view.staying, torch.inf).masked_fill(~view.valid, -torch.inf)
        assert torch.equal(again.kept, ops.top_mask(best, keep))


def test_more_protected_slots_than_are_kept() -> None:
    view = replace(view_of(40), protected=torch.ones(HEADS, 40, dtype=torch.bool))
    for policy in (Spiteful(), policies.get("fair(kvcrush)")):
        spans = replace(view, spans=((0, 10), (10, 30), (35, 40)))
        choice = choose(policy, spans, each(view, 20))
        assert choice.sound and slots(choice, 20) == [list(range(20))] * HEADS


# What a policy keeps


@dataclass
class Counting(Policy):
    """A policy whose state is how often each token was seen, and its newest keys."""

    name: ClassVar[str] = "counting"
    needs: ClassVar[frozenset[str]] = frozenset({"state"})

    def score(self, view: View) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert view.known is not None
        seen = view.state.get("seen", torch.zeros(view.num_kv_heads, view.candidates))
        before = view.state.get("keys", torch.zeros(view.num_kv_heads, view.candidates, 2, 3))
        keys = view.keys[:, : view.candidates, :6].reshape(before.shape)
        keys = torch.where(view.known[..., None, None], before, keys)
        return -seen, {"seen": (seen + 1).half(), "keys": keys, "broken": seen * torch.nan}


@pytest.mark.parametrize("counts", [None, [40, 30, 25]])
def test_state_of_several_channels_is_carried(counts: list[int] | None) -> None:
    view = replace(view_of(40), known=torch.zeros(HEADS, 40, dtype=torch.bool))
    view = view if counts is None else ragged(view, counts)
    policy, keep = Counting(), each(view, [16, 20, 25])
    first = choose(policy, view, keep)
    assert set(first.state) == {"seen", "keys", "broken"}
    assert all(state.dtype == torch.float32 for state in first.state.values())
    assert first.state["keys"].shape == (HEADS, 40, 2, 3)
    assert not bool(first.state["broken"].isnan().any())
    # As the engine carries it: survivors first, then newer ones with 0 that are not known.
    rows = {name: torch.zeros(HEADS, 40, *x.shape[2:]) for name, x in first.state.items()}
    known = torch.zeros(HEADS, 40, dtype=torch.bool)
    keys = view.keys.clone() + 1
    for h, n in enumerate(keep.tolist()):
        for name, x in first.state.items():
            rows[name][h, :n] = x[h][first.kept[h]]
        known[h, :n] = True
    later = replace(view, held=ops.LayerKV(keys), state=rows, known=known, counts=None)
    second = choose(policy, later, each(view, 30))
    for h, n in enumerate(keep.tolist()):
        assert second.state["seen"][h].tolist() == [2.0] * n + [1.0] * (40 - n)
        want = torch.cat((view.keys[h, :40, :6][first.kept[h]], keys[h, n:40, :6]))
        assert torch.equal(second.state["keys"][h], want.view(40, 2, 3))
        # The newer ones, of which there are more, before those that were seen.
        fresh = second.kept[h, n:].sum() + second.kept[h, : view.sinks].sum()
        assert fresh == min(30, 40 - n + view.sinks)


def test_state_that_nobody_said_he_needs_is_not_kept() -> None:
    @dataclass
    class Generous(Counting):
        needs: ClassVar[frozenset[str]] = frozenset()

    view = view_of(40, state=True)
    assert choose(Generous(), view, each(view, 20)).state == {}
    assert choose(policies.get("snapkv"), view, each(view, 20)).state == {}


# Shares of pages


@dataclass
class Sharing(Policy):
    name: ClassVar[str] = "sharing"
    allocates: ClassVar[bool] = True
    how: str = ""

    def score(self, view: View) -> Tensor:
        return torch.rand(view.num_kv_heads, view.candidates)

    def demand(self, view: View, scores: Tensor, room: Room) -> Any:
        return {"": scores.sum(1).half(), "none": None, "wide": scores, "text": "x"}.get(self.how)

    def allocate(self, demand: Tensor | None, room: Room) -> Any:
        shares = torch.ones(room.candidates.shape)
        if self.how == "raises":
            raise ZeroDivisionError
        values = {"negative": -1.0, "infinite": torch.inf, "NaN": torch.nan}
        shares[0, 0] = values.get(self.how, 1.0)
        return shares[:, 1:] if self.how == "short" else shares * (self.how != "nothing")


ROOM = Room(20, torch.full((2, HEADS), 8), torch.full((2, HEADS), 40))


@pytest.mark.parametrize("how", ["negative", "infinite", "NaN", "nothing", "short", "raises"])
def test_shares_that_cannot_be_used(how: str) -> None:
    says = "not numbers" if how == "short" else "negative, not finite or all 0"
    with pytest.raises(PolicyFailure, match="ZeroDivisionError" if how == "raises" else says):
        allocated(Sharing(how), None, ROOM)


@pytest.mark.parametrize("how", ["wide", "text"])
def test_demands_that_cannot_be_used(how: str) -> None:
    view = view_of(40)
    with pytest.raises(PolicyFailure, match="demand returned"):
        demanded(Sharing(how), view, torch.rand(HEADS, 40), ROOM)


def test_demands_and_shares_come_on_the_cpu_in_full_precision() -> None:
    view, scores = view_of(40), torch.rand(HEADS, 40)
    demand = demanded(Sharing(), view, scores, ROOM)
    assert demand is not None and demand.dtype == torch.float64
    assert torch.equal(demand, scores.sum(1).half().double())
    assert demanded(Sharing("none"), view, scores, ROOM) is None
    assert allocated(Sharing(), None, ROOM).dtype == torch.float64
    # Without a demand of their own, scores are not asked for.
    assert demanded(policies.get("snapkv"), view, scores, ROOM) is None


# Views in another order


@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("reduce", ["mean", "max", None])
def test_a_view_in_position_order_is_one_of_keys_in_that_order(
    pool: int, reduce: str | None
) -> None:
    m = 40
    view = replace(view_of(m, state=True), log_bias=torch.rand(HEADS, m))
    view.state["channels"] = torch.rand(HEADS, m, 2, 3)  # type: ignore[index]
    order = torch.stack([torch.randperm(m) for _ in range(HEADS)])
    where = order.unsqueeze(-1).expand(-1, -1, view.keys.shape[-1])
    keys = torch.cat((view.keys[:, :m].gather(1, where), view.keys[:, m:]), 1)
    seen = in_position_order(view, order)
    assert torch.equal(seen.keys, keys)
    assert seen.values is not None and view.values is not None
    assert torch.equal(seen.values[:, :m], view.values[:, :m].gather(1, where))
    assert torch.equal(seen.values[:, m:], view.values[:, m:])
    assert torch.equal(seen.state["attention"], view.state["attention"].gather(1, order))
    for head in range(HEADS):
        channels = view.state["channels"][head][order[head]]
        assert torch.equal(seen.state["channels"][head], channels)
    assert seen.log_bias is not None and view.log_bias is not None and seen.known is not None
    assert torch.equal(seen.log_bias, view.log_bias.gather(1, order))
    assert torch.equal(seen.positions, view.positions.gather(1, order))
    options: dict[str, Any] = {"pool": pool, "pool_kind": random.choice(["max", "avg"])}
    got = seen.held.window_scores(view.queries, 0.25, m, reduce=reduce, **options)
    want = ops.window_scores(view.queries, keys, 0.25, m, reduce=reduce, **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("counts", [None, [40, 33, 26]])
def test_a_view_of_some_slots_pools_among_them(
    pool: int, kind: str, counts: list[int] | None
) -> None:
    """A policy that is asked for one span sees such a view: weights are those over all held
    slots."""
    view = view_of(40) if counts is None else ragged(view_of(40), counts)
    assert view.queries is not None
    sizes, order = [7, 0, 5], torch.arange(8, 18).repeat(HEADS, 1)
    some = replace(in_position_order(view, order), counts=torch.tensor(sizes))
    assert torch.equal(some.keys[:, :10], view.keys[:, 8:18])
    got = some.window_scores(pool=pool, pool_kind=kind, reduce="max")
    assert got.shape == (HEADS, 10)
    for head, n in enumerate(sizes):
        own = view.queries[2 * head : 2 * head + 2]
        held = 8 + int(view.sizes[head])
        weights = ops.window_attention(own, view.keys[head : head + 1, :held], view.scale)
        votes = weights.mean(1)[:, 8 : 8 + n]
        want = ops.pool_scores(votes, pool, kind).amax(0) if n else votes.new_empty(0)
        torch.testing.assert_close(got[head, :n], want)
        assert bool(got[head, n:].isneginf().all())


# On a device


@pytest.mark.parametrize("text", [*EVERYONE, "spiteful"])
def test_choices_stay_on_the_device(text: str) -> None:
    """No values may be read but the counts, which are on the CPU: "meta" tensors have no data."""
    policy = Spiteful() if text == "spiteful" else policies.get(text)
    for view in (make_view(), ragged(make_view(), [48, 30, 40])):
        given_ = scored(policy, view)
        view = on(view, "meta")
        keep, finer, demoted = each(view, [20, 25, 16]), None, None
        if policy.tiers:
            finer, demoted = keep // 2, torch.zeros(3, 48, dtype=torch.bool, device="meta")
        if policy.merges:  # which finds the slots that it merges
            continue
        given_ = given_[0].to("meta"), {name: x.to("meta") for name, x in given_[1].items()}
        if policy.allocates:
            room = Room(12, torch.full((1, 3), 8), view.sizes.unsqueeze(0))
            demand = policy.demand(view, given_[0], room)
            assert demand is not None and demand.device.type == "meta"
        choice = choose(policy, view, keep, finer, demoted, given_)
        assert choice.kept.device.type == "meta" and choice.kept.shape == (3, 48)
        assert choice.sound.device.type == "meta"
