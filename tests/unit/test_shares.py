"""Policies that divide pages among layers and heads, and that merge: against their formulas."""

from __future__ import annotations

import hashlib
import json
import math
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

from tests.pairwise import parametrize
from tests.unit import shares_oracle as oracle
from tests.unit.views import each, make_view, ragged, scored, scores_of
from vllm_kvcrush import policies
from vllm_kvcrush.engine.worker.allocation import page_counts
from vllm_kvcrush.policies import Policy, Room, View, heads
from vllm_kvcrush.policies.cake import CAKE
from vllm_kvcrush.policies.cam import CaM
from vllm_kvcrush.policies.choice import allocated, choose, demanded, dry_run
from vllm_kvcrush.policies.composed import Composed
from vllm_kvcrush.policies.d2o import D2O
from vllm_kvcrush.policies.duo import Duo
from vllm_kvcrush.policies.pyramidkv import PyramidKV
from vllm_kvcrush.policies.surfacelogic import SurfaceLogic

LAYERS = 4
ALLOCATE = [
    *("pyramidkv", "pyramidkv(adakv)", "pyramidkv(beta=2)", "cake", "duo", "duo(sparsity=0.75)"),
    *("surfacelogic", "d2o", "d2o(dense=false)", "fair(duo)", "keepkv(cake)", "cam(pyramidkv)"),
]
COUNTS = [[48, 48, 48], [48, 30, 9], [5, 48, 1]]


@pytest.fixture
def seed() -> int:
    """Returns a fresh seed; pytest shows it with a test that fails."""
    drawn = random.SystemRandom().randrange(2**31)
    print(f"seed {drawn}")
    return drawn


def views_of(seed: int, counts: list[int] | None = None, **more: Any) -> list[View]:
    """Returns views of several layers of one request, whose heads may hold unequal numbers."""
    found = []
    for layer in range(LAYERS):
        view = make_view(seed=seed + layer, **more)
        keys = view.keys / (1 + layer)  # attention that differs clearly by layer
        view = replace(view, held=type(view.held)(keys, view.values), state={}, layer=layer)
        found.append(replace(ragged(view, counts) if counts else view, layers=LAYERS))
    return found


def room_of(views: list[View], pages: int, page: int = 8) -> Room:
    sizes = torch.stack([view.sizes for view in views])
    return Room(pages, torch.full(sizes.shape, page), sizes)


def demands_of(policy: Policy, views: list[View], room: Room) -> Tensor | None:
    found = [demanded(policy, view, scored_of(policy, view), room) for view in views]
    known = [demand for demand in found if demand is not None]
    return torch.stack(known) if known else None


def scored_of(policy: Policy, view: View) -> Tensor:
    return scores_of(policy, view).masked_fill(~view.valid, -torch.inf)


def tokens_of(policy: Policy, demand: Tensor | None, room: Room) -> Tensor:
    """Returns the tokens that the policy gives each head, before they become whole pages."""
    return allocated(policy, demand, room) * room.page_tokens


def near(got: Any, want: Any, **more: Any) -> None:
    both = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(*both, **{"rtol": 1e-9, "atol": 1e-9, **more})


def by_layer(tokens: list[float], heads: int = 3) -> Tensor:
    """Returns budgets of layers as those of their heads."""
    return torch.tensor(tokens, dtype=torch.float64).unsqueeze(1).expand(-1, heads)


@pytest.fixture
def pattern(tmp_path: pathlib.Path, seed: int) -> tuple[str, dict[str, Tensor]]:
    """Returns a file of head scores of LAYERS layers with 3 heads, and the scores."""
    draw = torch.Generator().manual_seed(seed)
    scores = {k: torch.rand(LAYERS, 3, generator=draw, dtype=torch.float64) for k in heads.KINDS}
    path = tmp_path / "heads.json"
    heads.save(path, "a model", "a digest", scores)
    return str(path), scores


# -- each method against its formulas ------------------------------------------------------------


@parametrize(counts=COUNTS, gamma=[0.0, 200.0], pool=[1, 5], group=[1, 3], biased=[False, True])
def test_cake_scores_are_mean_and_variance(
    counts: list[int], gamma: float, pool: int, group: int, biased: bool, seed: int
) -> None:
    view = views_of(seed, counts, group=group)[1]
    if biased:
        bias = torch.randn(view.valid.shape, generator=torch.Generator().manual_seed(seed))
        view = replace(view, log_bias=bias.masked_fill(~view.valid, 0))
    got = scored_of(CAKE(gamma, pool=pool), view)
    for head, want in enumerate(oracle.cake_scores(view, gamma, pool)):
        near(got[head, : len(want)], want, rtol=2e-4, atol=1e-6)


@parametrize(counts=COUNTS, tau=[(1.0, 1.0), (1.6, 0.4)], pages=[8, 20, 40])
def test_cake_budgets_follow_preferences(
    counts: list[int], tau: tuple[float, float], pages: int, seed: int
) -> None:
    views, policy = views_of(seed, counts), CAKE(tau1=tau[0], tau2=tau[1])
    room = room_of(views, pages)
    demand = demands_of(policy, views, room)
    assert demand is not None
    preferences = [oracle.cake_preference(view, *tau) for view in views]
    for got, want in zip(demand.tolist(), preferences, strict=True):
        assert got == pytest.approx([want] * 3, rel=1e-3)
    average = pages * 8 / (LAYERS * 3)
    most = [float(max(counts))] * LAYERS
    want_tokens = oracle.cake_budgets([row[0] for row in demand.tolist()], average, most)
    near(tokens_of(policy, demand, room), by_layer(want_tokens))
    assert len({round(x, 6) for x in want_tokens}) > 1, "layers do not differ"


def test_cake_of_one_query_divides_equally() -> None:
    views = views_of(1, window=1)
    policy, room = CAKE(), room_of(views_of(1, window=1), 24)
    tokens = tokens_of(policy, demands_of(policy, views, room), room)
    near(tokens, torch.full((LAYERS, 3), 16.0))


@parametrize(layers=[1, 2, 7, 30], beta=[1, 2, 20.0], there=[40, 400, 8000])
def test_pyramidkv_is_an_arithmetic_sequence(layers: int, beta: float, there: int) -> None:
    for pages in (layers, 4 * layers, 40 * layers):
        room = Room(pages, torch.full((layers, 2), 16), torch.full((layers, 2), there))
        got = tokens_of(PyramidKV(beta=beta), None, room)
        want = oracle.pyramid_budgets(layers, pages * 16 / (layers * 2), there, beta)
        near(got, by_layer(want, 2))
        assert bool((got[1:] <= got[:-1] + 1e-9).all())
        if layers > 1:  # one layer has all, whatever its share
            assert float(got.sum()) == pytest.approx(min(pages * 16, there * layers * 2))


def test_pyramidkv_divides_layers_and_its_base_divides_heads(seed: int) -> None:
    views = views_of(seed)
    policy, room = policies.get("pyramidkv(adakv(floor=0.5))"), room_of(views, 40)
    demand = demands_of(policy, views, room)
    got, plain = tokens_of(policy, demand, room), tokens_of(policies.get("pyramidkv"), None, room)
    near(got.sum(1), plain.sum(1))
    own = tokens_of(policies.get("adakv(floor=0.5)"), demand, room)
    near(got / got.sum(1, keepdim=True), own / own.sum(1, keepdim=True))
    assert not torch.allclose(got, plain)


@parametrize(counts=COUNTS, pages=[12, 40, 66], dense=[False, True])
def test_d2o_layers_follow_their_density(
    counts: list[int], pages: int, dense: bool, seed: int
) -> None:
    views = views_of(seed, counts)
    policy, room = D2O(dense=dense), room_of(views, pages)
    demand = demands_of(policy, views, room)
    assert demand is not None
    for view, row in zip(views, demand, strict=True):
        scores = scored_of(policy, view)
        rows = [scores[h, : int(view.sizes[h])].double().tolist() for h in range(3)]
        near(row, [oracle.d2o_density(rows)] * 3, rtol=1e-4, atol=1e-6)
    average, there = pages * 8 / (LAYERS * 3), [float(max(counts))] * LAYERS
    want = oracle.d2o_budgets(demand[:, 0].tolist(), average, there, dense)
    near(tokens_of(policy, demand, room), by_layer(want))


def test_d2o_keeps_whole_layers_where_they_fit() -> None:
    policy, there = D2O(), torch.full((30, 2), 100)
    demand = torch.rand(30, 2, generator=torch.Generator().manual_seed(3)).double()
    demand[:, 1] = demand[:, 0]
    enough = tokens_of(policy, demand, Room(250, torch.full((30, 2), 10), there))
    assert [i for i, n in enumerate(enough[:, 0].tolist()) if n == 100] == [0, 1, 29]
    few = tokens_of(policy, demand, Room(110, torch.full((30, 2), 10), there))
    assert float(few.max()) < 60, "three layers would have taken most of the budget"


@parametrize(
    counts=COUNTS, alpha=[0.5, 0.3], known=[False, True], share=[0.2, 0.6], biased=[False, True]
)
def test_d2o_merges_what_is_similar(
    counts: list[int], alpha: float, known: bool, share: float, biased: bool, seed: int
) -> None:
    """Keys, values and the running threshold, over two compactions."""
    policy = D2O(alpha=alpha, beta=1 - alpha)
    view = views_of(seed, counts, size=8)[0]
    if biased:
        view = replace(view, log_bias=torch.rand(view.valid.shape) * view.valid)
    old: list[float | None] = [None] * 3
    if known:
        old = [0.1, -0.2, 0.4]
        view = replace(view, layer_state={"threshold": torch.tensor(old).unsqueeze(1)})
    keep = [math.ceil(share * n) for n in counts]
    choice = choose(policy, view, torch.tensor(keep))
    assert choice.sound and choice.merged is not None and view.values is not None
    merged, mixed = choice.merged, 0
    for head, n in enumerate(counts):
        own = choice.kept[head, :n]
        want = oracle.d2o_merge(
            view.keys[head, :n].double().numpy(),
            view.values[head, :n].double().numpy(),
            own.tolist(), old[head], alpha, 1 - alpha,
        )  # fmt: skip
        near(merged.keys[head, :n][own], want[0][own.numpy()], rtol=1e-4, atol=1e-4)
        near(merged.values[head, :n][own], want[1][own.numpy()], rtol=1e-4, atol=1e-5)
        mixed += int((merged.keys[head, :n] != view.keys[head, :n])[own].any(1).sum())
        got = float(choice.layer_state["threshold"][head])
        assert got == pytest.approx(-2.0 if want[2] is None else want[2], rel=1e-4, abs=1e-5)
    assert mixed, "nothing was merged"
    assert merged.log_bias is view.log_bias, "biases that were there are kept"


@parametrize(counts=COUNTS, width=[1, 4, 32], base=["h2o", "snapkv", "streaming"])
def test_cam_spreads_values_over_what_follows(
    counts: list[int], width: int, base: str, seed: int
) -> None:
    view = replace(views_of(seed, counts, size=8)[2], first_head=5)
    policy = policies.get(f"cam({base}, width={width}, seed={seed})")
    choice = choose(policy, view, torch.tensor([math.ceil(n / 3) for n in counts]))
    assert choice.merged is not None and view.values is not None
    changed = 0
    for head, n in enumerate(counts):
        own = choice.kept[head, :n]
        digest = hashlib.sha256(f"{seed} 2 {5 + head}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        draws = torch.rand(n, generator=draw, dtype=torch.float64).tolist()
        weights = oracle.attention(view, head).sum(1).mean(0).tolist()
        values = view.values[head, :n].double().numpy()
        want = oracle.cam_merge(values, weights, own.tolist(), width, draws)
        near(choice.merged.values[head, :n][own], want[own.numpy()], rtol=1e-4, atol=1e-4)
        assert torch.equal(choice.merged.keys[head, :n], view.keys[head, :n])
        changed += int((choice.merged.values[head, :n] != view.values[head, :n])[own].sum())
    assert changed, "nothing was merged"
    again = choose(policy, view, choice.kept.sum(1)).merged
    assert again is not None and torch.equal(again.values, choice.merged.values)
    drawn = [policy._draws(replace(view, layer=i), 0, 9) for i in range(2)]  # type: ignore[attr-defined]
    other = CaM(seed=seed ^ 1)._draws(view, 0, 9)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], other)


def test_cam_keeps_the_expected_output() -> None:
    """Where no chance is cut at one, the mean over draws of Σ a·v over kept tokens is that over
    all."""
    view = make_view(heads=1, group=1, size=8, sinks=0, seed=2)
    view = replace(view, held=type(view.held)(view.keys / 30, view.values), state={})
    weights = torch.tensor(oracle.attention(view, 0).sum(1).mean(0))
    order = weights.argsort(descending=True)[:40]
    kept = torch.zeros(1, 48, dtype=torch.bool)
    kept[0, order] = True
    kept[0, -1] = True  # so that something follows every dropped token
    assert view.values is not None
    values = view.values[0, :48].double()
    want, total = (weights.unsqueeze(1) * values).sum(0), torch.zeros(8).double()
    alone = (weights.unsqueeze(1) * values)[kept[0]].sum(0)
    many = 600
    for seed in range(many):
        merged = CaM(width=4, seed=seed).merge(view, torch.zeros(1, 48), kept)
        total += (weights.unsqueeze(1) * merged.values[0].double())[kept[0]].sum(0) / many
    assert float((total - want).norm()) < 0.05 * float((alone - want).norm())


@parametrize(sparsity=[0.25, 0.5, 0.75], pages=[12, 30, 60], sink=[0, 3])
def test_duo_divides_heads_into_two_kinds(
    pattern: tuple[str, dict[str, Tensor]], sparsity: float, pages: int, sink: int, seed: int
) -> None:
    path, scores = pattern
    policy = Duo(pattern=path, sparsity=sparsity, sink=sink, recent=9)
    views = views_of(seed)
    room = room_of(views, pages)
    demand = demands_of(policy, views, room)
    assert demand is not None
    near(demand, scores["retrieval"])
    streams = oracle.duo_streams(demand.tolist(), sparsity)
    near(
        tokens_of(policy, demand, room),
        oracle.duo_budgets(streams, pages * 8 / (LAYERS * 3), sink + 9),
    )
    for view in views:
        seen = replace(view, demands=demand)
        base, own = (
            choose(p, v, each(view, 20)).kept for p, v in ((policy.base, view), (policy, seen))
        )
        first = min(sink, int(20 * sink / (sink + 9)))
        for head, stream in enumerate(streams[view.layer]):
            first_ones = max(first, view.sinks)
            newest = [*range(first_ones), *range(48 - 20 + first_ones, 48)]
            want = newest if stream else base[head].nonzero().squeeze(1).tolist()
            assert own[head].nonzero().squeeze(1).tolist() == want


@parametrize(counts=COUNTS, group=[1, 3], kind=["duo", "surfacelogic"])
def test_heads_without_a_pattern_are_scored_by_the_requests_own_tokens(
    counts: list[int], group: int, kind: str, seed: int
) -> None:
    view = views_of(seed, counts, group=group)[1]
    assert view.rope is not None and view.queries is not None
    policy = policies.get(kind)
    got = policy.demand(view, torch.zeros(3, 48), room_of([view], 9))
    assert got is not None
    frequencies = view.rope.frequencies.numpy()
    end = max(counts) + 7  # the tail has seven tokens, of which the window is the last five

    def unturned(row: Tensor, position: int) -> np.ndarray:
        x = row.double().numpy()
        pairs = (x[:8] + 1j * x[8:]) * np.exp(-1j * frequencies * position)
        return np.concatenate((pairs.real, pairs.imag))

    for head, n in enumerate(counts):
        key = sum(unturned(view.keys[head, i], i) for i in range(n)) / n
        want = 0.0
        for q in range(head * group, (head + 1) * group):
            rows = [unturned(view.queries[q, i], end - 5 + i) for i in range(5)]
            want += oracle.retrieval(sum(rows) / 5, key, frequencies, view.scale, 500) / group
        assert float(got[head]) == pytest.approx(want, rel=1e-5)


def test_a_head_that_looks_at_the_newest_scores_low_and_one_that_looks_back_high() -> None:
    rope = make_view(size=16).rope
    assert rope is not None
    ones = torch.zeros(16).double()
    ones[0] = 40.0  # the fastest pair: a sharp peak at distance 0
    far = torch.zeros(16).double()
    far[5] = -40.0  # a slow pair with the opposite sign: distance pays
    flat = torch.zeros(16).double()
    query = torch.stack((ones, -far, flat))
    got = heads.retrieval_scores(query, torch.stack((ones, far, flat)), rope, 0.1).tolist()
    assert got[2] == pytest.approx(0.501, abs=1e-6) and got[1] > 0.6 > 0.51 > got[0]


@parametrize(beta=[1.0, 1.2, 10], temperature=[0.5, 1.0, 2])
def test_surfacelogic_shares_by_scores(
    pattern: tuple[str, dict[str, Tensor]], beta: float, temperature: float, seed: int
) -> None:
    path, scores = pattern
    policy = SurfaceLogic(pattern=path, beta=beta, temperature=temperature)
    views = views_of(seed)
    room = room_of(views, 30)
    demand = demands_of(policy, views, room)
    assert demand is not None
    near(demand, scores["copying"])
    want = oracle.surface_budgets(demand.tolist(), 20.0, beta, temperature)
    got = tokens_of(policy, demand, room)
    near(got, want)
    assert float(got.sum()) == pytest.approx(240)
    assert bool((got >= 20 - 20 / beta - 1e-9).all()), "a head is under its floor"


def test_copying_scores_are_f1(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = (4 * torch.randn(3, 6, 40, generator=draw)).softmax(-1)
    weights[2, :, 10:16] += 3  # a head that finds the passage
    got = heads.copying_scores(weights, 10)
    want = [oracle.copying(row.double().numpy(), 10, 10) for row in weights]
    near(got, want, rtol=1e-6)
    assert got[2] > 0.9 > got[0]


@parametrize(counts=COUNTS, scale=["minmax", "rank"], weight=[0.0, 0.3, 1.0])
def test_composed_adds_scaled_scores(
    counts: list[int], scale: str, weight: float, seed: int
) -> None:
    view = views_of(seed, counts)[0]
    policy = Composed(base=policies.get("h2o"), other="snapkv(pool=3)", weight=weight, scale=scale)
    scores, state = scored(policy, view)
    assert list(state) == ["attention"]
    parts = scores_of(policies.get("h2o"), view), scores_of(policies.get("snapkv(pool=3)"), view)
    for head, n in enumerate(counts):
        free = [j >= view.sinks for j in range(n)]
        first, second = (oracle.scaled(p[head, :n].tolist(), free, scale) for p in parts)
        want = [(1 - weight) * a + weight * b for a, b in zip(first, second, strict=True)]
        near(scores[head, :n], want, rtol=1e-4, atol=1e-5)


def test_composed_keeps_the_state_of_either() -> None:
    view = replace(make_view(), state={})
    for text in ("composed(h2o, other=snapkv)", "composed(snapkv, other=h2o)"):
        policy = policies.get(text)
        first = scored(policy, view)[1]
        assert list(first) == ["attention"]
        second = scored(policy, replace(view, state=first))[1]
        near(second["attention"], 2 * first["attention"])
        assert policy.needs == {"queries", "state"}


# -- invariants ----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[View], Room, np.ndarray]:
    """Draws a request's views, the pages that it may have, and those that each head needs."""
    counts = draw(st.lists(st.integers(1, 48), min_size=3, max_size=3))
    counts[draw(st.integers(0, 2))] = 48
    views = views_of(draw(st.integers(0, 99)), counts if draw(st.booleans()) else None)
    sizes = torch.stack([view.sizes for view in views])
    per_page = st.lists(st.integers(4, 12), min_size=LAYERS * 3, max_size=LAYERS * 3)
    page_tokens = torch.tensor(draw(per_page)).view(LAYERS, 3)
    share = draw(st.sampled_from([0.0, 0.1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    views = [
        replace(
            view,
            protected=(view.staying | (torch.rand(view.valid.shape, generator=generator) < share))
            & view.valid,
            spans=((0, 20), (20, 33), (33, 60)),
        )
        for view in views
    ]
    needed = torch.stack([view.staying.sum(1) for view in views])
    least = -(-needed // page_tokens).numpy()
    most = int((-(-sizes // page_tokens)).sum())
    pages = draw(st.integers(int(least.sum()), max(int(least.sum()), most)))
    return views, Room(pages, page_tokens, sizes), least


@parametrize(text=ALLOCATE)
@given(case=cases())
@settings(deadline=None, max_examples=25)
def test_pages_add_up_and_what_is_protected_stays(
    text: str, case: tuple[list[View], Room, np.ndarray]
) -> None:
    views, room, least = case
    policy = policies.get(text)
    demand = demands_of(policy, views, room)
    pages = page_counts(allocated(policy, demand, room), room, least)
    most = -(-room.candidates.numpy() // room.page_tokens.numpy())
    assert pages.sum() == min(room.pages, most.sum())
    assert (pages >= least).all() and (pages <= most).all()
    keep = np.minimum(pages * room.page_tokens.numpy(), room.candidates.numpy())
    for view in views:
        count = torch.from_numpy(keep[view.layer])
        choice = choose(policy, replace(view, demands=demand), count)
        assert choice.sound and torch.equal(choice.kept.sum(1), count)
        assert not bool((choice.kept & ~view.valid).any())
        assert not bool((view.staying & ~choice.kept).any()), "a protected token is gone"
        for name, value in choice.layer_state.items():
            assert len(value) == 3 and bool(value.isfinite().all()), name


@parametrize(text=["cake", "d2o", "pyramidkv(adakv)", "duo", "surfacelogic"], cut=[1, 2, 3])
def test_ranks_with_unequal_heads_agree_about_layers(
    text: str, cut: int, tmp_path: pathlib.Path, seed: int
) -> None:
    """Two ranks that own `cut` and 4 - `cut` heads: what a layer is worth is the same on both and
    as on one, and head scores of a file are those of the rank's own heads."""
    scores = {kind: torch.rand(LAYERS, 4).double() for kind in heads.KINDS}
    heads.save(tmp_path / "heads.json", "", "", scores)
    given_heads = {"pattern": str(tmp_path / "heads.json")}
    policy = policies.get(text, {"duo": given_heads, "surfacelogic": given_heads})
    wholes = views_of(seed, heads=4)
    room = room_of(wholes, 50)
    want = demands_of(policy, wholes, room)
    assert want is not None

    def part(first: int, end: int) -> Room:
        return Room(25, room.page_tokens[:, first:end], room.candidates[:, first:end])

    def rank_of(view: View, first: int, end: int, gather: Callable[[Tensor], Tensor]) -> View:
        assert view.queries is not None and view.values is not None
        own = slice(first, end)
        return replace(
            view,
            held=type(view.held)(view.keys[own], view.values[own]),
            queries=view.queries[first * 3 : end * 3],
            true_positions=view.positions[own],
            known=None,
            all_heads=gather,
            first_head=first,
        )

    for view in wholes:
        told: list[Tensor] = []
        limits = ((0, cut), (cut, 4))

        def note(x: Tensor, told: list[Tensor] = told) -> Tensor:
            told.append(x)
            return x

        for first, end in limits:
            rank = rank_of(view, first, end, note)
            demanded(policy, rank, scored_of(policy, rank), part(first, end))
        for first, end in limits:
            rank = rank_of(view, first, end, lambda x, told=told: torch.cat(told))
            got = demanded(policy, rank, scored_of(policy, rank), part(first, end))
            if text.startswith("pyramidkv"):
                continue  # its base compares the heads of one rank
            near(got, want[view.layer, first:end], rtol=1e-4, atol=1e-7)


# -- files of head scores ------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: pathlib.Path) -> Iterator[Callable[[Any], str]]:
    def write(content: Any) -> str:
        path = tmp_path / "broken.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    yield write


def test_a_bad_pattern_is_one_clear_sentence(broken: Callable[[Any], str]) -> None:
    good = {"format": heads.FORMAT, "version": 1, "retrieval": [[0.5]], "copying": [[0.5]]}
    assert Duo(pattern=broken(good)).made_for == (1, 1)
    for content, why in (
        ("{", "cannot be read"),
        ([1], "is not a file of `vllm-kvcrush calibrate --heads`"),
        ({**good, "format": "x"}, "is not a file of"),
        ({**good, "version": 2}, "is of another version"),
        ({**good, "retrieval": [[0.5], [0.5, 0.1]]}, "has no table of 'retrieval' scores"),
        ({**good, "retrieval": [[2.0]]}, "from 0 to 1"),
        ({**good, "retrieval": [["a"]]}, "has no table"),
        ({**good, "retrieval": []}, "has no table"),
        ({**good, "retrieval": None}, "has no table"),
        ('{"format": "vllm-kvcrush-heads", "version": 1, "retrieval": [[NaN]]}', "has no table"),
    ):
        with pytest.raises(ValueError, match=r"duo.pattern=.* is not a pattern of heads: it") as e:
            Duo(pattern=broken(content))
        assert why in str(e.value) and str(e.value).count(". ") <= 1
    with pytest.raises(ValueError, match="cannot be read"):
        policies.get("duo", {"duo": {"pattern": "/nowhere"}})
    with pytest.raises(ValueError, match=r"duo.pattern=7 is not a path"):
        policies.get("duo(pattern=7)")


def test_bases_that_cannot_be() -> None:
    for text, why in (
        ("adakv(pyramidkv)", "adakv.base=pyramidkv divides pages, and so does adakv: take one of"),
        ("duo(adakv)", "duo.base=adakv divides pages, and so does duo"),
        ("surfacelogic(d2o)", "surfacelogic.base=d2o divides pages, and so does"),
        ("keepkv(fair(d2o))", "keepkv.base=fair merges tokens, and so does keepkv"),
        ("cam(keepkv)", "cam.base=keepkv merges tokens, and so does cam"),
        ("composed(other=nobody)", "'nobody' is not a policy"),
        ("composed(other=7)", "composed.other=7 is not a policy"),
        ('composed(other="kvcrush(level=page)")', "a policy of single tokens"),
        ("composed(h2o, other=mikv)", "a policy without running state, as the base has some"),
        ("composed(weight=2)", "composed.weight=2 is not a number from 0 to 1"),
        ("pyramidkv(beta=0.5)", "pyramidkv.beta=0.5 is not a number, 1 or more"),
        ("cake(tau1=0)", "cake.tau1=0 is not a number above 0"),
        ("cake(pool=4)", "cake.pool=4 is not an odd whole number"),
        ("duo(sparsity=1)", "duo.sparsity=1 is not a number from 0 to below 1"),
        ("d2o(dense=2)", "d2o.dense=2 is not true or false"),
        ("pyramidkv(mikv)", "shares pages out over heads, which tiers of two codecs do not do"),
    ):
        with pytest.raises(ValueError) as caught:
            policies.get(text)
        assert why in str(caught.value), str(caught.value)


def test_a_pattern_of_another_model_is_found_when_the_server_starts(
    pattern: tuple[str, dict[str, Tensor]],
) -> None:
    from vllm_kvcrush import plugin
    from vllm_kvcrush.config import ConfigError, Settings

    options = {"duo": {"pattern": pattern[0]}}
    settings_ = Settings.from_dict({"policy": "fair(duo)", "allow": ["duo"], "config": options})
    assert plugin._tried(settings_, 32, (LAYERS, 3))[1] == []
    with pytest.raises(ConfigError, match="is of a model with 4 layers of 3 KV heads, and this"):
        plugin._tried(settings_, 32, (30, 3))
    dry_run(policies.get("duo", options))


def test_scores_in_the_default_place_are_used(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.test_config import MODEL
    from vllm_kvcrush.config import Settings

    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    made = Settings.from_dict({"policy": "duo", "config": {"duo": {"sparsity": 0.25}}})
    assert made.with_heads(MODEL) is made
    place = heads.default_path(MODEL)
    assert place is not None and place.parent == tmp_path / "heads"
    place.parent.mkdir()
    heads.save(place, "", "", {kind: torch.rand(2, 2) for kind in heads.KINDS})
    found = made.with_heads(MODEL)
    assert found.options["duo"] == {"pattern": str(place), "sparsity": 0.25}
    policy = Settings.from_dict(found.to_dict()).build("duo")
    assert isinstance(policy, Duo) and policy.pattern == str(place) and policy.sparsity == 0.25
    named = replace(made, options={"duo": {"pattern": "mine"}}).with_heads(MODEL)
    assert named.options["duo"]["pattern"] == "mine"
    with pytest.raises(Exception, match=r"duo.pattern is not for clients to set"):
        found.validate_request({"kv_policy": "duo(pattern=x)"}, 32, 2048)
