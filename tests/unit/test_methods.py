"""Each scoring method against its formulas in float64 (`methods_oracle`), on fresh random tensors,
and what all of them must do whatever the numbers."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit import methods_oracle as oracle
from tests.unit.views import alone, each, make_view, ragged, scored, slots_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.policies import OptionError, Policy, View, queries
from vllm_kvcrush.policies.choice import PolicyFailure, choose, dry_run
from vllm_kvcrush.policies.expected_attention import ExpectedAttention
from vllm_kvcrush.policies.lacache import LaCache
from vllm_kvcrush.policies.rerotate import ReRotate

FRAMES = ((3, 11), (12, 20), (20, 28), (30, 38), (41, 56))
Oracle = Callable[[oracle.Head], Any]

# By method, with hyperparameters unlike the defaults: what the oracle says of one head.
METHODS: dict[str, Oracle] = {
    "knorm": oracle.knorm,
    "keydiff": oracle.keydiff,
    "lagkv(lag=9)": lambda head: oracle.lagkv(head, 9),
    "lagkv": lambda head: oracle.lagkv(head, 128),
    "expected_attention": lambda head: oracle.expected_attention(head, 512, True, True, 0.0),
    "expected_attention(future=7, epsilon=0.25)": (
        lambda head: oracle.expected_attention(head, 7, True, True, 0.25)
    ),
    "expected_attention(covariance=false, value_norm=false)": (
        lambda head: oracle.expected_attention(head, 512, False, False, 0.0)
    ),
    "gkv": lambda head: oracle.gkv(head, 0.8, 0.5, 0.5)[0],
    "gkv(decay=0.5, weight=0.2, threshold=0.3)": (lambda head: oracle.gkv(head, 0.5, 0.2, 0.3)[0]),
    "rkv": lambda head: oracle.rkv(head, 0.1, 7, 0.5),
    "rkv(weight=0.6, pool=3, threshold=0.2)": lambda head: oracle.rkv(head, 0.6, 3, 0.2),
    "critic": lambda head: oracle.critic(head, 0.5, 0.25, 0.25),
    "critic(attention=1, entropy=2, gradient=0)": lambda head: oracle.critic(head, 1, 2, 0),
    "critic(attention=0, entropy=0, gradient=1)": lambda head: oracle.critic(head, 0, 0, 1),
    "gui_kv": lambda head: oracle.gui_kv(head, 2.0, 3.5, 0.75, 32, 5),
    "gui_kv(saliency=0.5, temperature=0.7, redundant=0.4, rank=5, pool=1)": (
        lambda head: oracle.gui_kv(head, 0.5, 0.7, 0.4, 5, 1)
    ),
    "kvzip": oracle.kvzip,
}
SPANNED = ("gui_kv", "infinipot")
# Everything new, for what holds of every policy.
ALL = [
    *METHODS,
    *("tova", "infinipot", "infinipot(newest=0.5, redundancy=0)", "lacache"),
    *("lacache(span=2, overlap=1)", "rerotate", "rerotate(keepkv(threshold=0.1))"),
]
WRAPPED = ["kvcrush({})", "fair({})", "fair(kvcrush({}))", "adakv({})", "keepkv({})"]


@pytest.fixture
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    return value


def example(seed: int, counts: list[int] | None = None, **more: Any) -> View:
    """Returns a view after an earlier compaction: gaps in the positions, a running state, and log
    biases. Neighbouring keys are alike, so that some are redundant."""
    draw = torch.Generator().manual_seed(seed)
    view = make_view(seed=seed, **more)
    keys = view.keys + 0.7 * view.keys.roll(1, 1) + view.keys.roll(7, 1)
    m, heads = view.candidates, view.num_kv_heads
    old = torch.rand(heads, 2 * m, generator=draw)[:, : m + 5].argsort(1)[:, :m].sort(1).values
    view = replace(
        view,
        held=ops.LayerKV(keys, view.values, log_bias=torch.randn(heads, m, generator=draw)),
        state={name: torch.rand(heads, m, generator=draw) for name in ("global", "greatest")},
        known=(torch.arange(m) < m - 16).expand(heads, -1),
        true_positions=old.int(),
        computed=m + 5 + keys.shape[1] - m,
    )
    view = replace(view, log_bias=view.held.log_bias)  # type: ignore[attr-defined]
    return view if counts is None else ragged(view, counts)


def heads_of(view: View) -> Iterator[oracle.Head]:
    """Yields what each head of a view holds, in float64."""
    assert view.queries is not None and view.values is not None and view.rope is not None
    for index in range(view.num_kv_heads):
        own = alone(view, index)
        m, n = own.candidates, own.keys.shape[1]
        assert own.queries is not None and own.values is not None
        where = own.positions[0].tolist()
        yield oracle.Head(
            keys=own.keys[0].double().numpy(),
            values=own.values[0].double().numpy(),
            queries=own.queries.double().numpy(),
            m=m,
            sinks=view.sinks,
            scale=view.scale,
            positions=[*where, *range(view.computed - (n - m), view.computed)],
            spans=view.spans,
            computed=view.computed,
            frequencies=view.rope.frequencies.numpy(),
            state={name: x[0].double().numpy() for name, x in own.state.items()},
            bias=None if own.log_bias is None else own.log_bias[0].double().numpy(),
            known=None if own.known is None else own.known[0].tolist(),
            repeated=None if own.repeated is None else own.repeated[0].double().numpy(),
        )


@pytest.mark.parametrize("counts", [None, [48, 31, 40]], ids=["equal", "unequal"])
@pytest.mark.parametrize("text", METHODS)
def test_scores_are_those_of_the_formulas(text: str, counts: list[int] | None, seed: int) -> None:
    view = example(seed, counts)
    if text.startswith(SPANNED):
        view = replace(view, spans=FRAMES)
    scores, state = scored(policies.get(text), view)
    for index, head in enumerate(heads_of(view)):
        want = torch.from_numpy(np.array(METHODS[text](head)))
        got = scores[index, : head.m].double()
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
        if text.startswith("gkv"):
            options = (0.5, 0.2, 0.3) if "decay" in text else (0.8, 0.5, 0.5)
            (_, kept) = oracle.gkv(head, *options)
            torch.testing.assert_close(
                state["global"][index, : head.m].double(),
                torch.from_numpy(kept),
                rtol=2e-4,
                atol=2e-5,
            )


def test_the_first_compaction_has_no_state(seed: int) -> None:
    view = replace(example(seed), state={}, known=None)
    scores, _ = scored(policies.get("gkv"), view)
    for index, head in enumerate(heads_of(view)):
        want, _ = oracle.gkv(head, 0.8, 0.5, 0.5)
        torch.testing.assert_close(
            scores[index].double(), torch.from_numpy(want), rtol=2e-4, atol=2e-5
        )


@pytest.mark.parametrize("text", ["gui_kv", "infinipot"])
def test_frames_that_do_not_exist_yet_count_for_nothing(text: str, seed: int) -> None:
    view = replace(example(seed), spans=FRAMES)
    more = replace(view, spans=(*FRAMES, (view.computed, view.computed + 50)))
    policy = policies.get(text)
    assert torch.equal(scored(policy, view)[0], scored(policy, more)[0])


def test_tova_takes_the_mean_over_all_heads(seed: int) -> None:
    view, policy = example(seed), policies.get("tova")
    want = torch.from_numpy(oracle.tova(list(heads_of(view))))
    scores, _ = scored(policy, view)
    torch.testing.assert_close(scores.double(), want.expand(3, -1), rtol=2e-4, atol=2e-5)
    assert len({tuple(row) for row in slots_of(policy, view, scores, 16).tolist()}) == 1
    # Those of other ranks count too, and heads that hold other tokens than these do not.
    other = torch.rand(2, 48)
    seen = replace(view, all_heads=lambda x: torch.cat((x, other)))
    mixed = (3 * want + other.sum(0)) / 5
    got = scored(policy, seen)[0].double()
    torch.testing.assert_close(got, mixed.double().expand(3, -1), rtol=2e-4, atol=2e-5)
    uneven = example(seed, [48, 31, 40])
    scores, _ = scored(policy, uneven)
    for index, head in enumerate(heads_of(uneven)):
        want = torch.from_numpy(oracle.tova([head]))
        got = scores[index, : head.m].double()
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("spans", [(), FRAMES], ids=["text", "frames"])
@pytest.mark.parametrize("counts", [None, [48, 31, 40]], ids=["equal", "unequal"])
@pytest.mark.parametrize(("newest", "share"), [(0.25, 0.5), (0.5, 0.75), (0.0, 0.0), (1.0, 1.0)])
def test_infinipot_takes_turns(
    spans: Any, counts: list[int] | None, newest: float, share: float, seed: int
) -> None:
    view = replace(example(seed, counts, sinks=0), spans=spans)
    policy = policies.get(f"infinipot(newest={newest}, redundancy={share})")
    keep = [n // 2 for n in view.sizes.tolist()]
    slots = slots_of(policy, view, scored(policy, view)[0], keep)
    for head, row, count in zip(heads_of(view), slots.tolist(), keep, strict=True):
        assert row[:count] == oracle.infinipot(head, count, newest, share)


def test_a_channel_without_range_tells_lagkv_nothing(seed: int) -> None:
    view, policy = make_view(seed=seed), policies.get("lagkv(lag=8)")
    assert view.values is not None
    keys = view.keys.clone()
    keys[:, 20:28, 3] = 7.0
    scores, _ = scored(policy, replace(view, held=ops.LayerKV(keys, view.values)))
    assert bool(scores.isfinite().all())
    # Of a partition every place is there once.
    for start in range(4, 36, 8):
        places = scores[:, start : start + 8].sort(1).values
        torch.testing.assert_close(places, (torch.arange(8) / 8).expand(3, -1))


# LaCache


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_lacache_is_a_ladder_with_a_cursor(data: st.DataObject) -> None:
    """Over several compactions, each layer holds what a list with a cursor holds."""
    layers = data.draw(st.integers(2, 12))
    span = data.draw(st.integers(1, layers - 1))
    overlap = data.draw(st.integers(0, span - 1))
    policy, sinks = LaCache(span, overlap), data.draw(st.integers(0, 5))
    layer = data.draw(st.integers(0, layers - 1))
    before, after = policy.ladder(layers)
    ladder = oracle.Ladder(layer, layers, before, after, sinks)
    tokens: list[int] = []
    turns = torch.zeros(2, 0)
    keep = sinks + layers + before * data.draw(st.integers(2, 12))
    computed = 0
    for again in range(data.draw(st.integers(1, 5))):
        new = data.draw(st.integers(1, 40) if again else st.integers(keep, 4 * keep))
        old, m = len(tokens), len(tokens) + new
        ladder.compact(new, min(keep, m))
        tokens += range(computed, computed + new)
        computed += new
        view = replace(
            make_view(m, 1, 2, 1, sinks, window=1, tail=1, size=4),
            layer=layer,
            layers=layers,
            state={"turn": torch.nn.functional.pad(turns, (0, new))} if again else {},
            known=(torch.arange(m) < old).expand(2, -1),
        )
        scores, state = scored(policy, view)
        slots = slots_of(policy, view, scores, min(keep, m))
        assert slots[0].tolist() == slots[1].tolist()
        tokens = [tokens[slot] for slot in slots[0].tolist()]
        assert tokens == ladder.tokens
        turns = state["turn"].gather(1, slots)


def test_ladders_of_the_paper() -> None:
    assert LaCache(16, 0).ladder(32) == (2, 1)  # even layers keep even tokens
    assert LaCache(9, 3).ladder(32) == (5, 2)  # the recipe for a quarter
    assert LaCache().ladder(8) == (2, 1) and LaCache().ladder(1) == (2, 1)


def test_layers_keep_other_tokens(seed: int) -> None:
    view, policy = replace(make_view(seed=seed), state={}, known=None, layers=4), LaCache(2)
    kept = []
    for layer in range(4):
        own = replace(view, layer=layer)
        kept.append(set(slots_of(policy, own, scored(policy, own)[0], 28)[0].tolist()))
    assert kept[0] == kept[2] and kept[1] == kept[3] and kept[0] != kept[1]
    # Of each pair after the sinks one layer keeps the first, the next one the other.
    assert (kept[0] | kept[1]) == set(range(48))


# Re-rotated sinks


@pytest.mark.parametrize("text", ["d2o", "keepkv", "cam"])
def test_nothing_is_merged_into_what_a_request_protects(seed: int, text: str) -> None:
    view = make_view(seed=seed)
    m, policy = view.candidates, policies.get(text)
    assert view.values is not None
    values = view.values.clone()
    # All keys are so alike that dropped tokens go to whichever is next.
    held = replace(view.held, keys=view.keys[:, :1] + view.keys * 1e-3, values=values)
    view = replace(view, held=held, state={"attention": torch.rand(3, m)})
    protected = (torch.arange(m) % 3 == 0).expand(3, -1)
    touched = []
    for mask in (protected, torch.zeros_like(protected)):
        now = replace(view, protected=mask)
        kept = protected | (torch.arange(m) % 3 == 1)
        merged = policy.merge(now, torch.rand(3, m), kept)
        same = (merged.keys == now.keys[:, :m]).all(2) & (merged.values == values[:, :m]).all(2)
        if merged.log_bias is not None:
            same &= merged.log_bias.abs() < 1e-5
        assert same[protected & mask].all()
        touched.append(int((~same & kept).sum()))
    assert min(touched) > 0


def test_sinks_are_rotated_to_the_first_other_token(seed: int) -> None:
    """Over two compactions, and with tokens that a request protects."""
    view = replace(make_view(seed=seed), state={}, known=None)
    rope, policy = view.rope, ReRotate()
    assert rope is not None
    plain = view.keys[:, :4].double()
    for protected in (None, 9):
        where = view.positions
        held, known, computed = view.held, None, view.computed
        for keep in (24, 12):
            staying = where < 4 if protected is None else (where < 4) | (where == protected)
            m = where.shape[1]
            now = replace(
                view,
                held=held,
                candidates=m,
                known=known,
                protected=staying,
                true_positions=where,
                computed=computed,
            )
            kept = policy.select(now, scored(policy, now)[0], each(now, keep))
            merged = policy.merge(now, torch.zeros(3, m), kept)
            slots = ops.mask_slots(kept, keep)
            where = where.gather(1, slots)
            first = where[:, 4:5]
            assert first[0].item() == protected or protected is None
            want = rope.rotate(plain, (first - 4).expand(-1, 4))
            got = merged.keys.gather(1, slots.unsqueeze(2).expand(-1, -1, 16))
            torch.testing.assert_close(got[:, :4].double(), want, rtol=1e-4, atol=1e-4)
            others = now.keys[:, :m].gather(1, slots.unsqueeze(2).expand(-1, -1, 16))[:, 4:]
            torch.testing.assert_close(got[:, 4:], others)
            # The next compaction finds them and the tail's tokens, which are candidates now.
            tail = now.keys[:, m:]
            more = torch.arange(computed - tail.shape[1], computed, dtype=torch.int32)
            where = torch.cat((where, more.expand(3, -1)), 1)
            known = (torch.arange(where.shape[1]) < keep).expand(3, -1)
            fresh = torch.randn(3, 7, 16)
            keys = torch.cat((got, tail, fresh), 1)
            held = ops.LayerKV(keys, torch.randn_like(keys))
            computed += 7


def test_a_model_whose_rotations_are_not_known_is_refused() -> None:
    for text in ("rerotate", "expected_attention", "kvcrush(expected_attention)"):
        with pytest.raises(PolicyFailure, match="rotary embedding, which is of an unknown kind"):
            dry_run(policies.get(text), with_rope=False)
    dry_run(policies.get("keydiff"), with_rope=False)


def test_query_statistics_of_a_file_are_used_as_the_windows_are(
    seed: int, tmp_path: pathlib.Path
) -> None:
    """With a file of the window's own statistics the scores are those without a file, on each rank
    with its own heads'."""
    view = example(seed, [48, 31, 40])
    assert view.queries is not None and view.rope is not None
    window = view.queries.shape[1]
    at = torch.arange(view.computed - window, view.computed)
    plain = view.rope.rotate(view.queries.double(), -at)
    mean = plain.mean(1)
    apart = plain - mean.unsqueeze(1)
    other = torch.randn_like(mean)  # of another layer and another rank
    mean = torch.stack((other.repeat(2, 1), torch.cat((other, mean))))
    spread = (apart.mT @ apart / window).repeat(2, 1, 1).expand(2, -1, -1, -1)
    path = str(tmp_path / "queries.safetensors")
    queries.save(path, "", "", queries.of_moments(mean, spread, 6))
    for more in ({}, {"covariance": False}, {"future": 9, "epsilon": 0.5}):
        with_file = ExpectedAttention(statistics=path, **more)  # type: ignore[arg-type]
        own = replace(view, layer=1, first_head=3, queries=None)
        got, want = scored(with_file, own)[0], scored(ExpectedAttention(**more), view)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_files_that_are_no_query_statistics_are_refused(tmp_path: pathlib.Path) -> None:
    from safetensors.torch import save_file

    mean, spread = torch.zeros(2, 4, 8), torch.eye(8).expand(2, 4, 8, 8)
    good = queries.of_moments(mean, spread, 2)
    path = tmp_path / "file"

    def refused(problem: str) -> None:
        with pytest.raises(OptionError, match=f"a file of query statistics: it {problem}"):
            ExpectedAttention(statistics=str(path))

    refused("cannot be read")
    path.write_text("{}")
    refused("cannot be read")
    save_file({"mean": mean}, path)
    refused("is not a file of `vllm-kvcrush calibrate --queries`")
    for bad in (
        good._replace(kv_heads=3),
        good._replace(mean=mean[:1]),
        good._replace(mean=mean / 0),
        good._replace(deviations=good.deviations[..., :4].contiguous()),
    ):
        queries.save(path, "", "", bad)
        refused("has no means and deviations of queries by layer and head")
    queries.save(path, "", "", good)
    assert ExpectedAttention(statistics=str(path)).made_for == (2, 2)
    with pytest.raises(OptionError, match="is not a path"):
        ExpectedAttention(statistics=3)  # type: ignore[arg-type]


def test_mean_rotation_is_the_mean_of_rotations(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rope = Rope(torch.cat((torch.zeros(1), torch.rand(7, generator=draw))).double())
    x = torch.randn(3, 5, 16, generator=draw, dtype=torch.float64)
    first = torch.randint(0, 900, (5,), generator=draw)
    want = torch.stack([rope.rotate(x, first + j) for j in range(37)]).mean(0)
    torch.testing.assert_close(rope.averaged(x, first, 37), want)


# Shared mathematics


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_redundancy_is_its_definition(data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, 150)) for _ in range(2)]
    threshold = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.9]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    keys = torch.randn(2, 150, 6, generator=draw, dtype=torch.float64)
    got = ops.redundancy(keys, counts, threshold)
    for index, n in enumerate(counts):
        unit = torch.nn.functional.normalize(keys[index, :n], dim=1)
        matrix = unit @ unit.T
        matrix.fill_diagonal_(0.0)
        for i in range(n):
            similar = (matrix[i] > threshold).nonzero().flatten().tolist()
            similar = [j for j in similar if j != i]
            if similar:
                matrix[i, similar[-1]] = 0.0
        torch.testing.assert_close(got[index, :n], matrix.mean(0) if n else got[index, :0])
        assert not bool(got[index, n:].any())


def test_ranks_and_scales_by_hand() -> None:
    x = torch.tensor([[3.0, 1, 3, 2, 9], [5, 5, 5, 7, 0]])
    assert ops.ranks(x).tolist() == [[1, 4, 2, 3, 0], [1, 2, 3, 0, 4]]
    valid = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2])
    assert ops.min_max(x, valid).tolist() == [[1, 0, 1, 0.5, 0], [0, 0, 0, 0, 0]]
    assert ops.decayed_max(None, x, 0.5) is x
    assert ops.decayed_max(torch.full_like(x, 8), x, 0.5)[0].tolist() == [4, 4, 4, 4, 9]


# What holds of every method


def spanned(text: str, view: View) -> View:
    return replace(view, spans=FRAMES if policies.get(text).uses_spans else ())


@pytest.mark.parametrize("wrapper", ["{}", *WRAPPED])
@pytest.mark.parametrize("text", ALL)
def test_wrapped_or_not_what_stays_is_sound(text: str, wrapper: str, seed: int) -> None:
    """Exact counts of unequal heads, protected tokens stay, and the same view gives the same
    choice."""
    name = wrapper.format(text)
    if wrapper.startswith("keepkv") and policies.get(text).merges:
        with pytest.raises(policies.OptionError, match="take one of them"):
            policies.get(name)
        return
    policy = policies.get(name)
    draw = random.Random(seed)
    counts = [48, draw.randrange(20, 48), draw.randrange(20, 48)]
    view = spanned(name, example(seed, counts))
    where = view.positions
    protected = ((where < 4) | ((where >= 15) & (where < 18))) & view.valid
    view = replace(view, protected=protected)
    keep = [draw.randrange(8, n) for n in counts]
    first, again = (choose(policy, view, each(view, keep)) for _ in range(2))
    assert first.sound and torch.equal(first.kept, again.kept)
    assert first.kept.sum(1).tolist() == keep
    assert not bool((first.kept & ~view.valid).any())
    assert bool(first.kept[protected].all())
    assert set(first.state) == set(again.state) and bool(first.state) == ("state" in policy.needs)


def turned(view: View, order: list[int]) -> View:
    """Returns the view with its KV heads, and their query heads, in another order."""
    assert view.queries is not None and view.values is not None
    grouped = view.queries.unflatten(0, (view.num_kv_heads, -1))
    return replace(
        view,
        held=ops.LayerKV(view.keys[order], view.values[order]),
        queries=grouped[order].flatten(0, 1),
        state={name: x[order] for name, x in view.state.items()},
        known=None if view.known is None else view.known[order],
        log_bias=None,
        true_positions=view.positions[order],
        repeated=None if view.repeated is None else view.repeated[order],
    )


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("text", ALL)
def test_heads_in_another_order_choose_the_same(text: str, group: int, seed: int) -> None:
    view = spanned(text, replace(example(seed, group=group), log_bias=None))
    view = turned(view, [0, 1, 2])
    policy, order = policies.get(text), [2, 0, 1]
    scores, state = scored(policy, view)
    others, kept = scored(policy, turned(view, order))
    torch.testing.assert_close(others, scores[order], rtol=1e-4, atol=1e-6)
    for name, x in state.items():
        torch.testing.assert_close(kept[name], x[order])


@pytest.mark.parametrize("text", ALL)
def test_two_ranks_choose_as_one_would(text: str, seed: int) -> None:
    view = spanned(text, replace(example(seed, heads=4), log_bias=None))
    view = turned(view, [0, 1, 2, 3])
    policy = policies.get(text)
    want, _ = scored(policy, view)
    assert view.queries is not None and view.values is not None
    halves = []
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        halves.append(
            replace(
                view,
                held=ops.LayerKV(view.keys[own], view.values[own]),
                queries=view.queries[6 * rank : 6 * rank + 6],
                state={name: x[own] for name, x in view.state.items()},
                known=None if view.known is None else view.known[own],
                true_positions=view.positions[own],
                repeated=None if view.repeated is None else view.repeated[own],
            )
        )
    asked: list[Tensor] = []
    for half in halves:  # what each rank sends
        scored(policy, replace(half, all_heads=lambda x: asked.append(x) or x))
    everyone = torch.cat(asked) if asked else None
    found = [
        scored(policy, replace(half, all_heads=lambda x: everyone if everyone is not None else x))
        for half in halves
    ]
    torch.testing.assert_close(torch.cat([s for s, _ in found]), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lagkv(lag=1)", "lagkv.lag=1 is not a whole number, 2 or more"),
        ("expected_attention(future=0)", "future=0 is not a whole number, 1 or more"),
        ("expected_attention(covariance=1)", "covariance=1 is not true or false"),
        ("expected_attention(epsilon=-1)", "epsilon=-1 is not a number, 0 or more"),
        ("gkv(decay=2)", "gkv.decay=2 is not a number from 0 to 1"),
        ("rkv(pool=2)", "rkv.pool=2 is not an odd whole number, 1 or more"),
        ("critic(attention=0, entropy=0, gradient=0)", "attention=0 is not above 0"),
        ("gui_kv(temperature=0)", "gui_kv.temperature=0 is not a number above 0"),
        ("infinipot(newest=1.5)", "infinipot.newest=1.5 is not a number from 0 to 1"),
        ("lacache(span=4, overlap=4)", "overlap=4 is not a whole number from 0 to below the span"),
    ],
)
def test_bad_options_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="--kv-policy-config") as caught:
        policies.get(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", SPANNED)
def test_spans_count_where_scores_have_them(text: str) -> None:
    assert policies.get(text).uses_spans and policies.get(f"kvcrush({text})").uses_spans
    assert not policies.get("kvcrush(fair(knorm))").uses_spans
    assert policies.get(f"kvcrush(fair({text}))").uses_spans


def test_these_are_all_policies() -> None:
    names: set[str] = {text.partition("(")[0] for text in ALL}
    known = {"streaming", "snapkv", "h2o", "kvcrush", "mikv", "adakv", "keepkv", "fair"}
    assert all(issubclass(policies._BUILT_IN[name], Policy) for name in names)
    assert not names & known
