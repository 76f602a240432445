"""The runner's parts alone."""

from __future__ import annotations

import random
import types

import pytest
import torch

from vllm_kvcrush.engine.backend_stock import StockCacheLayer
from vllm_kvcrush.engine.region import Region
from vllm_kvcrush.ops.triton.shift import shift
from vllm_kvcrush.plan import Part


@pytest.mark.parametrize("rows", [[1, 1, 1], [5, 1, 1100], [7]])
def test_shift(rows: list[int]) -> None:
    states = random.sample(range(6), len(rows))
    evicted = torch.randint(0, 90, (6,), dtype=torch.int32)
    computed = torch.randint(100, 200, (len(rows),))
    start = torch.tensor([0, *rows]).cumsum(0).int()
    positions = torch.cat([c + torch.arange(n) for c, n in zip(computed, rows, strict=True)])
    lengths = torch.full((6,), 77, dtype=torch.int32)
    slots = torch.full((len(positions) + 4,), -77)
    seq_lens = (computed + torch.tensor(rows)).int()
    index = torch.tensor(states)
    if len(rows) == 3:
        index[1] = -1  # a row of nobody
    shift(lengths, slots, seq_lens, positions, index, start, evicted)
    gone = torch.where(index >= 0, evicted[index], 0)
    assert torch.equal(lengths[: len(rows)], seq_lens - gone)
    assert (lengths[len(rows) :] == 0).all()
    want = positions - gone.long().repeat_interleave(torch.tensor(rows))
    assert torch.equal(slots[: len(want)], want)
    assert (slots[len(want) :] == -77).all()


@pytest.mark.parametrize("order", ["BHN", "BNH", "HBN"])
def test_raw_pages_in_any_layout(order: str) -> None:
    """Survivors of a request move, in place too, whatever the strides; nothing else changes."""
    blocks, heads, size, k_size, layers = 9, 3, 4, 5, 2
    axes = [order.index(axis) for axis in "BHN"]
    sizes = dict(zip("BHN", (blocks, heads, size), strict=True))
    storage = torch.randn(*[sizes[axis] for axis in order], 2 * k_size)
    cache = storage.permute(*axes, 3)
    assert cache.shape == (blocks, heads, size, 2 * k_size)
    impl = types.SimpleNamespace(head_size=k_size, scale=0.5)
    layer = StockCacheLayer(types.SimpleNamespace(kv_cache=cache, impl=impl), layers, {})
    before = cache.clone()
    source, held = [7, 2, 5, 8], 14
    tail = torch.tensor(source, dtype=torch.int32)
    request = layer.request(None, tail, held, 0)

    def tokens(table: list[int], content: torch.Tensor) -> torch.Tensor:
        return torch.cat([content[block] for block in table], 1)  # [heads, slots, 2 * k_size]

    keys_values = tokens(source, before)[:, :held]
    seen = layer.held(request, held)
    assert torch.equal(torch.cat([seen.keys, seen.values], -1), keys_values)
    # Six survivors of each head, into two blocks, one of them a source.
    kept = torch.stack([torch.randperm(12)[:6].sort().values for _ in range(heads)])
    target = Region.of([2, 4], [Part("raw", 6)], [layer.pages] * layers)
    layer.compact(request, kept, target, None)
    want = keys_values.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2 * k_size))
    assert torch.equal(tokens([2, 4], cache)[:, :6], want)
    untouched = [b for b in range(blocks) if b not in (2, 4)]
    assert torch.equal(cache[untouched], before[untouched])
    assert torch.equal(cache[4, :, 2:], before[4, :, 2:])
