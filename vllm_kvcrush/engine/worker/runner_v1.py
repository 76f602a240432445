"""vLLM's V1 CPU runner with compaction: compactions run before a step, then slots are shifted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_kvcrush.engine.worker.backends import cpu
from vllm_kvcrush.engine.worker.backends.base import Backend
from vllm_kvcrush.engine.worker.compaction import CompactionMixin
from vllm_kvcrush.engine.worker.move import Move
from vllm_kvcrush.engine.worker.repeat import Repetition, passes
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.policies.choice import PolicyFailure


class KVCrushCPUModelRunner(CompactionMixin, CPUModelRunner):
    """vLLM's V1 CPU runner with compaction."""

    def _choose_backend(self, attention: Sequence[Any]) -> Backend:
        return cpu.install(attention)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        for command in self._begin_step(scheduler_output):
            self._run(command)
        return super().execute_model(scheduler_output, intermediate_tensors)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        ids = self.input_batch.req_ids
        n = len(ids)
        computed = self.input_batch.num_computed_tokens_cpu[:n]
        states = self._prepare_batch(ids, computed, num_scheduled_tokens)
        if self._wanted:
            assert self._tap is not None
            rows = [torch.arange(w.first_row, w.first_row + w.queries) for w in self._wanted]
            self._tap.rows = torch.cat(rows)
        shift = np.array([s.slot_shift if s else 0 for s in states], dtype=np.int32)
        if shift.any():
            # Slots and lengths are shifted, positions (for RoPE) are not.
            by_row = torch.from_numpy(shift)
            tokens = int(scheduler_output.total_num_scheduled_tokens)
            by_token = torch.from_numpy(np.repeat(shift, num_scheduled_tokens).astype(np.int64))
            self.seq_lens[:n] -= by_row
            self.optimistic_seq_lens_cpu[:n] -= by_row
            self.input_batch.block_table.compute_slot_mapping(
                n,
                self.query_start_loc.gpu[: n + 1],
                self.positions[:tokens] - by_token,
            )
        return prepared

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._model_forward(*args, **kwargs)
        if self._wanted:
            self._keep_queries()
        return output

    def _keep_queries(self) -> None:
        """Remembers the queries that the forward pass left in the tap."""
        assert self._tap is not None
        taken = self._tap.take()
        used = 0
        for state, _, _, first, count in self._wanted:
            window = state.plan.window
            if state.queries is None:
                layers, _, heads, size = taken.shape
                state.queries = taken.new_empty(layers, window, heads, size)
                held = [s.queries for s in self._requests.values() if s.queries is not None]
                self._holds("queries", sum(queries.nbytes for queries in held))
            places = torch.arange(first, first + count) % window
            state.queries[:, places] = taken[:, used : used + count]
            state.queries_end = first + count
            used += count
        self._wanted = []

    def _last_queries(self, request_id: str, state: WorkerRequest, computed: int) -> Tensor:
        if state.queries is None:
            raise PolicyFailure("its observation window was not kept")
        window = state.plan.window
        order = torch.arange(computed - window, computed) % window
        return state.queries[:, order].transpose(1, 2)

    def _repeat(self, request_id: str, move: Move, computed: int) -> dict[int, Tensor]:
        tokenizer = cached_tokenizer_from_config(self.model_config)
        request, (first, end) = self.requests[request_id], move.new
        tokens = [request.get_token_id(index) for index in range(end)]
        impls = {layer.impl.index: layer.impl for layer in self._attention.values()}
        found = Repetition(impls, move)
        most = min(self.max_num_tokens, self.model_config.max_model_len - computed)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        for own in passes(encode, tokens, first, end, most):
            n = len(own.tokens)
            ids = torch.tensor(own.tokens, dtype=self.input_ids.gpu.dtype)
            places = torch.arange(computed, computed + n, dtype=self.positions.dtype)
            context = set_forward_context(None, self.vllm_config, num_tokens=n, slot_mapping={})
            with context, found.repeating(own.first, own.end):
                self.model(input_ids=ids, positions=places)
        return found.received

    def sample_tokens(self, grammar_output: Any) -> Any:
        # When vLLM 0.32 discards the sample of a prompt's chunk, it rewinds the request's generator
        # by get_offset, which CPU generators lack: any seeded prompt of two chunks ends the engine,
        # and our chunks end where compactions are due. So such rows sample without their generator.
        # This can go when vLLM's own CPU runner takes seeded prompts in chunks.
        generators = self.input_batch.generators
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        away = {int(i): generators.pop(int(i)) for i in discarded if int(i) in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(away)

    def _install(self, request_id: str, blocks: list[int], slot_shift: int) -> None:
        self.requests[request_id].block_ids = (blocks,)
        row = self.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            self.input_batch.block_table.add_row((blocks,), row)
