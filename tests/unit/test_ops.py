"""The reference operations against slow loops written from their definitions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush import ops

SIZES = [1, 3, 5, 7]
GROUPS = [1, 3, 4, 8]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coarse(heads: int, m: int, seed: int, levels: int = 5) -> torch.Tensor:
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels, (heads, m), generator=generator).float()


def best(row: list[float], keep: int) -> list[int]:
    """Slots of the `keep` highest scores, the lower slot first among equals."""
    return sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep])


# window attention


def slow_attention(
    queries: list[list[list[float]]], keys: list[list[list[float]]], scale: float
) -> list[list[list[float]]]:
    group, out = len(queries) // len(keys), []
    for q, head in enumerate(queries):
        own, n, w = keys[q // group], len(keys[0]), len(head)
        rows = []
        for i, query in enumerate(head):
            seen = n - w + i + 1
            logits = [
                scale * sum(a * b for a, b in zip(query, own[slot], strict=True))
                for slot in range(seen)
            ]
            weights = [math.exp(logit) for logit in logits]
            rows.append([x / sum(weights) for x in weights] + [0.0] * (n - seen))
        out.append(rows)
    return out


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("n", "w"), [(9, 4), (5, 5), (6, 1)])
def test_window_attention_is_a_causal_softmax(group: int, n: int, w: int) -> None:
    queries = randn(2 * group, w, 4, seed=1, dtype=torch.float64)
    keys = randn(2, n, 4, seed=2, dtype=torch.float64)
    got = ops.window_attention(queries, keys, 0.7)
    want = slow_attention(queries.tolist(), keys.tolist(), 0.7)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_window_attention_computes_in_float32(dtype: torch.dtype) -> None:
    queries, keys = randn(6, 3, 8, dtype=dtype), randn(2, 20, 8, seed=3, dtype=dtype)
    got = ops.window_attention(queries, keys, 0.35)
    want = ops.window_attention(queries.double(), keys.double(), 0.35)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-7)


def test_window_attention_leaves_its_inputs_alone() -> None:
    queries, keys = randn(4, 3, 8), randn(2, 6, 8, seed=1)
    before = queries.clone(), keys.clone()
    ops.window_attention(queries, keys, 0.5)
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


def test_window_attention_takes_strided_keys() -> None:
    queries, keys = randn(4, 3, 8), randn(6, 2, 8, seed=1).transpose(0, 1)
    got = ops.window_attention(queries, keys, 0.5)
    assert torch.equal(got, ops.window_attention(queries, keys.contiguous(), 0.5))


def test_window_attention_refuses_impossible_shapes() -> None:
    with pytest.raises(ValueError, match="window of 4 queries is longer than the 3 held slots"):
        ops.window_attention(randn(2, 4, 8), randn(1, 3, 8), 1.0)
    with pytest.raises(ValueError, match="3 query heads do not divide over 2 KV heads"):
        ops.window_attention(randn(3, 1, 8), randn(2, 3, 8), 1.0)


# groups and pooling


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("group", GROUPS)
def test_reduce_groups(group: int, how: str) -> None:
    heads, x = 3, randn(3 * group, 5)
    got = ops.reduce_groups(x, heads, how)
    assert got.shape == (heads, 5)
    for h in range(heads):
        for slot in range(5):
            members = [x[q, slot].item() for q in range(3 * group) if q // group == h]
            want = max(members) if how == "max" else sum(members) / group
            assert got[h, slot].item() == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_reduce_groups_refuses() -> None:
    with pytest.raises(ValueError, match="5 query heads"):
        ops.reduce_groups(randn(5, 2), 2)
    with pytest.raises(ValueError, match="how='sum' is not one of mean, max"):
        ops.reduce_groups(randn(4, 2), 2, "sum")


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("m", [1, 2, 3, 11])
def test_pool_scores_cuts_its_window_at_the_edges(m: int, size: int, kind: str) -> None:
    # All negative: a zero that came in as padding would win every maximum.
    scores = -randn(2, m).abs() - 1
    got = ops.pool_scores(scores, size, kind)
    assert got.shape == scores.shape
    for h, row in enumerate(scores.tolist()):
        for i in range(m):
            near = [row[j] for j in range(m) if abs(i - j) <= size // 2]
            want = max(near) if kind == "max" else sum(near) / len(near)
            assert got[h, i].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pool_and_groups_widen_half_floats(dtype: torch.dtype) -> None:
    assert ops.pool_scores(randn(2, 5, dtype=dtype), 3, "avg").dtype == torch.float32
    assert ops.reduce_groups(randn(4, 5, dtype=dtype), 2).dtype == torch.float32
    assert ops.pool_scores(randn(2, 5).double(), 3, "max").dtype == torch.float64


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [(4, "avg", "size=4 is not an odd"), (0, "max", "size=0"), (3, "min", "kind='min' is not")],
)
def test_pool_scores_refuses(size: int, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pool_scores(randn(1, 8), size, kind)


# top slots


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_top_slots_are_the_best_with_ties_to_the_lower_slot(
    heads: int, m: int, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, m))
    scores = coarse(heads, m, seed)
    got = ops.top_slots(scores, keep)
    assert got.dtype == torch.int64 and got.shape == (heads, keep)
    assert got.tolist() == [best(row, keep) for row in scores.tolist()]


def test_top_slots_of_equal_scores_are_the_first() -> None:
    scores = torch.zeros(2, 5000)
    scores[:, 1::2] = -0.0
    assert ops.top_slots(scores, 1700).tolist() == [list(range(1700))] * 2


def test_top_slots_of_long_rows() -> None:
    scores = coarse(2, 6000, 7, levels=40)
    assert ops.top_slots(scores, 1504).tolist() == [best(r, 1504) for r in scores.tolist()]


def test_top_slots_take_infinities_and_put_nan_last() -> None:
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[nan, 1, -inf, inf, 2, nan], [nan] * 6])
    assert ops.top_slots(scores, 3).tolist() == [[1, 3, 4], [0, 1, 2]]


def test_top_slots_work_on_float64_and_do_not_write() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    before = scores.clone()
    assert ops.top_slots(scores, 1).tolist() == [[1]]
    assert torch.equal(scores, before)


@pytest.mark.parametrize("keep", [-1, 6])
def test_top_slots_refuse_impossible_counts(keep: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {keep} of 5 slots"):
        ops.top_slots(torch.zeros(1, 5), keep)


def test_mask_slots_is_the_inverse_of_a_scatter() -> None:
    slots = torch.tensor([[0, 3, 4], [1, 2, 5]])
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, slots, True)
    assert torch.equal(ops.mask_slots(mask, 3), slots)


# KVCrush


@settings(deadline=None)
@given(st.integers(1, 30), st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.integers(0, 2**31))
def test_keep_bits_mark_the_top_share(m: int, share: float, seed: int) -> None:
    scores = coarse(3, m, seed)
    for row, bits in zip(scores.tolist(), ops.keep_bits(scores, share).tolist(), strict=True):
        assert [i for i in range(m) if bits[i]] == best(row, round(share * m))


def test_fixed_anchors() -> None:
    matrix = torch.zeros(3, 5, dtype=torch.bool)
    assert ops.anchor_bits("zeros", matrix, 0).tolist() == [False] * 5
    assert ops.anchor_bits("ones", matrix, 0).tolist() == [True] * 5
    assert ops.anchor_bits("alternate", matrix, 0).int().tolist() == [0, 1, 0, 1, 0]


def test_mean_anchor_is_a_strict_majority() -> None:
    matrix = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assert ops.anchor_bits("mean", matrix, 0).int().tolist() == [1, 0, 0]
    stacked = torch.stack((matrix, ~matrix))
    assert ops.anchor_bits("mean", stacked, 0).int().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert ops.anchor_bits("mean", torch.ones(200, 2).bool(), 0).tolist() == [True, True]


def test_random_anchor_is_pinned() -> None:
    # Literal bits: a request that moves to another machine or torch must keep its selection.
    matrix = torch.zeros(4, 24, dtype=torch.bool)
    got = "".join(str(b) for b in ops.anchor_bits("random", matrix, 7).int().tolist())
    assert got == "101011110101010000100011"


def test_random_anchor_depends_on_seed_and_width_only() -> None:
    zeros, ones = torch.zeros(4, 64).bool(), torch.ones(9, 64).bool()
    torch.manual_seed(1)
    first = ops.anchor_bits("random", zeros, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, ops.anchor_bits("random", ones, 3))
    assert torch.equal(state, torch.get_rng_state())  # sampling's generator is not touched
    assert not torch.equal(first, ops.anchor_bits("random", ones, 4))


def test_anchor_bits_refuse_other_kinds() -> None:
    with pytest.raises(ValueError, match="kind='median' is not one of random, zeros, ones, mean"):
        ops.anchor_bits("median", torch.zeros(1, 1).bool(), 0)


def test_hamming() -> None:
    rng = random.Random(0)
    vectors = [[rng.random() < 0.5 for _ in range(9)] for _ in range(7)]
    anchor = [rng.random() < 0.5 for _ in range(9)]
    got = ops.hamming(torch.tensor(vectors), torch.tensor(anchor))
    assert got.dtype == torch.int32
    assert got.tolist() == [sum(a != b for a, b in zip(v, anchor, strict=True)) for v in vectors]
    both = torch.tensor([anchor, [not b for b in anchor]])
    assert ops.hamming(torch.tensor(vectors), both)[1].tolist() == [9 - d for d in got.tolist()]


def test_hamming_counts_beyond_a_byte() -> None:
    assert ops.hamming(torch.ones(1, 1000).bool(), torch.zeros(1000).bool()).tolist() == [1000]


@given(st.integers(0, 60), st.data())
def test_spread_is_even_and_starts_with_the_first(x: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, x))
    order = list(range(100, 100 + x))
    random.Random(x).shuffle(order)
    got = ops.spread(torch.tensor(order, dtype=torch.int64), count).tolist()
    assert got == [order[i * x // count] for i in range(count)]
    assert len(set(got)) == count
    assert not count or got[0] == order[0]


def test_spread_of_rows_and_of_too_few() -> None:
    rows = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]])
    assert ops.spread(rows, 2).tolist() == [[5, 7], [4, 2]]
    with pytest.raises(ValueError, match="cannot pick 6 of 5"):
        ops.spread(rows, 6)
