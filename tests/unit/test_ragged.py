"""What every policy does with heads that hold unequal numbers of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairwise import parametrize
from tests.unit.test_policies import slow_bits, slow_kvcrush
from tests.unit.views import alone, each, make_view, ragged, scored, slots_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import Room, View
from vllm_kvcrush.policies.choice import choose, demanded

POLICIES = [
    "streaming",
    "snapkv",
    "snapkv(pool=5, pool_kind=avg, reduce=max)",
    "h2o",
    "h2o(recent=0)",
    "mikv",
    *(f"kvcrush(anchor={a})" for a in ops.ANCHORS),
    "kvcrush(h2o, ratio=0.9)",
    "kvcrush(level=page)",
    "adakv(h2o)",
    "keepkv",
    "fair",
    "fair(h2o, fairness=0.5)",
    "fair(kvcrush)",
    *("knorm", "keydiff", "lagkv(lag=8)", "infinipot", "lacache", "tova", "expected_attention"),
    *("gkv", "rkv", "critic", "gui_kv", "rerotate", "rerotate(keepkv)", "fair(gkv)"),
    "kvzip",
    *("pyramidkv(adakv)", "cake", "duo(h2o)", "surfacelogic", "d2o", "cam(snapkv)"),
    *("composed(h2o, other=streaming)", "composed(scale=rank)", "fair(duo)"),
]
# Policies in which a head's choice does not depend on other heads.
APART = [text for text in POLICIES if "kvcrush" not in text]
SPANS = ((0, 11), (14, 30), (30, 44))


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes operations use C++, or plain torch where a test says so."""
    arguments: dict[str, Any] = getattr(request.node, "callspec", None).params  # type: ignore[union-attr]
    if arguments.get("how") == "reference":
        monkeypatch.setattr(ops, "_in_cpp", lambda tensor: False)


def example(text: str, counts: list[int], seed: int, sinks: int = 4, **more: Any) -> View:
    """Returns a ragged view, with spans where the policy treats them."""
    view = make_view(sinks=sinks, seed=seed, heads=len(counts), **more)
    view = replace(view, spans=SPANS if policies.get(text).uses_spans else ())
    return ragged(view, counts)


@st.composite
def sizes(draw: st.DrawFn, unit: int = 1, least: int = 0) -> tuple[list[int], list[int]]:
    """Draws the token counts of three heads, of which one may have next to none, and how many they
    keep."""
    counts = [draw(st.integers(least, 48 // unit)) * unit for _ in range(3)]
    if draw(st.booleans()):
        counts[draw(st.integers(0, 2))] = draw(st.integers(least, 2)) * unit
    counts[draw(st.integers(0, 2))] = 48
    return counts, [draw(st.integers(least, n // unit)) * unit for n in counts]


@parametrize(text=POLICIES, how=["reference", "cpu"])
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_masks_have_their_counts_and_no_padding(text: str, how: str, data: st.DataObject) -> None:
    counts, keep = data.draw(sizes(8 if "level=page" in text else 1))
    view = example(text, counts, data.draw(st.integers(0, 99)), data.draw(st.integers(0, 9)))
    policy = policies.get(text)
    scores, state = scored(policy, view)
    for head, n in enumerate(counts):
        own = scores[head, :n]
        assert bool(own.isfinite().all()), "padding got into the scores of a head"
    for kept in state.values():
        assert bool((kept[view.valid].abs() < 1e6).all()), "padding got into the state"
    # What it selects in the end, by way of `choose`; and by itself, which `slots_of` checks.
    slots_of(policy, view, scores.masked_fill(~view.valid, -torch.inf), keep)
    demoted = torch.zeros_like(view.valid)
    tiers = (each(view, keep) // 2, demoted) if policy.tiers else ()
    choice = choose(policy, view, each(view, keep), *tiers)
    assert choice.sound
    assert choice.kept.sum(1).tolist() == keep and not bool((choice.kept & ~view.valid).any())
    if choice.finer is not None:
        assert choice.finer.sum(1).tolist() == [n // 2 for n in keep]
    if "level=page" not in text:
        for row, k, n in zip(choice.kept.tolist(), keep, counts, strict=True):
            first = min(view.sinks, k, n)
            assert row[:first] == [True] * first
    if choice.merged is not None:
        biases = [] if choice.merged.log_bias is None else [choice.merged.log_bias]
        for part in (choice.merged.keys, choice.merged.values, *biases):
            assert bool(part[choice.kept].isfinite().all())
            assert bool((part[choice.kept].abs() < 1e3).all()), "padding was merged"
    if "adakv" in text:
        room = Room(12, torch.full((1, 3), 8), torch.tensor([counts]))
        demand = demanded(policy, view, scores.masked_fill(~view.valid, -torch.inf), room)
        assert demand is not None and demand.sum() == min(96, sum(counts))
        assert bool((demand <= torch.tensor(counts)).all())


@parametrize(text=POLICIES, how=["reference", "cpu"], seed=[0, 1])
def test_heads_that_happen_to_be_equal_choose_alike(text: str, how: str, seed: int) -> None:
    policy, unit = policies.get(text), 8 if "level=page" in text else 1
    plain = make_view(seed=seed, pages=6)
    plain = replace(plain, spans=SPANS if policy.uses_spans else ())
    for n in (48, 40):
        view = ragged(plain, [n] * 3)
        want = replace(view, counts=None, held=ops.LayerKV(view.keys, view.values))
        assert not view.ragged
        scores, state = scored(policy, want)
        seen, kept = scored(policy, view)
        torch.testing.assert_close(seen, scores)
        assert list(kept) == list(state)
        keep = [24 // unit * unit] * 3
        slots = slots_of(policy, want, scores, keep)
        assert torch.equal(slots_of(policy, view, scores, keep), slots)


@parametrize(text=APART, how=["reference", "cpu"], counts=[[48, 30, 17], [3, 48, 1], [48, 48, 20]])
def test_a_head_alone_chooses_as_it_does_among_others(
    text: str, how: str, counts: list[int]
) -> None:
    policy, view = policies.get(text), example(text, counts, seed=sum(counts))
    keep = [(n + 1) // 2 for n in counts]
    scores, state = scored(policy, view)
    mask = policy.select(view, scores.masked_fill(~view.valid, -torch.inf), each(view, keep))
    for head, (n, k) in enumerate(zip(counts, keep, strict=True)):
        own = alone(view, head)
        mine, kept = scored(policy, own)
        torch.testing.assert_close(scores[head : head + 1, :n], mine)
        for name, x in kept.items():
            torch.testing.assert_close(state[name][head : head + 1, :n], x)
        assert torch.equal(
            mask[head : head + 1, :n], policy.select(own, scores[head : head + 1, :n], each(own, k))
        )
        if policy.merges:
            one = policy.merge(own, mine, mask[head : head + 1, :n])
            every = policy.merge(view, scores, mask)
            own_kept = mask[head, :n]
            for part, whole in zip(one[:3], every[:3], strict=True):
                assert (part is None) == (whole is None)
                if part is not None and whole is not None:
                    torch.testing.assert_close(part[0][own_kept], whole[head, :n][own_kept])
            for name, value in (every.layer_state or {}).items():
                assert one.layer_state is not None
                torch.testing.assert_close(value[head : head + 1], one.layer_state[name])


@parametrize(anchor=ops.ANCHORS, how=["reference", "cpu"])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_kvcrush_of_unequal_heads_is_its_definition(
    anchor: str, how: str, data: st.DataObject
) -> None:
    """Each head's representatives are among its own tokens, which the bits of all heads
    describe."""
    counts, keep = data.draw(sizes(least=1))
    view = example("kvcrush", counts, 0, data.draw(st.integers(0, 5)))
    policy = policies.KVCrush(anchor=anchor, ratio=data.draw(st.sampled_from([0.1, 0.5, 0.9])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randint(-3, 4, (3, 48), generator=generator).float()
    scores = scores.masked_fill(~view.valid, -torch.inf)
    rows = [row[:n] for row, n in zip(scores.tolist(), counts, strict=True)]
    bits = [[*slow_bits([row], policy.share)[0], *[False] * (48 - len(row))] for row in rows]
    got = policy.select(view, scores, each(view, keep))
    for head, (n, k) in enumerate(zip(counts, keep, strict=True)):
        own = replace(alone(view, head), queries=None)
        described = [row[:n] for row in bits]
        (want,) = slow_kvcrush(policy, [rows[head]], described, own, k)
        assert got[head].nonzero().squeeze(1).tolist() == want
