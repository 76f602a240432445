"""What a request holds in one layer of the cache, as policies see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.ops.triton.cache import Layer, Source
from vllm_kvcrush.ops.triton.compaction import first_slots, gather, positions
from vllm_kvcrush.ops.triton.scores import window_scores


class LayerKV:
    """What a request holds in one layer: `reference.LayerKV` on the cache itself, whose keys and
    values become tensors only when they are asked for.

    Args:
        layer, source: the layer, and the request's tokens in it.
        tokens: n, held by every KV head, or by each.
        dtype: of keys and values.

    Attributes:
        counts: tokens of each KV head.
    """

    def __init__(
        self,
        layer: Layer,
        source: Source,
        tokens: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
    ):
        self._layer, self._source, self._dtype = layer, source, dtype
        self.counts = [tokens] * layer.kv_heads if isinstance(tokens, int) else list(tokens)

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self._layer.kv_heads

    @property
    def device(self) -> torch.device:
        """Where policies compute."""
        return self._layer.pool.device

    @cached_property
    def keys(self) -> Tensor:
        """[H, n, D]; n is the largest count, and rows past a head's own are 0."""
        key, _, _ = gather(
            self._layer, self._source, first_slots(self.counts, self._layer), values=False,
            positions=False, dtype=self._dtype,
        )  # fmt: skip
        assert key is not None
        return key

    @cached_property
    def values(self) -> Tensor:
        """[H, n, D], like `keys`."""
        _, value, _ = gather(
            self._layer, self._source, first_slots(self.counts, self._layer), keys=False,
            positions=False, dtype=self._dtype,
        )  # fmt: skip
        assert value is not None
        return value

    @cached_property
    def positions(self) -> Tensor:
        """Where the tokens stand, int32 [H, n]: see `compaction.positions`."""
        return positions(self._layer, self._source, self.counts)

    def window_scores(
        self, queries: Tensor, scale: float, candidates: int | Sequence[int], **options: Any
    ) -> Tensor:
        """`scores.window_scores` over these keys, without reading them."""
        if scale != self._layer.scale:
            raise ValueError(f"scale={scale!r} is not the layer's, {self._layer.scale!r}")
        return window_scores(self._layer, self._source, queries, candidates, **options)
