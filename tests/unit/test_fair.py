"""Fair eviction: quotas of spans, and the base's choice within each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import parametrize
from tests.unit.views import alone, each, make_view, ragged, scores_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import Policy, View
from vllm_kvcrush.policies.choice import choose
from vllm_kvcrush.policies.fair import Fair
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.kvcrush import KVCrush
from vllm_kvcrush.policies.snapkv import SnapKV
from vllm_kvcrush.policies.streaming import Streaming


def span_of(position: int, spans: tuple[tuple[int, int], ...]) -> int:
    """Returns the span that a token belongs to, by the definition: the last one that begins at or
    before it, or else the first."""
    return max([0, *(i for i, (first, _) in enumerate(spans) if first <= position)])


def by_span(view: View, head: int) -> list[list[int]]:
    """Returns the slots of a head, by span."""
    positions = view.positions[head, : int(view.sizes[head])].tolist()
    found: list[list[int]] = [[] for _ in view.spans]
    for slot, position in enumerate(positions):
        found[span_of(position, view.spans)].append(slot)
    return found


def remainders(shares: list[Fraction], total: int) -> list[int]:
    """Returns whole numbers by largest remainders; of equal ones the first comes first."""
    whole = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


@st.composite
def views(draw: st.DrawFn, sinks: int | None = None) -> tuple[View, Tensor]:
    """Draws a view with spans, whose heads may hold unequal numbers of tokens, and different
    ones."""
    view = make_view(
        pages=draw(st.integers(1, 8)),
        sinks=draw(st.integers(0, 6)) if sinks is None else sinks,
        seed=draw(st.integers(0, 999)),
    )
    m = view.candidates
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(1, m), min_size=3, max_size=3))
        view = ragged(view, counts)
    # Tokens that an earlier compaction dropped leave gaps, different ones in each head.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    gaps = torch.randint(0, draw(st.integers(1, 4)), view.positions.shape, generator=generator)
    gaps[:, : view.sinks] = 0
    view = replace(view, true_positions=(view.positions + gaps.cumsum(1)).int())
    last = int(view.positions[view.valid].max())
    cut = sorted(draw(st.sets(st.integers(0, last + 9), min_size=2, max_size=10)))
    spans = tuple(zip(cut[::2], cut[1::2], strict=False))
    keep = [draw(st.integers(0, n)) for n in view.sizes.tolist()]
    return replace(view, spans=spans), torch.tensor(keep)


@parametrize(base=["snapkv", "streaming", "h2o", "kvcrush", "kvcrush(h2o, ratio=0.9, anchor=mean)"])
@given(case=views(sinks=0))
@settings(deadline=None, max_examples=60)
def test_quotas_are_the_spans_shares(base: str, case: tuple[View, Tensor]) -> None:
    view, keep = case
    policy = policies.get(f"fair({base})")
    mask = policy.select(view, scores_of(policy, view).masked_fill(~view.valid, -torch.inf), keep)
    assert torch.equal(mask.sum(1), keep) and not bool((mask & ~view.valid).any())
    for head, k in enumerate(keep.tolist()):
        slots, n = by_span(view, head), int(view.sizes[head])
        want = remainders([Fraction(len(own) * k, n) for own in slots], k)
        assert [int(mask[head, own].sum()) for own in slots] == want


@parametrize(base=["snapkv", "streaming", "h2o", "kvcrush", "kvcrush(h2o, ratio=0.9, anchor=ones)"])
@given(case=views(sinks=0), data=st.data())
@settings(deadline=None, max_examples=40)
def test_within_a_span_the_base_chooses_as_if_there_were_nothing_else(
    base: str, case: tuple[View, Tensor], data: st.DataObject
) -> None:
    view, keep = case
    policy, own = policies.get(f"fair({base})"), policies.get(base)
    scores = scores_of(policy, view).masked_fill(~view.valid, -torch.inf)
    mask = policy.select(view, scores, keep)
    head = data.draw(st.integers(0, 2))
    for index in range(len(view.spans)):
        members = [by_span(view, h)[index] for h in range(3)]
        if not members[head]:
            continue
        # The span's tokens of all heads, for bases that compare heads.
        width = max(map(len, members))
        inside = torch.full((3, width), -torch.inf)
        for h, slots in enumerate(members):
            inside[h, : len(slots)] = scores[h, slots]
        there = [len(slots) for slots in members]
        quota = [int(mask[h, slots].sum()) for h, slots in enumerate(members)]
        seen = ragged(make_view(width, 1, sinks=0), there)
        want = own.select(seen, inside, each(seen, quota))
        assert want[head, : there[head]].tolist() == mask[head, members[head]].tolist()


@dataclass
class Newest(Policy):
    """A policy that reads keys and positions when it selects, as a third party's may."""

    name: ClassVar[str] = "newest"
    needs: ClassVar[frozenset[str]] = frozenset({"positions", "queries"})

    def score(self, view: View) -> Tensor:
        return torch.zeros(view.num_kv_heads, view.candidates)

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        seen = view.keys[:, : view.candidates, 0] + view.state["attention"] + view.positions
        seen = seen + view.window_scores(pool=3).clamp(min=0)
        return ops.top_mask(seen.masked_fill(~view.valid, -torch.inf), keep)


@pytest.mark.parametrize("counts", [None, [48, 33, 20]])
def test_a_base_sees_keys_positions_and_state_of_its_span(counts: list[int] | None) -> None:
    view = make_view(sinks=0)
    view = view if counts is None else ragged(view, counts)
    view = replace(view, spans=((0, 10), (10, 24), (30, 48)))
    keep = (view.sizes.double() * 0.5).long()
    mask = Fair(base=Newest()).select(view, scores_of(Newest(), view), keep)
    weights = [alone(view, head).window_scores() for head in range(3)]
    for head in range(3):
        for slots in by_span(view, head):
            seen = torch.tensor(
                [
                    float(view.keys[head, s, 0] + view.state["attention"][head, s])
                    + float(view.positions[head, s])
                    for s in slots
                ]
            )
            if slots:
                seen += ops.pool_scores(weights[head][:, slots], 3, "max")[0]
            best = seen.argsort(descending=True, stable=True)[: int(mask[head, slots].sum())]
            assert [s for s in slots if mask[head, s]] == sorted(slots[i] for i in best)


def test_tokens_between_spans_belong_to_the_span_before_them() -> None:
    view = replace(make_view(heads=1, group=1, sinks=0), spans=((8, 16), (24, 28), (40, 44)))
    scores = torch.arange(48.0).unsqueeze(0)
    mask = Fair(base=Streaming()).select(view, scores, each(view, 12))
    # 24, 16 and 8 tokens, of which a quarter each.
    assert ops.mask_slots(mask, 12).tolist() == [[*range(18, 24), *range(36, 40), 46, 47]]


@parametrize(
    base=["snapkv", "streaming", "h2o(recent=0.9)", "kvcrush(ratio=0.5)", "adakv", "keepkv(h2o)"],
    spans=[(), ((0, 48),), ((0, 5), (9, 30))],
)
def test_without_spans_or_fairness_it_is_the_base(
    base: str, spans: tuple[tuple[int, int], ...]
) -> None:
    own = policies.get(base)
    for plain in (make_view(), ragged(make_view(), [48, 20, 9])):
        view = replace(plain, spans=spans)
        keep = view.sizes // 2
        scores = scores_of(own, view).masked_fill(~view.valid, -torch.inf)
        want = own.select(view, scores, keep)
        assert torch.equal(
            policies.get(f"fair({base}, fairness=0)").select(view, scores, keep), want
        )
        if len(spans) < 2:
            assert torch.equal(policies.get(f"fair({base})").select(view, scores, keep), want)


@given(case=views(sinks=0), fairness=st.sampled_from([0.25, 0.5, 0.75]))
@settings(deadline=None, max_examples=60)
def test_fairness_lies_between(case: tuple[View, Tensor], fairness: float) -> None:
    view, keep = case
    scores = scores_of(SnapKV(), view).masked_fill(~view.valid, -torch.inf)
    free = SnapKV().select(view, scores, keep)
    mask = Fair(fairness=fairness).select(view, scores, keep)
    for head, k in enumerate(keep.tolist()):
        slots, n = by_span(view, head), int(view.sizes[head])
        some = Fraction(fairness)
        want = [
            some * Fraction(len(own) * k, n) + (1 - some) * int(free[head, own].sum())
            for own in slots
        ]
        got = [int(mask[head, own].sum()) for own in slots]
        assert sum(got) == k
        assert all(abs(count - share) < 1 for count, share in zip(got, want, strict=True))


@parametrize(base=["snapkv", "streaming", "h2o", "kvcrush", "kvcrush(h2o, ratio=0.9)"])
@given(case=views(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_protected_slots_stay_and_count_towards_their_span(
    base: str, case: tuple[View, Tensor], data: st.DataObject
) -> None:
    view, _ = case
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    share = data.draw(st.sampled_from([0.0, 0.2, 0.6]))
    more = torch.rand(view.valid.shape, generator=generator) < share
    view = replace(view, protected=(view.staying | more) & view.valid)
    least = view.staying.sum(1).tolist()
    keep = [
        data.draw(st.integers(low, n)) for low, n in zip(least, view.sizes.tolist(), strict=True)
    ]
    policy = policies.get(f"fair({base})")
    scores = scores_of(policy, view).masked_fill(~view.valid, -torch.inf)
    mask = policy.select(view, scores, torch.tensor(keep))
    assert mask.sum(1).tolist() == keep and not bool((mask & ~view.valid).any())
    assert not bool((view.staying & ~mask).any()), "not by `choose`, by itself"
    for head, k in enumerate(keep):
        slots, n = by_span(view, head), int(view.sizes[head])
        shares = [Fraction(len(own) * k, n) for own in slots]
        need = [int(view.staying[head, own].sum()) for own in slots]
        got = [int(mask[head, own].sum()) for own in slots]
        if all(low <= share for low, share in zip(need, shares, strict=True)):
            assert got == remainders(shares, k)
        for count, low, quota in zip(got, need, shares, strict=True):
            # What the protected slots of one span take beyond its share comes from the others.
            assert count >= low and (count <= low or count < quota + 1)


def test_ranks_whose_heads_hold_other_tokens_ask_each_other_alike() -> None:
    """A collective hangs, or fails, where one rank makes another call than the others."""
    calls: list[list[tuple[int, ...]]] = [[], []]
    whole = make_view(heads=4, group=1, sinks=2)
    gaps = torch.arange(4).unsqueeze(1) * torch.ones(48).cumsum(0)
    whole = replace(whole, true_positions=(whole.positions + gaps).int())
    whole = replace(whole, spans=((0, 20), (20, 90), (90, 130)))

    def asking(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(mine: Tensor) -> Tensor:
            calls[rank].append(tuple(mine.shape))
            return torch.cat((mine, mine))

        return gather

    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        half = replace(
            whole,
            held=ops.LayerKV(whole.keys[own]),
            queries=whole.queries[own] if whole.queries is not None else None,
            true_positions=whole.positions[own],
            state={},
            all_heads=asking(rank),
        )
        for keep in (2, 3, 40):
            Fair(base=KVCrush(ratio=0.3)).select(half, scores_of(SnapKV(), half), each(half, keep))
    assert calls[0] == calls[1] and len(calls[0]) == 3 * 4


def test_tiers_of_a_span_are_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    view = replace(make_view(sinks=0), spans=((0, 24), (24, 48)))
    policy = policies.get("fair(mikv)")
    finer = each(view, 16)
    none = torch.zeros(3, 48, dtype=torch.bool)
    choice = choose(policy, view, each(view, 48), finer, none)
    assert choice.sound and choice.finer is not None
    assert choice.finer[:, :24].sum(1).tolist() == choice.finer[:, 24:].sum(1).tolist() == [8] * 3
    # H2O's newest half is the newest of each span.
    assert bool(choice.finer[:, 20:24].all()) and bool(choice.finer[:, 44:].all())
    assert policy.base == policies.MiKV() and isinstance(policy.base, H2O)  # type: ignore[attr-defined]
