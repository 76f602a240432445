"""Attention through our own GPU kernels, over one pool of pages: what `cpu.py` is on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from vllm_kvcrush.engine.worker.region import Region, joined
from vllm_kvcrush.ops.triton import compaction
from vllm_kvcrush.ops.triton.attention import attention
from vllm_kvcrush.ops.triton.cache import Batch, Directory, Layer, Source, runs_of
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
    """What the layers need to know of a step; `directory` has the compressed pages of all layers,
    `runs` as [requests, layers, kv_heads, 4]."""

    num_actual_tokens: int
    slot_mapping: Tensor
    batch: Batch
    directory: Directory | None

    def of(self, layer: int) -> Batch:
        """The batch as layer number `layer` sees it."""
        if self.directory is None:
            return self.batch
        own = dataclasses.replace(self.directory, runs=self.directory.runs[:, layer])
        return dataclasses.replace(self.batch, directory=own)


class KVCrushTritonMetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Splits each request's blocks into compressed ones and its tail. The runner leaves the regions
    of the requests in the batch here."""

    regions: ClassVar[list[Region | None]] = []

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # The regions of the last step and what was made of them: they change at compactions only.
        self._known: list[Region | None] = []
        self._made: tuple[Directory, Tensor]

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common, n = common_attn_metadata, common_attn_metadata.num_reqs
        length, table = common.seq_lens[:n], common.block_table_tensor[:n]
        regions, directory = self.regions[:n], None
        if any(regions):
            if len(regions) != len(self._known) or any(
                a is not b for a, b in zip(regions, self._known, strict=True)
            ):
                self._known, self._made = regions, self._directory(regions)
            directory, blocks = self._made
            columns = torch.arange(table.shape[1], device=table.device) + blocks.unsqueeze(1)
            table = table.gather(1, columns.clamp_(max=table.shape[1] - 1))
            length = length - blocks * self.kv_cache_spec.block_size
        start = common.query_start_loc[: n + 1]
        batch = Batch(start, length, table, None, common.max_query_len)
        return Metadata(common.num_actual_tokens, common.slot_mapping, batch, directory)

    def _directory(self, regions: Sequence[Region | None]) -> tuple[Directory, Tensor]:
        """Pages of all requests and layers, and blocks that they take: int32 [requests]."""
        own = joined(regions)
        made = Directory.of(
            own.begin.flatten(0, 1),
            own.end.flatten(0, 1),
            own.page,
            own.count,
            own.codec,
            own.bias,
            own.log_bias,
            device=self.device,
        )
        made.runs = made.runs.view(*own.begin.shape, -1)
        return made, own.blocks.to(self.device, non_blocking=True)


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
    return Backend(TritonCacheLayer, KVCrushTritonMetadataBuilder, LayerTable)


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
        counts = torch.zeros(self.heads, dtype=torch.int32)
        parts = [torch.zeros(0, dtype=torch.int32)] * 3
        bias = log_bias = None
        if region is not None:
            begin, end = region.begin[self.index], region.end[self.index]
            own = slice(int(begin[0]), int(end[-1]))  # a layer's heads follow each other
            counts = end - begin
            parts = [x[own] for x in (region.page, region.count.int(), region.codec)]
            if region.bias is not None and region.log_bias is not None and len(parts[0]):
                # A layer's tokens follow each other, too; pages without a bias have -1.
                starts = region.bias[own]
                first = int(torch.where(starts < 0, len(region.log_bias), starts).min())
                bias = torch.where(starts < 0, -1, starts - first)
                log_bias = region.log_bias[first : first + int(parts[1].sum())]
                bias, log_bias = (x.to(self.device, non_blocking=True) for x in (bias, log_bias))
        ends = counts.cumsum(0)
        page, count, codec, begins, ends = (
            x.to(self.device, non_blocking=True) for x in (*parts, ends - counts, ends)
        )
        runs = runs_of(parts[2])
        return Source.of(
            *(begins, ends, page, count, codec, tail, tokens, position, runs, bias, log_bias)
        )

    def held(self, source: Source, tokens: Sequence[int]) -> LayerKV:
        return LayerKV(self.pages, source, tokens)

    def positions(self, source: Source, tokens: Sequence[int]) -> Tensor:
        return compaction.positions(self.pages, source, tokens)

    def compact(self, source: Source, slots: Tensor, counts: Sequence[int], target: Region) -> None:
        past = torch.arange(slots.shape[1], device=self.device)
        past = past >= torch.tensor(counts, device=self.device).unsqueeze(1)
        compaction.compact(self.pages, source, slots.masked_fill(past, -1), self._target(target))

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
