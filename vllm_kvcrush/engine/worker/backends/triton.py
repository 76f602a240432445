"""Attention through our own GPU kernels, over one pool of pages: what `cpu.py` is on a CPU."""

from __future__ import annotations

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
    return Backend(TritonCacheLayer, None, LayerTable, ResidentDirectory)


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
            heads = torch.zeros(self.heads, dtype=torch.int32, device=self.device)
            none = heads[:0]
            return Source(
                heads, heads, none, none, none, none, none, heads, tail, tokens, position, ()
            )  # fmt: skip
        there = UploadedRegion.of(region, self.device)
        return there.source(self.index, tail, tokens, position)

    def held(self, source: Source, tokens: Sequence[int]) -> LayerKV:
        return LayerKV(self.pages, source, tokens)

    def positions(self, source: Source, tokens: Sequence[int]) -> Tensor:
        return compaction.positions(self.pages, source, tokens)

    def compact(self, source: Source, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        own = compaction.within(slots, counts)
        compaction.compact(self.pages, source, own, self._target(target))

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
        nothing = torch.zeros(0, dtype=torch.int32, device=self.device)
        return self.source(region, nothing, 0, 0)
