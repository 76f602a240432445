"""The queries that compactions score with, as the V2 runner keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.ops.triton.tap import tap


class QueryRing:
    """The last `window` queries of every request, on a GPU, in a tensor of the largest size: by
    layer, by vLLM's request state, and there the one of token p at p % window.

    A layer copies the rows that have a place, which the device knows, so its launch can be part of
    a graph.

    Args:
        layers: vLLM's attention layers, which will call `tap` before they attend.
        states: requests that the runner has states for.
        places: int32 [most query rows], where in a layer's part of `kept` each query row of a step
            goes, -1: nowhere. For the runner to write.

    Attributes:
        kept: [layers, states * window, query_heads, head_size].
    """

    def __init__(
        self,
        layers: Sequence[Any],
        states: int,
        window: int,
        places: Tensor,
        dtype: torch.dtype,
    ):
        impl = layers[0].impl
        self._window, self._places = window, places
        self.kept = torch.zeros(
            *(len(layers), states * window, impl.num_heads, impl.head_size),
            dtype=dtype,
            device=places.device,
        )
        for own, layer in zip(self.kept, layers, strict=True):
            self._wrap(own, layer.impl)

    def _wrap(self, own: Tensor, impl: Any) -> None:
        forward = impl.forward

        def tapped(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            tap(own, query, self._places)
            return forward(layer, query, *args, **kwargs)

        impl.forward = tapped

    def last(self, state: int, computed: int) -> Tensor:
        """The queries of the tokens before `computed`, in order: a copy, `[layers, query_heads,
        window, head_size]`."""
        order = torch.arange(computed - self._window, computed, device=self.kept.device)
        places = order % self._window + state * self._window
        return self.kept.index_select(1, places).transpose(1, 2)
