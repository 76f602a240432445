"""Eviction policies: one list for the shared contract, then what each does by its paper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import pairwise
from tests.unit.views import each, make_view, on, scored, scores_of, slots_of
from vllm_kvcrush import ops, policies, spec
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.policies import Policy, View
from vllm_kvcrush.policies.fair import Fair
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.keydiff import KeyDiff
from vllm_kvcrush.policies.kvcrush import KVCrush
from vllm_kvcrush.policies.snapkv import SnapKV
from vllm_kvcrush.policies.streaming import Streaming

BUILT_IN = (
    *("streaming", "lacache", "knorm", "keydiff", "lagkv", "infinipot"),
    *("snapkv", "tova", "h2o", "expected_attention", "gkv", "rkv", "critic", "gui_kv"),
    "kvzip",
    *("kvcrush", "mikv", "adakv", "keepkv", "fair", "rerotate"),
    *("pyramidkv", "cake", "duo", "surfacelogic", "d2o", "cam", "composed"),
    *("int8", "int4", "tc4", "tc6", "tc8", "tada", "gear", "auto"),
)
PACKED = {
    **{name: (name,) for name in ("int8", "int4", "tc4", "tc6", "tc8", "tada", "gear")},
    "auto": ("int8", "tc4", "tc6", "tc8"),
    "mikv": ("int8", "tc8"),
}

ANCHORS = ["random", "zeros", "ones", "mean", "alternate"]

ALL = [
    "streaming",
    "snapkv",
    "snapkv(pool=5, pool_kind=avg, reduce=max)",
    "h2o",
    "h2o(recent=1)",
    "mikv",
    "adakv",
    "adakv(kvcrush, floor=0)",
    "keepkv",
    "fair",
    "fair(kvcrush(h2o))",
    *("pyramidkv", "pyramidkv(adakv)", "cake", "duo", "duo(h2o)", "surfacelogic", "d2o", "cam"),
    *("composed", 'composed(h2o, other="snapkv(pool=3)", scale=rank)'),
    "kvcrush(streaming)",
    "kvcrush(h2o, ratio=0)",
    *(f"kvcrush(anchor={a}, level={level})" for a in ANCHORS for level in ("token", "page")),
    "kvcrush(ratio=0.99)",
    "kvcrush(ratio=0.99, level=page)",
    *("knorm", "keydiff", "lagkv(lag=8)", "infinipot", "lacache", "tova", "expected_attention"),
    *("gkv", "rkv", "critic", "gui_kv", "rerotate", "kvcrush(keydiff)", "fair(lacache)"),
    *("kvzip", "adakv(kvzip)"),
]


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the policies' operations use C++, or plain torch where a test says so."""
    if getattr(request, "param", "cpu") == "reference":
        monkeypatch.setattr(ops, "_in_cpp", lambda tensor: False)


def sampled(**dimensions: Iterable[Any]) -> pytest.MarkDecorator:
    """Runs a test with both implementations and combinations of the dimensions."""
    dimensions["implementation"] = ("reference", "cpu")
    return pytest.mark.parametrize(
        tuple(dimensions), pairwise(**dimensions), indirect=["implementation"]
    )


every_policy = sampled(text=ALL)
both = sampled()


def check_slots(slots: Tensor, heads: int, m: int, keep: int, sinks: int) -> None:
    assert slots.dtype == torch.int64
    assert slots.shape == (heads, keep)
    for row in slots.tolist():
        assert row == sorted(set(row))
        assert not row or (row[0] >= 0 and row[-1] < m)
        assert row[: min(sinks, keep)] == list(range(min(sinks, keep)))


# The contract of every policy


@sampled(text=ALL, dtype=[torch.float32, torch.bfloat16], keep_pages=[1, 2, 5, 6])
def test_selects_as_many_as_asked(text: str, dtype: torch.dtype, keep_pages: int) -> None:
    policy, view = policies.get(text), make_view(dtype=dtype)
    scores = scores_of(policy, view)
    assert scores.shape == (3, 48) and scores.dtype == torch.float32
    slots = slots_of(policy, view, scores, keep_pages * 8)
    check_slots(slots, 3, 48, keep_pages * 8, view.sinks)


@sampled(text=ALL, sinks=[0, 1, 8, 11, 16, 30], page=[4, 16])
def test_sinks_stay(text: str, sinks: int, page: int) -> None:
    view = make_view(pages=48 // page, page=page, sinks=sinks, group=1)
    # The least wanted slots are the first ones: only protection keeps them.
    keys, queries = view.keys.clone(), view.queries
    assert queries is not None
    keys[:, :sinks] = -3 * queries.mean(1, keepdim=True)
    view = replace(view, held=ops.LayerKV(keys, view.values), state={})
    policy = policies.get(text)
    check_slots(slots_of(policy, view, scores_of(policy, view), 16), 3, 48, 16, sinks)


@every_policy
def test_same_view_same_choice_and_untouched(text: str) -> None:
    policy, view = policies.get(text), replace(make_view(), spans=((0, 10), (20, 40)))
    tensors = (view.keys, view.values, view.queries, *view.state.values(), view.positions)
    before = [t.clone() for t in tensors if t is not None]
    scores = scores_of(policy, view)
    kept, keep = scores.clone(), each(view, 16)
    first, second = policy.select(view, scores, keep), policy.select(view, scores, keep)
    assert torch.equal(first, second) and torch.equal(scores, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True) if b is not None)
    assert keep.tolist() == [16] * 3


@every_policy
def test_takes_only_what_it_says_it_needs(text: str) -> None:
    policy, view = policies.get(text), make_view()
    assert policy.needs <= {"queries", "state", "positions", "repeat"}
    view = replace(
        view,
        held=ops.LayerKV(view.keys, view.values),
        queries=view.queries if "queries" in policy.needs else None,
        state=view.state if "state" in policy.needs else {},
        known=None,
        true_positions=view.true_positions if "positions" in policy.needs else None,
        repeated=view.repeated if "repeat" in policy.needs else None,
        spans=((0, 20), (20, 40)) if policy.uses_spans else (),
    )
    scores, state = scored(policy, view)
    slots_of(policy, view, scores, 16)
    assert bool(state) == ("state" in policy.needs)
    for kept in state.values():
        assert kept.shape == (3, 48) and kept.dtype == torch.float32


@every_policy
def test_broken_numbers_do_not_break_the_count(text: str) -> None:
    view = make_view()
    keys = view.keys.clone()
    keys[0, 20] = torch.nan
    keys[1, 21] = torch.inf
    policy, view = policies.get(text), replace(view, held=ops.LayerKV(keys, view.values))
    check_slots(slots_of(policy, view, scores_of(policy, view), 16), 3, 48, 16, view.sinks)


@sampled(text=ALL)
def test_stays_on_the_device_of_the_view(text: str) -> None:
    # "meta" refuses to mix with the CPU and has no data: a copy from or to the device would fail.
    view, policy = on(make_view(), "meta"), policies.get(text)
    slots = slots_of(policy, view, scores_of(policy, view), 16)
    assert slots.device.type == "meta" and slots.shape == (3, 16)


def test_no_policy_needs_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from vllm_kvcrush import policies; "
    code += "[policies.get(name) for name in policies.names()]"
    subprocess.run([sys.executable, "-c", code], check=True)


# StreamingLLM


@sampled(keep=[8, 16, 40, 48], sinks=[0, 4, 20])
def test_streaming_keeps_sinks_and_the_newest(sinks: int, keep: int) -> None:
    view, policy = make_view(sinks=sinks), Streaming()
    scores = scores_of(policy, view)
    slots = slots_of(policy, view, scores, keep)
    first = min(sinks, keep)
    assert slots.tolist() == [[*range(first), *range(48 - keep + first, 48)]] * 3
    plain, counts = Policy.select(policy, view, scores, each(view, keep)), each(view, keep)
    assert torch.equal(policy.select(view, scores, counts), plain)


# SnapKV


def weights_of(view: View) -> list[list[list[float]]]:
    assert view.queries is not None
    return ops.window_attention(view.queries, view.keys, view.scale).tolist()


@sampled(group=[1, 3, 4, 8], pooling=[(1, "max"), (7, "max"), (5, "avg")], reduce=["mean", "max"])
def test_snapkv_score(group: int, pooling: tuple[int, str], reduce: str) -> None:
    pool, kind = pooling
    view = make_view(pages=3, heads=2, group=group)
    m, weights = 24, weights_of(view)
    got = SnapKV(pool, kind, reduce).score(view)
    for head in range(2):
        pooled = []
        for q in range(head * group, (head + 1) * group):
            mean = [sum(row[j] for row in weights[q]) / len(weights[q]) for j in range(m)]
            near = [mean[max(0, j - pool // 2) : j + pool // 2 + 1] for j in range(m)]
            pooled.append([max(x) if kind == "max" else sum(x) / len(x) for x in near])
        for j in range(m):
            column = [p[j] for p in pooled]
            want = max(column) if reduce == "max" else sum(column) / group
            assert got[head, j].item() == pytest.approx(want, rel=1e-4)


@both
def test_snapkv_keeps_what_the_window_looks_at() -> None:
    view = make_view(heads=2, group=1, sinks=0)
    assert view.queries is not None
    keys = torch.zeros_like(view.keys)
    keys[0, 20] = 5 * view.queries[0].mean(0)
    keys[1, 33] = 5 * view.queries[1].mean(0)
    view = replace(view, held=ops.LayerKV(keys))
    policy = SnapKV(pool=3)
    slots = slots_of(policy, view, scores_of(policy, view), 8).tolist()
    assert {19, 20, 21} <= set(slots[0]) and {32, 33, 34} <= set(slots[1])
    assert not {32, 33, 34} & set(slots[0])


# H2O


@both
def test_h2o_adds_the_windows_column_sums_to_what_was_gathered() -> None:
    view = make_view(pages=3, heads=2, group=3)
    gathered = view.state["attention"]
    weights, policy = weights_of(view), H2O()
    scores, state = scored(policy, view)
    for head in range(2):
        for j in range(24):
            group = range(3 * head, 3 * head + 3)
            want = gathered[head, j].item()
            want += sum(row[j] for q in group for row in weights[q]) / 3
            assert scores[head, j].item() == pytest.approx(want, rel=1e-4)
    assert list(state) == ["attention"] and torch.equal(state["attention"], scores)
    # At the first compaction nothing was gathered.
    first = scores_of(policy, replace(view, state={}))
    assert torch.equal(scores, first + gathered)


@sampled(keep=[8, 16, 32], sinks=[0, 3, 13], recent=[0, 0.3, 0.5, 1.0])
def test_h2o_splits_its_budget(recent: float, sinks: int, keep: int) -> None:
    view = make_view(sinks=sinks)
    generator = torch.Generator().manual_seed(keep)
    scores = torch.randint(0, 9, (3, 48), generator=generator).float()
    first = min(sinks, keep)
    newest = min(int(recent * keep), keep - first)
    for row, got in zip(scores.tolist(), slots_of(H2O(recent), view, scores, keep), strict=True):
        chosen = {*range(first), *range(48 - newest, 48)}
        rest = sorted(set(range(48)) - chosen, key=lambda i: (-row[i], i))
        chosen.update(rest[: keep - len(chosen)])
        assert got.tolist() == sorted(chosen)


@both
def test_infinite_scores_do_not_displace_protected_slots() -> None:
    view = make_view(sinks=0)
    scores = torch.full((3, 48), torch.inf)
    assert slots_of(H2O(0.5), view, scores, 8).tolist() == [[0, 1, 2, 3, 44, 45, 46, 47]] * 3


# KVCrush


def slow_kvcrush(
    policy: KVCrush, scores: list[list[float]], bits: list[list[bool]], view: View, keep: int
) -> list[list[int]]:
    """Returns KVCrush's choice by its definition, unit by unit. `scores` are one rank's, `bits` all
    ranks'."""
    unit = view.page_size if policy.level == "page" else 1
    m, units, budget = view.candidates, view.candidates // unit, keep // unit
    sinks = {slot // unit for slot in range(view.sinks)}
    vectors = [
        [head[slot] for head in bits for slot in range(u * unit, u * unit + unit)]
        for u in range(units)
    ]
    count = round(policy.ratio * budget)
    if policy.level == "page" and policy.ratio > 0 and budget >= 2:
        count = max(count, 1)
    while count and budget - count < max(1, len(sinks)):
        count -= 1
    out = []
    for row in scores:
        total = [sum(row[u * unit : u * unit + unit]) for u in range(units)]
        ranked = sorted(
            range(units), key=lambda u: (u not in sinks, u if u in sinks else -total[u], u)
        )
        important = ranked[: budget - count]
        rest = [u for u in range(units) if u not in important]
        width = len(vectors[0])
        if policy.anchor == "random":
            generator = torch.Generator().manual_seed(policy.seed)
            anchor = [bool(b) for b in torch.randint(0, 2, (width,), generator=generator)]
        elif policy.anchor == "mean":
            anchor = [
                bool(rest) and sum(vectors[u][i] for u in rest) / len(rest) > 0.5
                for i in range(width)
            ]
        elif policy.anchor == "alternate":
            anchor = [i % 2 == 1 for i in range(width)]
        else:
            anchor = [policy.anchor == "ones"] * width

        def distance(u: int, anchor: list[bool] = anchor) -> int:
            return sum(a != b for a, b in zip(vectors[u], anchor, strict=True))

        rest.sort(key=lambda u: (distance(u), u))
        chosen = important + [rest[i * len(rest) // count] for i in range(count)]
        out.append(sorted(u * unit + i for u in chosen for i in range(unit)))
        assert m > out[-1][-1]
    return out


def slow_bits(scores: list[list[float]], share: float) -> list[list[bool]]:
    out = []
    for row in scores:
        top = sorted(range(len(row)), key=lambda i: (-row[i], i))[: round(share * len(row))]
        out.append([i in top for i in range(len(row))])
    return out


@sampled(anchor=ANCHORS, level=["token", "page"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_kvcrush_is_its_definition(anchor: str, level: str, data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 4))
    other = data.draw(st.integers(0, 3))  # heads of another rank, after these
    page, pages = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    keep = page * data.draw(st.integers(1, pages))
    sinks = data.draw(st.integers(0, min(8, page * pages)))
    policy = KVCrush(
        anchor=anchor,
        level=level,
        ratio=data.draw(st.sampled_from([0, 0.1, 0.25, 0.5, 0.9])),
        share=data.draw(st.sampled_from([0.2, 0.5, 0.7])),
        seed=data.draw(st.integers(0, 9)),
    )
    # Few whole-numbered levels: many ties, and sums without rounding.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    everyone = torch.randint(-3, 4, (heads + other, page * pages), generator=generator).float()
    scores = everyone[:heads]
    view = replace(
        make_view(pages, page, heads, 1, sinks),
        all_heads=lambda bits: torch.cat((bits, ops.keep_bits(everyone[heads:], policy.share))),
    )
    got = slots_of(policy, view, scores, keep)
    bits = slow_bits(everyone.tolist(), policy.share)
    assert got.tolist() == slow_kvcrush(policy, scores.tolist(), bits, view, keep)


@both
def test_kvcrush_by_hand() -> None:
    # One sink, 8 tokens, keep 4 = 2 important + 2 representatives; bits: the better 4 of a head.
    scores = torch.tensor([[0.0, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 0]])
    # bits of head 0:      0   1  1  1  1  0  0  0,    of head 1: 0 0 0 1 1 1 1 0
    # distance to (0, 1):  1   2  2  1  1  0  0  1
    view = make_view(pages=2, page=4, heads=2, group=1, sinks=1)
    slots = slots_of(KVCrush(ratio=0.5), view, scores, 4)
    # Head 0 keeps 0 and 1; the others in order: 5 6 3 | 4 7 2. Head 1 keeps 0 and 6: 5 3 4 | 7 1 2.
    assert slots.tolist() == [[0, 1, 4, 5], [0, 5, 6, 7]]


@both
def test_kvcrush_pages_by_hand() -> None:
    # Pages of 2 with the bits of head 0, then of head 1; anchor 0101.
    scores = torch.tensor(
        [[9.0, 8, 7, 0, 1, 6, 0, 0, 0, 5], [0.0, 0, 9, 0, 8, 7, 0, 6, 0, 5]],
    )
    # bits 11 10 01 00 01 | 00 10 11 01 01, so that the pages are 1100 1010 0111 0001 0101 with
    # distances 2, 4, 1, 1, 0; totals 17 7 7 0 5 and 0 9 15 6 5.
    view = make_view(pages=5, page=2, heads=2, group=1, sinks=0)
    slots = slots_of(KVCrush(ratio=0.67, level="page"), view, scores, 6)
    # Head 0 keeps page 0 and two of 4 2 | 3 1; head 1 keeps page 2 and two of 4 3 | 0 1.
    assert slots.tolist() == [[0, 1, 6, 7, 8, 9], [0, 1, 4, 5, 8, 9]]


@both
def test_each_head_leaves_out_its_own_important_tokens() -> None:
    # All that is not important is a representative here: a head that left out another head's
    # important tokens instead of its own would run short or keep one twice.
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(4, 48, generator=generator)
    view = make_view(heads=4, group=1, sinks=0)
    for anchor in ANCHORS:
        slots = slots_of(KVCrush(ratio=0.5, anchor=anchor), view, scores, 48)
        assert slots.tolist() == [list(range(48))] * 4


@both
def test_heads_choose_for_themselves() -> None:
    view, policy = make_view(), KVCrush()
    slots = slots_of(policy, view, scores_of(policy, view), 16).tolist()
    assert slots[0] != slots[1] and slots[1] != slots[2]
    same = scores_of(policy, view)[:1].repeat(3, 1)
    slots = slots_of(policy, view, same, 16).tolist()
    assert slots[0] == slots[1] == slots[2]


@both
def test_ratio_zero_is_the_base() -> None:
    view, base = make_view(), SnapKV()
    scores = scores_of(base, view)
    crush = KVCrush(base, ratio=0)
    assert torch.equal(scores_of(crush, view), scores)
    assert torch.equal(slots_of(crush, view, scores, 16), slots_of(base, view, scores, 16))


@sampled(keep=[8, 16, 32, 40])
def test_the_budget_is_total(keep: int) -> None:
    view, crush = make_view(), KVCrush(ratio=0.25)
    scores = scores_of(crush, view)
    important = slots_of(SnapKV(), view, scores, keep - keep // 4).tolist()
    for chosen, own in zip(slots_of(crush, view, scores, keep).tolist(), important, strict=True):
        assert set(own) < set(chosen) and len(chosen) == keep


@sampled(anchor=ANCHORS, level=["token", "page"])
def test_tensor_parallel_ranks_choose_as_one_would(anchor: str, level: str) -> None:
    whole, policy = make_view(heads=4, seed=8), KVCrush(anchor=anchor, level=level, ratio=0.5)
    assert whole.queries is not None
    want = slots_of(policy, whole, scores_of(policy, whole), 24)
    halves = [
        replace(
            whole,
            held=ops.LayerKV(whole.keys[2 * rank : 2 * rank + 2]),
            queries=whole.queries[6 * rank : 6 * rank + 6],
            state={},
        )
        for rank in range(2)
    ]
    scores = [scores_of(policy, half) for half in halves]
    bits = [ops.keep_bits(s, policy.share) for s in scores]
    got = []
    for rank in range(2):

        def gather(mine: Tensor, rank: int = rank) -> Tensor:
            assert torch.equal(mine, bits[rank])
            return torch.cat(bits)

        view = replace(halves[rank], all_heads=gather)
        got.append(slots_of(policy, view, scores[rank], 24))
    assert torch.equal(torch.cat(got), want)


@both
def test_wrappers_pass_the_base_on() -> None:
    view, base = make_view(), H2O(recent=0.25)
    for text in ("kvcrush", "adakv", "keepkv", "fair"):
        wrapped = policies.get(f"{text}(h2o(recent=0.25))")
        more = {"positions"} if text == "fair" else set()
        assert wrapped.needs == {"queries", "state"} | more
        scores, state = scored(wrapped, view)
        want, kept = scored(base, view)
        assert torch.equal(scores, want) and torch.equal(state["attention"], kept["attention"])
        if text != "kvcrush":  # which takes scores alone
            assert torch.equal(
                slots_of(wrapped, view, scores, 16), slots_of(base, view, scores, 16)
            )
    assert policies.get("kvcrush(streaming)").needs == frozenset()
    assert policies.get("keepkv(streaming)").needs == {"queries"}
    nested = policies.get("adakv(keepkv(fair(h2o)))")
    assert nested.allocates and nested.merges and nested.uses_spans and not nested.tiers
    assert policies.get("fair(mikv)").tiers and policies.get("fair(mikv)").codecs == PACKED["mikv"]
    # Whose `select` is its own does not treat spans each on its own, whatever it wraps.
    assert not policies.get("kvcrush(fair)").uses_spans


# Options and the registry


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "kvcrush",
            {"anchor": "foo"},
            "kvcrush.anchor='foo' is not one of random, zeros, ones, mean, alternate",
        ),
        ("kvcrush", {"level": "block"}, "kvcrush.level='block' is not one of token, page"),
        ("kvcrush", {"ratio": 1}, "kvcrush.ratio=1 is not a number from 0 to below 1"),
        ("kvcrush", {"ratio": -0.1}, "kvcrush.ratio=-0.1 is not a number from 0 to below 1"),
        ("kvcrush", {"ratio": "0.5"}, "kvcrush.ratio='0.5' is not a number from 0 to below 1"),
        ("kvcrush", {"ratio": True}, "kvcrush.ratio=True is not a number from 0 to below 1"),
        (
            "kvcrush",
            {"ratio": float("nan")},
            "kvcrush.ratio=nan is not a number from 0 to below 1",
        ),
        ("kvcrush", {"share": 0}, "kvcrush.share=0 is not a number between 0 and 1"),
        ("kvcrush", {"share": 1.0}, "kvcrush.share=1.0 is not a number between 0 and 1"),
        ("kvcrush", {"seed": -1}, "kvcrush.seed=-1 is not a whole number from 0 to 2**63 - 1"),
        ("kvcrush", {"seed": 0.5}, "kvcrush.seed=0.5 is not a whole number from 0 to 2**63 - 1"),
        ("kvcrush", {"base": "kvcrush"}, "kvcrush.base='kvcrush' wraps policies more than 4 deep"),
        ("kvcrush", {"base": [7]}, "kvcrush.base=[7] is not a policy's name"),
        ("kvcrush", {"base": "h2o("}, "kvcrush.base='h2o(' lacks a policy's name"),
        (
            "kvcrush",
            {"base": "snapkv@int8"},
            "kvcrush.base='snapkv@int8' names codecs of a policy inside another",
        ),
        (
            "kvcrush",
            {"base": "snapkv(pool=2)"},
            "snapkv.pool=2 is not an odd whole number, 1 or more",
        ),
        (
            "kvcrush",
            {"base": {"policy": "h2o", "pool": 3}},
            "h2o.pool is not an option: h2o takes recent",
        ),
        (
            "kvcrush",
            {"base_options": {"pool": 3}},
            "kvcrush.base_options is not an option: kvcrush takes base, ratio, anchor, level, "
            "share, seed",
        ),
        (
            "kvcrush",
            {"ratios": 0.5},
            "kvcrush.ratios is not an option: kvcrush takes base, ratio, anchor, level, share, "
            "seed",
        ),
        ("int4", {"anchor": "foo"}, "int4.anchor='foo' is not one of random, zeros, ones, mean"),
        ("int4", {"level": "page"}, "int4.level='page' is not token, the only level of packed"),
        ("adakv", {"floor": 1.5}, "adakv.floor=1.5 is not a number from 0 to 1"),
        ("adakv", {"base": "mikv"}, "adakv shares pages out over heads, which tiers of two codecs"),
        ("keepkv", {"threshold": -2}, "keepkv.threshold=-2 is not a number from -1 to 1"),
        ("keepkv", {"base": "h2", "threshold": 1}, "'h2' is not a policy: there are streaming"),
        ("fair", {"fairness": True}, "fair.fairness=True is not a number from 0 to 1"),
        (
            "fair",
            {"base": "kvcrush(level=page)"},
            "fair.base=KVCrush(base=KeyDiff(), ratio=0.25, "
            "anchor='alternate', level='page', share=0.5, seed=0) is not a policy of single tokens",
        ),
        ("snapkv", {"pool": 4}, "snapkv.pool=4 is not an odd whole number, 1 or more"),
        ("snapkv", {"pool": -1}, "snapkv.pool=-1 is not an odd whole number, 1 or more"),
        ("snapkv", {"pool": 7.0}, "snapkv.pool=7.0 is not an odd whole number, 1 or more"),
        ("snapkv", {"pool_kind": "mean"}, "snapkv.pool_kind='mean' is not one of avg, max"),
        ("snapkv", {"reduce": ["mean"]}, "snapkv.reduce=['mean'] is not one of mean, max"),
        ("h2o", {"recent": 1.5}, "h2o.recent=1.5 is not a number from 0 to 1"),
        ("streaming", {"sinks": 4}, "streaming.sinks is not an option: streaming takes none"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        policies.get(name, {name: options})
    assert str(caught.value).removeprefix("--kv-policy-config.").startswith(message)


def test_get_builds_with_options_and_with_none() -> None:
    snapkv = {"snapkv": {"pool": 5, "pool_kind": "avg"}}
    assert policies.get("snapkv", snapkv) == SnapKV(5, "avg")
    assert policies.get("snapkv(pool=5, pool_kind=avg)") == SnapKV(5, "avg")
    # What the policy says itself comes before what the server says.
    assert policies.get("snapkv(pool=3)", snapkv) == SnapKV(3, "avg")
    assert policies.get("kvcrush") == policies.get("kvcrush", {}) == KVCrush(KeyDiff())
    # Wherever a policy stands, the server's options are its own.
    named = policies.get("fair(kvcrush(snapkv))", snapkv)
    assert named == Fair(base=KVCrush(base=SnapKV(5, "avg")))
    based = {"kvcrush": {"base": "h2o", "ratio": 0.5}, "h2o": {"recent": 0.75}}
    assert policies.get("kvcrush", based) == KVCrush(base=H2O(0.75), ratio=0.5)
    assert policies.get("kvcrush(streaming)", based) == KVCrush(base=Streaming(), ratio=0.5)
    assert policies.get("int4", based) == KVCrush(), "an alias has options of its own"
    both_ways = {"kvcrush": {"base": "fair"}, "fair": {"base": "kvcrush"}}
    with pytest.raises(ValueError, match="wraps policies more than 4 deep"):
        policies.get("fair", both_ways)
    with pytest.raises(ValueError, match=r"snapkv wraps no other policy, so not h2o either\.$"):
        policies.get("snapkv(h2o)")


@pytest.mark.parametrize("name", ["none", "snap"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not a policy: there are streaming, lacache"):
        policies.get(name)
    with pytest.raises(ValueError, match=f"'{name}' is not a policy: there are streaming, lacache"):
        policies.get(f"fair({name})")


def test_options_of_policies() -> None:
    assert policies.options_of("streaming") == ()
    assert policies.options_of("int8") == policies.options_of("kvcrush")
    assert policies.options_of("fair") == ("base", "fairness")


@dataclass
class Oldest(Policy):
    """A third party's policy."""

    name: ClassVar[str] = "oldest"

    step: int = 1

    def score(self, view: View) -> Tensor:
        return -self.step * Streaming().score(view)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Returns a function that installs entry points of third parties, name → value."""
    module = ModuleType("third_party")
    module.Oldest = Oldest  # type: ignore[attr-defined]
    module.nothing = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "third_party", module)

    def install(*entries: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, policies.GROUP) for name, value in entries]
        monkeypatch.setattr(policies, "entry_points", lambda group: found)
        policies._third_party.cache_clear()

    yield install
    policies._third_party.cache_clear()


def test_policies_name_codecs_that_pages_have() -> None:
    assert policies.names() == BUILT_IN
    for name in BUILT_IN:
        stored = spec.storage(spec.parse(name))
        assert stored.codecs == PACKED.get(name, ())
        assert set(stored.codecs) <= set(CODECS)
        # What is known without torch is what the classes say.
        assert stored.tiers == policies.get(name).tiers == (name == "mikv")
        if name not in spec.ALIASES:
            assert stored == policies.storage_of(name)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("kvcrush", spec.Storage()),
        ("kvcrush@int8", spec.Storage(("int8",))),
        ("fair(int4)", spec.Storage(("int4",))),
        ("int4(mikv)", spec.Storage(("int4",), tiers=True)),
        ("int4@tc8", spec.Storage(("tc8",))),
        ("int4@raw", spec.Storage()),
        ("fair(mikv)@tc4+tc8", spec.Storage(("tc4", "tc8"), tiers=True)),
        ("fair(adakv)", spec.Storage(pages=True)),
        ("kvcrush(keepkv(h2o))@int8", spec.Storage(("int8",), pages=True)),
    ],
)
def test_storage_is_the_outermost_that_says_something(text: str, stored: spec.Storage) -> None:
    assert spec.storage(spec.parse(text)) == stored


@both
@pytest.mark.parametrize("name", spec.ALIASES)
def test_packed_policies_choose_as_kvcrush_does_by_tokens(name: str) -> None:
    policy, view = policies.get(f"{name}(ratio=0.5)"), make_view()
    crush = KVCrush(ratio=0.5, level="token")
    scores = scores_of(policy, view)
    assert torch.equal(scores, scores_of(crush, view))
    # Any number of tokens, since pages of the region hold no round number of them.
    for keep in (5, 17, 47):
        assert torch.equal(
            slots_of(policy, view, scores, keep), slots_of(crush, view, scores, keep)
        )
    for text in (f"{name}(level=page)", f"fair({name}(level=page))"):
        with pytest.raises(ValueError, match=rf"{name}\.level='page' is not token, the only level"):
            policies.get(text)
    with pytest.raises(ValueError, match=r"kvcrush\.level='page' is not token, the only level"):
        policies.get("kvcrush(level=page)@int8")


def test_a_third_party_policy_is_one_of_the_policies(install: Callable[..., None]) -> None:
    install(("oldest", "third_party:Oldest"))
    assert policies.names() == (*BUILT_IN, "oldest")
    assert policies.get("oldest", {"oldest": {"step": 2}}) == Oldest(2)
    crush = policies.get("kvcrush(oldest(step=3))")
    assert torch.equal(scores_of(crush, make_view()), scores_of(Oldest(3), make_view()))
    assert spec.storage(spec.parse("oldest")) == spec.Storage()
    assert spec.storage(spec.parse("adakv(oldest)")) == spec.Storage(pages=True)


@pytest.mark.parametrize("name", ["snapkv", "none"])
def test_a_third_party_may_not_take_our_names(install: Callable[..., None], name: str) -> None:
    install((name, "third_party:Oldest"))
    with pytest.raises(
        ValueError, match=f"'{name}' of entry point third_party:Oldest has the name"
    ):
        policies.names()


def test_two_third_parties_may_not_share_a_name(install: Callable[..., None]) -> None:
    install(("oldest", "third_party:Oldest"), ("oldest", "other:Oldest"))
    with pytest.raises(ValueError, match=r"other:Oldest and third_party:Oldest both .*'oldest'"):
        policies.get("oldest")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gone", "third_party:Gone", "'gone' of entry point third_party:Gone does not load: Attr"),
        ("gone", "no_such_module:X", "'gone' .* does not load: ModuleNotFoundError"),
        ("nothing", "third_party:nothing", "'nothing' .* is not a subclass of"),
        ("newest", "third_party:Oldest", "'newest' .* must have name = 'newest'"),
    ],
)
def test_a_third_party_policy_that_does_not_load(
    install: Callable[..., None], name: str, value: str, message: str
) -> None:
    install((name, value))
    assert name in policies.names()  # listing loads nothing
    policies.get("snapkv")  # and the others still work
    with pytest.raises(ValueError, match=message):
        policies.get(name)


# Tiers of precision


def marked(slots: range) -> Tensor:
    """Returns a mask of these slots of 48 in each of three heads."""
    where = torch.arange(48)
    return ((where >= slots.start) & (where < slots.stop)).expand(3, -1)


TIERED = ["mikv", "fair(mikv)", "kvcrush(mikv)"]


@sampled(text=TIERED)
@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    keep=st.integers(8, 48),
    finer=st.integers(0, 48),
    first=st.integers(0, 48),
    coarse=st.integers(0, 48),
)
def test_tiers_share_out_what_is_kept(
    text: str, seed: int, keep: int, finer: int, first: int, coarse: int
) -> None:
    policy, view = policies.get(text), make_view(seed=seed)
    finer, coarser = min(finer, keep), range(first, min(48, first + coarse))
    demoted = marked(coarser)
    scores = scores_of(policy, view)
    kept = policy.select(view, scores, each(view, keep))
    high = policy.split(view, scores, kept, each(view, finer), demoted)
    assert high.dtype == torch.bool and high.shape == (3, 48)
    assert high.sum(1).tolist() == [finer] * 3
    assert not bool((high & ~kept).any())
    low = kept & ~high
    assert low.sum(1).tolist() == [keep - finer] * 3
    for h, lo in zip(high.tolist(), low.tolist(), strict=True):
        # Demoted tokens come last: they are finer only if all others are.
        if any(h[slot] for slot in coarser):
            assert all(slot in coarser for slot in range(48) if lo[slot])


@both
def test_the_finer_tier_is_what_the_policy_would_keep() -> None:
    """By MiKV's definition, the important tokens are those that H2O would not evict."""
    policy, view = policies.get("mikv"), make_view()
    scores = scores_of(policy, view)
    everything, finer = marked(range(48)), each(view, 16)
    high = policy.split(view, scores, everything, finer, marked(range(0)))
    assert torch.equal(high, policies.get("h2o").select(view, scores, finer))
    # The demoted are passed over: the choice is made among the others alone.
    high = policy.split(view, scores, everything, finer, marked(range(4, 36)))
    assert ops.mask_slots(high, 16).tolist() == [[*range(4), *range(36, 48)]] * 3
    assert ops.mask_slots(everything & ~high, 32).tolist() == [[*range(4, 36)]] * 3
    for text in ("keepkv(mikv)", "adakv(mikv)"):
        with pytest.raises(ValueError, match="tiers of two codecs do not do yet"):
            policies.get(text)
