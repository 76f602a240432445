"""Compaction on a worker, for all of vLLM's model runners: it follows requests, remembers the
queries that the next compaction scores with, and runs the scheduler's commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform.fit import fit
from vllm_kvcrush.codecs.transform.points import POINTS, horizon
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.blocks import KVCrushSpec
from vllm_kvcrush.engine.commands import Command, Compact, Compacted, StepCommands, WorkerReport
from vllm_kvcrush.engine.worker import statistics
from vllm_kvcrush.engine.worker.backends.base import Backend, CacheLayer, CacheLayers
from vllm_kvcrush.engine.worker.move import Move
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.plan import cdiv
from vllm_kvcrush.policies.base import Policy
from vllm_kvcrush.policies.choice import USELESS, PolicyFailure

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

logger = init_logger("vllm.kvcrush")

# Most policies that are cached: clients may vary their parameters.
_MOST_POLICIES = 64


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


# The type checker takes the mixin for a runner.
_Base: Any = GPUModelRunner if TYPE_CHECKING else object


class CompactionMixin(_Base):
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
        if self._tap is None:
            self._tap = QueryTap(list(self._attention.values()))

    def _open_layers(self, tables: list[Tables], rank: int) -> None:
        """Describes the cache to the kernels. `tables` are those of the fitted codecs; in them, the
        KV heads of this rank come after those of `rank` others."""
        names, config, size = list(self._attention), self.model_config, self.cache_config.block_size
        found: list[dict[str, Any]] = [{} for _ in names]
        if tables:
            assert self._settings.page is not None
            k_size, v_size, itemsize = self._settings.page
            page_bytes = size * (k_size + v_size) * itemsize
            count = config.get_num_kv_heads(self.parallel_config)
            heads = range(rank * count, (rank + 1) * count)
            angles = Angles(tables[0].rope, config.max_model_len)
            for own, name in zip(found, names, strict=True):
                layer = extract_layer_index(name)
                for each in tables:
                    own[each.point.name] = self._backend.table(
                        each, layer, heads, page_bytes, v_size, angles
                    )
        self._layers = [
            self._backend.layer(layer, len(names), own)
            for layer, own in zip(self._attention.values(), found, strict=True)
        ]
        self._layers.sort(key=lambda layer: layer.index)
        together = self._backend.together
        self._together = None if together is None else together(self._layers)

    def take_statistics(self) -> None:
        """Makes the tables of fitted codecs from statistics of the running model, and measures what
        each codec loses, if no file has them. It runs requests, and must be called before there are
        others."""
        settings = self._settings
        if settings.fitted and settings.tables is None:
            self._fit_tables()
        if any(loss is None for loss in settings.losses.values()):
            self._measure_losses()

    def _fit_tables(self) -> None:
        began = time.perf_counter()
        config = self.model_config.hf_text_config.to_dict()
        rope = Rope.from_config(config)
        measured = statistics.gather(self._read_pieces(), rope)
        far = horizon(config)
        self._open_layers([fit(measured, p, rope, far, even=True) for p in POINTS], 0)
        logger.info(
            "vllm-kvcrush: statistics of the model for transform coding taken in %.1f s.",
            time.perf_counter() - began,
        )

    def _read_pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs each piece of text and yields its queries [L, Hq, n, D] and keys [L, H, n, D], with
        RoPE."""
        size, tap = self.cache_config.block_size, self._tap
        assert tap is not None
        for tokens in statistics.pieces(self.model_config, min(self._room * size, self._longest)):
            n = len(tokens)
            blocks = list(range(1, 1 + cdiv(n, size)))
            tap.rows = torch.arange(n, device=self.device)
            self.execute_model(statistics.scheduled(tokens, blocks))
            self.sample_tokens(None)
            self.execute_model(statistics.finished())
            table = torch.tensor(blocks, dtype=torch.int32, device=self._layers[0].device)
            held = (
                layer.held(layer.source(None, table, n, 0), [n] * layer.heads)
                for layer in self._layers
            )
            keys = torch.stack([own.keys for own in held])
            yield tap.take().transpose(1, 2).cpu(), keys.cpu()

    @property
    def _room(self) -> int:
        return int(self._layers[0].pages.num_blocks) - 1  # vLLM keeps block 0 for itself

    @property
    def _longest(self) -> int:
        """Tokens that one step and one request can have."""
        return min(self.max_num_tokens, self.model_config.max_model_len - 1)

    def _measure_losses(self) -> None:
        """Measures `Settings.losses` by compacting contexts to each codec in turn, as requests
        are."""
        began, size = time.perf_counter(), self.cache_config.block_size
        # The context's blocks are read for each codec, and others written.
        room = self._room // 2 * size
        found = statistics.excerpts(self.model_config, size, min(room, self._longest))
        packings = self._settings.packings(self._settings.policy, size)
        losses = {packing.codec: [0.0] for packing in packings}
        for context, question in found:
            n, tokens = len(context), context + question
            blocks = list(range(1, 1 + self._room))
            whole = n // size
            tail = [blocks.pop() for _ in range(cdiv(len(question), size))]
            exact = self._hidden(statistics.scheduled(tokens, [*blocks[:whole], *tail]))[n:]
            for packing in packings:
                # One token again, as only a request that is known can be compacted.
                self._hidden(statistics.scheduled(tokens, blocks[:whole], n - 1, 1), last=False)
                step = statistics.compacted(packing, n, blocks, tail, size, len(question))
                other = self._hidden(step)
                losses[packing.codec].append(
                    statistics.divergence(self.get_model().compute_logits, exact, other)
                )
        self._peaks = {}
        if not found:
            logger.warning(
                "vllm-kvcrush: the context or the KV cache is too short to measure what codecs "
                "lose on this model: %s takes them in the order %s.",
                self._settings.policy,
                ", ".join(losses),
            )
            return
        # Only one rank may have logits, and all must choose alike.
        means = {codec: sum(own) / len(found) for codec, own in losses.items()}
        self._losses = get_tp_group().broadcast_object(means, src=0)
        self._untold = True
        logger.info(
            "vllm-kvcrush: measured in %.1f s what codecs lose on this model, in nats a token "
            "(KL divergence): %s.",
            time.perf_counter() - began,
            ", ".join(f"{codec} {loss:.4f}" for codec, loss in self._losses.items()),
        )

    @torch.inference_mode()
    def _hidden(self, step: Any, last: bool = True) -> Tensor:
        """Runs a step of one request, its last one if so said, and returns the hidden states of its
        tokens."""
        found: list[Tensor] = []
        model = self.get_model()
        hook = model.register_forward_hook(lambda model, given, states: found.append(states))
        try:
            self.execute_model(step)
        finally:
            hook.remove()
        states = found[-1][: step.total_num_scheduled_tokens].clone()
        self.sample_tokens(None)
        if last:
            self.execute_model(statistics.finished())
        return states

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
        self._compacted.append(Compacted(command.request_id, state.label, seconds, held, evicted))

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
            failed=lambda why: self._failed(name, state, why),
            on_select=self.on_select,
            together=self._together,
        )
        if move.scores and "queries" in state.needs:
            try:
                move.queries = self._window(name, state, command.computed)
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
