"""What a request holds in one layer of the cache, as policies see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.ops.cpu.cache import Layer, Source
from vllm_kvcrush.ops.cpu.kernels import gather_keys, gather_values, positions
from vllm_kvcrush.ops.cpu.library import per_row
from vllm_kvcrush.ops.cpu.select import window_scores


class LayerKV:
    """What a request holds in one layer. Unlike `reference.LayerKV` it works on the cache itself:
    keys and values are copied to tensors only when they are asked for.

    Args:
        layer: the layer.
        source: the request's tokens in the layer.
        tokens: number of tokens that all KV heads hold, or that each does.

    Attributes:
        counts: number of tokens of each KV head.
    """

    def __init__(self, layer: Layer, source: Source, tokens: int | Sequence[int] | Tensor):
        self._layer, self._source = layer, source
        self.counts: list[int] = per_row(tokens, layer.kv_heads).tolist()

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of KV heads, H."""
        return self._layer.kv_heads

    @property
    def device(self) -> torch.device:
        """Returns the device on which policies compute."""
        return self._layer.pool.device

    @cached_property
    def keys(self) -> Tensor:
        """Returns the keys, float32 [H, n, D]; n is the largest count, and rows past a head's own
        are 0."""
        return gather_keys(self._layer, self._source, self.counts)

    @cached_property
    def values(self) -> Tensor:
        """Returns the values, float32 [H, n, D], padded like `keys`."""
        return gather_values(self._layer, self._source, self.counts)

    @cached_property
    def positions(self) -> Tensor:
        """Returns the positions of the tokens, int32 [H, n]; see `kernels.positions`."""
        return positions(self._layer, self._source, self.counts)

    def window_scores(
        self,
        queries: Tensor,
        scale: float,
        candidates: int | Sequence[int] | Tensor,
        **options: Any,
    ) -> Tensor:
        """Returns `window_scores` over these keys, without a copy of them. Raises ValueError if
        `scale` is not the layer's."""
        if scale != self._layer.scale:
            raise ValueError(f"scale={scale!r} is not the layer's, {self._layer.scale!r}")
        return window_scores(self._layer, self._source, queries, candidates, **options)
