"""KeepKV: kept slots take over the exact weight and content of dropped ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import parametrize
from tests.unit.views import each, make_view, ragged, scores_of
from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import Merged, View
from vllm_kvcrush.policies.choice import choose
from vllm_kvcrush.policies.keepkv import KeepKV

M, TAIL = 48, 1


def view_of(seed: int = 0, heads: int = 3, size: int = 16, **more: Any) -> View:
    """Returns a view with one query for each KV head, that of the newest token, which is the whole
    tail."""
    view = make_view(heads=heads, group=1, window=1, tail=TAIL, seed=seed, size=size, **more)
    assert view.values is not None
    # In double precision, only the rounding of merged values can make a difference.
    return replace(view, held=ops.LayerKV(view.keys / 3, view.values))


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Returns the attention of one query [D] over tokens that have log biases, in float64."""
    logits = keys.double() @ query.double() * scale + bias.double()
    return logits.softmax(0) @ values.double()


def bias_of(view: View, head: int) -> Tensor:
    n = int(view.sizes[head])
    return torch.zeros(n) if view.log_bias is None else view.log_bias[head, :n]


def before(view: View, head: int, query: Tensor) -> Tensor:
    """Returns a query's attention over all that a head holds."""
    n = int(view.sizes[head])
    assert view.values is not None
    bias = torch.cat((bias_of(view, head), torch.zeros(TAIL)))
    held = n + TAIL
    return attention(query, view.keys[head, :held], view.values[head, :held], bias, view.scale)


def after(view: View, head: int, query: Tensor, merged: Merged, kept: Tensor) -> Tensor:
    """Returns its attention when only merged slots, with their biases, and the tail are left."""
    n, own = int(view.sizes[head]), kept[head]
    assert view.values is not None and merged.log_bias is not None
    keys = torch.cat((merged.keys[head, own], view.keys[head, n : n + TAIL]))
    values = torch.cat((merged.values[head, own], view.values[head, n : n + TAIL]))
    bias = torch.cat((merged.log_bias[head, own], torch.zeros(TAIL)))
    return attention(query, keys, values, bias, view.scale)


def merged_of(view: View, policy: KeepKV, keep: list[int]) -> tuple[Merged, Tensor]:
    choice = choose(policy, view, torch.tensor(keep))
    assert choice.sound and choice.merged is not None
    return choice.merged, choice.kept


@parametrize(
    base=["snapkv", "streaming", "h2o", "kvcrush"],
    counts=[[48, 48, 48], [48, 30, 9]],
    biased=[False, True],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_next_query_reads_the_same(
    base: str, counts: list[int], biased: bool, seed: int
) -> None:
    """The paper's claim: with every dropped token merged, nothing changes for the query whose
    logits the weights were made of."""
    view = view_of(seed)
    if biased:
        generator = torch.Generator().manual_seed(seed)
        view = replace(view, log_bias=torch.randn(3, M, generator=generator).abs())
    view = ragged(view, counts) if len(set(counts)) > 1 else view
    policy = policies.get(f"keepkv({base}, threshold=-1)")
    assert isinstance(policy, KeepKV)
    keep = [max(4, n // 3) for n in counts]
    merged, kept = merged_of(view, policy, keep)
    assert view.queries is not None and view.values is not None
    for head in range(3):
        query = view.queries[head, 0]
        want = before(view, head, query)
        torch.testing.assert_close(
            after(view, head, query, merged, kept), want, rtol=1e-4, atol=2e-6
        )
        # Without the dropped tokens, or without the bias, its attention would differ.
        plain = Merged(
            view.keys[:, : kept.shape[1]], view.values[:, : kept.shape[1]], view.log_bias
        )
        plain = plain._replace(log_bias=torch.zeros_like(kept, dtype=torch.float32))
        assert (after(view, head, query, plain, kept) - want).abs().max() > 1e-3
        unweighted = merged._replace(log_bias=torch.zeros_like(kept, dtype=torch.float32))
        assert (after(view, head, query, unweighted, kept) - want).abs().max() > 1e-3


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_merges_add_up_to_what_there_was(data: st.DataObject) -> None:
    """Weights, votes and content of each kept slot are as defined, token by token."""
    counts = data.draw(st.lists(st.integers(5, M), min_size=3, max_size=3))
    view = ragged(view_of(data.draw(st.integers(0, 99))), counts)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        bias = torch.randn(view.valid.shape, generator=generator).masked_fill(~view.valid, 0)
        view = replace(view, log_bias=bias)
    threshold = data.draw(st.sampled_from([-1.0, 0.0, 0.3, 0.8]))
    keep = [data.draw(st.integers(1, n)) for n in counts]
    merged, kept = merged_of(view, KeepKV(threshold=threshold), keep)
    assert view.queries is not None and view.values is not None and merged.log_bias is not None
    for head, n in enumerate(counts):
        keys, values = view.keys[head, :n].double(), view.values[head, :n].double()
        logits = keys @ view.queries[head, 0].double() * view.scale
        weights = (logits + bias_of(view, head).double()).exp()
        unit = keys / keys.norm(dim=1, keepdim=True)
        stay = kept[head, :n].nonzero().squeeze(1).tolist()
        groups = {slot: [slot] for slot in stay}
        for slot in set(range(n)) - set(stay):
            near = max(stay, key=lambda s: (float(unit[s] @ unit[slot]), -s))
            if abs(float(unit[near] @ unit[slot]) - threshold) < 1e-6:
                return  # as near to the threshold as rounding
            if unit[near] @ unit[slot] >= threshold:
                groups[near].append(slot)
        for slot, group in groups.items():
            own = weights[group] / weights[group].sum()
            close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(merged.keys[head, slot].double(), own @ keys[group], **close)
            torch.testing.assert_close(
                merged.values[head, slot].double(), own @ values[group], **close
            )
            total = weights[group].sum().log() - own @ logits[group]
            torch.testing.assert_close(merged.log_bias[head, slot].double(), total, **close)


def test_repeated_merges_accumulate() -> None:
    """48 tokens are merged into 6 in four steps. The attention of a query that all steps saw is the
    same over the last six as over all."""
    view, policy = view_of(7), KeepKV(threshold=-1)
    assert view.queries is not None
    want = [before(view, head, view.queries[head, 0]) for head in range(3)]
    for keep in (30, 20, 11, 6):
        merged, kept = merged_of(view, policy, [keep] * 3)
        assert merged.log_bias is not None and view.values is not None
        # Kept slots move together, the tail after them, as a compaction does.
        slots = ops.mask_slots(kept, keep)
        where = slots.unsqueeze(2).expand(-1, -1, 16)
        tails = view.keys[:, view.candidates :], view.values[:, view.candidates :]
        view = replace(
            view,
            held=ops.LayerKV(
                torch.cat((merged.keys.gather(1, where), tails[0]), 1),
                torch.cat((merged.values.gather(1, where), tails[1]), 1),
            ),
            candidates=keep,
            log_bias=merged.log_bias.gather(1, slots),
            true_positions=view.positions.gather(1, slots),
            known=torch.ones(3, keep, dtype=torch.bool),
            state={},
        )
        for head in range(3):
            got = before(view, head, view.queries[head, 0])
            torch.testing.assert_close(got, want[head], rtol=1e-4, atol=1e-5)
        # Scores count the votes too: the window's weights of all slots sum to one.
        weights = ops.window_attention(view.queries, view.keys, view.scale, view.log_bias)
        torch.testing.assert_close(weights.sum(2), torch.ones(3, 1))
    # Six slots stand for 48 tokens.
    assert view.log_bias is not None
    assert bool((view.log_bias.exp().sum(1) > 12).all())


@parametrize(base=["snapkv", "h2o", "kvcrush", "streaming"], counts=[[48, 48, 48], [48, 30, 9]])
def test_what_is_not_similar_is_dropped_as_the_base_drops_it(base: str, counts: list[int]) -> None:
    view, own = ragged(view_of(), counts), policies.get(base)
    keep = [n // 2 for n in counts]
    merged, kept = merged_of(view, KeepKV(base=own, threshold=1.0), keep)
    assert torch.equal(kept, choose(own, view, each(view, keep)).kept)
    assert view.values is not None and merged.log_bias is not None
    m = view.candidates
    assert torch.equal(merged.keys[kept], view.keys[:, :m][kept])
    assert torch.equal(merged.values[kept], view.values[:, :m][kept])
    torch.testing.assert_close(merged.log_bias, torch.zeros(3, m), rtol=0, atol=1e-5)


def test_groups_of_heads_and_windows_have_one_mean_query() -> None:
    """With two query heads for each KV head and four queries, merging is exact for the mean
    query."""
    view = make_view(heads=2, group=2, window=4, tail=4)
    assert view.values is not None and view.queries is not None
    view = replace(view, held=ops.LayerKV(view.keys / 3, view.values))
    merged, kept = merged_of(view, KeepKV(threshold=-1), [12, 20])
    assert merged.log_bias is not None
    for head in range(2):
        query = view.queries[2 * head : 2 * head + 2].mean((0, 1))
        want = attention(
            query, view.keys[head, :M], view.values[head, :M], torch.zeros(M), view.scale
        )
        own = kept[head]
        got = attention(
            query, merged.keys[head, own], merged.values[head, own], merged.log_bias[head, own],
            view.scale,
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_kept_and_everything_kept() -> None:
    view = ragged(view_of(sinks=0), [48, 20, 8])
    for keep in ([0, 0, 0], [48, 20, 8], [48, 0, 1]):
        merged, kept = merged_of(view, KeepKV(threshold=-1), keep)
        assert all(bool(part.isfinite().all()) for part in merged[:3] if part is not None)
        if sum(keep) == 76:
            assert torch.equal(merged.keys[kept], view.keys[:, :48][kept])


def test_scores_see_the_votes() -> None:
    """A slot that stands for many tokens scores as much as they did together."""
    view = view_of()
    plain = scores_of(KeepKV(), view)
    votes = torch.zeros(3, M)
    votes[:, 20] = 5.0
    held = ops.LayerKV(view.keys, view.values, log_bias=votes)
    heavy = scores_of(KeepKV(), replace(view, held=held, log_bias=votes))
    assert bool((heavy[:, 20] > plain[:, 20]).all()) and bool((heavy[:, 40] < plain[:, 40]).all())
