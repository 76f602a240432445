"""Which pages layers and heads get: whole pages from shares, the shares of Ada-KV, and codecs by
what they lose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.views import each, make_view, ragged, scores_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.engine.worker.allocation import least_loss_codecs, page_counts
from vllm_kvcrush.policies import Room, View
from vllm_kvcrush.policies.adakv import AdaKV
from vllm_kvcrush.policies.choice import allocated, choose, demanded, scored

SHARES = st.one_of(
    st.just(0.0),
    st.floats(0, 1),
    st.sampled_from([1e-300, 1e-12, 1e300, 1.0, 1.0, 2.0]),
    st.floats(0, 1e308),
)


@st.composite
def rooms(draw: st.DrawFn) -> tuple[Room, np.ndarray]:
    """Draws the pages to divide, and the number that each head needs."""
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def table(low: int, high: int) -> np.ndarray:
        size = layers * heads
        numbers = st.lists(st.integers(low, high), min_size=size, max_size=size)
        return np.array(draw(numbers)).reshape(layers, heads)

    page_tokens, candidates = table(1, 40), table(0, 300)
    least = table(0, 4)
    needed = int(np.minimum(least, -(-candidates // page_tokens)).sum())
    pages = draw(st.integers(needed, needed + 100))
    return Room(pages, torch.from_numpy(page_tokens), torch.from_numpy(candidates)), least


def shares_of(data: st.DataObject, room: Room) -> Tensor:
    size = room.candidates.numel()
    found = data.draw(st.lists(SHARES, min_size=size, max_size=size))
    return torch.tensor(found, dtype=torch.float64).view(room.candidates.shape)


def most_of(room: Room) -> np.ndarray:
    return -(-room.candidates.numpy() // room.page_tokens.numpy())


@given(found=rooms(), data=st.data())
@settings(deadline=None, max_examples=400)
def test_pages_are_whole_and_within_their_bounds(
    found: tuple[Room, np.ndarray], data: st.DataObject
) -> None:
    room, least = found
    shares = shares_of(data, room)
    before = shares.clone(), room.page_tokens.clone(), room.candidates.clone(), least.copy()
    pages = page_counts(shares, room, least)
    assert torch.equal(before[0], shares) and np.array_equal(before[3], least)
    assert torch.equal(before[1], room.page_tokens) and torch.equal(before[2], room.candidates)
    most = most_of(room)
    assert pages.shape == most.shape and pages.dtype == np.int64
    assert (np.minimum(least, most) <= pages).all() and (pages <= most).all()
    assert pages.sum() == min(room.pages, most.sum())
    # The result does not change with the units of the shares.
    assert np.array_equal(page_counts(shares, room, least), pages)
    if shares.max() < 1e100:
        assert np.array_equal(page_counts(shares * 4.0, room, least), pages)


@given(found=rooms(), data=st.data())
@settings(deadline=None, max_examples=400)
def test_more_of_a_share_is_no_fewer_pages(
    found: tuple[Room, np.ndarray], data: st.DataObject
) -> None:
    room, least = found
    shares = shares_of(data, room)
    pages, most = page_counts(shares, room, least).ravel(), most_of(room).ravel()
    floor, flat = np.minimum(least.ravel(), most), shares.flatten()
    # Shares below a billionth of the largest are all alike.
    flat = flat.clamp(min=float(flat.max()) * 1e-9).tolist()
    for a in range(len(flat)):
        for b in range(len(flat)):
            # A head with no smaller share has no fewer pages, unless it can use no more of them or
            # the other needs as many.
            if flat[a] > flat[b] * (1 + 1e-9) and pages[a] < pages[b]:
                assert pages[a] == most[a] or pages[b] == floor[b]
            if flat[a] == flat[b] and pages[a] < pages[b] - 1:
                assert pages[a] == most[a] or pages[b] == floor[b]
    # And no head loses by a larger share of its own.
    one = data.draw(st.integers(0, len(flat) - 1))
    larger = shares.clone()
    larger.view(-1)[one] = flat[one] * 2 + 0.1
    assume(bool(larger.isfinite().all()))
    assert page_counts(larger, room, least).ravel()[one] >= pages[one]


@pytest.mark.parametrize("scale", [1.0, 1e-305, 1e300])
def test_pages_follow_the_shares(scale: float) -> None:
    room = Room(20, torch.full((2, 2), 16), torch.full((2, 2), 1000))
    shares = torch.tensor([[4.0, 3.0], [2.0, 1.0]]).double() * scale
    none = np.zeros((2, 2), dtype=np.int64)
    assert page_counts(shares, room, none).tolist() == [[8, 6], [4, 2]]
    # Pages that one head cannot fill go to the others by their shares.
    few = room._replace(candidates=torch.tensor([[32, 1000], [1000, 1000]]))
    assert page_counts(shares, few, none).tolist() == [[2, 9], [6, 3]]
    # One that needs more than its share takes it from the others.
    eleven = none + np.array([[0, 0], [0, 11]])
    assert page_counts(shares, room, eleven).tolist() == [[4, 3], [2, 11]]
    # Heads without any come last.
    shares[1] = 0
    assert page_counts(shares, few, none).tolist() == [[2, 18], [0, 0]]
    full = few._replace(candidates=torch.tensor([[32, 64], [1000, 1000]]))
    assert page_counts(shares, full, none).tolist() == [[2, 4], [7, 7]]


def test_what_is_left_over_goes_to_the_nearest() -> None:
    room = Room(10, torch.full((1, 3), 16), torch.full((1, 3), 1000))
    shares = torch.tensor([[1.0, 1.0, 1.0]]).double()
    none = np.zeros((1, 3), dtype=np.int64)
    assert page_counts(shares, room, none).tolist() == [[4, 3, 3]]
    assert page_counts(torch.tensor([[2.6, 2.5, 4.9]]).double(), room, none).tolist() == [[3, 2, 5]]


# Ada-KV


def slow_demand(scores: Tensor, view: View, tokens: int) -> list[int]:
    """Returns how many of the layer's best `tokens` votes belong to each head, counted one by
    one."""
    votes = []
    for head, row in enumerate(scores.tolist()):
        own, stay = row[: int(view.sizes[head])], view.staying[head].tolist()
        votes += [(math.inf if stay[i] else x, -i, -head) for i, x in enumerate(own)]
    best = sorted(votes, reverse=True)[:tokens]
    return [sum(-vote[2] == head for vote in best) for head in range(view.num_kv_heads)]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_adakvs_demand_is_its_definition(data: st.DataObject) -> None:
    heads, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    view = make_view(m, 1, heads, 1, sinks=data.draw(st.integers(0, 5)))
    if data.draw(st.booleans()):
        counts = st.lists(st.integers(1, m), min_size=heads, max_size=heads)
        view = ragged(view, data.draw(counts))
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        more = torch.rand(view.valid.shape, generator=generator) < 0.2
        view = replace(view, protected=(view.staying | more) & view.valid)
    # Few levels, so that there are ties, of either sign.
    levels = st.lists(st.integers(-3, 4), min_size=view.candidates, max_size=view.candidates)
    scores = torch.tensor([data.draw(levels) for _ in range(heads)]).float()
    scores = scores.masked_fill(~view.valid, -torch.inf)
    layers, page = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    room = Room(
        data.draw(st.integers(0, 40)),
        torch.full((layers, heads), page),
        view.sizes.expand(layers, -1),
    )
    got = demanded(AdaKV(), view, scores, room)
    assert got is not None
    tokens = min(room.pages * page // layers, int(view.sizes.sum()))
    assert got.tolist() == slow_demand(scores, view, tokens)


def test_adakv_mixes_its_shares_with_equal_ones() -> None:
    room = Room(8, torch.full((2, 2), 16), torch.full((2, 2), 1000))
    demand = torch.tensor([[30.0, 10.0], [0.0, 0.0]]).double()
    assert allocated(AdaKV(floor=0.0), demand, room)[0].tolist() == [0.75, 0.25]
    mixed = allocated(AdaKV(floor=0.5), demand, room)
    assert mixed.tolist() == [[0.625, 0.375], [0.25, 0.25]]
    assert allocated(AdaKV(floor=1.0), demand, room).tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("base", ["snapkv", "h2o", "kvcrush(snapkv)"])
def test_heads_that_look_at_many_tokens_get_more(
    base: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes from keys to pages: one head attends to one needle, one to all tokens alike, one to
    some of them, whose neighbours a pooling base counts too."""
    if implementation == "reference":
        monkeypatch.setattr(ops, "_in_cpp", lambda tensor: False)
    view = make_view(pages=16, page=8, heads=3, group=1, sinks=0)
    view = replace(view, state={})
    assert view.queries is not None
    keys = 0.5 * view.keys
    keys[0, 50] = 40 * view.queries[0].mean(0)
    keys[2] = 0
    view = replace(view, held=ops.LayerKV(keys, view.values))
    policy = policies.get(f"adakv({base})")
    room = Room(24, torch.full((1, 3), 8), torch.full((1, 3), 128))
    given_ = scored(policy, view)
    demand = demanded(policy, view, given_[0], room)
    assert demand is not None
    pages = page_counts(
        allocated(policy, demand[None], room), room, np.zeros((1, 3), dtype=np.int64)
    )
    needle, some, all_alike = pages[0].tolist()
    assert needle + some + all_alike == 24 and 1 <= needle < min(some, all_alike)
    keep = pages[0] * 8
    choice = choose(policy, view, torch.from_numpy(keep), given=given_)
    assert choice.sound and choice.kept.sum(1).tolist() == keep.tolist()
    assert bool(choice.kept[0, 50])
    # Within a head the base chooses.
    alike = policies.get(base)
    assert torch.equal(
        choice.kept, alike.select(view, scores_of(alike, view), each(view, keep.tolist()))
    )


@settings(deadline=None)
@given(st.data())
def test_codecs_by_head(data: st.DataObject) -> None:
    codecs, layers, heads = (data.draw(st.integers(1, 4)) for _ in range(3))
    shape, size = (codecs, layers, heads), codecs * layers * heads

    def table(of: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(data.draw(st.lists(of, min_size=size, max_size=size))).reshape(shape)

    pages, losses = table(st.integers(1, 9)), table(st.floats(0, 5, width=32))
    total = data.draw(st.integers(0, 9 * layers * heads))
    choice = least_loss_codecs(losses, pages, total)
    fewest = int(pages.min(0).sum())
    if choice is None:
        assert fewest > total
        return
    taken = int(np.take_along_axis(pages, choice[None], 0).sum())
    assert fewest <= total and taken <= total
    # No head could do better alone with what is left.
    for codec, layer, head in np.ndindex(*shape):
        more = int(pages[codec, layer, head] - pages[choice[layer, head], layer, head])
        if more <= total - taken:
            assert losses[choice[layer, head], layer, head] <= losses[codec, layer, head] + 1e-9


def test_codecs_by_head_are_the_best_for_their_price() -> None:
    """A hundred heads that differ in what errors cost: the dear ones get the finer codec, and all
    lose less together than in one mixture for all."""
    cost = np.logspace(-3, 0, 100).reshape(50, 2)
    losses = np.stack([0.1 * cost, 0.4 * cost, cost])
    pages = np.stack([np.full((50, 2), n) for n in (16, 8, 4)])
    for total in (400, 700, 1000, 1600, 5000):
        choice = least_loss_codecs(losses, pages, total)
        assert choice is not None
        assert int(np.take_along_axis(pages, choice[None], 0).sum()) <= total
        assert (np.diff(choice.ravel()) <= 0).all(), "in the order of cost"
        lost = float(np.take_along_axis(losses, choice[None], 0).sum())
        share = (total / 100 - 4) / 4, (total / 100 - 8) / 8
        mixed = 1 - 0.6 * share[0] if total <= 800 else max(0.1, 0.4 - 0.3 * share[1])
        assert lost <= mixed * cost.sum() + 1e-9
    assert least_loss_codecs(losses, pages, 399) is None


@pytest.mark.parametrize("total", [40, 60, 200])
def test_losses_that_are_no_numbers_end_no_engine(total: int) -> None:
    """As a model's may be whose logits overflow: any codecs that there is room for do."""
    pages = np.stack([np.full((4, 2), n) for n in (16, 8, 4)])
    losses = np.random.default_rng(0).random((3, 4, 2))
    for where in (slice(None), 0, 1, 2):
        broken = losses.copy()
        broken[where, 1] = np.nan
        choice = least_loss_codecs(broken, pages, total)
        assert choice is not None
        assert int(np.take_along_axis(pages, choice[None], 0).sum()) <= total
