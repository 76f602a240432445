"""Queries of one forward pass, as the V1 runner and start-up take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class QueryTap:
    """Copies chosen rows of every layer's queries during one forward pass."""

    def __init__(self, layers: Sequence[Any]):
        self.rows: Tensor | None = None
        self._taken: list[Tensor | None] = [None] * len(layers)
        for index, layer in enumerate(layers):
            self._wrap(index, layer.impl)

    def _wrap(self, index: int, impl: Any) -> None:
        forward = impl.forward

        def tapped(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rows is not None:
                # A copy: the model reuses its buffers.
                self._taken[index] = query.index_select(0, self.rows)
            return forward(layer, query, *args, **kwargs)

        impl.forward = tapped

    def take(self) -> Tensor:
        """Returns the chosen rows of the last forward pass, `[layers, rows, query_heads,
        head_size]`, and chooses none for the next."""
        taken, self._taken = self._taken, [None] * len(self._taken)
        self.rows = None
        assert all(t is not None for t in taken), "a layer's attention did not run"
        return torch.stack([t for t in taken if t is not None])
