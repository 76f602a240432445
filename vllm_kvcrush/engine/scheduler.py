"""When requests are compacted: vLLM's scheduler with a plan for every request."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_kvcrush import compat
from vllm_kvcrush.config import PLAIN, Demands, RequestParams, Settings
from vllm_kvcrush.engine import canaries, pressure
from vllm_kvcrush.engine.blocks import Deferred, Job, KVCrushManager, twins
from vllm_kvcrush.engine.commands import Admitted, Compact, StepCommands, WorkerReport
from vllm_kvcrush.engine.pressure import Holder
from vllm_kvcrush.engine.snapshot import Observer, expected_pages, install, region_codecs
from vllm_kvcrush.plan import Plan, cdiv
from vllm_kvcrush.stats import Stats

logger = init_logger(__name__)

# Steps for which nobody looks for blocks again after none were found.
_REST = 8


@dataclass
class _Wait:
    """What jobs that were put off together wait for.

    They need not be looked at again before enough blocks came: `missing` of them, less what each
    member's shape may have changed by. The blocks that the members and the pool had then, and what
    the manager's epoch was, tell."""

    reason: str
    missing: int
    epoch: int
    blocks: dict[str, int]
    free: int
    # The step in which it was looked at, and what was found.
    step: int = -1
    over: bool = False


@dataclass
class _Tracked:
    """What is known of a request.

    Attributes:
        params: what it runs with.
        demands: what its policy asks the engine for.
        number: of all requests that came, how many did up to this one.
        compactions: how many it had.
        policy_failures: of those, in which the policy failed and sinks and newest tokens were kept.
        in_region: tokens of each layer and head in its compressed region, as the workers said; None
            until they have.
        deferred: why its compaction is overdue, or None.
        first_compaction: tokens with KV when it was compacted first, or None.
        pages: pages of its compressed region by codec, as a worker told; None before.
        codecs: blocks of its compressed region by codec; None until somebody asks.
        level, pressed: of one that is compacted under pressure only: how far (`pressure.levels`),
            and whether it is to be compacted that far now.
        observed: likewise, positions [first, end) of the queries that were kept without a gap.
    """

    params: RequestParams
    demands: Demands
    number: int = 0
    compactions: int = 0
    policy_failures: int = 0
    in_region: float | None = None
    deferred: _Wait | None = None
    first_compaction: int | None = None
    pages: dict[str, int] | None = None
    codecs: dict[str, int] | None = None
    level: int = 0
    pressed: bool = False
    observed: tuple[int, int] = (0, 0)


# A mixin at run time; to the type checker it is a scheduler.
_Base: Any = Scheduler if TYPE_CHECKING else object


class KVCrushSchedulerMixin(_Base):
    """Adds compaction to `Scheduler` and `AsyncScheduler`; everything else is theirs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], KVCrushManager):
            groups = ", ".join(type(m).__name__ for m in managers)
            raise ValueError(
                "vllm-kvcrush needs a model whose layers all use full attention: this one has "
                f"{len(managers)} KV cache groups ({groups})."
            )
        self._manager: KVCrushManager = managers[0]
        self._settings = Settings.from_dict(self.vllm_config.additional_config["kvcrush"])
        self._tracked: dict[str, _Tracked] = {}
        self._plans: dict[str, Plan] = {}
        self._step = 0
        self._came = 0
        # Requests whose numbers changed since their client was told.
        self._unreported: set[str] = set()
        # Of the step that is being scheduled: compactions, and the request that asks for blocks.
        self._commands: list[Compact] = []
        self._allocating: Request | None = None
        # Before this step it is of no use to look for blocks again.
        self._rest_until = 0
        self._may_come = False
        self._manager.plans = self._plans
        # Canaries, with the number of their last tokens that are scored, and those of them that
        # gave way, whose clients are still to be told.
        self._canaries: dict[str, int] = {}
        self._gave_way: list[Request] = []
        self._manager.uncached = self._canaries
        self.kvcrush_stats = Stats()
        # Every rank holds its share of the heads; bytes are counted over all of them.
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        self._block_bytes = (
            ranks
            * sum(tensor.size for tensor in self.kv_cache_config.kv_cache_tensors)
            // max(1, self.kv_cache_config.num_blocks)
        )

        self._pairs = ranks * sum(
            len(group.layer_names) * group.kv_cache_spec.num_kv_heads
            for group in self.kv_cache_config.kv_cache_groups
        )
        self.observer: Observer | None = None
        if self._settings.live_page:
            install()
            self.observer = Observer(self)

    # -- requests -------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests and request.sampling_params is not None:
            params, demands = self._resolved(request)
            self._came += 1
            self._tracked[request.request_id] = _Tracked(params, demands, self._came)
            self._unreported.add(request.request_id)
            if params.active:
                self._plans[request.request_id] = self._settings.plan(
                    params, request.num_prompt_tokens, self._manager.block_size
                )
        super().add_request(request)

    def _resolved(self, request: Request) -> tuple[RequestParams, Demands]:
        """What a request runs with: resolved here once, for everybody."""
        assert request.sampling_params is not None
        plain = PLAIN, Demands()
        scored = canaries.scored(request.sampling_params.extra_args)
        if scored and self._settings.canary:
            self._canaries[request.request_id] = scored
            return plain
        if request.resumable:
            # A prompt that grows while it is served has no plan.
            logger.warning_once("Requests with streaming input are not compressed.")
            return plain
        try:
            params = self._settings.resolved(
                request.sampling_params.extra_args, self._manager.block_size, self.max_model_len
            )
            if not params.active:
                return params, Demands()
            return params, self._settings.demands(params.policy)
        except Exception as error:
            # Not by way of our front-end, which refuses it; or a third party's constructor.
            logger.error("Request %s is not compressed: %s", request.request_id, error)
            self.kvcrush_stats.record_uncompressed()
            return plain

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        held = self._held_report(request)
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)
        if held is not None:
            # Rides to the API server, which moves it into `usage`.
            kv_params = {**(kv_params or {}), "kvcrush": held}
        self._unreported.discard(request.request_id)
        self._tracked.pop(request.request_id, None)
        self._plans.pop(request.request_id, None)
        self._canaries.pop(request.request_id, None)
        return kv_params, ec_params

    def _held_report(self, request: Request) -> dict[str, Any] | None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return None
        # The last sampled token has no KV; under async scheduling the count may run ahead.
        raw = max(0, min(request.num_computed_tokens, request.num_tokens - 1))
        slots = max(0, raw - self._manager.slot_shift.get(request.request_id, 0))
        held = self._manager.held_tokens(request.request_id, raw, tracked.in_region)
        blocks = len(self._manager.req_to_blocks.get(request.request_id, ()))
        return {
            "kv_tokens_held": max(0, held),
            "kv_tokens_raw": raw,
            "kv_slots_held": slots,
            "kv_blocks_held": blocks,
            "kv_block_size": self._manager.block_size,
            "kv_block_bytes": self._block_bytes,
            "kv_side_bytes": self._side_bytes(request.request_id),
            "budget": tracked.params.budget if tracked.params.active else 1.0,
            "compactions": tracked.compactions,
            "first_compaction": tracked.first_compaction,
            "reason": tracked.params.reason,
            "protected": tracked.params.protected,
            "policy_failures": tracked.policy_failures,
            "policy": tracked.params.policy if tracked.params.active else "none",
            "rule": tracked.params.rule,
        }

    def _codecs(self, request_id: str) -> dict[str, int]:
        """Returns the blocks of a request's compressed region by codec, in slot order."""
        blocks, _ = self._manager.regions.get(request_id, (0, 0))
        if not blocks:
            return {}
        tracked = self._tracked[request_id]
        if tracked.codecs is None:
            pages = tracked.pages
            if pages is None:
                candidates = self._manager.candidates[request_id]
                pages = expected_pages(self._plans[request_id], blocks, candidates)
            tracked.codecs = region_codecs(pages, blocks)
        return tracked.codecs

    def _side_bytes(self, request_id: str) -> int:
        """Bytes that workers keep beside a request's blocks between compactions, over all ranks:
        which pages its heads own (`region.Region`), where tokens stand, and policies' state."""
        blocks, tokens = self._manager.regions.get(request_id, (0, 0))
        if not blocks:
            return 0
        tracked = self._tracked[request_id]
        pages = self._plans[request_id].packings or tracked.demands.pages
        directory = 7 * blocks + 8 if pages else 0
        state = (
            4
            * tokens
            * (
                ("state" in tracked.demands.needs)
                + (tracked.demands.positions or bool(tracked.params.protect))
                + tracked.demands.merges
            )
        )
        return self._pairs * (directory + state)

    # -- one step -------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._canaries_give_way()
        self._commands = self._compact_due()
        output = super().schedule(throttle_prefills)
        if self._canaries and not output.total_num_scheduled_tokens:
            self._canaries_do_not_wait()
        self._allocating = None
        if self.observer is not None:
            self.observer.sample()
        output.kvcrush = StepCommands(
            self._standing(self._commands), self._admitted(output), self._observed(output)
        )
        return output

    def _standing(self, commands: list[Compact]) -> list[Compact]:
        """Without those of requests that were preempted a moment ago: nothing is left to compact.
        What such a one would have done for its twins, the first of them does."""
        standing: list[Compact] = []
        heirs: dict[str, str] = {}
        for command in commands:
            if command.request_id not in self._manager.slot_shift:
                self._uncount(command)
                continue
            done = {c.request_id for c in standing}
            if command.same_as is not None and command.same_as not in done:
                heir = heirs.setdefault(command.same_as, command.request_id)
                same_as = None if heir == command.request_id else heir
                command = replace(command, same_as=same_as)
            standing.append(command)
        return standing

    def _uncount(self, command: Compact) -> None:
        tracked = self._tracked[command.request_id]
        tracked.compactions -= 1
        if not tracked.compactions:
            tracked.first_compaction = None
        self.kvcrush_stats.forget_compaction(tracked.params.label, tracked.params.reason)

    def _admitted(self, output: SchedulerOutput) -> dict[str, Admitted]:
        ids = [new.req_id for new in output.scheduled_new_reqs]
        ids += output.scheduled_cached_reqs.resumed_req_ids
        return {
            i: Admitted(
                self._tracked[i].params.policy,
                self._plans[i],
                self._tracked[i].params.spans,
                self._tracked[i].params.protect,
            )
            for i in ids
            if i in self._plans
        }

    def _observed(self, output: SchedulerOutput) -> dict[str, int]:
        """Of how many of this step's newest tokens of a request the queries are to be kept."""
        self._may_come = self._pressure_may_come()
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        observed = {}
        for request_id, count in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if request_id not in self._plans or tracked is None:
                continue
            if "queries" in tracked.demands.needs:
                start, end = computed[request_id], computed[request_id] + count
                wanted = max(start, self._window_from(request_id, tracked, start, end))
                if wanted < end:
                    observed[request_id] = end - wanted
                    first, last = tracked.observed
                    tracked.observed = (first if last == wanted else wanted, end)
        return observed

    def _window_from(self, request_id: str, tracked: _Tracked, start: int, end: int) -> int:
        """From which position on a request's queries are wanted, of a step that computes tokens
        [start, end): `end` if none are."""
        plan, window = self._plans[request_id], self._plans[request_id].window
        shift = self._manager.slot_shift.get(request_id, 0)
        if tracked.deferred:
            return max(0, end - window)
        if tracked.params.elastic:
            wanted = self._may_come and pressure.may_score(self._holder(request_id, end))
            return max(0, end - window) if wanted else end
        near = plan.next_compaction(start, start - shift, end + window)
        if near is None:
            return end
        # If it is put off, others than itself may need scores.
        if not any(
            self._scores_at(request_id, tracked, n - shift, n)
            for n in (near, near + window // 2, near + window)
        ):
            # So may those that follow it at once.
            region = self._manager.regions.get(request_id, (0, 0))
            scoring = plan.scoring_within(start, start - shift, region, end + window)
            near = next(scoring, end + window)
        return min(end, max(end - window, near - window))

    def _scores_at(self, request_id: str, tracked: _Tracked, held: int, n: int) -> bool:
        """Whether a compaction at n would have the policy choose among tokens."""
        if tracked.demands.always:
            return True
        plan = self._plans[request_id]
        blocks, tokens = self._manager.regions.get(request_id, (0, 0))
        shape = plan.shape(n, held)
        new = held - shape.tail_tokens - blocks * self._manager.block_size
        return plan.needs_scores(shape.compressed, tokens + new)

    # -- canaries -------------------------------------------------------------------------------

    def _canaries_give_way(self) -> None:
        """Ends canaries as soon as anybody else is there, before blocks and time are given out; of
        several canaries the first one stays."""
        if not self._canaries or len(self.requests) == 1:
            return
        ids = list(self._canaries)
        if len(self.requests) == len(ids):
            del ids[0]
        self._end_canaries(ids)

    def _canaries_do_not_wait(self) -> None:
        """Ends a canary that finds no room although it is alone, or whose engine is paused."""
        running = {request.request_id for request in self.running}
        self._end_canaries([i for i in self._canaries if i not in running])

    def _end_canaries(self, ids: list[str]) -> None:
        self._gave_way += self.finish_requests(ids, RequestStatus.FINISHED_ABORTED)

    def _tell_of_canaries(self, results: dict[int, EngineCoreOutputs]) -> None:
        for request in self._gave_way:
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)
            own = results.setdefault(request.client_index, EngineCoreOutputs())
            own.outputs = [*own.outputs, output]
        self._gave_way.clear()

    # -- pressure -------------------------------------------------------------------------------

    @property
    def pressure_now(self) -> float:
        """Returns what the last step found, or, where nothing is scheduled that would count again,
        the share of the pool in use now."""
        if self.running or self.waiting:
            return self.kvcrush_stats.pressure
        pool = self.kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1
        return float((total - pool.get_num_free_blocks()) / total)

    def _pressure_may_come(self) -> bool:
        """Whether the pool, with all that waits, would be nearly as full as `--kv-pressure`."""
        if (limit := self._settings.pressure) is None:
            return False
        pool, size = self.kv_cache_manager.block_pool, self._manager.block_size
        near = pressure.NEAR * limit * (pool.num_gpu_blocks - 1)
        wanted = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        for request in self.waiting:
            if wanted > near:
                break
            wanted += cdiv(request.num_tokens, size)
        return wanted > near

    def _press(self) -> None:
        """Marks the requests that are to give blocks back now, if the pool is too full."""
        pool = self.kv_cache_manager.block_pool
        total, free = pool.num_gpu_blocks - 1, pool.get_num_free_blocks()
        if (limit := self._settings.pressure) is None:
            self.kvcrush_stats.pressure = (total - free) / total
            return
        growth = sum(self._blocks_wanted(request) for request in self.running)
        head = self._head_wants() if growth <= free else 0
        self.kvcrush_stats.pressure = (total - free + growth + head) / total
        if self.kvcrush_stats.pressure <= limit:
            for tracked in self._tracked.values():
                if tracked.pressed:
                    tracked.pressed, tracked.deferred = False, None
            return
        if self._step < self._rest_until and growth <= free:
            return
        holders = {
            request.request_id: self._holder(request.request_id, request.num_computed_tokens)
            for request in self.running
            if request.request_id in self._plans
            and self._tracked[request.request_id].params.elastic
        }
        over = total - free + growth - int(pressure.RELIEF * limit * total)
        steps = pressure.relieve(holders, over)
        if head:
            # Worth its loss only where the request that waits then finds room.
            more = pressure.relieve(holders, over + head)
            if free + sum(step.freed for step in more.values()) >= growth + head:
                steps = more
        if growth > free + sum(step.freed for step in steps.values()):
            # Somebody would be preempted.
            steps = pressure.relieve(holders, over, small=True)
        if not steps:
            self._rest_until = self._step + _REST
        for request_id, step in steps.items():
            tracked = self._tracked[request_id]
            tracked.level, tracked.pressed = step.level, True

    def _blocks_wanted(self, request: Request) -> int:
        """Blocks that a running request needs for the tokens of the next step."""
        n = request.num_computed_tokens
        new = request.num_tokens_with_spec + request.num_output_placeholders - n
        threshold = self.scheduler_config.long_prefill_token_threshold
        new = min(new, self.max_num_scheduled_tokens, threshold or new, self.max_model_len - n)
        held = n + new - self._manager.slot_shift.get(request.request_id, 0)
        return max(0, cdiv(held, self._manager.block_size) - self._num_blocks(request.request_id))

    def _head_wants(self) -> int:
        """Blocks that the request needs which waits to be admitted next, if there is one."""
        if not self.waiting or len(self.running) >= self.max_num_active_reqs:
            return 0
        request = self.waiting.peek_request()
        size, plan = self._manager.block_size, self._plans.get(request.request_id)
        blocks = cdiv(request.num_tokens, size)
        if plan is not None:
            blocks = min(blocks, plan.bound(request.num_tokens))
        hit = self._get_local_prefix_cache_hit(request)[0]
        return max(0, blocks - sum(block.ref_cnt > 0 for group in hit.blocks for block in group))

    def _holder(self, request_id: str, n: int) -> Holder:
        """What a running request with n tokens holds, and may give back under pressure."""
        tracked, plan = self._tracked[request_id], self._plans[request_id]
        held = n - self._manager.slot_shift.get(request_id, 0)
        before_tail = (held - plan.tail(held)) // plan.block_size
        blocks = self._manager.req_to_blocks.get(request_id, ())[:before_tail]
        first, end = tracked.observed
        return Holder(
            plan,
            level=tracked.level,
            n=n,
            held=held,
            region=self._manager.regions.get(request_id, (0, 0)),
            own=sum(block.ref_cnt == 1 for block in blocks),
            asks=tracked.demands.always,
            ready="queries" not in tracked.demands.needs or (end == n and first <= n - plan.window),
        )

    # -- compactions ----------------------------------------------------------------------------

    def _compact_due(self) -> list[Compact]:
        """Compacts every running request of which its plan, or pressure, says that it is due."""
        self._step += 1
        self._press()
        jobs = [job for request in self.running if (job := self._due(request)) is not None]
        ready = [job for job in jobs if not self._waits(job)]
        done: list[Compact] = []
        refused: dict[str, Deferred] = {}
        for unit in twins(ready):
            result = self._try(unit)
            if isinstance(result, Deferred):
                refused.update((job.request_id, result) for job in unit)
            else:
                done += result
        if not refused:
            return done
        # Requests that share blocks, as copies of one prompt do, may free them together only.
        over = {c.request_id for c in done}
        for group in self._manager.sharing([job for job in jobs if job.request_id not in over]):
            why = [refused[job.request_id] for job in group if job.request_id in refused]
            if not why:
                continue  # all of them wait already
            result = self._try(group) if len(twins(group)) > 1 else why[0]
            if isinstance(result, Deferred):
                self._defer(group, result)
            else:
                done += result
        return done

    def _defer(self, jobs: list[Job], why: Deferred) -> None:
        blocks = {job.request_id: self._num_blocks(job.request_id) for job in jobs}
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        wait = _Wait(why.reason, why.missing, self._manager.epoch, blocks, free)
        for job in jobs:
            tracked = self._tracked[job.request_id]
            if tracked.deferred is None:
                self.kvcrush_stats.record_deferral(why.reason)
            tracked.deferred = wait

    def _waits(self, job: Job) -> bool:
        """Whether a job was put off and nothing has changed that could let it go on."""
        wait = self._tracked[job.request_id].deferred
        if wait is None:
            return False
        if wait.step != self._step:
            came = sum(self._num_blocks(r) - n for r, n in wait.blocks.items())
            if wait.reason == "no_room":
                came += self.kv_cache_manager.block_pool.get_num_free_blocks() - wait.free
            # Its tail may take a block more or less than it did, and so may its region.
            least = wait.missing - 2 * len(wait.blocks)
            wait.step, wait.over = self._step, came >= least or wait.epoch != self._manager.epoch
        return not wait.over

    def _num_blocks(self, request_id: str) -> int:
        return len(self._manager.req_to_blocks.get(request_id, ()))

    def _due(self, request: Request) -> Job | None:
        """The compaction that `request` is due now, at a position of its plan or put off there."""
        plan = self._plans.get(request.request_id)
        if plan is None:
            return None
        tracked = self._tracked[request.request_id]
        n = request.num_computed_tokens
        if tracked.params.elastic:
            return self._due_under_pressure(request, plan, tracked)
        if not (tracked.deferred or plan.is_check(n)):
            return None
        held = n - self._manager.slot_shift.get(request.request_id, 0)
        if not plan.due(n, held):
            tracked.deferred = None
            return None
        return Job(request.request_id, n, held, plan.shape(n, held), self._twin(request, plan, n))

    def _due_under_pressure(self, request: Request, plan: Plan, tracked: _Tracked) -> Job | None:
        if not tracked.pressed:
            return None
        n = request.num_computed_tokens
        holder = self._holder(request.request_id, n)
        shape = pressure.shape_at(holder, tracked.level)
        if shape.compressed >= (holder.held - shape.tail_tokens) // plan.block_size:
            tracked.pressed, tracked.deferred = False, None
            return None
        return Job(request.request_id, n, holder.held, shape, self._twin(request, plan, n))

    def _twin(self, request: Request, plan: Plan, n: int) -> Hashable:
        """What the result of a compaction at n follows from, where others may have the same: the
        plan, the tokens, and the region that it starts from."""
        full = n // self._manager.block_size
        if n > request.num_prompt_tokens or not 0 < full <= len(request.block_hashes):
            return None
        if request.prompt_embeds is not None:
            return None  # of which tokens after the last full block say nothing
        compressed, _ = self._manager.regions.get(request.request_id, (0, 0))
        blocks = self._manager.req_to_blocks[request.request_id][:compressed]
        return (
            self._tracked[request.request_id].params,
            self._tracked[request.request_id].level,
            plan.num_prompt_tokens,
            n,
            tuple(block.block_id for block in blocks),
            request.block_hashes[full - 1],  # of all tokens before its end, and of their adapter
            tuple(request.all_token_ids[full * self._manager.block_size : n]),
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if (tracked := self._tracked.get(request.request_id)) is not None:
            # It will be prefilled again, and compacted at its plan's positions.
            tracked.deferred = tracked.in_region = None
            tracked.level, tracked.pressed, tracked.observed = 0, False, (0, 0)
            self._unreported.add(request.request_id)
        current = self._allocating
        if current is None or current is request or current.request_id not in self._tracked:
            return
        # What the victim shared with the request that needs blocks is that one's own now. Without
        # this, two copies of a prompt could preempt each other for ever.
        if self._tracked[current.request_id].deferred and (job := self._due(current)) is not None:
            result = self._try([job])
            if not isinstance(result, Deferred):
                self._commands += result

    def _try(self, jobs: list[Job]) -> list[Compact] | Deferred:
        free_before = self.kv_cache_manager.block_pool.get_num_free_blocks()
        result = self._manager.compact(jobs)
        if isinstance(result, Deferred):
            return result
        freed = self.kv_cache_manager.block_pool.get_num_free_blocks() - free_before
        for i, command in enumerate(result):
            tracked = self._tracked[command.request_id]
            tracked.deferred = tracked.in_region = None
            tracked.pressed, tracked.observed = False, (0, 0)
            tracked.pages = tracked.codecs = None
            tracked.compactions += 1
            if tracked.first_compaction is None:
                tracked.first_compaction = command.computed
            self._unreported.add(command.request_id)
            self.kvcrush_stats.record_compaction(
                tracked.params.label, tracked.params.reason, blocks=freed if i == 0 else 0
            )
            if self.observer is not None:
                self.observer.compacted(command, freed if i == 0 else 0)
        return result

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Ends a chunk where the next compaction is due. vLLM asks this of every chunk, right
        before it allocates."""
        self._allocating = request
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if request.request_id in self._canaries:
            return min(num_new_tokens, canaries.MOST_TOKENS)
        plan = self._plans.get(request.request_id)
        if plan is None or num_new_tokens <= 1:
            return num_new_tokens
        held = num_computed_tokens - self._manager.slot_shift.get(request.request_id, 0)
        if self._tracked[request.request_id].params.elastic:
            # Ends it where the pool does: then others, or this one, give blocks back.
            # Blocks that a new request found in the prefix cache may be among the free ones.
            pool, size = self.kv_cache_manager.block_pool, self._manager.block_size
            own = self._num_blocks(request.request_id)
            room = (own + pool.get_num_free_blocks()) * size - held
            return min(num_new_tokens, room) if room > 0 else num_new_tokens
        limit = num_computed_tokens + num_new_tokens
        stop = plan.next_compaction(num_computed_tokens, held, limit)
        return num_new_tokens if stop is None else stop - num_computed_tokens

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Leaves the tokens before the first compaction to be computed here, so that the
        observation window never depends on what the cache held."""
        plan, cap = self._plans.get(request.request_id), None
        if plan is not None and not self._tracked[request.request_id].params.elastic:
            # The last sampled token never has KV.
            last = min(request.num_prompt_tokens + request.max_tokens - 1, self.max_model_len)
            cap = self._exact_until(plan, self._tracked[request.request_id].demands, last)
        elif scored := self._canaries.get(request.request_id):
            cap = canaries.first_row(request.num_tokens, scored)
        if cap is not None:
            cap = max(0, cap) // self._manager.block_size * self._manager.block_size
        find = super()._get_local_prefix_cache_hit
        return compat.prefix_hit(find, self.kv_cache_manager, request, max_cache_hit_length, cap)

    @staticmethod
    def _exact_until(plan: Plan, demands: Demands, last: int) -> int | None:
        """How many tokens of a request that grows to `last` the prefix cache may give it: those
        before its first compaction, and before the window of the first that scores; None: all."""
        first = plan.first_compaction(last)
        if first is None:
            return None
        scored: int | None = None
        if "queries" in demands.needs:
            near = min(last, first + plan.window)  # later windows begin after it
            scored = first if demands.always else plan.first_scoring(near)
        return first - 1 if scored is None else min(first - 1, scored - plan.window)

    # -- statistics -----------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        report = getattr(model_runner_output, "kvcrush", WorkerReport())
        for kind, size in report.peaks.items():
            worker_bytes = self.kvcrush_stats.worker_bytes
            worker_bytes[kind] = max(worker_bytes.get(kind, 0), size)
        if report.losses:
            self._settings = replace(self._settings, losses=report.losses)
            for request_id, plan in self._plans.items():
                self._plans[request_id] = plan.with_losses(report.losses)
        for done in report.compacted:
            self.kvcrush_stats.record_moved(done.policy, round(done.evicted), done.seconds)
            if self.observer is not None:
                self.observer.moved(done)
            if (tracked := self._tracked.get(done.request_id)) is not None:
                tracked.in_region = done.held
                if done.pages:
                    tracked.pages, tracked.codecs = done.pages, None
        for request_id, policy in report.failures:
            self.kvcrush_stats.record_policy_failure(policy)
            if (tracked := self._tracked.get(request_id)) is not None:
                tracked.policy_failures += 1
                self._unreported.add(request_id)
        results = super().update_from_output(scheduler_output, model_runner_output)
        if self.observer is not None and not self.running:
            self.observer.rested()
        if self._gave_way:
            self._tell_of_canaries(results)
        if self._unreported:
            # With a request's first output and after each compaction, because a front-end that
            # meets a stop string never gets the last output.
            for outputs in results.values():
                for output in outputs.outputs:
                    if output.request_id in self._unreported:
                        self._unreported.discard(output.request_id)
                        if (request := self.requests.get(output.request_id)) is not None:
                            report = self._held_report(request)
                            output.kv_transfer_params = {"kvcrush": report} if report else None
        return results

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self.kvcrush_stats.pressure = self.pressure_now
            held: dict[str, int] = {}
            raw: dict[str, int] = {}
            by_codec: dict[str, int] = {}
            size = self._block_bytes
            for request in self.running:
                tracked = self._tracked.get(request.request_id)
                if tracked is None:
                    continue
                name = tracked.params.label
                blocks = len(self._manager.req_to_blocks.get(request.request_id, ()))
                saved = self._manager.slot_shift.get(request.request_id, 0)
                side = self._side_bytes(request.request_id)
                held[name] = held.get(name, 0) + blocks * size + side
                whole = blocks + cdiv(saved, self._manager.block_size)
                raw[name] = raw.get(name, 0) + whole * size
                region = self._codecs(request.request_id)
                rest = blocks - sum(region.values())
                for codec, count in (*region.items(), ("raw", rest)):
                    by_codec[codec] = by_codec.get(codec, 0) + count * size
            stats.kv_connector_stats = {
                **(stats.kv_connector_stats or {}),
                "kvcrush": {
                    **self.kvcrush_stats.take(),
                    "kv_bytes_held": held,
                    "kv_bytes_raw_equivalent": raw,
                    "kv_codec_bytes": by_codec,
                },
            }
        return stats


class KVCrushScheduler(KVCrushSchedulerMixin, Scheduler):
    """Synchronous scheduling."""


class KVCrushAsyncScheduler(KVCrushSchedulerMixin, AsyncScheduler):
    """Asynchronous scheduling: needs nothing of its own, as block counts follow from the plan."""
