"""Eviction policies: one list for the shared contract, then what each does by its paper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_kvcrush import ops, policies
from vllm_kvcrush.codecs import layout
from vllm_kvcrush.policies import Policy, View
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.kvcrush import KVCrush
from vllm_kvcrush.policies.snapkv import SnapKV
from vllm_kvcrush.policies.streaming import Streaming

BUILT_IN = (
    *("streaming", "snapkv", "h2o", "kvcrush"),
    *("int8", "int4", "tc4", "tc6", "tc8", "auto", "mikv"),
)
PACKED = {
    **{name: (name,) for name in ("int8", "int4", "tc4", "tc6", "tc8")},
    "auto": ("int8", "tc4", "tc6", "tc8"),
    "mikv": ("int8", "tc8"),
}

ANCHORS = ["random", "zeros", "ones", "mean", "alternate"]

ALL: list[tuple[str, dict[str, Any]]] = [
    ("streaming", {}),
    ("snapkv", {}),
    ("snapkv", {"pool": 5, "pool_kind": "avg", "reduce": "max"}),
    ("h2o", {}),
    ("h2o", {"recent": 1}),
    ("mikv", {}),
    ("kvcrush", {"base": "streaming"}),
    ("kvcrush", {"base": "h2o", "ratio": 0}),
    *(("kvcrush", {"anchor": a, "level": lv}) for a in ANCHORS for lv in ("token", "page")),
    ("kvcrush", {"ratio": 0.99}),
    ("kvcrush", {"ratio": 0.99, "level": "page"}),
]
every_policy = pytest.mark.parametrize(
    ("name", "options"), ALL, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in ALL]
)


@pytest.fixture(scope="module", autouse=True, params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the policies' operations are made of: plain torch, then C++."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(ops, "_in_cpp", lambda tensor: False)
        yield


def make_view(
    pages: int = 6,
    page: int = 8,
    heads: int = 3,
    group: int = 3,
    sinks: int = 4,
    window: int = 5,
    tail: int = 7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    all_heads: Callable[[Tensor], Tensor] = lambda x: x,
) -> View:
    """A random view; its keys are long enough for clearly uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    m = pages * page

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return View(
        held=ops.LayerKV(3 * randn(heads, m + tail, 16), randn(heads, m + tail, 16)),
        queries=randn(heads * group, window, 16),
        scale=0.25,
        candidates=m,
        sinks=sinks,
        page_size=page,
        running=torch.rand(heads, m, generator=generator),
        layer=0,
        all_heads=all_heads,
    )


def check_slots(slots: Tensor, heads: int, m: int, keep: int, sinks: int) -> None:
    assert slots.dtype == torch.int64
    assert slots.shape == (heads, keep)
    for row in slots.tolist():
        assert row == sorted(set(row))
        assert not row or (row[0] >= 0 and row[-1] < m)
        assert row[: min(sinks, keep)] == list(range(min(sinks, keep)))


# The contract of every policy


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_pages", [1, 2, 5, 6])
def test_selects_as_many_as_asked(
    name: str, options: dict[str, Any], dtype: torch.dtype, keep_pages: int
) -> None:
    policy, view = policies.get(name, options), make_view(dtype=dtype)
    scores = policy.score(view)
    assert scores.shape == (3, 48) and scores.dtype == torch.float32
    slots = policy.select(view, scores, keep_pages * 8)
    check_slots(slots, 3, 48, keep_pages * 8, view.sinks)


@every_policy
@pytest.mark.parametrize("sinks", [0, 1, 8, 11, 16, 30])
@pytest.mark.parametrize("page", [4, 16])
def test_sinks_stay(name: str, options: dict[str, Any], sinks: int, page: int) -> None:
    view = make_view(pages=48 // page, page=page, sinks=sinks, group=1)
    # The least wanted slots are the first ones: only protection keeps them.
    keys, queries = view.keys.clone(), view.queries
    assert queries is not None
    keys[:, :sinks] = -3 * queries.mean(1, keepdim=True)
    view = replace(view, held=ops.LayerKV(keys), running=torch.zeros(3, 48))
    policy = policies.get(name, options)
    check_slots(policy.select(view, policy.score(view), 16), 3, 48, 16, sinks)


@every_policy
def test_same_view_same_choice_and_untouched(name: str, options: dict[str, Any]) -> None:
    policy, view = policies.get(name, options), make_view()
    tensors = (view.keys, view.values, view.queries, view.running)
    before = [t.clone() for t in tensors if t is not None]
    scores = policy.score(view)
    kept = scores.clone()
    first, second = policy.select(view, scores, 16), policy.select(view, scores, 16)
    assert torch.equal(first, second) and torch.equal(scores, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True) if b is not None)


@every_policy
def test_takes_only_what_it_says_it_needs(name: str, options: dict[str, Any]) -> None:
    policy, view = policies.get(name, options), make_view()
    assert policy.needs <= {"queries", "running"}
    unused: dict[str, Any] = dict.fromkeys({"queries", "running"} - policy.needs)
    view = replace(view, held=ops.LayerKV(view.keys), **unused)
    scores = policy.score(view)
    policy.select(view, scores, 16)
    running = policy.running(view, scores)
    assert (running is not None) == ("running" in policy.needs)
    assert running is None or (running.shape == (3, 48) and running.dtype == torch.float32)


@every_policy
def test_broken_numbers_do_not_break_the_count(name: str, options: dict[str, Any]) -> None:
    view = make_view()
    keys = view.keys.clone()
    keys[0, 20] = torch.nan
    keys[1, 21] = torch.inf
    policy, view = policies.get(name, options), replace(view, held=ops.LayerKV(keys))
    check_slots(policy.select(view, policy.score(view), 16), 3, 48, 16, view.sinks)


@every_policy
def test_stays_on_the_device_of_the_view(name: str, options: dict[str, Any]) -> None:
    # "meta" refuses to mix with the CPU and has no data: a copy from or to the device would fail.
    view, policy = make_view(), policies.get(name, options)
    moved = {f: getattr(view, f).to("meta") for f in ("queries", "running")}
    view = replace(view, held=ops.LayerKV(view.keys.to("meta")), **moved)
    slots = policy.select(view, policy.score(view), 16)
    assert slots.device.type == "meta" and slots.shape == (3, 16)


def test_no_policy_needs_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from vllm_kvcrush import policies; "
    code += "[policies.get(name) for name in policies.names()]"
    subprocess.run([sys.executable, "-c", code], check=True)


# StreamingLLM


@pytest.mark.parametrize("keep", [8, 16, 40, 48])
@pytest.mark.parametrize("sinks", [0, 4, 20])
def test_streaming_keeps_sinks_and_the_newest(sinks: int, keep: int) -> None:
    view, policy = make_view(sinks=sinks), Streaming()
    scores = policy.score(view)
    slots = policy.select(view, scores, keep)
    first = min(sinks, keep)
    assert slots.tolist() == [[*range(first), *range(48 - keep + first, 48)]] * 3
    assert torch.equal(slots, Policy.select(policy, view, scores, keep))


# SnapKV


def weights_of(view: View) -> list[list[list[float]]]:
    assert view.queries is not None
    return ops.window_attention(view.queries, view.keys, view.scale).tolist()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("pool", "kind"), [(1, "max"), (7, "max"), (5, "avg")])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_snapkv_score(group: int, pool: int, kind: str, reduce: str) -> None:
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


def test_snapkv_keeps_what_the_window_looks_at() -> None:
    view = make_view(heads=2, group=1, sinks=0)
    assert view.queries is not None
    keys = torch.zeros_like(view.keys)
    keys[0, 20] = 5 * view.queries[0].mean(0)
    keys[1, 33] = 5 * view.queries[1].mean(0)
    view = replace(view, held=ops.LayerKV(keys))
    policy = SnapKV(pool=3)
    slots = policy.select(view, policy.score(view), 8).tolist()
    assert {19, 20, 21} <= set(slots[0]) and {32, 33, 34} <= set(slots[1])
    assert not {32, 33, 34} & set(slots[0])


# H2O


def test_h2o_adds_the_windows_column_sums_to_the_running_scores() -> None:
    view = make_view(pages=3, heads=2, group=3)
    assert view.running is not None
    weights, policy = weights_of(view), H2O()
    scores = policy.score(view)
    for head in range(2):
        for j in range(24):
            group = range(3 * head, 3 * head + 3)
            want = view.running[head, j].item()
            want += sum(row[j] for q in group for row in weights[q]) / 3
            assert scores[head, j].item() == pytest.approx(want, rel=1e-4)
    assert torch.equal(policy.running(view, scores), scores)


@pytest.mark.parametrize("keep", [8, 16, 32])
@pytest.mark.parametrize("sinks", [0, 3, 13])
@pytest.mark.parametrize("recent", [0, 0.3, 0.5, 1.0])
def test_h2o_splits_its_budget(recent: float, sinks: int, keep: int) -> None:
    view = make_view(sinks=sinks)
    generator = torch.Generator().manual_seed(keep)
    scores = torch.randint(0, 9, (3, 48), generator=generator).float()
    first = min(sinks, keep)
    newest = min(int(recent * keep), keep - first)
    for row, got in zip(scores.tolist(), H2O(recent).select(view, scores, keep), strict=True):
        chosen = {*range(first), *range(48 - newest, 48)}
        rest = sorted(set(range(48)) - chosen, key=lambda i: (-row[i], i))
        chosen.update(rest[: keep - len(chosen)])
        assert got.tolist() == sorted(chosen)


def test_infinite_scores_do_not_displace_protected_slots() -> None:
    view = make_view(sinks=0)
    scores = torch.full((3, 48), torch.inf)
    assert H2O(0.5).select(view, scores, 8).tolist() == [[0, 1, 2, 3, 44, 45, 46, 47]] * 3


# KVCrush


def slow_kvcrush(
    policy: KVCrush, scores: list[list[float]], bits: list[list[bool]], view: View, keep: int
) -> list[list[int]]:
    """KVCrush by its definition, unit by unit. `scores` are one rank's, `bits` all ranks'."""
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


@pytest.mark.parametrize("level", ["token", "page"])
@pytest.mark.parametrize("anchor", ANCHORS)
@settings(deadline=None, max_examples=60)
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
    got = policy.select(view, scores, keep)
    bits = slow_bits(everyone.tolist(), policy.share)
    assert got.tolist() == slow_kvcrush(policy, scores.tolist(), bits, view, keep)


def test_kvcrush_by_hand() -> None:
    # One sink, 8 tokens, keep 4 = 2 important + 2 representatives; bits: the better 4 of a head.
    scores = torch.tensor([[0.0, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 0]])
    # bits of head 0:      0   1  1  1  1  0  0  0,    of head 1: 0 0 0 1 1 1 1 0
    # distance to (0, 1):  1   2  2  1  1  0  0  1
    view = make_view(pages=2, page=4, heads=2, group=1, sinks=1)
    slots = KVCrush(ratio=0.5).select(view, scores, 4)
    # Head 0 keeps 0 and 1; the others in order: 5 6 3 | 4 7 2. Head 1 keeps 0 and 6: 5 3 4 | 7 1 2.
    assert slots.tolist() == [[0, 1, 4, 5], [0, 5, 6, 7]]


def test_kvcrush_pages_by_hand() -> None:
    # Pages of 2 with the bits of head 0, then of head 1; anchor 0101.
    scores = torch.tensor(
        [[9.0, 8, 7, 0, 1, 6, 0, 0, 0, 5], [0.0, 0, 9, 0, 8, 7, 0, 6, 0, 5]],
    )
    # bits 11 10 01 00 01 | 00 10 11 01 01, so that the pages are 1100 1010 0111 0001 0101 with
    # distances 2, 4, 1, 1, 0; totals 17 7 7 0 5 and 0 9 15 6 5.
    view = make_view(pages=5, page=2, heads=2, group=1, sinks=0)
    slots = KVCrush(ratio=0.67, level="page").select(view, scores, 6)
    # Head 0 keeps page 0 and two of 4 2 | 3 1; head 1 keeps page 2 and two of 4 3 | 0 1.
    assert slots.tolist() == [[0, 1, 6, 7, 8, 9], [0, 1, 4, 5, 8, 9]]


def test_each_head_leaves_out_its_own_important_tokens() -> None:
    # All that is not important is a representative here: a head that left out another head's
    # important tokens instead of its own would run short or keep one twice.
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(4, 48, generator=generator)
    view = make_view(heads=4, group=1, sinks=0)
    for anchor in ANCHORS:
        slots = KVCrush(ratio=0.5, anchor=anchor).select(view, scores, 48)
        assert slots.tolist() == [list(range(48))] * 4


def test_heads_choose_for_themselves() -> None:
    view, policy = make_view(), KVCrush()
    slots = policy.select(view, policy.score(view), 16).tolist()
    assert slots[0] != slots[1] and slots[1] != slots[2]
    same = policy.score(view)[:1].repeat(3, 1)
    slots = policy.select(view, same, 16).tolist()
    assert slots[0] == slots[1] == slots[2]


def test_ratio_zero_is_the_base() -> None:
    view, base = make_view(), SnapKV()
    scores = base.score(view)
    crush = KVCrush(ratio=0)
    assert torch.equal(crush.score(view), scores)
    assert torch.equal(crush.select(view, scores, 16), base.select(view, scores, 16))


@pytest.mark.parametrize("keep", [8, 16, 32, 40])
def test_the_budget_is_total(keep: int) -> None:
    view, crush = make_view(), KVCrush(ratio=0.25)
    scores = crush.score(view)
    important = SnapKV().select(view, scores, keep - keep // 4).tolist()
    for chosen, own in zip(crush.select(view, scores, keep).tolist(), important, strict=True):
        assert set(own) < set(chosen) and len(chosen) == keep


@pytest.mark.parametrize("level", ["token", "page"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_tensor_parallel_ranks_choose_as_one_would(anchor: str, level: str) -> None:
    whole, policy = make_view(heads=4, seed=8), KVCrush(anchor=anchor, level=level, ratio=0.5)
    assert whole.queries is not None and whole.running is not None
    want = policy.select(whole, policy.score(whole), 24)
    halves = [
        replace(
            whole,
            held=ops.LayerKV(whole.keys[2 * rank : 2 * rank + 2]),
            queries=whole.queries[6 * rank : 6 * rank + 6],
            running=whole.running[2 * rank : 2 * rank + 2],
        )
        for rank in range(2)
    ]
    scores = [policy.score(half) for half in halves]
    bits = [ops.keep_bits(s, policy.share) for s in scores]
    got = []
    for rank in range(2):

        def gather(mine: Tensor, rank: int = rank) -> Tensor:
            assert torch.equal(mine, bits[rank])
            return torch.cat(bits)

        view = replace(halves[rank], all_heads=gather)
        got.append(policy.select(view, scores[rank], 24))
    assert torch.equal(torch.cat(got), want)


def test_kvcrush_passes_the_base_on() -> None:
    crush = KVCrush(base="h2o", base_options={"recent": 0.25})
    view = make_view()
    assert crush.needs == {"queries", "running"}
    assert torch.equal(crush.score(view), H2O().score(view))
    running = crush.running(view, crush.score(view))
    assert running is not None and torch.equal(running, H2O().score(view))
    assert KVCrush(base="streaming").needs == frozenset()


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
        ("kvcrush", {"base": "kvcrush"}, "kvcrush.base='kvcrush' is not one of streaming, snapkv"),
        ("kvcrush", {"base": "none"}, "kvcrush.base='none' is not one of streaming, snapkv"),
        (
            "kvcrush",
            {"base_options": [7]},
            "kvcrush.base_options=[7] is not an object with options of snapkv",
        ),
        (
            "kvcrush",
            {"base_options": {"pool": 2}},
            "kvcrush.base_options.pool=2 is not an odd whole number, 1 or more",
        ),
        (
            "kvcrush",
            {"base": "h2o", "base_options": {"pool": 3}},
            "kvcrush.base_options.pool is not an option: h2o takes recent",
        ),
        (
            "kvcrush",
            {"ratios": 0.5},
            "kvcrush.ratios is not an option: kvcrush takes base, base_options, ratio, anchor, "
            "level, share, seed",
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
        policies.get(name, options)
    assert str(caught.value).startswith(f"--kv-policy-config.{message}")


def test_get_builds_with_options_and_with_none() -> None:
    assert policies.get("snapkv", {"pool": 5, "pool_kind": "avg"}) == SnapKV(5, "avg")
    assert policies.get("kvcrush") == policies.get("kvcrush", {}) == KVCrush()


@pytest.mark.parametrize("name", ["none", "snap", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not a policy: there are streaming, snapkv"):
        policies.get(name)


@dataclass
class Oldest(Policy):
    """A third party's policy."""

    name: ClassVar[str] = "oldest"

    step: int = 1

    def score(self, view: View) -> Tensor:
        return -self.step * Streaming().score(view)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs entry points of third parties, name → value."""
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
    for name in BUILT_IN:
        assert policies.codecs(name) == policies.get(name).codecs == PACKED.get(name, ())
        assert set(policies.codecs(name)) <= set(layout.CODECS)


@pytest.mark.parametrize("name", [name for name in PACKED if name != "mikv"])
def test_packed_policies_choose_as_kvcrush_does_by_tokens(name: str) -> None:
    policy, view = policies.get(name, {"ratio": 0.5}), make_view()
    crush = KVCrush(ratio=0.5, level="token")
    scores = policy.score(view)
    assert torch.equal(scores, crush.score(view))
    # Any number of tokens: pages of the region hold no round one.
    for keep in (5, 17, 47):
        assert torch.equal(policy.select(view, scores, keep), crush.select(view, scores, keep))
    with pytest.raises(ValueError, match=rf"{name}\.level='page' is not token, the only level"):
        policies.get(name, {"level": "page"})


def test_a_third_party_policy_is_one_of_the_policies(install: Callable[..., None]) -> None:
    install(("oldest", "third_party:Oldest"))
    assert policies.names() == (*BUILT_IN, "oldest")
    assert policies.get("oldest", {"step": 2}) == Oldest(2)
    crush = policies.get("kvcrush", {"base": "oldest", "base_options": {"step": 3}})
    assert torch.equal(crush.score(make_view()), Oldest(3).score(make_view()))
    assert policies.codecs("oldest") == ()


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


def marked(slots: range) -> torch.Tensor:
    """These slots of 48 in each of three heads."""
    where = torch.arange(48)
    return ((where >= slots.start) & (where < slots.stop)).expand(3, -1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    keep=st.integers(8, 48),
    finer=st.integers(0, 48),
    first=st.integers(0, 48),
    coarse=st.integers(0, 48),
)
def test_tiers_share_out_what_is_kept(
    seed: int, keep: int, finer: int, first: int, coarse: int
) -> None:
    policy, view = policies.get("mikv"), make_view(seed=seed)
    finer, coarser = min(finer, keep), range(first, min(48, first + coarse))
    demoted = marked(coarser)
    scores = policy.score(view)
    kept = policy.select(view, scores, keep)
    high, low = policy.split(view, scores, kept, finer, demoted)
    assert high.shape == (3, finer) and low.shape == (3, keep - finer)
    for h, lo, all_ in zip(high.tolist(), low.tolist(), kept.tolist(), strict=True):
        assert h == sorted(h) and lo == sorted(lo)
        assert sorted(h + lo) == all_
        # Demoted tokens come last: they are finer only if all others are.
        if any(slot in coarser for slot in h):
            assert all(slot in coarser for slot in lo)


def test_the_finer_tier_is_what_the_policy_would_keep() -> None:
    """MiKV's definition: the important tokens are those that H2O would not evict."""
    policy, view = policies.get("mikv"), make_view()
    scores = policy.score(view)
    everything = torch.arange(48).expand(3, -1)
    high, _ = policy.split(view, scores, everything, 16, marked(range(0)))
    assert torch.equal(high, policies.get("h2o").select(view, scores, 16))
    # The demoted are passed over: the choice is made among the others alone.
    high, low = policy.split(view, scores, everything, 16, marked(range(4, 36)))
    assert high.tolist() == [[*range(4), *range(36, 48)]] * 3
    assert low.tolist() == [[*range(4, 36)]] * 3
