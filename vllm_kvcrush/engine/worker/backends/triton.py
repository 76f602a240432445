"""Attention through our own GPU kernels, over one pool of pages: what `cpu.py` is on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcrush import gate
from vllm_kvcrush.engine.worker.backends.base import Backend, pages_of
from vllm_kvcrush.engine.worker.directory import ResidentDirectory, UploadedRegion
from vllm_kvcrush.engine.worker.memory import copies, staged_layers
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.cache import Batch, Layer, Source
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable
from vllm_kvcrush.ops.triton.layer_kv import LayerKV
from vllm_kvcrush.ops.triton.store import store


class KVCrushTritonBackend(TritonAttentionBackend):
    """vLLM's Triton backend with our kernels."""

    forward_includes_kv_cache_update = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return KVCrushTritonImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return KVCrushTritonMetadataBuilder


@dataclass
class Metadata:
    """What the layers need to know of a step. `batches` has one for each layer, or a single one for
    all if no request has compressed pages."""

    num_actual_tokens: int
    slot_mapping: Tensor
    batches: list[Batch]

    def of(self, layer: int) -> Batch:
        """The batch as layer number `layer` sees it."""
        return self.batches[layer if len(self.batches) > 1 else 0]


class KVCrushTritonMetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Hands vLLM's tensors on, and with them the directory, which is on the device already: nothing
    is computed or copied at a step. The runner leaves three things here.

    Attributes:
        directory: of all requests.
        states: int32 [most requests], vLLM's state of each row of the batch, -1 past its end; its
            address never changes.
        paged: whether a request of the batch has compressed pages.
    """

    directory: ResidentDirectory
    states: Tensor
    paged: bool = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # Tiles are compiled in: those of decode, which a graph of single tokens has, are no good
        # for a chunk of a prompt.
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        # Without compressed pages the kernel that knows none has the more registers.
        return self._metadata(common_attn_metadata, self.paged)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> Metadata:
        # Whoever is replayed may have any pages.
        return self._metadata(common_attn_metadata, True)

    def _metadata(self, common: CommonAttentionMetadata, paged: bool) -> Metadata:
        n = common.num_reqs
        rows = (common.query_start_loc[: n + 1], common.seq_lens[:n], common.block_table_tensor[:n])
        states, longest = self.states[:n], common.max_query_len
        directories = self.directory.layers if paged else [None]
        batches = [Batch(*rows, states, own, longest) for own in directories]
        return Metadata(common.num_actual_tokens, common.slot_mapping, batches)


class KVCrushTritonImpl(TritonAttentionImpl):
    """One layer's attention. `cache` and the layer's `index` are set when the cache exists."""

    cache: Layer
    index: int

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Stores this step's keys and values and attends; shapes as in vLLM's own `forward`."""
        if attn_metadata is None:
            return output.fill_(0)
        n = attn_metadata.num_actual_tokens
        store(self.cache, key[:n], value[:n], attn_metadata.slot_mapping[:n])
        attention(self.cache, attn_metadata.of(self.index), query[:n], output[:n])
        return output


def install(attention: Sequence[Any]) -> Backend:
    """Gives the model's attention layers our backend in place of vLLM's Triton one. Raises
    ValueError if one does what ours does not."""
    gate.check_attention(attention)
    for layer in attention:
        impl = layer.impl
        if type(impl) is not TritonAttentionImpl:
            raise ValueError(
                f"vllm-kvcrush replaces vLLM's Triton attention, and this model has "
                f"{type(impl).__name__}: start the server with --attention-backend TRITON_ATTN, or "
                "without --kv-policy."
            )
        impl.__class__ = KVCrushTritonImpl
        layer.attn_backend = KVCrushTritonBackend
    return Backend(TritonCacheLayer, None, LayerTable, ResidentDirectory, TritonCacheLayers)


class TritonCacheLayer:
    """One layer's KV cache as compactions see it: `base.CacheLayer` on the GPU kernels.

    Args:
        layer: vLLM's attention layer, whose cache is laid out block-outermost.
        layers: number of layers that share its storage.
        tables: of fitted codecs for this layer, by name.
    """

    def __init__(self, layer: Any, layers: int, tables: Mapping[str, LayerTable]):
        self.pages: Layer = pages_of(Layer, layer, layers, tables)
        self.index, self.heads = layer.impl.index, self.pages.kv_heads
        self.scale = self.pages.scale

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.pages.pool.device

    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Source:
        """See `base.CacheLayer`, as for all of these."""
        if region is None:
            return _raw(self.heads, self.device, tail, tokens, position)
        there = UploadedRegion.of(region, self.device)
        return there.source(self.index, tail, tokens, position)

    def held(self, source: Source, tokens: Sequence[int], exact: bool = True) -> LayerKV:
        dtype = torch.float32 if exact else self.pages.dtype
        return LayerKV(self.pages, source, tokens, dtype)

    def positions(self, source: Source, tokens: Sequence[int]) -> Tensor:
        return compaction.positions(self.pages, source, tokens)

    def compact(self, source: Source, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        to = self._target(target)
        own = slots if min(counts) >= slots.shape[1] else compaction.within(slots, to.tail_slot)
        compaction.compact(self.pages, source, own, to)

    def fill(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Sequence[int],
        target: Region,
    ) -> None:
        compaction.fill(self.pages, keys, values, positions, counts, self._target(target))

    def _target(self, region: Region) -> Source:
        return self.source(region, _zeros(self.heads, self.device)[:0], 0, 0)


class TritonCacheLayers:
    """`base.CacheLayers` on the GPU kernels: what they do for a layer they do for the KV heads of
    several at once, whose pages follow each other."""

    def __init__(self, layers: Sequence[TritonCacheLayer]):
        self._heads, self._device = layers[0].heads, layers[0].device
        self._whole = Layer.joined([layer.pages for layer in layers])
        self._parts: dict[range, Layer] = {range(len(layers)): self._whole}

    def at_once(self, tokens: int, codecs: Sequence[str]) -> int:
        """See `base.CacheLayers`, as for all of these."""
        layer = self._whole
        size = self._heads * tokens * (layer.k_size + layer.v_size)
        return staged_layers(size * copies("gear" in codecs))

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
        if layers not in self._parts:
            first, heads = layers.start * self._heads, len(layers) * self._heads
            self._parts[layers] = self._whole.part(first, heads)
        part = self._parts[layers]
        if old is None:
            source = _raw(part.kv_heads, self._device, tail, tokens, position)
        else:
            there = UploadedRegion.of(old, self._device)
            source = there.source_of(layers, tail, tokens, position)
        to = UploadedRegion.of(target, self._device).source_of(layers, tail[:0], 0, 0)
        own = slots if alike else compaction.within(slots, to.tail_slot)
        compaction.compact(part, source, own, to)


@functools.lru_cache(maxsize=64)
def _zeros(heads: int, device: torch.device) -> Tensor:
    """int32 [heads], to be read only."""
    return torch.zeros(heads, dtype=torch.int32, device=device)


def _raw(heads: int, device: torch.device, tail: Tensor, tokens: int, position: int) -> Source:
    """What a request without a region holds."""
    zero = _zeros(heads, device)
    none = zero[:0]
    return Source(zero, zero, none, none, none, none, none, zero, tail, tokens, position, ())
