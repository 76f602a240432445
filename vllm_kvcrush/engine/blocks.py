"""Block accounting of compacted requests, on top of vLLM's full-attention manager.

Only this file takes blocks from the pool or gives them back because of a compaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.commands import Compact
from vllm_kvcrush.plan import Plan, Shape, cdiv


@dataclass(frozen=True, kw_only=True)
class KVCrushSpec(FullAttentionSpec):
    """The cache spec of a full-attention layer whose requests are bounded by the default budget."""

    @classmethod
    def convert(cls, spec: FullAttentionSpec) -> KVCrushSpec:
        """Returns the spec of the same layer under this plugin."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec)})

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Returns the bytes of the longest request under the default budget. vLLM's start-up check
        and its concurrency figure use it, so a pool is accepted that is too small for
        `max_model_len` raw tokens."""
        settings = Settings.from_dict(vllm_config.additional_config["kvcrush"])
        longest = vllm_config.model_config.max_model_len
        return settings.most_blocks(longest, self.block_size) * self.page_size_bytes


class Job(NamedTuple):
    """A compaction that is due.

    Attributes:
        request_id: vLLM's id of the request.
        computed: number of tokens whose KV has been computed.
        held: number of slots that they take.
        shape: the blocks and the tail that the request is to hold.
        twin: jobs with an equal `twin` have the same result, so that only one of them is done; None
            if there is no other such job.
    """

    request_id: str
    computed: int
    held: int
    shape: Shape
    twin: Hashable = None


class Deferred(NamedTuple):
    """Why a due compaction did not happen.

    Attributes:
        reason: "shared" if it would take at least as many blocks as come free, "no_room" if there
            are too few blocks to write to.
        missing: by how many blocks.
    """

    reason: str
    missing: int


class KVCrushManager(FullAttentionManager):
    """vLLM's manager, with the slot shift subtracted wherever blocks follow from tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Grows whenever requests may have come to share fewer blocks.
        self.epoch = 0
        # By compacted request: the slot of a token p of the tail is p - slot_shift.
        self.slot_shift: dict[str, int] = {}
        # By compacted request: the position from which its KV is not exact any more.
        self.lossy_since: dict[str, int] = {}
        # By compacted request: blocks of its compressed region, and tokens of each layer and head
        # by the plan. A policy may divide these unequally; only the worker knows then.
        self.regions: dict[str, tuple[int, int]] = {}
        # By compacted request: tokens before the tail of which its last compaction made the region.
        self.candidates: dict[str, int] = {}
        # Requests whose blocks the prefix cache does not take; owned by the scheduler.
        self.uncached: Collection[str] = ()
        # Plans of requests with an active policy; owned by the scheduler.
        self.plans: Mapping[str, Plan] = {}

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        if kwargs.get("apply_admission_cap") and (plan := self.plans.get(request_id)):
            # The whole prompt is never in the pool at once, so admission reserves the bound only.
            num_tokens = min(num_tokens, plan.bound(num_tokens) * self.block_size)
        else:
            num_tokens -= self.slot_shift.get(request_id, 0)
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        shift = self.slot_shift.get(request_id, 0)
        return super().allocate_new_blocks(
            request_id, num_tokens - shift, num_tokens_main_model - shift
        )

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # Tokens after a lossy compaction attended to a lossy cache, so their blocks are not exact;
        # and where slots are shifted, block i does not hold the tokens from i * block_size on.
        if request.request_id in self.lossy_since or request.request_id in self.uncached:
            return
        assert not self.slot_shift.get(request.request_id), "a slot shift without loss"
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # vLLM calls this for finish, abort and preemption alike.
        self.slot_shift.pop(request_id, None)
        self.lossy_since.pop(request_id, None)
        self.regions.pop(request_id, None)
        self.candidates.pop(request_id, None)
        self.epoch += any(b.ref_cnt > 1 for b in self.req_to_blocks.get(request_id, ()))
        return super().pop_blocks_for_free(request_id)

    def held_tokens(self, request_id: str, computed: int, in_region: float | None = None) -> int:
        """Returns the number of tokens whose KV a request holds in each layer and head.

        Args:
            computed: number of tokens whose KV has been computed.
            in_region: how many of them the compressed region holds; None for what the plan says.
        """
        blocks, tokens = self.regions.get(request_id, (0, 0))
        tail = computed - self.slot_shift.get(request_id, 0) - blocks * self.block_size
        return tail + round(tokens if in_region is None else in_region)

    def compact(self, jobs: Sequence[Job]) -> list[Compact] | Deferred:
        """Compacts the requests of all jobs, or none of them. Returns the commands for the workers,
        or why the compaction did not happen.

        Twins share one set of new blocks. Together the jobs must give back more physical blocks
        than they take: a block that another request still holds does not come free. New contents go
        into blocks that nobody else can see: first the requests' own unhashed blocks, then free
        ones, and only when the pool is empty their own hashed ones, which are first evicted from
        the prefix cache.
        """
        regions = {job.request_id: self._region(job) for job in jobs}
        units = twins(jobs)
        released = Counter(block.block_id for r in regions.values() for block in r)
        by_id = {block.block_id: block for r in regions.values() for block in r}
        freed = sum(by_id[i].ref_cnt == count for i, count in released.items())
        needed = sum(unit[0].shape.compressed for unit in units)
        if freed <= needed:
            return Deferred("shared", needed + 1 - freed)
        if missing := self._missing_room(units, regions):
            return Deferred("no_room", missing)
        self.epoch += 1
        return [command for unit in units for command in self._compact_unit(unit, regions)]

    def sharing(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Returns the jobs in groups whose requests share blocks, directly or through others."""
        groups: list[tuple[set[int], list[Job]]] = []
        for job in jobs:
            blocks, members = {b.block_id for b in self._region(job)}, [job]
            apart = []
            for theirs, others in groups:
                if blocks & theirs:
                    blocks, members = blocks | theirs, others + members
                else:
                    apart.append((theirs, others))
            groups = [*apart, (blocks, members)]
        return [members for _, members in groups]

    def _region(self, job: Job) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[job.request_id]
        assert len(blocks) >= cdiv(job.held, self.block_size), (job, len(blocks))
        assert (job.held - job.shape.tail_tokens) % self.block_size == 0
        return blocks[: (job.held - job.shape.tail_tokens) // self.block_size]

    def _missing_room(
        self, units: Sequence[list[Job]], regions: Mapping[str, list[KVCacheBlock]]
    ) -> int:
        """Returns how many blocks the first unit lacks that, in turn, does not find enough free or
        own blocks to write to, or 0 if all do. A unit is a list of twins."""
        free = self.block_pool.get_num_free_blocks()
        references = {b.block_id: b.ref_cnt for r in regions.values() for b in r}
        for unit in units:
            released = Counter(b.block_id for job in unit for b in regions[job.request_id])
            own = sum(references[i] == count for i, count in released.items())
            for i, count in released.items():
                references[i] -= count
            free += own - unit[0].shape.compressed
            if free < 0:
                return -free
        return 0

    def _compact_unit(
        self, unit: Sequence[Job], regions: Mapping[str, list[KVCacheBlock]]
    ) -> list[Compact]:
        """Compacts twins and returns their commands: the first one's blocks are written, and the
        others take them over."""
        pool, need = self.block_pool, unit[0].shape.compressed
        held = {b.block_id: b for job in unit for b in regions[job.request_id]}
        released = Counter(b.block_id for job in unit for b in regions[job.request_id])
        own = [block for i, block in held.items() if block.ref_cnt == released[i]]
        target = [b for b in own if b.block_hash is None][:need]
        fresh = min(need - len(target), pool.get_num_free_blocks())
        target += pool.get_new_blocks(fresh)
        if missing := need - len(target):
            dropped = [b for b in own if b.block_hash is not None][-missing:]
            pool.evict_blocks({b.block_id for b in dropped})
            target += dropped
        kept = {b.block_id for b in target}
        assert len(kept) == need and all(b.block_hash is None for b in target)
        for block in target:
            pool.touch([block] * (len(unit) - block.ref_cnt))
        commands = []
        for job in unit:
            region = regions[job.request_id]
            tail = self.req_to_blocks[job.request_id][len(region) :]
            self.req_to_blocks[job.request_id] = target + tail
            pool.free_blocks(reversed([b for b in region if b.block_id not in kept]))
            same_as = unit[0].request_id if job is not unit[0] else None
            commands.append(self._command(job, region, target, tail, same_as))
        assert all(b.ref_cnt == len(unit) for b in target)
        return commands

    def _command(
        self,
        job: Job,
        region: list[KVCacheBlock],
        target: list[KVCacheBlock],
        tail: list[KVCacheBlock],
        same_as: str | None,
    ) -> Compact:
        need = len(target)
        slot_shift = job.computed - need * self.block_size - job.shape.tail_tokens
        self.slot_shift[job.request_id] = slot_shift
        self.lossy_since.setdefault(job.request_id, job.computed)
        compressed, tokens = self.regions.get(job.request_id, (0, 0))
        candidates = tokens + (len(region) - compressed) * self.block_size
        self.regions[job.request_id] = need, self.plans[job.request_id].kept(need, candidates)
        self.candidates[job.request_id] = candidates
        return Compact(
            request_id=job.request_id,
            computed=job.computed,
            source=tuple(b.block_id for b in region),
            compressed=compressed,
            target=tuple(b.block_id for b in target),
            tail=tuple(b.block_id for b in tail),
            tail_tokens=job.shape.tail_tokens,
            slot_shift=slot_shift,
            same_as=same_as,
        )


def twins(jobs: Sequence[Job]) -> list[list[Job]]:
    """Returns the jobs in groups of twins, which have one result, in the order of the groups' first
    jobs."""
    units: dict[Hashable, list[Job]] = {}
    for job in jobs:
        units.setdefault(job.request_id if job.twin is None else job.twin, []).append(job)
    return list(units.values())


# vLLM registers its own specs only while the registry is empty, so that must happen first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(KVCrushSpec, KVCrushManager, uniform_type_base_spec=FullAttentionSpec)
