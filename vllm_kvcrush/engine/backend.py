"""vLLM's CPU attention seen from a compaction: cache contents in, cache contents out, and the
queries of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CacheLayer:
    """One layer's KV cache, `[blocks, kv_heads, block_size, 2 * head_size]` as vLLM's CPU kernel
    stores it. That kernel tiles K inside a block in a way that depends on ISA and dtype, so the
    order is read off once, through the kernel's own store, instead of being assumed."""

    def __init__(self, layer: Any, cache: Tensor):
        self.layer = layer
        self.cache = cache
        self.num_blocks, self.heads, self.block_size, double = cache.shape
        self.head_size = double // 2
        self._flat = cache.view(self.num_blocks, self.heads, -1)
        order = self._probe()
        half = self.block_size * self.head_size
        plain = torch.arange(half)
        transposed = plain.view(self.head_size, self.block_size).t().reshape(-1)
        self._k_transposed = bool((order[:half] == transposed).all())
        self._v_plain = bool((order[half:] == plain + half).all())
        self._k_order, self._v_order = order[:half], order[half:]

    def _probe(self) -> Tensor:
        """Offset of every (K or V, token, channel) inside a block: stores its index, seven bits
        at a time (exact in every float dtype), and looks where it lands."""
        size = self.block_size * self.head_size
        index = torch.arange(2 * size)
        found = torch.zeros(2 * size, dtype=torch.int64)
        scratch = torch.zeros(1, self.heads, *self.cache.shape[2:], dtype=self.cache.dtype)
        shape = (self.block_size, 1, self.head_size)
        for shift in range(0, (2 * size).bit_length(), 7):
            digits = ((index >> shift) & 127).to(self.cache.dtype)
            key, value = (
                part.view(shape).expand(-1, self.heads, -1).contiguous()
                for part in (digits[:size], digits[size:])
            )
            self._store(key, value, scratch, torch.arange(self.block_size))
            found |= scratch[0, 0].reshape(-1).to(torch.int64) << shift
        order = torch.empty_like(found)
        order[found] = index
        assert torch.equal(found[order], index), "vLLM's CPU cache store is not a permutation"
        return order

    def _store(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        self.layer.impl.do_kv_cache_update(self.layer, key, value, cache, slots)

    def keys(self, blocks: Tensor) -> Tensor:
        """All keys of the blocks, in slot order: `[heads, len(blocks) * block_size, head_size]`."""
        half = self.block_size * self.head_size
        part = self._flat[:, :, :half]
        if self._k_transposed:
            tiles = part.view(*part.shape[:2], self.head_size, self.block_size)[blocks]
            return tiles.permute(1, 0, 3, 2).reshape(self.heads, -1, self.head_size)
        return self._reorder(part[blocks], self._k_order)

    def values(self, blocks: Tensor, slots: Tensor | None = None) -> Tensor:
        """Values of the blocks, or of `slots` `[heads, k]` among them: `[heads, k, head_size]`."""
        half = self.block_size * self.head_size
        part = self._flat[:, :, half:]
        if not self._v_plain:
            values = self._reorder(part[blocks], self._v_order - half)
            return values if slots is None else gather(values, slots)
        rows = part.view(*part.shape[:2], self.block_size, self.head_size)
        if slots is None:
            return rows[blocks].permute(1, 0, 2, 3).reshape(self.heads, -1, self.head_size)
        heads = torch.arange(self.heads).unsqueeze(1)
        return rows[blocks[slots // self.block_size], heads, slots % self.block_size]

    def _reorder(self, tiles: Tensor, order: Tensor) -> Tensor:
        rows = tiles.index_select(2, order).view(len(tiles), self.heads, -1, self.head_size)
        return rows.permute(1, 0, 2, 3).reshape(self.heads, -1, self.head_size)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Stores `[heads, k, head_size]` keys and values into global slots `[k]`."""
        self._store(
            keys.transpose(0, 1).contiguous(),
            values.transpose(0, 1).contiguous(),
            self.cache,
            slots,
        )


def gather(rows: Tensor, slots: Tensor) -> Tensor:
    """`rows [heads, n, d]` at `slots [heads, k]` → `[heads, k, d]`."""
    return rows.gather(1, slots.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


class QueryTap:
    """Copies chosen rows of every layer's queries during one forward pass."""

    def __init__(self, layers: Sequence[Any]):
        self.rows: Tensor | None = None
        self._taken: list[Tensor | None] = [None] * len(layers)
        for index, layer in enumerate(layers):
            self._wrap(index, layer.impl)

    def _wrap(self, index: int, impl: Any) -> None:
        forward = impl.forward

        def tapped(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rows is not None:
                # A copy: the model reuses its buffers.
                self._taken[index] = query.index_select(0, self.rows)
            return forward(layer, query, *args, **kwargs)

        impl.forward = tapped

    def take(self) -> Tensor:
        """The rows of the last forward pass: `[layers, rows, query_heads, head_size]`."""
        taken, self._taken = self._taken, [None] * len(self._taken)
        self.rows = None
        assert all(t is not None for t in taken), "a layer's attention did not run"
        return torch.stack([t for t in taken if t is not None])
