"""What a request holds in one layer of the cache, as policies see it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.ops.cpu.cache import Layer, Source
from vllm_kvcrush.ops.cpu.kernels import read
from vllm_kvcrush.ops.cpu.select import window_scores


class LayerKV:
    """What a request holds in one layer: `reference.LayerKV` on the cache itself, whose keys and
    values become tensors only when they are asked for.

    Args:
        layer, source: the layer, and the request's tokens in it.
        tokens: n, held by every KV head.
    """

    def __init__(self, layer: Layer, source: Source, tokens: int):
        self._layer, self._source, self._tokens = layer, source, tokens

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self._layer.kv_heads

    @property
    def device(self) -> torch.device:
        """Where policies compute."""
        return self._layer.pool.device

    @cached_property
    def _read(self) -> tuple[Tensor, Tensor]:
        layer = self._layer
        parts = [
            read(layer, self._source, head, 0, self._tokens)[:2] for head in range(layer.kv_heads)
        ]
        keys, values = zip(*parts, strict=True)
        return torch.stack(keys), torch.stack(values)

    @property
    def keys(self) -> Tensor:
        """Float32 [H, n, D]."""
        return self._read[0]

    @property
    def values(self) -> Tensor:
        """Float32 [H, n, D]."""
        return self._read[1]

    def window_scores(
        self, queries: Tensor, scale: float, candidates: int, **options: Any
    ) -> Tensor:
        """`window_scores` over these keys, without reading them."""
        if scale != self._layer.scale:
            raise ValueError(f"scale={scale!r} is not the layer's, {self._layer.scale!r}")
        return window_scores(self._layer, self._source, queries, candidates, **options)
