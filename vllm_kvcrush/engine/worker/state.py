"""What a worker knows of its cache and of its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.config import RequestParams
from vllm_kvcrush.engine.worker.region import Pages, Region
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.cpu.tables import LayerTable
from vllm_kvcrush.plan import Plan
from vllm_kvcrush.policies.base import Held, Policy


class CacheLayer(Protocol):
    """One layer's KV cache as compactions see it; `request` makes what `held` and `compact` take.

    Attributes:
        index: of the layer among those that share the cache's storage, in the order of its pages.
        heads: KV heads of this rank.
        scale: factor of q·k.
        pages: what its pages are, for `Region.of`.
        device: of its cache.
    """

    index: int
    heads: int
    scale: float

    @property
    def pages(self) -> Pages: ...
    @property
    def device(self) -> torch.device: ...
    def request(self, region: Region | None, tail: Tensor, tokens: int, position: int) -> Any:
        """A request: its region, then `tokens` raw ones in the blocks `tail` (int32), the first
        of which stands at `position`."""
        ...

    def held(self, request: Any, tokens: int) -> Held:
        """What every head of a request holds, `tokens` tokens."""
        ...

    def positions(self, request: Any, tokens: int) -> Tensor:
        """Where each head's first `tokens` slots stand, int32 `[heads, tokens]`."""
        ...

    def compact(self, request: Any, kept: Tensor, target: Region) -> None:
        """Moves the slots `kept` (int64 `[heads, k]`, each page's in position order) into the pages
        of `target`, which may be among the request's own: all is read before any is written."""
        ...


class Backend(NamedTuple):
    """How a worker's attention and compactions are done.

    Attributes:
        layer: makes a CacheLayer of (vLLM's attention layer, number of layers, its tables).
        builder: metadata builder that is told the regions of the requests in a batch, or None
            where all pages are raw.
        table: makes what `layer` wants for a fitted codec; arguments as `LayerTable`.
    """

    layer: Callable[[Any, int, Mapping[str, Any]], CacheLayer]
    builder: Any
    table: Callable[[Tables, int, range, int, int, Angles], Any] = LayerTable


@dataclass
class Request:
    """Worker-side state of a request with an active policy."""

    params: RequestParams
    # None where it could not be built: then the sinks and the newest tokens stay.
    policy: Policy | None
    plan: Plan
    evicted: int = 0
    # The compressed region in pages of another codec; None while it is raw.
    region: Region | None = None
    # The last `window` queries, `[layers, window, query_heads, head_size]`; the one of token p is
    # at p % window. None until a compaction is near.
    queries: Tensor | None = None
    queries_end: int = 0
    # Per layer [kv_heads, slots of the compressed region], for policies with running scores.
    running: list[Tensor] | None = None
    # Leading slots of the compressed region that are in the finer of two codecs, of a policy with
    # tiers.
    finer: int = 0
    # Tokens that each head holds in the compressed region, and its blocks.
    compressed_tokens: int = 0
    compressed: int = 0
    # Whether the log has said that its policy failed.
    failed: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """What its policy asks the engine to keep."""
        return frozenset() if self.policy is None else self.policy.needs

    @property
    def tiers(self) -> bool:
        """Whether its most important tokens get the finer of two codecs."""
        return self.plan.tiers and bool(self.plan.packings)

    def scores_at(self, n: int, block_size: int) -> bool:
        """Whether a compaction at n would have its policy choose among tokens."""
        if "running" in self.needs:
            return True
        held = n - self.evicted
        shape = self.plan.shape(n, held)
        new = held - shape.tail_tokens - self.compressed * block_size
        return self.plan.needs_scores(shape.compressed, self.compressed_tokens + new)
