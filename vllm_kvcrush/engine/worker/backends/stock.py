"""Raw pages under one of vLLM's own attention backends, which sees a compaction only in lengths,
block tables and slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from vllm_kvcrush import gate, ops
from vllm_kvcrush.engine.worker.backends.base import Backend
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops.cpu.tables import LayerTable


def keep(attention: Sequence[Any]) -> Backend:
    """Leaves the model's attention layers as they are, and returns the backend for them. Raises
    ValueError if compaction was not verified with one of them."""
    gate.check_attention(attention)
    for layer in attention:
        if type(layer.impl) is not TritonAttentionImpl:
            raise ValueError(
                f"vllm-kvcrush was not verified with {type(layer.impl).__name__}: start the server "
                "with --attention-backend TRITON_ATTN, or without --kv-policy."
            )
    return Backend(StockCacheLayer, None)


class StockPages:
    """A layer's pages for `Region.of`: the (block, head) pairs of a cache. A page need not be
    contiguous in memory."""

    def __init__(self, cache: Tensor, layers: int):
        self.num_blocks, self.kv_heads, self._block_size, content = cache.shape
        self.block_pages = layers * self.kv_heads
        self.page_bytes = self._block_size * content * cache.itemsize

    def capacity(self, codec: str, head: int = 0) -> int:
        """Returns the number of tokens that a page holds."""
        assert codec == "raw", f"{codec} pages under an attention backend of vLLM's own"
        return self._block_size


class StockCacheLayer:
    """One layer's KV cache as compactions see it: `base.CacheLayer` in any layout that vLLM's
    GPU backends use, [blocks, KV heads, block size, K then V] with any strides.

    Args:
        layer: vLLM's attention layer.
        layers: number of layers.
        tables: must be empty.
    """

    index = 0  # layers stay in the order of their group; where they are stored does not matter

    def __init__(self, layer: Any, layers: int, tables: Mapping[str, LayerTable]):
        assert not tables, "tables of fitted codecs under an attention backend of vLLM's own"
        self._cache: Tensor = layer.kv_cache
        self.heads, self._block_size = self._cache.shape[1:3]
        self._k_size: int = layer.impl.head_size
        self.scale: float = layer.impl.scale
        self.pages = StockPages(self._cache, layers)
        self._head = torch.arange(self.heads, device=self.device).unsqueeze(1)

    @property
    def device(self) -> torch.device:
        """Returns the device of the cache."""
        return self._cache.device

    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Tensor:
        """Returns the blocks of a request, whose slots are all in order."""
        assert region is None
        return tail

    def held(self, source: Tensor, tokens: Sequence[int], exact: bool = True) -> ops.LayerKV:
        slots = torch.arange(max(tokens), device=self.device).unsqueeze(0)
        content = self._cache[self._places(source, slots)]
        return ops.LayerKV(content[..., : self._k_size], content[..., self._k_size :])

    def positions(self, source: Tensor, tokens: Sequence[int]) -> Tensor:
        """Raises AssertionError: only regions with pages of two codecs need this."""
        raise AssertionError("raw pages do not say where their tokens stand")

    def compact(self, source: Tensor, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        # Every layer and head has its own page of each target block, so the first's will do.
        pages = target.page[int(target.begin[0, 0]) : int(target.end[0, 0])]
        blocks = (pages // self.pages.block_pages).to(self.device, non_blocking=True)
        moved = self._cache[self._places(source, slots)]  # a copy: targets may be sources
        places = torch.arange(slots.shape[1], device=self.device).unsqueeze(0)
        self._cache[self._places(blocks, places)] = moved

    def fill(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Sequence[int],
        target: Region,
    ) -> None:
        """Raises AssertionError: only policies that merge need this, and they need our kernels."""
        raise AssertionError("merged tokens under an attention backend of vLLM's own")

    def _places(self, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where slots [heads or 1, n] lie, as indices into the cache that broadcast to
        [heads, n]."""
        return (
            blocks[slots // self._block_size].long(),
            self._head,
            slots % self._block_size,
        )
