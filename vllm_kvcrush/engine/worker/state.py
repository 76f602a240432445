"""What a worker knows about a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.plan import Plan
from vllm_kvcrush.policies.base import Policy
from vllm_kvcrush.spec import parse


@dataclass
class WorkerRequest:
    """Worker-side state of a request with an active policy.

    Attributes:
        name: the policy with its parameters, in the grammar of `spec`.
        policy: the policy, or None if it could not be built: then the sinks and the newest tokens
            stay.
        plan, spans, protect: as in `commands.Admitted`.
        slot_shift: position minus slot of later tokens.
        blocks: number of blocks of the compressed region.
        region: pages of the compressed region; None while they are raw ones in the order of their
            blocks.
        queries: the last `window` queries, `[layers, window, query_heads, head_size]`; the query of
            token p is at p % window. None until a compaction is near, and under the V2 runner,
            which keeps those of all requests together.
        queries_end: position after the last query that was kept.
        kept_state: by name and layer, what the policy remembers about the region's tokens,
            [H, k, ...].
        layer_state: by layer and name, what the policy remembers about the layer, [H, c].
        positions: by layer, positions of the region's tokens, int32 [H, k], if they are kept.
        finer: number of leading slots of the region that are in the finer of two codecs.
        failed: whether the log has said that its policy failed.
    """

    name: str
    policy: Policy | None
    plan: Plan
    spans: tuple[tuple[int, int], ...] = ()
    protect: tuple[tuple[int, int], ...] = ()
    slot_shift: int = 0
    blocks: int = 0
    region: Region | None = None
    queries: Tensor | None = None
    queries_end: int = 0
    kept_state: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    layer_state: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    positions: dict[int, Tensor] = field(default_factory=dict)
    finer: int = 0
    failed: bool = False

    @property
    def label(self) -> str:
        """Returns the outermost name of its policy, as a label for counters."""
        return parse(self.name).name

    @property
    def needs(self) -> frozenset[str]:
        """Returns what its policy asks the engine to keep; see `Policy.needs`."""
        return frozenset() if self.policy is None else self.policy.needs

    @property
    def tiers(self) -> bool:
        """Returns whether its most important tokens get the finer of two codecs."""
        return self.plan.tiers and bool(self.plan.packings)

    @property
    def allocates(self) -> bool:
        """Returns whether its policy divides pages among layers and heads."""
        return self.policy is not None and self.policy.allocates

    @property
    def merges(self) -> bool:
        """Returns whether its policy changes keys and values."""
        return self.policy is not None and self.policy.merges

    @property
    def keeps_positions(self) -> bool:
        """Returns whether the true positions of its tokens are kept beside the pages."""
        return "positions" in self.needs or self.merges or self.allocates or bool(self.protect)

    @property
    def owns_pages(self) -> bool:
        """Returns whether its region's pages differ from what its block table says."""
        return bool(self.plan.packings) or self.allocates or self.merges

    def region_tokens(self, block_size: int) -> int:
        """Returns the tokens of each layer and head in the region, if its blocks are raw."""
        return self.blocks * block_size
