"""Heads that hold unequal numbers of tokens, and log biases: scoring, gathering and filling."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.cache import Cache
from vllm_kvcrush.codecs import CODECS, FITTED, by_number
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.cache import Source, runs_of
from vllm_kvcrush.ops.triton.scores import window_scores

PLAIN = tuple(name for name, codec in CODECS.items() if not codec.needs_tables)


def pages_of(cache: Cache, codec: str, counts: list[int]) -> tuple[list[int], Source]:
    """Returns fresh pages of a codec for a number of tokens of each head, and a source of them. The
    first page is not full; a head without tokens has no page, or an empty one."""
    entries, begin, end = [], [], []
    for head, count in enumerate(counts):
        begin.append(len(entries))
        room, left = cache.layer.capacity(codec, head), count
        for most in [room - 3, *[room] * count]:
            if left > 0 or (most < room and cache.draw.random() < 0.5):
                entries.append((cache.page(), min(left, most), CODECS[codec].number))
                left -= min(left, most)
        end.append(len(entries))
    device = cache.device
    page, count, number = (torch.tensor([e[i] for e in entries], device=device) for i in range(3))
    begins, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in (begin, end))
    none = torch.zeros(1, dtype=torch.int32, device=device)
    target = Source.of(begins, ends, page, count, number, none, 0, 0, runs_of(number.cpu()))
    return page.tolist(), target


def attention_of(cache: Cache, head: int, queries: Tensor) -> Tensor:
    """Returns the attention of a window of queries, [group, w, size], to a head's tokens, float64
    [group, n], summed over the window, by the definition."""
    keys, window = cache.keys[0][head], queries.shape[1]
    logits = queries.double() @ keys.T * cache.layer.scale + cache.biases(0)[head].double()
    n = len(keys)
    later = torch.arange(n) > (n - window + torch.arange(window)).unsqueeze(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1).sum(1)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize(("group", "size"), [(1, 80), (3, 64)])
def test_window_scores(
    draw: random.Random, device: str, group: int, size: int, fitted: bool
) -> None:
    """One head has nothing but the tail. Biases count, and pooling uses no other head's slots."""
    names = FITTED if fitted else ("int8", "int4", "exact", "raw")
    cache = Cache(
        draw, device, group, size, 64, kv_heads=3, blocks=40, fitted_codecs=FITTED if fitted else ()
    )
    some = [draw.sample(names, 2), draw.sample(names, 3), []]
    draw.shuffle(some)
    most = max(map(len, some))
    some = [own + ["int8"] * (draw.random() < 0.5 and len(own) == most) for own in some]
    counts = [[draw.randrange(1, 40) for _ in own] for own in some]
    cache.put(some, 30, counts)
    window, held = draw.choice([1, 9, 20]), [len(k) for k in cache.keys[0]]
    candidates = [max(0, n - draw.choice([0, 7, 31])) for n in held]
    queries = torch.randn(3 * group, window, size).half()
    source = cache.source(0, bias=True)
    sums = []
    for head, m in enumerate(candidates):
        own = queries[head * group : (head + 1) * group]
        sums.append(attention_of(cache, head, own)[:, :m])

    def check(got: Tensor, want: list[Tensor]) -> None:
        assert got.shape == (sum(map(len, want)), max(candidates))
        rows = iter(got.cpu().double())
        for head, own in enumerate(want):
            for row in own:
                mine = next(rows)
                m = candidates[head]
                torch.testing.assert_close(mine[:m], row, rtol=1e-2, atol=1e-4)
                assert (mine[m:] == -torch.inf).all()

    run = (cache.layer, source, queries.to(device), candidates)
    check(window_scores(*run, mean=False, reduce=None), sums)

    def pooled(x: Tensor, kind: str, width: int) -> Tensor:
        if not x.shape[1]:
            return x
        if kind == "max":
            return F.max_pool1d(x, width, 1, width // 2)
        return F.avg_pool1d(x, width, 1, width // 2, count_include_pad=False)

    means = [x / window for x in sums]
    want = [pooled(x, "max", 5).mean(0, keepdim=True) for x in means]
    check(window_scores(*run, pool=5, pool_kind="max", reduce="mean"), want)
    want = [pooled(x, "avg", 3).amax(0, keepdim=True) for x in means]
    check(window_scores(*run, pool=3, pool_kind="avg", reduce="max"), want)


def test_biases_move_scores(draw: random.Random, device: str) -> None:
    """Otherwise the comparison above would not test them."""
    cache = Cache(draw, device, 2, 64, 64, kv_heads=1)
    cache.put(["int8", "int4"], 20, [30, 30])
    queries = torch.randn(2, 8, 64).half().to(device)
    with_bias, without = (
        window_scores(cache.layer, cache.source(0, bias=b), queries, 60) for b in (True, False)
    )
    assert (with_bias - without).abs().max() > 1e-4


@pytest.mark.parametrize("fitted", [False, True])
def test_gather(draw: random.Random, device: str, fitted: bool) -> None:
    """Each head has the slots that are asked for, one has none, and rows past them are 0."""
    names = FITTED if fitted else ("int8", "int4", "exact", "raw")
    cache = Cache(
        draw, device, 1, 64, 48, torch.float32, kv_heads=3, blocks=40,
        fitted_codecs=FITTED if fitted else (),
    )  # fmt: skip
    cache.put([draw.sample(names, 3), [], draw.sample(names, 1)], draw.choice([0, 25]))
    source, held = cache.source(0), [len(k) for k in cache.keys[0]]
    wanted = [draw.randrange(n + 1) for n in held]
    slots = [torch.randperm(n)[:w].sort().values for n, w in zip(held, wanted, strict=True)]
    key, value, where = compaction.gather(cache.layer, source, [s.to(device) for s in slots])
    assert value is not None and where is not None
    every = compaction.positions(cache.layer, source, held)
    for head, own in enumerate(slots):
        for got, want in ((key, cache.keys), (value, cache.values)):
            mine, right = got[head].cpu().double(), want[0][head][own]
            close = 1e-5 * max([1.0, *(float(x.abs().max()) for x in want[0] if len(x))])
            assert ((mine[: len(own)] - right).abs() <= close).all()
            assert (mine[len(own) :] == 0).all()
        got = where[head].cpu()
        assert (got[len(own) :] == 0).all()
        assert torch.equal(got[: len(own)], every[head].cpu()[own])
        known = got[: len(own)] >= 0
        assert torch.equal(got[: len(own)][known], cache.positions[0][head][own][known])
        assert (every[head, held[head] :] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_fill_is_the_other_half_of_compact(draw: random.Random, device: str, codec: str) -> None:
    """Pages that are gathered and filled again unchanged are bit for bit those of `compact`."""
    cache = Cache(
        draw, device, 1, 64, 64, draw.choice([torch.float32, torch.float16]), kv_heads=3,
        block_size=64, blocks=30, fitted_codecs=FITTED,
    )  # fmt: skip
    codecs = [["int8", "tc6", "exact"], ["tc4"], ["int4", "int8"]]
    cache.put(codecs, 50, [[60, 40, 20], [90], [50, 50]])
    source = cache.source(0)
    counts = [draw.randrange(100), 0, draw.randrange(1, 100)]
    draw.shuffle(counts)
    slots = []
    for n, held in zip(counts, cache.keys[0], strict=True):
        slots.append(torch.randperm(len(held))[:n].sort().values)
    made, filled = (pages_of(cache, codec, counts) for _ in range(2))
    while len(made[0]) != len(filled[0]):
        filled = pages_of(cache, codec, counts)
    compaction.compact(cache.layer, source, slots, made[1])
    key, value, where = compaction.gather(cache.layer, source, slots)
    assert value is not None
    compaction.fill(cache.layer, key, value, where, counts, filled[1])
    there = torch.zeros(3, dtype=torch.int64).index_add_(
        0, made[1].head.cpu().long(), made[1].count.cpu().long()
    )
    assert there.tolist() == counts
    for a, b in zip(made[0], filled[0], strict=True):
        assert torch.equal(cache.bytes_of(a), cache.bytes_of(b))
    written = [p for p, n in zip(filled[0], filled[1].count.tolist(), strict=True) if n]
    assert all((cache.bytes_of(p) != 255).any() for p in written)
    # And what is read back is what was given, as exactly as the codec keeps it.
    back, _, _ = compaction.gather(cache.layer, filled[1], [torch.arange(n) for n in counts])
    tolerance = {"raw": 1e-2, "exact": 1e-2, "int8": 0.15, "tc8": 1.0, "tc6": 3.0}.get(codec, 4.0)
    assert (back - key).abs().mean() <= tolerance * key.abs().mean()
    assert all(by_number(n).name == codec for n in filled[1].codec.tolist())


def test_misfits_are_refused(draw: random.Random, device: str, mode: str) -> None:
    cache = Cache(draw, device, 1, 64, 64, torch.float32)
    target = pages_of(cache, "int8", [5, 9])[1]
    key, value, where = torch.zeros(2, 9, 64), torch.zeros(2, 9, 64), torch.zeros(2, 9)
    key, value, where = (x.to(device) for x in (key, value, where.int()))
    for arguments, words in (
        ((key[:1], value, where, [5, 9]), r"keys are torch.float32 \(1, 9, 64\)"),
        ((key.half(), value, where, [5, 9]), r"keys are torch.float16"),
        ((key, value, where[:, :4], [5, 9]), r"positions are \(2, 4\)"),
        ((key, value, None, [5, 9]), r"pages of int8 keep positions"),
        ((key, value, where, [5, 10]), r"counts \[5, 10\] for 2 heads of 9 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            compaction.fill(cache.layer, *arguments, target)
    if mode == "interpreter":
        with pytest.raises(
            ValueError, match=r"pages for \[5, 9\] tokens of each head, and \[4, 9\] tokens"
        ):
            compaction.fill(cache.layer, key, value, where, [4, 9], target)
    queries = torch.zeros(2, 1, 64, device=device)
    cache.put([], 3)
    with pytest.raises(ValueError, match=r"candidates of 3 heads for 2 KV heads"):
        window_scores(cache.layer, cache.source(0), queries, [1, 1, 1])
