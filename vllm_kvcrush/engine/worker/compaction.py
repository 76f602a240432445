"""Compaction on a worker, for all of vLLM's model runners: it follows requests, remembers the
queries that the next compaction scores with, and runs the scheduler's commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.blocks import KVCrushSpec
from vllm_kvcrush.engine.commands import Command, Compact, Compacted, StepCommands, WorkerReport
from vllm_kvcrush.engine.worker.backends.base import Backend, CacheLayer, CacheLayers
from vllm_kvcrush.engine.worker.measuring import MeasuringMixin
from vllm_kvcrush.engine.worker.move import Move
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.engine.worker.tap import QueryTap
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.policies.base import Policy
from vllm_kvcrush.policies.choice import USELESS, PolicyFailure

logger = init_logger("vllm.kvcrush")

# Most policies that are cached: clients may vary their parameters.
_MOST_POLICIES = 64


class Wanted(NamedTuple):
    """Queries of a step that are wanted: `queries` of one request's, from query row `first_row` on,
    the first at position `first`; `row` is the request's in the batch."""

    request: WorkerRequest
    row: int
    first_row: int
    first: int
    queries: int


class Answer:
    """A truth value that a device may still be computing: nobody waits for it."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._event: Any = None
        if value.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def known(self) -> bool:
        """Whether the device has told."""
        return self._event is None or bool(self._event.query())

    def __bool__(self) -> bool:
        assert self.known
        return bool(self._value)


def _side_bytes(state: WorkerRequest) -> int:
    """Returns the bytes that are kept beside the pages of a request between compactions."""
    kept = (x for by in (*state.kept_state.values(), state.positions) for x in by.values())
    return sum(x.nbytes for x in kept)


class CompactionMixin(MeasuringMixin):
    """What our model runners have in common. A runner calls `_run` for the commands of a step,
    takes the results in `_install`, and applies the shift between slots and positions."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._settings = Settings.from_dict(vllm_config.additional_config["kvcrush"])
        # Built policies by name; None where one could not be built.
        self._policies: dict[str, Policy | None] = {}
        self._rope = Rope.if_known(vllm_config.model_config.hf_text_config.to_dict())
        # Requests with an active policy.
        self._requests: dict[str, WorkerRequest] = {}
        self._observe: dict[str, int] = {}
        self._backend: Backend
        self._layers: list[CacheLayer] = []
        # The place of each in the model.
        self._depths: list[int] = []
        self._together: CacheLayers | None = None
        self._tap: QueryTap | None = None
        self._attention: dict[str, Any] = {}
        self._wanted: list[Wanted] = []
        # What the next output tells the scheduler: compactions, and (request id, policy) where a
        # policy failed.
        self._compacted: list[Compacted] = []
        self._failures: list[tuple[str, str]] = []
        # The most bytes held beside the cache, by their use; and whether any grew since the last
        # report.
        self._peaks: dict[str, int] = {}
        self._higher = False
        # Compactions of which the device has not told yet whether their choices are sound.
        self._unsettled: list[tuple[str, WorkerRequest, Answer]] = []
        # What was measured here, by codec, and whether the scheduler does not know it yet.
        self._losses: dict[str, float] = {}
        self._untold = False
        # By codec, float64 [L, H]: how what each loses is divided among this rank's heads.
        self._head_losses: dict[str, np.ndarray] = {}
        # Called with each layer's choice, slots [kv_heads, keep]; for tests and tools.
        self.on_select: Callable[[Compact, int, Tensor], None] | None = None

    # -- what a runner adds ---------------------------------------------------------------------

    def _choose_backend(self, attention: Sequence[Any]) -> Backend:
        """Prepares the model's attention layers and returns the backend for them."""
        raise NotImplementedError

    def _install(self, request_id: str, blocks: list[int], slot_shift: int) -> None:
        """Sets the blocks and the slot shift of a compacted request, before this step adds
        blocks."""
        raise NotImplementedError

    def _last_queries(self, request_id: str, state: WorkerRequest, computed: int) -> Tensor:
        """The queries of a request's last `window` tokens before position `computed`, all of which
        were wanted: see `_window`."""
        raise NotImplementedError

    def _repeat(self, request_id: str, move: Move, computed: int) -> dict[int, Tensor]:
        """Lets the model repeat the tokens of a request that are new since its last compaction,
        and returns `Repetition.received`. Raises PolicyFailure if that cannot be done."""
        raise PolicyFailure("this model runner does not let the model repeat its context")

    # -- start-up -------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        self._backend = self._choose_backend(list(layers.values()))

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        odd = sorted({type(s).__name__ for s in specs.values() if type(s) is not FullAttentionSpec})
        windowed = [n for n, s in specs.items() if getattr(s, "sliding_window", None)]
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        shared = any(layer.kv_sharing_target_layer_name for layer in layers)
        if odd or windowed or shared:
            what = odd or windowed[:1] or ["cross-layer KV sharing"]
            raise ValueError(
                f"vllm-kvcrush needs layers with full attention and their own KV cache: this model "
                f"has {', '.join(what)}. Start the server without --kv-policy."
            )
        return {name: KVCrushSpec.convert(spec) for name, spec in specs.items()}

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        context = self.compilation_config.static_forward_context
        (group,) = kv_cache_config.kv_cache_groups
        self._attention = {name: context[name] for name in group.layer_names}
        settings = self._settings
        tables: list[Tables] = []
        if settings.tables is not None:
            config = self.model_config.hf_text_config.to_dict()
            tables = [
                transform_tables.load(settings.tables, config, codec) for codec in settings.fitted
            ]
        self._open_layers(tables, get_tensor_model_parallel_rank())
        if settings.tables is not None:
            known = transform_tables.load_losses(settings.tables)
            self._head_losses = {} if known is None else self._own(known.loss)
        if self._tap is None:
            self._tap = QueryTap(list(self._attention.values()))

    def _open_layers(self, tables: list[Tables], rank: int) -> None:
        """Describes the cache to the kernels. `tables` are those of the fitted codecs; in them, the
        KV heads of this rank come after those of `rank` others."""
        names, size = list(self._attention), self.cache_config.block_size
        found: list[dict[str, Any]] = [{} for _ in names]
        if tables:
            assert self._settings.page is not None
            k_size, v_size, itemsize = self._settings.page
            page_bytes = size * (k_size + v_size) * itemsize
            heads = self._heads_of(rank)
            angles = Angles(tables[0].rope, self.model_config.max_model_len)
            for own, name in zip(found, names, strict=True):
                layer = extract_layer_index(name)
                for each in tables:
                    own[each.point.name] = self._backend.table(
                        each, layer, heads, page_bytes, v_size, angles
                    )
        made = [
            (self._backend.layer(self._attention[name], len(names), own), extract_layer_index(name))
            for name, own in zip(names, found, strict=True)
        ]
        made.sort(key=lambda pair: pair[0].index)
        self._layers, self._depths = [own for own, _ in made], [depth for _, depth in made]
        together = self._backend.together
        self._together = None if together is None else together(self._layers)

    def _heads_of(self, rank: int) -> range:
        """Returns which of the model's KV heads a rank has."""
        count = self.model_config.get_num_kv_heads(self.parallel_config)
        return range(rank * count, (rank + 1) * count)

    def _own(self, losses: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Returns the losses of this rank's layers and heads, in the order of their pages, given
        those of the model's, by codec, [L, H]."""
        heads = list(self._heads_of(get_tensor_model_parallel_rank()))
        return {
            codec: own[self._depths][:, heads].double().numpy() for codec, own in losses.items()
        }

    # -- one step -------------------------------------------------------------------------------

    def _begin_step(self, scheduler_output: Any) -> list[Command]:
        """Adds and removes the requests that come and go, and returns the commands of this step."""
        told: StepCommands = getattr(scheduler_output, "kvcrush", None) or StepCommands()
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        for request_id in scheduler_output.preempted_req_ids or ():
            self._requests.pop(request_id, None)
        self._settle()
        for request_id, own in told.admitted.items():
            policy = self._policy(own.policy)
            plan = own.plan.with_losses(self._losses)
            self._requests[request_id] = WorkerRequest(
                own.policy, policy, plan, own.spans, own.protect
            )
        self._observe = told.observe
        return told.commands

    def _run(self, command: Command) -> None:
        """Runs one of the scheduler's commands."""
        assert isinstance(command, Compact), f"a command of an unknown kind: {command}"
        self._compact(command)

    def _policy(self, name: str) -> Policy | None:
        if name not in self._policies:
            if len(self._policies) >= _MOST_POLICIES:
                del self._policies[next(iter(self._policies))]
            try:
                self._policies[name] = self._settings.build(name)
            except Exception:  # a third party's constructor may raise anything
                logger.exception("vllm-kvcrush: the policy %s cannot be built.", name)
                self._policies[name] = None
        return self._policies[name]

    def _prepare_batch(
        self, ids: Sequence[str], computed: np.ndarray, scheduled: np.ndarray
    ) -> list[WorkerRequest | None]:
        """Tells the backend which requests are in the batch, notes whose queries are wanted, and
        returns the requests' states, None for those without an active policy.

        Args:
            ids: ids of the requests, in the order of the batch.
            computed: number of tokens of each whose KV has been computed.
            scheduled: number of tokens of each in this step.
        """
        states = [self._requests.get(request_id) for request_id in ids]
        self._wanted = list(self._wanted_queries(ids, states, computed, scheduled))
        if self._backend.builder is not None:
            self._backend.builder.regions = [s.region if s else None for s in states]
        return states

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        news = self._compacted or self._failures or self._higher or self._untold
        if news and output is not None:
            # An asynchronous output wraps the real one, in V2 and in V1 under different names.
            inner = getattr(output, "model_runner_output", output)
            inner = getattr(inner, "_model_runner_output", inner)
            losses = self._losses if self._untold else {}
            inner.kvcrush = WorkerReport(
                self._compacted, self._failures, dict(self._peaks), dict(losses)
            )
            self._compacted, self._failures = [], []
            self._higher = self._untold = False
        return output

    # -- observation window ---------------------------------------------------------------------

    def _wanted_queries(
        self,
        ids: Sequence[str],
        states: Sequence[WorkerRequest | None],
        computed: np.ndarray,
        scheduled: np.ndarray,
    ) -> Iterator[Wanted]:
        first_row = 0
        for row, (request_id, state) in enumerate(zip(ids, states, strict=True)):
            first_row += int(scheduled[row])
            count = self._observe.get(request_id, 0)
            if state is not None and count:
                end = int(computed[row] + scheduled[row])
                yield Wanted(state, row, first_row - count, end - count, count)

    def _holds(self, kind: str, size: int) -> None:
        """Remembers the most bytes that are held for one use, see `stats.Stats.worker_bytes`."""
        if size > self._peaks.get(kind, 0):
            self._peaks[kind], self._higher = size, True

    def _window(self, request_id: str, state: WorkerRequest, computed: int) -> Tensor:
        """Returns the queries of the last `window` tokens, in order, `[layers, query_heads, window,
        size]`. Raises PolicyFailure if they were not all kept."""
        if state.queries_end != computed:
            raise PolicyFailure(
                f"its observation window ends at {state.queries_end}, "
                f"the compaction is at {computed}"
            )
        return self._last_queries(request_id, state, computed)

    # -- compaction -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _compact(self, command: Compact) -> None:
        """Runs a compaction, or takes over the result of an equal one, and installs the request's
        new blocks."""
        began = time.perf_counter()
        state = self._requests[command.request_id]
        held = evicted = 0.0
        if command.same_as is None:
            held, evicted = self._move(command, state)
        else:
            other = self._requests[command.same_as]
            state.region, state.finer = other.region, other.finer
            state.kept_state, state.positions = other.kept_state, other.positions
            state.layer_state = other.layer_state
            for done in self._compacted:
                if done.request_id == command.same_as:
                    held, evicted = done.held, done.evicted
            if (command.same_as, other.label) in self._failures:
                self._failures.append((command.request_id, state.label))
        state.blocks, state.slot_shift = len(command.target), command.slot_shift
        # The next window may reach back before this compaction.
        n, left = command.computed, command.computed - command.slot_shift
        if state.plan.next_compaction(n, left, n + state.plan.window - 1) is None:
            state.queries = None
        self._install(command.request_id, [*command.target, *command.tail], command.slot_shift)
        if state.region is not None:
            state.region.uploaded = None
        seconds = time.perf_counter() - began
        pages = state.region.codec_pages if state.region is not None else {}
        self._compacted.append(
            Compacted(command.request_id, state.label, seconds, held, evicted, pages)
        )

    def _move(self, command: Compact, state: WorkerRequest) -> tuple[float, float]:
        """Fills the target blocks of a compaction. Returns the numbers of tokens held and evicted,
        means over layers and heads."""
        name = command.request_id
        move = Move(
            command,
            state,
            self._layers,
            self.cache_config.block_size,
            self._rope,
            self._head_losses,
            failed=lambda why: self._failed(name, state, why),
            on_select=self.on_select,
            together=self._together,
        )
        if move.scores:
            try:
                if "queries" in state.needs:
                    move.queries = self._window(name, state, command.computed)
                if "repeat" in state.needs:
                    move.repeated = self._repeat(name, move, command.computed)
            except PolicyFailure as why:
                move.give_up(why)
        move.run()
        cpus = self._layers[0].device.type == "cpu"
        if move.sound:
            self._unsettled.append((name, state, Answer(torch.stack(move.sound).all())))
            if cpus:
                self._settle()
        if state.region is not None:
            state.region.uploaded = None  # others may have the same
        state.region = move.target if state.owns_pages else None
        state.kept_state, state.positions = move.kept_state, move.positions
        state.layer_state = move.layer_state
        state.finer = move.finer
        self._holds("gathered", move.gathered)
        if state.kept_state or state.positions:
            self._holds("running", sum(_side_bytes(known) for known in self._requests.values()))
        if cpus:
            self._holds("scratch", cpu.scratch_peak())
        return move.held, move.evicted

    # -- policies that fail ---------------------------------------------------------------------

    def _failed(self, request_id: str, state: WorkerRequest, why: PolicyFailure) -> None:
        """Counts a compaction that had to do without its policy, and logs it once for each
        request."""
        if (request_id, state.label) not in self._failures:
            self._failures.append((request_id, state.label))
        if not state.failed:
            state.failed = True
            logger.error(
                "vllm-kvcrush: the policy %s failed for request %s, which keeps its sinks and "
                "newest tokens instead: %s",
                state.name,
                request_id,
                why,
            )

    def _settle(self) -> None:
        """Counts the compactions whose choices turned out not to be sound, as far as the device has
        told."""
        unsettled, self._unsettled = self._unsettled, []
        for request_id, state, sound in unsettled:
            if not sound.known:
                self._unsettled.append((request_id, state, sound))
            elif not sound:
                self._failed(request_id, state, PolicyFailure(USELESS))
