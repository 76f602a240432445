"""Pages of fitted codecs: reading, writing, scoring and attending, against plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu import oracle
from tests.gpu.cache import TABLE_LAYER, Cache
from tests.gpu.test_attention import TOLERANCE
from vllm_kvcrush.codecs import CODECS, FITTED, reference
from vllm_kvcrush.codecs.transform.reference import encode_page, origins
from vllm_kvcrush.ops import reference as plain
from vllm_kvcrush.ops.triton import attention, compaction
from vllm_kvcrush.ops.triton.cache import Source
from vllm_kvcrush.ops.triton.scores import window_scores

SHAPES = [(64, 64), (80, 24), (96, 128), (256, 80)]
DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("codec", FITTED)
@pytest.mark.parametrize(("k_size", "v_size"), SHAPES)
def test_gather(draw: random.Random, device: str, codec: str, k_size: int, v_size: int) -> None:
    dtype = draw.choice(DTYPES)
    cache = Cache(draw, device, 1, k_size, v_size, dtype, blocks=10, fitted_codecs=FITTED)
    others = [c for c in FITTED if c != codec]
    counts = [10**6, *draw.choices([0, 5, 100, 10**6], k=3)]  # cut to what a page holds
    cache.put([codec, draw.choice(others), codec, codec], 20, counts)
    source = cache.source(0)
    held = [len(k) for k in cache.keys[0]]
    count = 50
    slots = torch.full((2, count), -1)
    for row, n in zip(slots, held, strict=True):
        some = sorted(draw.sample(range(n), min(n, count - 3)))
        row[: len(some)] = torch.tensor(some, dtype=torch.int64)
    key = torch.full((2, count, k_size), torch.nan, device=device)
    value = torch.full((2, count, v_size), torch.nan, device=device)
    where = torch.full((2, count), -77, dtype=torch.int32, device=device)
    for variant in cache.layer.variants(codec):
        compaction.gather_pages(cache.layer, variant, source, slots.to(device), key, value, where)
    seen = 0
    for head in range(2):
        mine = slots[head][slots[head] >= 0]
        own = torch.zeros(held[head], dtype=torch.bool)
        at = 0
        for _, n, number in cache.entries[cache.begin[0][head] : cache.end[0][head]]:
            own[at : at + n] = number == CODECS[codec].number
            at += n
        inside = torch.zeros(count, dtype=torch.bool)
        inside[: len(mine)] = own[mine]
        mine = mine[own[mine]]
        seen += len(mine)
        for got, want in ((key, cache.keys), (value, cache.values)):
            largest = max(1.0, *(float(x.abs().max()) for x in want[0]))
            got, want = got[head].cpu(), want[0][head][mine]
            assert got[~inside].isnan().all()
            close = 1e-5 if dtype == torch.float32 else 1e-4
            assert ((got[inside] - want).abs() <= close * largest).all()
        got = where[head].cpu()
        assert (got[~inside] == -77).all()
        assert torch.equal(got[inside], cache.positions[0][head][mine])
    assert seen > 0


@pytest.mark.parametrize("codec", FITTED)
@pytest.mark.parametrize(("k_size", "v_size"), SHAPES)
def test_pages_keep_what_their_codec_says(
    draw: random.Random, device: str, codec: str, k_size: int, v_size: int
) -> None:
    cache = Cache(draw, device, 1, k_size, v_size, draw.choice(DTYPES), fitted_codecs=(codec,))
    layer, tables = cache.layer, cache.tables[codec]
    full = [layer.capacity(codec, head) for head in range(2)]
    counts = [full[0], draw.randrange(1, 30), 0, full[1]]
    n = max(sum(counts[:2]), sum(counts[2:]))
    key, value = zip(*(cache.content(n) for _ in range(2)), strict=True)
    # The first head's tokens begin a request, the second's come from far behind.
    where = torch.stack([torch.arange(n), 65_500 + torch.randint(1, 9, (n,)).cumsum(0)])
    where = where.int()
    pages = [cache.page() for _ in counts]
    target = Source.of(
        *(torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [2, 4], pages)),
        *(torch.tensor(x, device=device) for x in (counts, [CODECS[codec].number] * 4, [0])),
        0, 0,
    )  # fmt: skip
    compaction.encode(
        layer, target, *(torch.stack(x).to(device) for x in (key, value)), where.to(device)
    )
    for i, (page, count) in enumerate(zip(pages, counts, strict=True)):
        head = i // 2
        first = 0 if i in (0, 2) else counts[i - 1]
        own = slice(first, first + count)
        content = cache.bytes_of(page)
        if not count:
            assert (content == 255).all()
            continue
        section = layer.fitted.sections[codec][head]
        at = (tables, TABLE_LAYER, head)
        got, positions = oracle.decode_fitted(content, section, layer.geometry, count, *at)
        k, v, p = key[head][own], value[head][own], where[head][own]
        assert torch.equal(positions, (origins(p) + torch.arange(count) % 16).int())
        assert len(got.slots) == min(section.exceptions, count)
        want = encode_page(k, v, p, *at, section.exceptions)
        if first == 0 and head == 0:
            assert got.slots[:4].tolist() == [0, 1, 2, 3]
        # Losses that are nearly equal may be ordered the other way.
        same = set(got.slots.tolist()) & set(want.slots.tolist())
        assert len(same) >= len(want.slots) - 2
        usual = torch.ones(count, dtype=torch.bool)
        usual[got.slots] = usual[want.slots] = False
        # A tie may be rounded the other way.
        for mine, its in ((got.key_codes, want.key_codes), (got.value_codes, want.value_codes)):
            error = mine[usual].int() - its[usual].int()
            assert (error.abs() <= 1).all() and (error != 0).sum() <= 1e-3 * error.numel()
        error = got.value_scales[usual].int() - want.value_scales[usual].int()
        assert (error.abs() <= 1).all() and (error != 0).sum() <= 0.05 * error.numel()
        for mine, its in ((got.keys, k), (got.values, v)):
            codes, scale = reference.int8(its[got.slots])
            close = (mine - codes.double() * scale.double()).abs() <= 1e-5 * its.abs().max()
            assert close.double().mean() > 0.999
    clean = [p for p in range(24 * layer.block_pages) if p not in pages]
    assert all((cache.bytes_of(p) == 255).all() for p in clean)


@pytest.mark.parametrize(("size", "group"), [(64, 1), (80, 8), (96, 3), (128, 4), (256, 2)])
@pytest.mark.parametrize("codec", FITTED)
def test_decode(draw: random.Random, device: str, codec: str, size: int, group: int) -> None:
    """The cache has full, partial and empty pages, tails of any length, and heads that hold unequal
    numbers of tokens."""
    cache = Cache(
        draw, device, group, size, size, kv_heads=2 if group == 3 else 1, fitted_codecs=(codec,)
    )
    full = cache.layer.capacity(codec)
    cache.put([codec] * 3, draw.randrange(1, 34), [full, draw.randrange(1, full), 0])
    cache.put([], draw.randrange(1, 50))
    cache.check([1, 1], TOLERANCE[torch.float16], parts=draw.choice([1, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_of_all_codecs(draw: random.Random, device: str, dtype: torch.dtype) -> None:
    """The codecs are in any order, in sequences that hold some of them or none, and there are
    splits without work."""
    cache = Cache(draw, device, 4, 64, 96, dtype, kv_heads=1, fitted_codecs=FITTED)
    some = [*FITTED, "int8", "int4", "raw", "exact", *FITTED]
    cache.put(draw.sample(some, 6), 21)
    cache.put([], 5)
    cache.put(draw.sample(some, 2), 0)
    cache.put(["tc6", "int4", "tc8"], 33)
    cache.check([1, 1, 1, 1], TOLERANCE[dtype], parts=4)


@pytest.mark.parametrize("group", [1, 4])
def test_prefill_with_log_bias(draw: random.Random, device: str, group: int) -> None:
    """Exceptions get their own token's bias too."""
    cache = Cache(draw, device, group, 64, 64, kv_heads=1, fitted_codecs=FITTED)
    # Up to three blocks of rows.
    rows = [0, 1, draw.randrange(2, 100 // group)]
    for n in rows:
        codecs = [*draw.sample(FITTED, 2), draw.choice(["int8", "int4"])]
        cache.put(codecs, n + draw.randrange(30), [45, cache.layer.capacity(codecs[1]), 9])
    cache.check(rows, TOLERANCE[torch.float16], bias=True, parts=draw.choice([1, 2]))


def test_only_the_log_sum(draw: random.Random, device: str) -> None:
    cache = Cache(draw, device, 3, 64, 64, fitted_codecs=FITTED)
    cache.put(["tc8", "tc4", "int8"], 20)
    batch, query = cache.batch([4]), torch.randn(4, 6, 64).half().to(device)
    out, lse = torch.empty(4, 6, 64, device=device), torch.empty(4, 6, device=device)
    attention.attention(cache.layer, batch, query, out, lse)
    alone = torch.full_like(lse, torch.nan)
    attention.attention(cache.layer, batch, query, None, alone, parts=2)
    torch.testing.assert_close(alone, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "size"), [(1, 80), (3, 64)])
def test_window_scores(draw: random.Random, device: str, group: int, size: int) -> None:
    cache = Cache(draw, device, group, size, 64, fitted_codecs=FITTED)
    codecs = [*draw.sample(FITTED, 2), "int4"]
    # All heads hold equally many tokens, as policies see them.
    cache.put(codecs, 45, [min(37, cache.layer.capacity(codecs[0], 1)), 40, 32])
    window, held = draw.choice([1, 20]), len(cache.keys[0][0])
    candidates = held - draw.randrange(60)
    queries = torch.randn(2 * group, window, size).half()
    keys = torch.stack(cache.keys[0])
    weights = plain.window_attention(queries.double(), keys, cache.layer.scale)
    run = (cache.layer, cache.source(0), queries.to(device), candidates)
    got = window_scores(*run, mean=False, reduce=None).cpu()
    want = weights.sum(1)[:, :candidates]
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("codec", FITTED)
def test_compact_onto_its_own_sources(draw: random.Random, device: str, codec: str) -> None:
    """Tokens that stay in their places within strips keep their codes when they are written again,
    and all are read before their pages are written."""
    cache = Cache(draw, device, 2, 64, 64, fitted_codecs=FITTED)
    layer, tables = cache.layer, cache.tables[codec]
    n = 16 * min(4, layer.capacity(codec, 0) // 16, layer.capacity(codec, 1) // 16)
    cache.put([codec, "int8"], 50, [n, 40])
    source = cache.source(0)
    slots = torch.stack([torch.randperm(n + 90)[: n - 5].sort().values for _ in range(2)])
    counts = [n - 5, 0] * 2
    begin = torch.tensor([0, 2], dtype=torch.int32, device=device)
    target = Source.of(
        begin, begin + 2, source.page, torch.tensor(counts, device=device),
        torch.full((4,), CODECS[codec].number, device=device), source.tail_table, 0, 0,
    )  # fmt: skip
    where = [x[s] for x, s in zip(cache.positions[0], slots, strict=True)]
    keys = [x[s] for x, s in zip(cache.keys[0], slots, strict=True)]
    values = [x[s] for x, s in zip(cache.values[0], slots, strict=True)]
    compaction.compact(layer, source, slots.to(device), target)
    for head, page in enumerate(source.page.tolist()[::2]):
        at, section = (tables, TABLE_LAYER, head), layer.fitted.sections[codec][head]
        got, _ = oracle.decode_fitted(cache.bytes_of(page), section, layer.geometry, n - 5, *at)
        want = encode_page(keys[head], values[head], where[head], *at, section.exceptions)
        same = (got.key_codes == want.key_codes).double().mean()
        assert same > 0.99 and (got.value_codes == want.value_codes).double().mean() > 0.99
