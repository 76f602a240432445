"""What every attention backend offers: the cache as compactions see it, and how it is made."""

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
    """One layer's KV cache as compactions see it. The other methods take what `source` returns.

    Attributes:
        index: index of the layer among those that share the cache's storage, in the order of their
            pages.
        heads: number of KV heads of this rank.
        scale: factor of q·k.
        pages: the layer's pages, for `Region.of`.
        device: device of the cache.
    """

    index: int
    heads: int
    scale: float

    @property
    def pages(self) -> Pages: ...
    @property
    def device(self) -> torch.device: ...
    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Any:
        """Returns a description of what a request holds: its region, then `tokens` raw tokens in
        the blocks `tail` (int32), the first of them at `position`."""
        ...

    def held(self, source: Any, tokens: Sequence[int], exact: bool = True) -> LayerKV:
        """Returns the first `tokens` tokens of each head of a request. Unless `exact`, keys and
        values may be of the pages' dtype also where pages tell them more exactly."""
        ...

    def positions(self, source: Any, tokens: Sequence[int]) -> Tensor:
        """Returns the positions of each head's first `tokens` slots, int32 `[heads, most]`. In
        pages of fitted codecs they are exact only for the first token of each strip."""
        ...

    def compact(self, source: Any, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        """Moves the first `counts` of each head's slots, int64 `[heads, k]`, into the pages of
        `target`. The slots of each page are in position order. Target pages may be among the
        request's own: everything is read before anything is written."""
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


class CacheLayers(Protocol):
    """All layers of a KV cache, for what can be done in several of them at once."""

    def at_once(self, tokens: int, codecs: Sequence[str]) -> int:
        """Returns of how many layers `compact` may move up to `tokens` tokens of each head into
        pages of `codecs`, so that what it takes for that stays within bounds; 1 or more."""
        ...

    def compact(
        self,
        layers: range,
        old: Region | None,
        tail: Tensor,
        tokens: int,
        position: int,
        slots: Tensor,
        alike: bool,
        target: Region,
    ) -> None:
        """Does what `CacheLayer.compact` does in each of `layers`, with the source that
        `CacheLayer.source` makes of `old` and what follows it. All of it is read before anything
        is written.

        Args:
            slots: int64 [layers * heads, k], a layer's heads after the other's; of each head as
                many count as `target` has tokens of it.
            alike: whether these are k everywhere.
        """
        ...


class Backend(NamedTuple):
    """How a worker's attention and compactions are done.

    Attributes:
        layer: makes a CacheLayer from vLLM's attention layer, the number of layers, and the layer's
            tables.
        builder: metadata builder whose `regions` are set to those of the requests in a batch, or
            None where all pages are raw or regions lie in a directory.
        table: makes the table of one fitted codec that `layer` takes; arguments are those of
            `LayerTable`.
        directory: makes the directory in which attention finds the regions of requests, or None;
            arguments are those of `directory.ResidentDirectory`, which not all backends import.
        together: makes CacheLayers of all CacheLayers in the order of their pages, or None.
    """

    layer: Callable[[Any, int, Mapping[str, Any]], CacheLayer]
    builder: Any
    table: Callable[[Tables, int, range, int, int, Angles], Any] = LayerTable
    directory: Callable[..., Any] | None = None
    together: Callable[[Any], CacheLayers] | None = None


def pages_of(
    kernels: Callable[..., Any], layer: Any, layers: int, tables: Mapping[str, Any]
) -> Any:
    """Returns a layer's pages in the pool that all layers share, and sets them and the layer's
    index as `cache` and `index` of the layer's implementation, whose kernels read them.

    Args:
        kernels: makes the result: `ops.cpu.Layer` or `ops.triton.cache.Layer`.
        layer: vLLM's attention layer, whose cache is [blocks, KV heads, block size, K then V] with
            blocks outermost in storage.
        layers: number of layers that share the storage.
        tables: by name, the layer's tables of fitted codecs.
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
