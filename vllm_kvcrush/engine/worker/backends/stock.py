"""Raw pages under an attention backend of vLLM's own: lengths, block tables and slots are all that
tells it of a compaction."""

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
    """Leaves the model's attention layers as they are. Raises ValueError if compaction would be
    wrong for one."""
    gate.check_attention(attention)
    for layer in attention:
        if type(layer.impl) is not TritonAttentionImpl:
            raise ValueError(
                f"vllm-kvcrush was not verified with {type(layer.impl).__name__}: start the server "
                "with --attention-backend TRITON_ATTN, or without --kv-policy."
            )
    return Backend(StockCacheLayer, None)


class StockPages:
    """A layer's pages as `Region.of` wants them: the (block, head) pairs of a cache in which no
    page need be one run of bytes."""

    def __init__(self, cache: Tensor, layers: int):
        self.num_blocks, self.kv_heads, self._block_size, content = cache.shape
        self.block_pages = layers * self.kv_heads
        self.page_bytes = self._block_size * content * cache.itemsize

    def capacity(self, codec: str, head: int = 0) -> int:
        """Tokens of a page."""
        assert codec == "raw", f"{codec} pages under an attention backend of vLLM's own"
        return self._block_size


class StockCacheLayer:
    """One layer's KV cache as compactions see it: `base.CacheLayer` in any layout that vLLM's
    GPU backends use, [blocks, KV heads, block size, K then V] by whatever strides.

    Args:
        layer: vLLM's attention layer.
        layers: number of layers.
        tables: none.
    """

    index = 0  # layers are in the order of their group, and nobody asks where they lie

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
        """Where the cache is."""
        return self._cache.device

    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Tensor:
        """The blocks of a request: all its slots are in order."""
        assert region is None
        return tail

    def held(self, source: Tensor, tokens: Sequence[int]) -> ops.LayerKV:
        slots = torch.arange(max(tokens), device=self.device).unsqueeze(0)
        content = self._cache[self._places(source, slots)]
        return ops.LayerKV(content[..., : self._k_size], content[..., self._k_size :])

    def positions(self, source: Tensor, tokens: Sequence[int]) -> Tensor:
        """Asked for where a region has pages of two codecs."""
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
        """Asked for by policies that merge, which have pages of their own."""
        raise AssertionError("merged tokens under an attention backend of vLLM's own")

    def _places(self, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where slots [heads or 1, n] lie: indices of the cache that broadcast to [heads, n]."""
        return (
            blocks[slots // self._block_size].long(),
            self._head,
            slots % self._block_size,
        )
