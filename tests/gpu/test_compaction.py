"""Storing, gathering, encoding and scoring against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.gpu import oracle
from tests.gpu.cache import CHUNKS, Cache
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops import reference
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.cache import Source
from vllm_kvcrush.ops.triton.codecs import TRAITS
from vllm_kvcrush.ops.triton.scores import window_scores
from vllm_kvcrush.ops.triton.store import store


def rounding(codec: str) -> float:
    """Returns by how much of the largest number one that was coded alike may differ. What a chunk's
    tokens share may differ by the last bit of a float16 number."""
    return 2e-3 if codec in CHUNKS else 1e-5


SHAPES = [(64, 64), (80, 48), (128, 128), (8, 24), (256, 96)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k_size", "v_size"), [(64, 64), (80, 24)])
def test_store(
    draw: random.Random, device: str, k_size: int, v_size: int, dtype: torch.dtype
) -> None:
    cache = Cache(draw, device, 1, k_size, v_size, dtype, block_size=16)
    layer, rows = cache.layer, 11
    slots = torch.tensor(draw.sample(range(16 * 24), rows))
    slots[3] = slots[7] = -1
    key = torch.randn(rows + 2, 5, k_size).to(dtype)[:, :2]  # rows are strided
    value = torch.randn(rows + 2, 2, v_size).to(dtype)
    store(layer, key.to(device), value.to(device), slots.to(device))
    untouched = torch.full_like(cache.bytes_of(0), 255).view(dtype).view(16, -1)
    for block in range(24):
        for head in range(2):
            want = untouched.clone()
            for row, slot in enumerate(slots.tolist()):
                if slot // 16 == block and slot >= 0:
                    want[slot % 16] = torch.cat([key[row, head], value[row, head]])
            got = cache.bytes_of(layer.page(block, head))
            assert torch.equal(got, want.view(torch.uint8).flatten())


def test_store_refuses_another_dtype(draw: random.Random, device: str) -> None:
    cache = Cache(draw, device, 1, 64, 64)
    x = torch.zeros(1, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"keys are torch\.float32"):
        store(cache.layer, x, x, torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize(("k_size", "v_size"), SHAPES)
def test_gather(draw: random.Random, device: str, k_size: int, v_size: int) -> None:
    cache = Cache(draw, device, 1, k_size, v_size, draw.choice([torch.float16, torch.float32]))
    cache.put(["raw", "int8"], 3)
    cache.put(draw.sample(["int8", "int4", "exact", "raw", *CHUNKS], 4), draw.randrange(70))
    source = cache.source(1)
    held = [len(k) for k in cache.keys[1]]
    assert (source.tail_slot + source.tail_length).tolist() == held
    count = 40
    slots = torch.full((2, count), -1)
    for row, n in zip(slots, held, strict=True):
        some = sorted(draw.sample(range(n), min(n, count - 3)))
        row[: len(some)] = torch.tensor(some, dtype=torch.int64)
    key, value, where = compaction.gather(cache.layer, source, slots.to(device))
    assert key is not None and value is not None and where is not None
    # Each alone, and in the pages' type: what is rounded from the same numbers.
    for own, got in (("keys", key), ("values", value), ("positions", where)):
        wanted = {name: name == own for name in ("keys", "values", "positions")}
        alone = compaction.gather(
            cache.layer, source, slots.to(device), **wanted, dtype=torch.float16
        )
        (found,) = [x for x in alone if x is not None]
        torch.testing.assert_close(found, got.to(found.dtype), rtol=1e-3, atol=1e-6)
    for head in range(2):
        mine = slots[head][slots[head] >= 0]
        got_k, got_v = key[head, : len(mine)].cpu(), value[head, : len(mine)].cpu()
        for got, want in ((got_k, cache.keys), (got_v, cache.values)):
            want = want[1][head][mine]
            assert (got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))
        got = where[head, : len(mine)].cpu()
        want = cache.positions[1][head][mine]
        kept = got >= 0
        assert torch.equal(got[kept], want[kept])
        raw_slots = _raw_slots(cache, 1, head)
        assert torch.equal(~kept, torch.tensor([int(s) in raw_slots for s in mine]))


def _raw_slots(cache: Cache, seq: int, head: int) -> set[int]:
    slots, at = set(), 0
    for _, count, codec in cache.entries[cache.begin[seq][head] : cache.end[seq][head]]:
        if codec == CODECS["raw"].number:
            slots |= set(range(at, at + count))
        at += count
    return slots


@pytest.mark.parametrize("codec", ["raw", "exact", "int8", "int4", *CHUNKS])
@pytest.mark.parametrize(("k_size", "v_size"), SHAPES)
def test_pages_keep_what_their_codec_says(
    draw: random.Random, device: str, codec: str, k_size: int, v_size: int
) -> None:
    dtype = draw.choice([torch.float32, torch.float16])
    cache = Cache(draw, device, 1, k_size, v_size, dtype, blocks=8, block_size=64)
    layer, full = cache.layer, cache.layer.capacity(codec)
    counts = [full, draw.randrange(1, full), 0, 3]
    kept = torch.tensor([counts[:2], counts[2:]]).sum(1).max()
    key, value = zip(*(cache.content(int(kept)) for _ in range(2)), strict=True)
    where = torch.randint(1, 900, (2, int(kept))).cumsum(1).int()
    pages = [cache.page() for _ in counts]
    target = Source.of(
        *(torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [2, 4], pages)),
        *(torch.tensor(x, device=device) for x in (counts, [CODECS[codec].number] * 4, [0])),
        0, 0,
    )  # fmt: skip
    compaction.encode(
        layer, target, torch.stack(key).to(device), torch.stack(value).to(device), where.to(device)
    )
    for i, (page, count) in enumerate(zip(pages, counts, strict=True)):
        own = slice(0, counts[0]) if i in (0, 2) else slice(counts[i - 1], counts[i - 1] + count)
        k, v, positions = key[i // 2][own][:count], value[i // 2][own][:count], where[i // 2][own]
        content = cache.bytes_of(page)
        if not count:
            assert (content == 255).all()
            continue
        got_k, got_v, got_where = oracle.decode(content, codec, layer.geometry, count, dtype)
        assert got_where is None or torch.equal(got_where, positions[:count])
        want_k, want_v = oracle.kept(codec, k, v, dtype)
        for got, want, original in ((got_k, want_k, k), (got_v, want_v, v)):
            assert got.isfinite().all()
            if codec in ("raw", "exact"):
                assert torch.equal(got, want)
                continue
            # A tie may be rounded the other way, so single codes may differ by one; of few
            # tokens of a chunk, whose last bits are shared, all that one has.
            close = (got - want).abs() <= rounding(codec) * want.abs().amax()
            assert close.all(-1).sum() > 0.85 * len(close) - (codec in CHUNKS)
            error = (got - original).square().mean()
            assert error <= (want - original).square().mean() * 1.01 + 1e-12
    # Nothing else was written.
    clean = [p for p in range(8 * layer.block_pages) if p not in pages]
    assert all((cache.bytes_of(p) == 255).all() for p in clean)


@pytest.mark.parametrize("codec", ["int8", "int4", *CHUNKS])
def test_extreme_values_do_not_break_a_page(draw: random.Random, device: str, codec: str) -> None:
    cache = Cache(draw, device, 1, 64, 64, torch.float32, kv_heads=1)
    key, value = torch.randn(1, 20, 64), torch.randn(1, 20, 64)
    key[0, 3], value[0, 3] = 0, 0
    key[0, 5], value[0, 5] = 1e-30, 1e-30
    key[0, 7], value[0, 7] = 6e4, -6e4
    key[0, 9], value[0, 9] = 1e30, -1e30
    one = torch.tensor([0], dtype=torch.int32, device=device)
    page = torch.tensor([5], device=device)
    target = Source.of(one, one + 1, page, one + 20, one + CODECS[codec].number, one, 0, 0)
    where = torch.tensor([[*range(10), *range(9 * 10**5, 9 * 10**5 + 10)]], dtype=torch.int32)
    compaction.encode(
        cache.layer, target, key.to(device), value.to(device), where.contiguous().to(device)
    )
    got = oracle.decode(cache.bytes_of(5), codec, cache.layer.geometry, 20, torch.float32)
    assert got[0].isfinite().all() and got[1].isfinite().all()
    assert got[2] is not None and torch.equal(got[2], where[0])


@pytest.mark.parametrize("codec", ["exact", "int8", "int4", *CHUNKS])
def test_compact_onto_its_own_sources(draw: random.Random, device: str, codec: str) -> None:
    """Chosen tokens of all pages and of the tail move into pages that were among the sources."""
    cache = Cache(draw, device, 2, 64, 64, torch.float16)
    cache.put(["int8", "int4"], 50, [40, 60])
    source = cache.source(0)
    n = min(100, 2 * cache.layer.capacity(codec))
    slots = torch.stack([torch.randperm(150)[:n].sort().values for _ in range(2)])
    first = min(n, cache.layer.capacity(codec))
    counts = [first, n - first] * 2
    begin = torch.tensor([0, 2], dtype=torch.int32, device=device)
    target = Source.of(
        begin, begin + 2, source.page, torch.tensor(counts, device=device),
        torch.full((4,), CODECS[codec].number, device=device), source.tail_table, 0, 0,
    )  # fmt: skip
    compaction.compact(cache.layer, source, slots.to(device), target)
    for head in range(2):
        k, v = cache.keys[0][head][slots[head]].float(), cache.values[0][head][slots[head]].float()
        where = cache.positions[0][head][slots[head]]
        at = 0
        for page, count in zip(source.page.tolist()[2 * head :], counts[:2], strict=False):
            own = slice(at, at + count)
            at += count
            if not count:
                continue
            got = oracle.decode(
                cache.bytes_of(page), codec, cache.layer.geometry, count, torch.float16
            )
            want = oracle.kept(codec, k[own], v[own], torch.float16)
            for x, y in zip(got[:2], want, strict=True):
                close = (x - y).abs() <= rounding(codec) * y.abs().amax()
                assert close.all(-1).double().mean() > 0.85
            assert got[2] is not None and torch.equal(got[2], where[own])


@pytest.mark.parametrize(("group", "size"), [(1, 80), (3, 64), (8, 64)])
def test_window_scores(draw: random.Random, device: str, group: int, size: int) -> None:
    cache = Cache(draw, device, group, size, 64, torch.float16)
    # All heads hold equally many tokens, as policies see them.
    cache.put(draw.sample(["int8", "int4", "raw", *CHUNKS], draw.randrange(4)), 45, [13, 40, 32])
    window, held = draw.choice([1, 8, 20]), len(cache.keys[0][0])
    candidates = held - draw.randrange(30)
    queries = torch.randn(2 * group, window, size).half()
    keys = torch.stack(cache.keys[0])
    weights = reference.window_attention(queries.double(), keys, cache.layer.scale)
    want = weights.sum(1)[:, :candidates]
    source = cache.source(0)
    run = (cache.layer, source, queries.to(device), candidates)
    got = window_scores(*run, mean=False, reduce=None).cpu()
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-4)
    pooled = F.max_pool1d(want / window, 5, stride=1, padding=2)
    got = window_scores(*run, pool=5, pool_kind="max", reduce="mean").cpu()
    pooled = pooled.view(2, group, -1).mean(1)
    torch.testing.assert_close(got.double(), pooled, rtol=1e-2, atol=1e-4)
    averaged = F.avg_pool1d(want / window, 3, stride=1, padding=1, count_include_pad=False)
    got = window_scores(*run, pool=3, pool_kind="avg", reduce="max").cpu()
    averaged = averaged.view(2, group, -1).amax(1)
    torch.testing.assert_close(got.double(), averaged, rtol=1e-2, atol=1e-4)
    greatest = weights[..., :candidates].view(2, group, window, -1).amax(1).sum(1)
    got = window_scores(*run, mean=False, reduce="greatest").cpu()
    torch.testing.assert_close(got.double(), greatest, rtol=1e-2, atol=1e-4)


def test_every_codec_has_traits() -> None:
    """The kernels ignore pages of codecs without traits."""
    assert sorted(name for traits in TRAITS for name in traits.pages) == sorted(CODECS)
    planes = [max(planes for _, planes, _ in traits.loops) for traits in TRAITS]
    assert planes == sorted(planes, reverse=True), "attention reads more planes before fewer"
