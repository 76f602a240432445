"""A tiny model in an engine of this process, and what its attention was told at each step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests import tiny

BLOCK = 32  # vLLM's CPU attention takes multiples
LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY = 2, 2, 32, 256
INTERVALS: dict[str, Any] = {"prefill_interval": 64, "decode_interval": 16}
CLIENTS = {"keepkv": {"threshold": [-1, 1]}}
SHAPE = tiny.Shape(LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY, 512)


class Step(NamedTuple):
    """What attention was told about one request in one step."""

    rows: int
    length: int  # slots held
    bound: int | None  # the same, as the host has it
    blocks: list[int]
    slots: list[int]  # of this step's tokens


def arguments(
    model: str, blocks: int = 64, tables: str | None = None, **kvcrush: Any
) -> dict[str, Any]:
    """Returns the arguments of an `LLM` with a tiny model and a pool of so many blocks."""
    config = INTERVALS | {"clients": CLIENTS} | ({"tables": tables} if tables else {})
    own = {"policy": "none", "config": config, "budget": 96, "min_tokens": 0, **kvcrush}
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": 512,
        "kv_cache_memory_bytes": blocks * LAYERS * KV_HEADS * BLOCK * 2 * HEAD_SIZE * 4,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 6,
        "disable_log_stats": False,
        "additional_config": {"kvcrush": own},
    }


@dataclass
class Answer:
    tokens: list[int]
    compactions: int
    steps: list[Step] = field(default_factory=list)


class Engine:
    """A tiny model in an engine of this process.

    Attributes:
        preempted: ids of requests that were preempted, with their slot shift at that time.
    """

    def __init__(
        self,
        model: str,
        v2: bool,
        blocks: int = 64,
        asynchronous: bool = False,
        tables: str | None = None,
        **kvcrush: Any,
    ):
        import vllm.envs
        from vllm import LLM

        vllm.envs.disable_envs_cache()
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
        with _scheduling(asynchronous):
            self.llm = LLM(
                **arguments(model, blocks, tables, **kvcrush), distributed_executor_backend="uni"
            )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.preempted: list[tuple[str, int]] = []
        self._ids: list[str] = []
        self._steps: dict[str, list[Step]] = {}
        self._watch()

    def _watch(self) -> None:
        add, preempt = self.scheduler.add_request, self.scheduler._preempt_request

        def added(request: Any) -> None:
            self._ids.append(request.request_id)
            add(request)

        def preempting(request: Any, *args: Any, **kwargs: Any) -> None:
            gone = self.scheduler._manager.slot_shift.get(request.request_id, 0)
            self.preempted.append((request.request_id, gone))
            preempt(request, *args, **kwargs)

        self.scheduler.add_request, self.scheduler._preempt_request = added, preempting
        for groups in self.runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    self._record(builder)

    def _record(self, builder: Any) -> None:
        build = builder.build

        def recorded(common_prefix_len: int, common: Any, *args: Any, **kwargs: Any) -> Any:
            batch = getattr(self.runner, "_batch", None) or self.runner.input_batch
            starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
            bound = common.seq_lens_cpu_upper_bound
            for i, request_id in enumerate(batch.req_ids[: common.num_reqs]):
                held = -(-lengths[i] // BLOCK)
                step = Step(
                    starts[i + 1] - starts[i],
                    lengths[i],
                    None if bound is None else int(bound[i]),
                    common.block_table_tensor[i, :held].tolist(),
                    common.slot_mapping[starts[i] : starts[i + 1]].tolist(),
                )
                self._steps.setdefault(request_id, []).append(step)
            return build(common_prefix_len, common, *args, **kwargs)

        builder.build = recorded

    def run(
        self, prompts: list[list[int]], max_tokens: int, extra: list[dict[str, Any]]
    ) -> list[Answer]:
        """Returns the answers in the order of the prompts. The pool and the prefix cache are first
        made as they were at the start."""
        from vllm import SamplingParams

        assert self.llm.reset_prefix_cache()
        # Blocks will be handed out in the same order in every engine; the first is vLLM's own.
        self.pool.free_block_queue = type(self.pool.free_block_queue)(self.pool.blocks[1:])
        self._ids, self._steps, self.preempted = [], {}, []
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=e or None,
                )
                for e in extra
            ],
            use_tqdm=False,
        )
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        return [
            Answer(
                list(o.outputs[0].token_ids),
                o.kv_tokens_details["compactions"],
                self._steps[request_id],
            )
            for o, request_id in zip(outputs, self._ids, strict=True)
        ]


@contextlib.contextmanager
def _scheduling(asynchronous: bool) -> Iterator[None]:
    """Makes vLLM schedule asynchronously, which it does not do on CPUs by itself."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_kvcrush import plugin

    load_general_plugins()  # ours wraps the same function
    create = EngineArgs.create_engine_config

    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = create(*args, **kwargs)
        config.scheduler_config.async_scheduling = asynchronous
        plugin.choose_scheduler(config)
        return config

    EngineArgs.create_engine_config = create_engine_config
    try:
        yield
    finally:
        EngineArgs.create_engine_config = create
