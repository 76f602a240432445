"""Pages of fitted codecs: reading, writing, scoring and attending, against plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu import oracle
from tests.gpu.cache import TABLE_LAYER, Cache
from tests.gpu.test_attention import TOLERANCE
from vllm_kvcrush import transform
from vllm_kvcrush.ops import pages_reference as reference
from vllm_kvcrush.ops.triton import fitted_ops
from vllm_kvcrush.ops.triton.cache import Request
from vllm_kvcrush.pages import CODECS, FITTED

SHAPES = [(64, 64), (80, 24), (96, 128), (128, 80), (256, 256)]
DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("codec", FITTED)
@pytest.mark.parametrize(("k_size", "v_size"), SHAPES)
def test_gather(draw: random.Random, device: str, codec: str, k_size: int, v_size: int) -> None:
    dtype = draw.choice(DTYPES)
    cache = Cache(draw, device, 1, k_size, v_size, dtype, blocks=10, fitted_codecs=FITTED)
    others = [c for c in FITTED if c != codec]
    cache.put([codec, draw.choice(others), codec, codec], 20)
    request = cache.request(0)
    held = [len(k) for k in cache.keys[0]]
    count = 50
    slots = torch.full((2, count), -1)
    for row, n in zip(slots, held, strict=True):
        some = sorted(draw.sample(range(n), min(n, count - 3)))
        row[: len(some)] = torch.tensor(some, dtype=torch.int64)
    key = torch.full((2, count, k_size), torch.nan, device=device)
    value = torch.full((2, count, v_size), torch.nan, device=device)
    where = torch.full((2, count), -77, dtype=torch.int32, device=device)
    fitted_ops.gather(cache.layer, codec, request, slots.to(device), key, value, where)
    seen = 0
    for head in range(2):
        mine = slots[head][slots[head] >= 0]
        own = torch.zeros(held[head], dtype=torch.bool)
        at = 0
        for _, n, number in cache.entries[cache.begin[0][head] : cache.end[0][head]]:
            own[at : at + n] = number == CODECS[codec]
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
    target = Request.of(
        *(torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [2, 4], pages)),
        *(torch.tensor(x, device=device) for x in (counts, [CODECS[codec]] * 4, [0])),
        0, 0,
    )  # fmt: skip
    fitted_ops.encode(
        layer, codec, target, *(torch.stack(x).to(device) for x in (key, value)), where.to(device)
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
        assert torch.equal(positions, (transform.origins(p) + torch.arange(count) % 16).int())
        assert len(got.slots) == min(section.exceptions, count)
        want = transform.encode_page(k.double(), v.double(), p, *at, section.exceptions)
        if first == 0 and head == 0:
            assert got.slots[:4].tolist() == [0, 1, 2, 3]
        # Losses that are nearly equal may be ordered the other way.
        same = set(got.slots.tolist()) & set(want.slots.tolist())
        assert len(same) >= len(want.slots) - 2
        plain = torch.ones(count, dtype=torch.bool)
        plain[got.slots] = plain[want.slots] = False
        # A tie may be rounded the other way.
        for mine, its in ((got.key_codes, want.key_codes), (got.value_codes, want.value_codes)):
            error = mine[plain].int() - its[plain].int()
            assert (error.abs() <= 1).all() and (error != 0).sum() <= 1e-3 * error.numel()
        error = got.value_scales[plain].int() - want.value_scales[plain].int()
        assert (error.abs() <= 1).all() and (error != 0).sum() <= 0.05 * error.numel()
        for mine, its in ((got.keys, k), (got.values, v)):
            codes, scale = reference.int8(its[got.slots])
            close = (mine - codes.double() * scale.double()).abs() <= 1e-5 * its.abs().max()
            assert close.double().mean() > 0.999
    clean = [p for p in range(24 * layer.block_pages) if p not in pages]
    assert all((cache.bytes_of(p) == 255).all() for p in clean)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("codec", FITTED)
def test_decode(draw: random.Random, device: str, codec: str, size: int, group: int) -> None:
    cache = Cache(
        draw, device, group, size, size, kv_heads=2 if group == 3 else 1, fitted_codecs=(codec,)
    )
    full = cache.layer.capacity(codec)
    cache.put([codec] * 3, draw.randrange(1, 34), [full, draw.randrange(1, full), 0])
    cache.put([], draw.randrange(1, 50))
    cache.check([1, 1], TOLERANCE[torch.float16], parts=draw.choice([1, 2]))
