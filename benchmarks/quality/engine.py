"""Runs one offline engine with the plugin, and records what requests held as they answered."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcrush.spec import parse

BLOCK = 32


@dataclass(frozen=True)
class Job:
    """One continuation of `prompt` under a policy: `tokens` are forced, then up to `free` more
    are decoded greedily. A job with `reference` is compared with the job of that name, which must
    be uncompressed and of an earlier call. `extra`: other parameters, such as `kv_spans`."""

    name: str
    prompt: list[int]
    tokens: list[int]
    scored: list[bool]
    rivals: list[int | None]
    policy: str = "none"
    budget: float | int = 1.0
    reference: str | None = None
    free: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    spans: int = 8

    @property
    def extra_args(self) -> dict[str, Any]:
        """Returns the parameters of the request."""
        if self.policy == "none":
            return {"kv_policy": "none", **self.extra}
        args: dict[str, Any] = {"kv_policy": self.policy, "kv_budget": self.budget}
        if any(spec.name == "fair" for spec in parse(self.policy).chain):
            edges = [len(self.prompt) * i // self.spans for i in range(self.spans + 1)]
            args["kv_spans"] = list(itertools.pairwise(edges))
        return args | self.extra


@dataclass
class Held:
    """KV bytes of one request, everything counted: blocks and the plugin's side tensors."""

    block_bytes: int
    forced: int
    # Blocks right after the prompt was read (and compacted), in tokens: what a peer may keep.
    kept: int = 0
    # The most that was held while a scored or free token was computed.
    scored: int = 0
    steps: set[int] = field(default_factory=set)

    def see(self, step: int, blocks: int, side: int) -> None:
        """Takes note of one decode step, before the forward pass that yields the logits of
        `step`."""
        if step == 1:
            self.kept = blocks * BLOCK
        if step in self.steps or step >= self.forced:
            self.scored = max(self.scored, blocks * self.block_bytes + side)


def _compact_all(manager: Any, jobs: Sequence[Any]) -> Any:
    """Stands in for `KVCrushManager.compact`, which puts off what frees no block: one prompt under
    many policies at once shares its blocks, and each is to be compacted at its end."""
    from vllm_kvcrush.engine.blocks import Deferred, twins

    regions = {job.request_id: manager._region(job) for job in jobs}
    if missing := manager._missing_room(twins(jobs), regions):
        return Deferred("no_room", missing)
    manager.epoch += 1
    return [command for unit in twins(jobs) for command in manager._compact_unit(unit, regions)]


class Engine:
    """vLLM in this process with all policies allowed, and `also` whole expressions; requests name
    theirs."""

    def __init__(
        self,
        model: str,
        max_model_len: int,
        pool_tokens: int,
        max_num_seqs: int = 64,
        also: Sequence[str] = (),
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from transformers import AutoConfig
        from vllm import LLM

        from benchmarks.quality.force import Forcing
        from vllm_kvcrush import policies
        from vllm_kvcrush.config import NONE

        active: dict[str, Any] = {"policy": "auto", "budget": 0.25, "min_tokens": 0}
        active["allow"] = [*policies.names(), NONE, *also]
        config = AutoConfig.from_pretrained(model)
        head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        token_bytes = config.num_hidden_layers * config.num_key_value_heads * 2 * head * 4
        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=pool_tokens * token_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            logits_processors=[Forcing],
            additional_config={"kvcrush": active},
        )
        self.tokenizer = self.llm.get_tokenizer()
        core = self.llm.llm_engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._held: dict[str, Held] = {}
        manager = self._scheduler._manager
        manager.compact = functools.partial(_compact_all, manager)
        schedule = self._scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._watch(output)
            return output

        self._scheduler.schedule = watched

    def _watch(self, output: Any) -> None:
        from benchmarks.quality.force import KEY

        blocks = self._scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
        for request_id in output.num_scheduled_tokens:
            request = self._scheduler.requests[request_id]
            name = (request.sampling_params.extra_args or {}).get(KEY)
            if name in self._held:
                self._check_compacted(request, output.num_scheduled_tokens[request_id])
                state = self._runner._requests.get(request_id)
                tensors = []
                if state is not None:
                    kept = (*state.kept_state.values(), state.positions)
                    tensors = [state.queries, *(x for by in kept for x in by.values())]
                if state is not None and (region := state.region) is not None:
                    tensors += (region.begin, region.end, region.page, region.count, region.codec)
                    tensors += (region.bias, region.log_bias)
                side = sum(t.nbytes for t in tensors if t is not None)
                step = request.num_computed_tokens - request.num_prompt_tokens
                self._held[name].see(step, len(blocks[request_id]), side)

    def _check_compacted(self, request: Any, scheduled: int) -> None:
        plan = self._scheduler._plans.get(request.request_id)
        prompt = request.num_prompt_tokens
        evicted = self._scheduler._manager.slot_shift.get(request.request_id, 0)
        computed = request.num_computed_tokens - scheduled
        if plan and computed == prompt and plan.due(prompt, prompt - evicted):
            raise RuntimeError(
                "a compaction was put off: give one call fewer jobs, or the engine a larger pool"
            )

    def forced(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Runs all jobs in one batch; results by name: lists over the scored tokens (`nll`,
        `correct`, `agree`, `kl`, `margin`), `held` in bytes, `kept` in tokens, `free` token ids."""
        from vllm import SamplingParams

        from benchmarks.quality.force import BOOK, KEY, Forced

        wanted = {job.reference for job in jobs}
        params = []
        for job in jobs:
            reference = BOOK[job.reference] if job.reference else None
            BOOK[job.name] = Forced(
                job.tokens,
                job.scored,
                job.rivals,
                reference=reference.logp if reference else None,
                keep=job.policy == "none" and job.name not in wanted,
            )
            self._held[job.name] = Held(
                self._scheduler._block_bytes,
                len(job.tokens),
                steps=set(BOOK[job.name].steps),
            )
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=len(job.tokens) + job.free,
                    ignore_eos=not job.free,
                    detokenize=False,
                    extra_args={KEY: job.name, **job.extra_args},
                )
            )
        prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        results = {}
        for job, output in zip(jobs, outputs, strict=True):
            forced, held = BOOK[job.name], self._held.pop(job.name)
            decoded = list(output.outputs[0].token_ids)
            assert decoded[: len(job.tokens)] == job.tokens, "a token was not forced"
            steps = forced.steps
            result: dict[str, Any] = {
                "nll": [forced.nll[s] for s in steps],
                "correct": [forced.top[s] == job.tokens[s] for s in steps],
                "margin": [forced.margin[s] for s in steps if s in forced.margin],
                "held": held.scored,
                "kept": min(held.kept, len(job.prompt)),
                "free": decoded[len(job.tokens) :],
            }
            if job.reference:
                full = BOOK[job.reference]
                result["agree"] = [forced.top[s] == full.top[s] for s in steps]
                result["kl"] = [forced.kl[s] for s in steps]
            results[job.name] = result
        return results

    def close(self) -> None:
        """Gives the memory back. vLLM keeps its models and caches in globals that outlive an
        engine, so the tensors themselves are emptied; nothing may run here afterwards."""
        tensors = [*self._runner.kv_caches, *self._runner.get_model().parameters()]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)

    @staticmethod
    def forget() -> None:
        """Drops all records; references are large (a float per word of the vocabulary a token)."""
        from benchmarks.quality.force import BOOK

        BOOK.clear()
