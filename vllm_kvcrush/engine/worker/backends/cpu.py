"""Attention through our own CPU kernels: the backend for vLLM's attention layers, and the cache as
compactions see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcrush import gate
from vllm_kvcrush.codecs.layout import STRIP
from vllm_kvcrush.engine.worker import region
from vllm_kvcrush.engine.worker.backends.base import Backend, pages_of
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.cpu.tables import LayerTable
from vllm_kvcrush.policies.base import LayerKV


class KVCrushAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with our kernels, over one pool of equal pages (design section 3)."""

    forward_includes_kv_cache_update = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(STRIP)]  # vLLM's own kernels need 32

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return KVCrushAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return KVCrushMetadataBuilder


@dataclass
class Metadata:
    """What the layers need to know about a step. `batches` has one batch for each layer, or a
    single one for all if no request has compressed pages."""

    num_actual_tokens: int
    slot_mapping: Tensor
    batches: list[cpu.Batch]

    def batch(self, layer: int) -> cpu.Batch:
        """Returns the batch for the layer with this index."""
        return self.batches[layer if len(self.batches) > 1 else 0]


class KVCrushMetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes a step's Metadata from vLLM's lengths and block table, and from the regions of the
    requests in the batch, which the runner sets as `regions`."""

    regions: ClassVar[list[region.Region | None]] = []

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common, n = common_attn_metadata, common_attn_metadata.num_reqs
        start, length = common.query_start_loc[: n + 1], common.seq_lens[:n]
        table = common.block_table_tensor[:n]
        if any(self.regions[:n]):
            size = self.kv_cache_spec.block_size
            batches = region.batches(start, length, table, self.regions[:n], size)
        else:
            batches = [cpu.Batch(start, length, table)]
        return Metadata(common.num_actual_tokens, common.slot_mapping, batches)


class KVCrushAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention. `pages_of` sets `cache` and `index` when the cache exists."""

    cache: cpu.Layer
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
        """Stores this step's keys and values and computes attention; shapes are as in vLLM's own
        `forward`."""
        if attn_metadata is not None:
            n = attn_metadata.num_actual_tokens
            cpu.store(self.cache, key[:n], value[:n], attn_metadata.slot_mapping[:n])
            batch = attn_metadata.batch(self.index)
            cpu.attention(self.cache, batch, query[:n], output[:n])
        return output


def install(attention: Sequence[Any]) -> Backend:
    """Replaces the backend of the model's attention layers by ours, and returns it. Raises
    ValueError if a layer does something that ours does not."""
    gate.check_attention(attention)
    for layer in attention:
        impl = layer.impl
        if type(impl) is not CPUAttentionBackendImpl:
            raise ValueError(
                f"vllm-kvcrush replaces vLLM's CPU attention, and this model has "
                f"{type(impl).__name__}: start the server without --kv-policy."
            )
        impl.__class__ = KVCrushAttentionImpl
        layer.attn_backend = KVCrushAttentionBackend
    return Backend(CPUCacheLayer, KVCrushMetadataBuilder)


class CPUCacheLayer:
    """One layer's KV cache as compactions see it: `base.CacheLayer` on the CPU kernels.

    Args:
        layer: vLLM's attention layer, whose cache is laid out block-outermost.
        layers: number of layers that share its storage.
        tables: by name, the layer's tables of fitted codecs.
    """

    def __init__(self, layer: Any, layers: int, tables: Mapping[str, LayerTable]):
        self.pages: cpu.Layer = pages_of(cpu.Layer, layer, layers, tables)
        self.index, self.heads = layer.impl.index, self.pages.kv_heads
        self.scale, self.block_size = self.pages.scale, self.pages.block_size

    @property
    def device(self) -> torch.device:
        """Returns the device of the cache."""
        return self.pages.pool.device

    def source(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> cpu.Source:
        """See `base.CacheLayer`, also for the methods below."""
        directory = None if region is None else region.directory(self.index)
        return cpu.Source(directory, tail, tokens, position, self.block_size)

    def held(self, source: cpu.Source, tokens: Sequence[int], exact: bool = True) -> LayerKV:
        return cpu.LayerKV(self.pages, source, tokens)

    def positions(self, source: cpu.Source, tokens: Sequence[int]) -> Tensor:
        return cpu.positions(self.pages, source, tokens)

    def compact(
        self, source: cpu.Source, slots: Tensor, counts: Sequence[int], target: Region
    ) -> None:
        own = (
            slots if len(set(counts)) == 1 else [s[:n] for s, n in zip(slots, counts, strict=True)]
        )
        cpu.compact(self.pages, source, own, target.directory(self.index))

    def fill(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Sequence[int],
        target: Region,
    ) -> None:
        directory = target.directory(self.index)
        cpu.fill(self.pages, keys, values, positions, counts, directory)
