"""A policy's choice, checked: what is wrong with it is found before anything is moved."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import Policy, View
from vllm_kvcrush.policies.choice import (
    PolicyFailure,
    choose,
    dry_run,
    in_position_order,
    newest,
)

HEADS, GROUP, SIZE, WINDOW = 3, 2, 16, 8


def view_of(m: int, sinks: int = 4, running: bool = False) -> View:
    n = m + WINDOW
    return View(
        held=ops.LayerKV(torch.randn(HEADS, n, SIZE), torch.randn(HEADS, n, SIZE)),
        queries=torch.randn(HEADS * GROUP, WINDOW, SIZE),
        scale=0.25,
        candidates=m,
        sinks=sinks,
        page_size=8,
        running=torch.rand(HEADS, m) if running else None,
        layer=0,
        all_heads=lambda x: x,
    )


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
    plain = newest(view, keep).slots
    first = min(sinks, keep)
    want = [*range(first), *range(m - keep + first, m)]
    assert plain.tolist() == [want] * HEADS
    tiers = newest(view, keep, finer).slots
    assert tiers.sort(1).values.tolist() == plain.tolist()
    first = min(sinks, finer)
    assert tiers[0, :finer].tolist() == want[:first] + want[keep - finer + first :]


@dataclass
class Wrong(Policy):
    name: ClassVar[str] = "wrong"
    how: str = ""

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
        return scores.half() if self.how == "half" else scores

    def select(self, view: View, scores: torch.Tensor, keep: int) -> Any:
        kept = super().select(view, scores, keep)
        if self.how == "int32":
            return kept.int()
        if self.how == "far":
            kept[2, -1] = view.candidates
        if self.how == "same":
            kept[0, 0] = kept[0, 1]
        return kept

    def split(self, *args: Any) -> Any:
        high, low = super().split(*args)
        if self.how == "one part":
            return (high,)
        if self.how == "other slots":
            return high, torch.arange(low.shape[1]).expand(len(low), -1)
        if self.how == "short":
            return high[:, 1:], low
        return high, low


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "OSError: disk full"),
        ("nothing", "score returned NoneType, not a tensor"),
        ("int32", r"select returned torch\.int32 \(3, 20\), not int64 \(3, 20\)"),
        ("one part", "split returned tuple, not two tensors"),
        ("short", r"split returned torch\.int64 \(3, 8\), not int64 \(3, 9\)"),
    ],
)
def test_what_cannot_be_used_is_a_failure(how: str, says: str) -> None:
    demoted = torch.zeros(HEADS, 40, dtype=torch.bool)
    with pytest.raises(PolicyFailure, match=says):
        choose(Wrong(how), view_of(40), 20, 9, demoted)


def test_whoever_ends_the_process_may() -> None:
    with pytest.raises(SystemExit):
        choose(Wrong("exits"), view_of(40), 20)


@pytest.mark.parametrize("how", ["NaN", "far", "same", "other slots"])
def test_useless_values_are_replaced_and_told(how: str) -> None:
    view, demoted = view_of(40), torch.zeros(HEADS, 40, dtype=torch.bool)
    tiers = demoted if how == "other slots" else None
    choice = choose(Wrong(how), view, 20, 9 if tiers is not None else 0, tiers)
    assert not choice.sound
    assert torch.equal(choice.slots, newest(view, 20, 9 if tiers is not None else 0).slots)


@pytest.mark.parametrize(
    ("how", "says"), [("raises", "disk full"), ("same", "not ascending"), ("int32", "not int64")]
)
def test_a_dry_run_finds_what_is_wrong(how: str, says: str) -> None:
    with pytest.raises(PolicyFailure, match=says):
        dry_run(Wrong(how))


def test_a_sound_choice_is_the_policys() -> None:
    view = view_of(40)
    for how in ("", "half"):
        choice = choose(Wrong(how), view, 20)
        assert choice.sound and choice.slots.shape == (HEADS, 20)
    h2o = policies.get("h2o")
    view = view_of(40, running=True)
    choice, scores = choose(h2o, view, 24), h2o.score(view)
    assert torch.equal(choice.slots, h2o.select(view, scores, 24))
    assert choice.running is not None
    assert torch.equal(choice.running, scores.gather(1, choice.slots))


@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("reduce", ["mean", "max", None])
def test_a_view_in_position_order_is_one_of_keys_in_that_order(
    pool: int, reduce: str | None
) -> None:
    m = 40
    view = view_of(m, running=True)
    order = torch.stack([torch.randperm(m) for _ in range(HEADS)])
    assert view.running is not None
    where = order.unsqueeze(-1).expand(-1, -1, SIZE)
    keys = torch.cat((view.keys[:, :m].gather(1, where), view.keys[:, m:]), 1)
    seen = in_position_order(view, order)
    assert torch.equal(seen.keys, keys)
    assert seen.values is not None and view.values is not None
    assert torch.equal(seen.values[:, :m], view.values[:, :m].gather(1, where))
    assert torch.equal(seen.values[:, m:], view.values[:, m:])
    assert seen.running is not None
    assert torch.equal(seen.running, view.running.gather(1, order))
    options: dict[str, Any] = {"pool": pool, "pool_kind": random.choice(["max", "avg"])}
    got = seen.held.window_scores(view.queries, 0.25, m, reduce=reduce, **options)
    want = ops.window_scores(view.queries, keys, 0.25, m, reduce=reduce, **options)
    torch.testing.assert_close(got, want)
