"""Paged attention over mixed pages against the float64 oracle.

Inputs are drawn anew in each run; a failing test prints the seed, and KVCRUSH_TEST_SEED repeats it.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu import oracle
from tests.gpu.cache import Cache
from tests.pairwise import parametrize
from vllm_kvcrush.codecs import CODECS, reference
from vllm_kvcrush.ops.triton import attention

# Relative to the largest value held: weights and unpacked keys are rounded to the dtype.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@parametrize(
    codec=["raw", "exact", "int8", "int4", "tada", "gear"],
    size=[64, 80, 96, 128, 256],
    group=[1, 3, 4, 8],
    dtype=[torch.bfloat16, torch.float16],
    block_size=[32, 64],
)
def test_decode(
    draw: random.Random,
    device: str,
    codec: str,
    size: int,
    group: int,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    """The cache has full, partial and empty pages, and tails of any length."""
    heads = 2 if group == 3 else 1
    cache = Cache(draw, device, group, size, size, dtype, kv_heads=heads, block_size=block_size)
    full = cache.layer.capacity(codec)
    cache.put([codec] * 3, draw.randrange(1, 34), [full, draw.randrange(1, full), 0])
    cache.put([], draw.randrange(1, 50))
    cache.check([1, 1], TOLERANCE[dtype], parts=draw.choice([1, 2]))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_mixed_pages(draw: random.Random, device: str, dtype: torch.dtype) -> None:
    """There are codecs in any order, many sequences, sequences that hold nothing, and splits
    without work."""
    cache = Cache(
        draw, device, 4, 64, 96, dtype, kv_heads=1, block_size=draw.choice([16, 32, 48, 64])
    )
    several = ["int8", "int4", "raw", "tada", "gear"]
    several += ["exact"] * (cache.layer.capacity("exact") > 0)
    cache.put(draw.sample(several, 4), 21)
    cache.put([], 0)
    cache.put(draw.sample(several, 2), 0)
    cache.put([], 33)
    cache.check([1, 1, 1, 1], TOLERANCE[dtype], parts=4)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("size", [64, 80])
def test_prefill(draw: random.Random, device: str, group: int, size: int) -> None:
    """Rows of ragged chunks attend to compressed pages without a mask, and to the tail up to their
    own token."""
    cache = Cache(draw, device, group, size, 64, kv_heads=1)
    rows = [0, 1, draw.randrange(2, 100 // group + 2)]
    for n in rows:
        codecs = draw.sample(["int8", "int4", "raw", "int4"], 2)
        cache.put(codecs, n + draw.randrange(30), [9, cache.layer.capacity(codecs[1])])
    cache.check(rows, TOLERANCE[torch.float16], parts=2 if group == 3 else 1)


@pytest.mark.parametrize("group", [1, 4])
def test_log_bias(draw: random.Random, device: str, group: int) -> None:
    cache = Cache(draw, device, group, 64, 64, kv_heads=1)
    for tail in (5, 40):
        cache.put(["int8", "int4", "gear", "raw", "tada"], tail)
    cache.check([1, 5], TOLERANCE[torch.float16], bias=True, parts=2)


def test_rows_of_equal_number(draw: random.Random, device: str) -> None:
    """Each sequence has a few rows (as in speculative decoding), and a padded one has none."""
    cache = Cache(draw, device, 4, 64, 64, kv_heads=1)
    for tail in (7, 40, 3, 9):
        cache.put(["int4"], tail)
    rows = [4, 3, 0, 1]
    assert max(rows) <= attention.tiles_for(cache.layer, 4)[0].queries
    cache.check(rows, TOLERANCE[torch.float16], parts=1)


def test_only_the_log_sum(draw: random.Random, device: str) -> None:
    cache = Cache(draw, device, 3, 64, 64)
    cache.put(["int8", "int4", "raw"], 20)
    batch, query = cache.batch([4]), torch.randn(4, 6, 64).half().to(device)
    out, lse = torch.empty(4, 6, 64, device=device), torch.empty(4, 6, device=device)
    attention.attention(cache.layer, batch, query, out, lse)
    alone = torch.full_like(lse, torch.nan)
    attention.attention(cache.layer, batch, query, None, alone, parts=2)
    torch.testing.assert_close(alone, lse, rtol=1e-5, atol=1e-5)


def test_misfits_are_refused(draw: random.Random, device: str) -> None:
    cache = Cache(draw, device, 2, 64, 64)
    cache.put([], 3)
    query = torch.zeros(1, 4, 64).half().to(device)
    with pytest.raises(ValueError, match=r"query \(1, 4, 32\) does not fit"):
        attention.attention(cache.layer, cache.batch([1]), query[..., :32], query)
    with pytest.raises(ValueError, match=r"out \(1, 3, 64\) does not fit"):
        attention.attention(cache.layer, cache.batch([1]), query, query[:, :3])


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_sink_leaves_the_others_their_weights(
    draw: random.Random, device: str, codec: str
) -> None:
    """One token has nearly all of the attention and the value 0, so the result is the others', in
    float16 too."""
    cache = Cache(draw, device, 1, 64, 64, kv_heads=1)
    layer, n = cache.layer, cache.layer.capacity(codec)
    key, value = 0.1 * torch.randn(n, 64), torch.randn(n, 64) + 0.5
    query = torch.randn(1, 1, 64).half().float()
    # Weight of the sink: some 20000 times all others together.
    key[0] = query[0, 0] / query.norm() ** 2 * (10 + torch.tensor(float(n)).log()) / layer.scale
    value[0] = 0
    page = cache.page()
    cache.fill(page, codec, key, value, None)
    key, value = oracle.kept(codec, key, value, cache.dtype)
    cache.entries, cache.begin, cache.end = [(page, n, CODECS[codec].number)], [[0]], [[1]]
    cache.tails, cache.lengths = [[]], [0]
    out = torch.full((1, 1, 64), torch.nan, device=device)
    attention.attention(layer, cache.batch([1]), query.half().to(device), out)
    want, _ = reference.attention(query, [key], [value], layer.scale, 0)
    assert (out.cpu() - want).abs().max() < 0.05 * want.abs().max()
