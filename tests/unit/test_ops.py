"""The operations behind the names of `ops` against slow loops written from their definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush import ops

SIZES = [1, 3, 5, 7]
GROUPS = [1, 3, 4, 8]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True, params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test with plain torch behind the names, then with C++."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(ops, "_in_cpp", lambda tensor: False)
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coarse(heads: int, m: int, seed: int, levels: int = 5) -> torch.Tensor:
    """Returns scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels, (heads, m), generator=generator).float()


def best(row: list[float], keep: int) -> list[int]:
    """Returns the slots of the `keep` highest scores; of equal ones the lower slot comes first."""
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
    got = {kind: ops.anchor_bits(kind, 5, 0, CPU) for kind in ("zeros", "ones", "alternate")}
    bits = {kind: anchor.int().tolist() for kind, anchor in got.items() if anchor is not None}
    assert bits == {"zeros": [0] * 5, "ones": [1] * 5, "alternate": [0, 1, 0, 1, 0]}
    assert ops.anchor_bits("mean", 5, 0, CPU) is None


def random_anchor(width: int, seed: int) -> torch.Tensor:
    anchor = ops.anchor_bits("random", width, seed, CPU)
    assert anchor is not None
    return anchor


def test_random_anchor_is_pinned() -> None:
    # Literal bits: a request that moves to another machine or torch must keep its selection.
    got = "".join(str(b) for b in random_anchor(24, 7).int().tolist())
    assert got == "101011110101010000100011"


def test_random_anchor_depends_on_seed_and_width_only() -> None:
    torch.manual_seed(1)
    first = random_anchor(64, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, random_anchor(64, 3))
    assert torch.equal(state, torch.get_rng_state())  # sampling's generator is not touched
    assert not torch.equal(first, random_anchor(64, 4))


def test_anchor_bits_refuse_other_kinds() -> None:
    with pytest.raises(ValueError, match="kind='median' is not one of random, zeros, ones, mean"):
        ops.anchor_bits("median", 1, 0, CPU)


def slow_represent(
    vectors: list[list[bool]], important: list[bool], count: int, anchor: list[bool] | None
) -> list[bool]:
    """Returns one head's important units and representatives, by the definition, given a vector for
    each unit."""
    rest = [u for u, taken in enumerate(important) if not taken]
    if anchor is None:
        columns = zip(*(vectors[u] for u in rest), strict=True)
        anchor = [2 * sum(column) > len(rest) for column in columns]
    wanted = anchor or [False] * len(vectors[0])
    far = {u: sum(a != b for a, b in zip(vectors[u], wanted, strict=True)) for u in rest}
    rest.sort(key=lambda u: (far[u], u))
    chosen = {rest[i * len(rest) // count] for i in range(count)}
    return [taken or u in chosen for u, taken in enumerate(important)]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.data())
def test_represent(seed: int, mean: bool, data: st.DataObject) -> None:
    b, heads, units, unit = (data.draw(st.integers(1, n)) for n in (5, 3, 30, 4))
    rng = random.Random(seed)
    bits = torch.rand(b, units * unit, generator=torch.Generator().manual_seed(seed)) < 0.4
    taken = data.draw(st.integers(0, units))
    count = data.draw(st.integers(0, units - taken))
    important = torch.zeros(heads, units, dtype=torch.bool)
    for row in important:
        row[rng.sample(range(units), taken)] = True
    anchor = None if mean else random_anchor(b * unit, seed)
    before = important.clone()
    got = ops.represent(bits, important, count, anchor, unit)
    vectors = [
        [bool(bit) for head in bits for bit in head[u * unit : u * unit + unit]]
        for u in range(units)
    ]
    given_bits = None if anchor is None else anchor.tolist()
    want = [slow_represent(vectors, row, count, given_bits) for row in important.tolist()]
    assert got.tolist() == want and torch.equal(important, before)


def test_distances_count_beyond_a_byte() -> None:
    # One token differs from the anchor in 1000 bits, the other in 744: 256 less.
    bits = torch.ones(1000, 2, dtype=torch.bool)
    bits[:256, 1] = False
    anchor = torch.zeros(1000, dtype=torch.bool)
    got = ops.represent(bits, torch.zeros(1, 2, dtype=torch.bool), 1, anchor)
    assert got.tolist() == [[False, True]]


# similar keys, and merging


@st.composite
def some_keys(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Generator]:
    """Keys [H, m, D] some of which are alike, in every length around those that kernels take
    together, not contiguous; and a generator."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([8, 24, 64]))
    m = draw(st.sampled_from([1, 2, 15, 16, 17, 100, 129, 250]))
    keys = torch.randn(heads, m + 3, size, generator=generator)
    like = torch.randint(0, m, (heads, m + 3), generator=generator)
    again = keys.gather(1, like.unsqueeze(2).expand_as(keys))
    copied = torch.rand(heads, m + 3, 1, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    return torch.where(copied, 2 * again, keys)[:, :m], generator


def cosines(keys: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(keys.double(), dim=2)
    return unit @ unit.mT


@given(given_keys=some_keys(), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(deadline=None, max_examples=60)
def test_nearest_kept_is_the_first_of_the_most_similar(
    given_keys: tuple[torch.Tensor, torch.Generator], share: float
) -> None:
    keys, generator = given_keys
    heads, m, _ = keys.shape
    kept = torch.rand(heads, m, generator=generator) < share
    gone = ~kept & (torch.rand(heads, m, generator=generator) < 0.8)
    target, cosine = ops.nearest_kept(keys, gone, kept)
    every = cosines(keys)
    for h in range(heads):
        for i in range(m):
            if not gone[h, i] or not kept[h].any():
                want = -2.0 if gone[h, i] else 1.0
                assert (int(target[h, i]), float(cosine[h, i])) == (i, want)
                continue
            own = every[h, i].masked_fill(~kept[h], -9)
            assert float(cosine[h, i]) == pytest.approx(float(own.max()), abs=1e-5)
            found = int(target[h, i])
            assert kept[h, found] and float(own[found]) > float(own.max()) - 1e-5
            # Equal keys have equal cosines, however they were rounded.
            same = (keys[h] == keys[h, found]).all(1) & kept[h]
            assert found == int(same.nonzero()[0])


@given(given_keys=some_keys(), threshold=st.sampled_from([0.0, 0.2, 0.5, 0.9]))
@settings(deadline=None, max_examples=60)
def test_redundancy_in_float32(
    given_keys: tuple[torch.Tensor, torch.Generator], threshold: float
) -> None:
    keys, _ = given_keys
    every = cosines(keys)
    other = ~torch.eye(keys.shape[1], dtype=torch.bool)
    # What rounding could decide is not tested.
    if bool(((every - threshold).abs() < 1e-5)[:, other].any()):
        return
    counts = [max(0, keys.shape[1] - 5 * h) for h in range(len(keys))]
    got = ops.redundancy(keys, counts, threshold)
    for h, n in enumerate(counts):
        matrix = every[h, :n, :n].masked_fill(~other[:n, :n], 0.0)
        for i in range(n):
            similar = ((matrix[i] > threshold) & other[i, :n]).nonzero().flatten().tolist()
            if similar:
                matrix[i, similar[-1]] = 0.0
        want = torch.zeros(keys.shape[1])
        want[:n] = matrix.mean(0) if n else 0
        torch.testing.assert_close(got[h], want, rtol=1e-4, atol=1e-5)


@given(given_keys=some_keys(), width=st.sampled_from([1, 2, 7, 32, 2**20]))
@settings(deadline=None, max_examples=60)
def test_merge_and_spread_are_sums(
    given_keys: tuple[torch.Tensor, torch.Generator], width: int
) -> None:
    x, generator = given_keys
    heads, m, _ = x.shape
    target = torch.randint(0, m, (heads, m), generator=generator)
    weight = torch.randn(heads, m, generator=generator)
    weight[torch.rand(heads, m, generator=generator) < 0.3] = 0
    want = torch.zeros(x.shape, dtype=torch.float64)
    kept = torch.rand(heads, m, generator=generator) < 0.5
    spread = x.double()
    for h in range(heads):
        stay = kept[h].nonzero().flatten().tolist()
        for i in range(m):
            want[h, target[h, i]] += weight[h, i].double() * x[h, i].double()
            if not kept[h, i]:
                for j in [j for j in stay if j > i][:width]:
                    spread[h, j] += weight[h, i].double() * x[h, i].double()
    before = x.clone()
    # What does not count may be anything.
    x = torch.where((weight == 0).unsqueeze(2), torch.nan, x)
    got = ops.merge(x, target, weight)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    got = ops.spread(before, kept, weight, width)
    torch.testing.assert_close(got.double(), spread, rtol=1e-4, atol=1e-4)


def test_keys_of_nothing_are_similar_to_none() -> None:
    keys = torch.zeros(1, 40, 8)
    keys[0, 3] = 1
    kept = torch.arange(40).unsqueeze(0) < 4
    target, cosine = ops.nearest_kept(keys, ~kept, kept)
    assert target[0, 4:].unique().tolist() == [0] and not cosine[0, 4:].any()
    assert float(ops.redundancy(keys).abs().max()) < 1e-6
