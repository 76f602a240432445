"""What every attention backend offers: the cache as compactions see it, and how one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.engine.worker.region import Pages, Region
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.cpu.tables import LayerTable
from vllm_kvcrush.policies.base import LayerKV


class CacheLayer(Protocol):
    """One layer's KV cache as compactions see it; `source` makes what the others take.

    Attributes:
        index: of the layer among those that share the cache's storage, in the order of its pages.
        heads: KV heads of this rank.
        scale: factor of q·k.
        pages: what its pages are, for `Region.of`.
        device: of its cache.
    """

    index: int
    heads: int
    scale: float

    @property
    def pages(self) -> Pages: ...
    @property
    def device(self) -> torch.device: ...
    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Any:
        """Describes a request: its region, then `tokens` raw ones in the blocks `tail` (int32), the
        first of which stands at `position`."""
        ...

    def held(self, source: Any, tokens: Sequence[int]) -> LayerKV:
        """Returns the first `tokens` tokens of each head of a request."""
        ...

    def positions(self, source: Any, tokens: Sequence[int]) -> Tensor:
        """Returns where each head's first `tokens` slots stand, int32 `[heads, most]`; in pages of
        fitted codecs exactly only for the first of each strip."""
        ...

    def compact(self, source: Any, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        """Moves the first `counts` of each head's slots (int64 `[heads, k]`, each page's in
        position order) into the pages of `target`, which may be among the request's own: all is
        read before any is written."""
        ...

    def fill(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Sequence[int],
        target: Region,
    ) -> None:
        """Encodes the first `counts` tokens of each head, float32 `[heads, k, size]` at ascending
        positions int32 `[heads, k]`, into the pages of `target`."""
        ...


class Backend(NamedTuple):
    """How a worker's attention and compactions are done.

    Attributes:
        layer: makes a CacheLayer of (vLLM's attention layer, number of layers, its tables).
        builder: metadata builder that is told the regions of the requests in a batch, or None
            where all pages are raw or regions lie in a directory.
        table: makes what `layer` wants for a fitted codec; arguments as `LayerTable`.
        directory: makes the directory in which attention finds the regions of requests, or None;
            arguments as `directory.ResidentDirectory`, which not every backend can import.
    """

    layer: Callable[[Any, int, Mapping[str, Any]], CacheLayer]
    builder: Any
    table: Callable[[Tables, int, range, int, int, Angles], Any] = LayerTable
    directory: Callable[..., Any] | None = None


def pages_of(
    kernels: Callable[..., Any], layer: Any, layers: int, tables: Mapping[str, Any]
) -> Any:
    """Returns a layer's pages in the pool that all layers share, as `kernels` (`ops.cpu.Layer` or
    `ops.triton.cache.Layer`) sees them, and leaves them and the layer's index with the layer's
    implementation, whose kernels read them.

    Args:
        kernels: makes the result.
        layer: vLLM's attention layer, whose cache is [blocks, KV heads, block size, K then V] with
            blocks outermost in storage.
        layers: number of layers that share the storage.
        tables: of fitted codecs for this layer, by name.
    """
    cache, impl = layer.kv_cache, layer.impl
    _, heads, block_size, content = cache.shape
    storage = torch.empty(0, dtype=torch.uint8, device=cache.device)
    storage.set_(cache.untyped_storage())
    page_bytes = block_size * content * cache.itemsize
    index, odd = divmod(cache.data_ptr() - storage.data_ptr(), heads * page_bytes)
    block_bytes = layers * heads * page_bytes
    assert not odd and index < layers, "a layer's pages do not lie where blocks are outermost"
    assert cache.stride(0) * cache.itemsize == block_bytes, "blocks are not outermost"
    impl.index, impl.cache = (
        index,
        kernels(
            storage[: len(storage) // block_bytes * block_bytes],
            index=index,
            layers=layers,
            heads=impl.num_heads,
            kv_heads=heads,
            k_size=impl.head_size,
            v_size=content - impl.head_size,
            block_size=block_size,
            dtype=cache.dtype,
            scale=impl.scale,
            tables=tables,
        ),
    )
    return impl.cache
