"""vLLM's V2 model runner with compaction, on GPUs and, where Triton's kernels can run there, CPUs.

Compactions run while requests are updated. Positions stay true; attention is given lengths, slots
and block tables of what is held, in buffers of our own that never move, as graphs must have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_kvcrush.engine.commands import Command
from vllm_kvcrush.engine.worker import allowed
from vllm_kvcrush.engine.worker.backends.base import Backend
from vllm_kvcrush.engine.worker.compaction import CompactionMixin
from vllm_kvcrush.engine.worker.memory import SideMemory, Sizes
from vllm_kvcrush.engine.worker.queries import QueryRing
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.ops.triton.shift import shift
from vllm_kvcrush.policies.choice import PolicyFailure


class KVCrushModelState(DefaultModelState):
    """vLLM's, with attention metadata of slots held instead of tokens read."""

    as_held: Callable[[InputBatch], InputBatch]

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().prepare_attn(self.as_held(input_batch), *args, **kwargs)


class V2Mixin(CompactionMixin):
    """What a V2 runner does differently."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # Slot shift and blocks of the region of each of vLLM's request states, here and on the
        # device (blocks in the directory), and the states in which the two may differ: a state is
        # written once a step, as the device's writes race.
        self._slot_shift = np.zeros(self.max_num_reqs, dtype=np.int32)
        self._region_blocks = np.zeros(self.max_num_reqs, dtype=np.int32)
        self._shift_device = StagedWriteTensor(self.max_num_reqs, torch.int32, device)
        self._changed: set[int] = set()
        self._directory: Any = None
        self._builders: list[Any] = []
        self._ring: QueryRing | None = None
        self._observing = False
        # By row of the batch, and by row of the query.
        self._observed = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self._places = torch.full((self.max_num_tokens,), -1, dtype=torch.int32, device=device)
        self._slot_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self._row_states = torch.full_like(self._slot_lens, -1)
        self._slots = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self._due: list[Command] = []
        self._batch: InputBatch | None = None

    def _choose_backend(self, attention: Sequence[Any]) -> Backend:
        if self.device.type == "cpu":
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

            if any(isinstance(layer.impl, CPUAttentionBackendImpl) for layer in attention):
                from vllm_kvcrush.engine.worker.backends import cpu

                return cpu.install(attention)
        if self._settings.owns_pages:
            from vllm_kvcrush.engine.worker.backends import triton

            return triton.install(attention)
        # A kernel that knows nothing of us is the best that raw pages can have.
        from vllm_kvcrush.engine.worker.backends import stock

        return stock.keep(attention)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        state = self.model_state
        if type(state) is not DefaultModelState:
            raise ValueError(
                f"vllm-kvcrush was not verified with models that need {type(state).__name__}: "
                "start the server without --kv-policy."
            )
        state.__class__ = KVCrushModelState
        state.as_held = self._as_held

    def left_for_pool(self, available: int) -> int:
        """Bytes that the pool may take of `available` ones, beside all that we hold."""
        sizes = self._sizes()
        side = SideMemory.of(self._settings, sizes)
        return side.left_for_pool(available, sizes.block_bytes)

    def _sizes(self) -> Sizes:
        layers = list(get_layers_from_vllm_config(self.vllm_config, Attention).values())
        impl = layers[0].impl
        return Sizes(
            layers=len(layers),
            heads=impl.num_heads,
            kv_heads=impl.num_kv_heads,
            head_size=impl.head_size,
            itemsize=self.model_config.dtype.itemsize,
            block_size=self.cache_config.block_size,
            requests=self.max_num_reqs,
            max_model_len=self.model_config.max_model_len,
        )

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self._ring is None and allowed.needs_queries(self._settings):
            self._ring = QueryRing(
                list(self._attention.values()), self.max_num_reqs, self._settings.window,
                self._places, self.model_config.dtype,
            )  # fmt: skip
        if self._backend.directory is None:
            return
        first = self._layers[0]
        self._directory = self._backend.directory(
            self.max_num_reqs, len(self._layers), first.heads, first.pages.num_blocks,
            self._settings, self.device,
        )  # fmt: skip
        ((group,),) = self.attn_groups
        self._builders = group.metadata_builders
        for builder in self._builders:
            builder.directory, builder.states = self._directory, self._row_states

    def execute_model(
        self,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        if dummy_run:
            self._places.fill_(-1)
        else:
            self._due = self._begin_step(scheduler_output)
        return super().execute_model(scheduler_output, intermediate_tensors, dummy_run, **kwargs)

    def _remove_request(self, req_id: str) -> bool:
        # Every way out of the batch leads here, and only now its state is known.
        state = self.req_states.req_id_to_index.get(req_id)
        if state is not None:
            self._set_state(state, 0, 0)
        return super()._remove_request(req_id)

    def update_requests(self, scheduler_output: Any) -> None:
        for command in self._due:
            self._run(command)
        self._due = []
        for state in sorted(self._changed):
            self._shift_device.stage_write_elem(state, int(self._slot_shift[state]))
            if self._directory is not None:
                self._directory.stage_blocks(state, int(self._region_blocks[state]))
        self._changed.clear()
        self._shift_device.apply_write()
        if self._directory is not None:
            self._directory.apply()
        super().update_requests(scheduler_output)

    def _install(self, request_id: str, blocks: list[int], slot_shift: int) -> None:
        state = self.req_states.req_id_to_index[request_id]
        self.block_tables.append_block_ids(state, (blocks,), overwrite=True)
        region = self._requests[request_id].region
        if region is not None and self._directory is not None:
            assert blocks[: region.blocks] == region.block_ids.tolist()
            self._directory.write(state, region)
        self._set_state(state, slot_shift, 0 if region is None else region.blocks)

    def _set_state(self, state: int, slot_shift: int, region_blocks: int) -> None:
        if (self._slot_shift[state], self._region_blocks[state]) != (slot_shift, region_blocks):
            self._slot_shift[state], self._region_blocks[state] = slot_shift, region_blocks
            self._changed.add(state)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        self._prepare_batch(
            input_batch.req_ids,
            input_batch.num_computed_tokens_np,
            input_batch.num_scheduled_tokens,
        )
        self._batch = input_batch
        self._tell_observed()
        for builder in self._builders:
            builder.paged = bool(self._region_blocks[input_batch.idx_mapping_np].any())
        shift(
            self._slot_lens,
            self._slots,
            self._row_states,
            self._places,
            input_batch.seq_lens,
            input_batch.positions,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            self._shift_device.gpu,
            self._observed,
            self._settings.window,
        )
        slots = self._slots[: input_batch.num_tokens_after_padding]
        return super().prepare_attn(dataclasses.replace(input_batch, positions=slots))

    def _tell_observed(self) -> None:
        """Tells the device of how many of this step's newest tokens of each request the queries are
        to be kept."""
        if self._wanted or self._observing:
            counts = np.zeros(self.max_num_reqs, dtype=np.int32)
            for wanted in self._wanted:
                counts[wanted.row] = wanted.queries
                wanted.request.queries_end = wanted.first + wanted.queries
            async_tensor_h2d(counts, out=self._observed)
        if self._wanted and self._ring is not None:
            self._holds("queries", self._ring.kept.nbytes)
        self._observing = bool(self._wanted)

    def _last_queries(self, request_id: str, state: WorkerRequest, computed: int) -> Tensor:
        if self._ring is None:  # of a policy that could not be built when the server started
            raise PolicyFailure("its observation window was not kept")
        return self._ring.last(self.req_states.req_id_to_index[request_id], computed)

    def _as_held(self, batch: InputBatch) -> InputBatch:
        """The batch as attention is to see it: slots held, on the device and on the host."""
        lengths = self._slot_lens[: batch.num_reqs_after_padding]
        bound = batch.seq_lens_cpu_upper_bound
        if self._batch is not None and batch is self._batch:
            # Backends derive page counts from this one: too long would reach into freed blocks.
            bound = bound.clone()
            bound[: batch.num_reqs] -= torch.from_numpy(self._slot_shift[batch.idx_mapping_np])
        else:
            # A dummy, or a batch to capture: of nobody's requests, but in the same buffer.
            lengths.copy_(batch.seq_lens[: batch.num_reqs_after_padding])
            self._row_states.fill_(-1)
            self._places.fill_(-1)
            for builder in self._builders:
                builder.paged = False
            if self._backend.builder is not None:
                self._backend.builder.regions = []
        return dataclasses.replace(batch, seq_lens=lengths, seq_lens_cpu_upper_bound=bound)


class KVCrushCPUModelRunnerV2(V2Mixin, CPUModelRunner):
    """The V2 runner on a CPU, where Triton's kernels can run there."""


class KVCrushGPUModelRunnerV2(V2Mixin, GPUModelRunner):
    """The V2 runner on a GPU."""
