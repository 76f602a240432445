"""One engine with a policy and one plain vLLM for all end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent
BLOCK = 32
POOL_BLOCKS = 60
MAX_MODEL_LEN = 2048
PREFILL_INTERVAL, DECODE_INTERVAL = 256, 32
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Engine:
    """vLLM in this process, with its scheduler, block pool and runner in reach."""

    def __init__(self, model_path: str):
        from vllm import LLM

        layers, kv_heads, head_size, itemsize = 30, 3, 64, 4
        block_bytes = layers * BLOCK * kv_heads * 2 * head_size * itemsize
        self.llm = LLM(
            model_path,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_memory_bytes=POOL_BLOCKS * block_bytes,
            max_num_batched_tokens=512,
            max_num_seqs=16,
            disable_log_stats=False,
            additional_config={
                "kvcrush": {
                    "policy": "kvcrush",
                    "budget": 0.25,
                    "min_tokens": 0,
                    "config": {
                        "prefill_interval": PREFILL_INTERVAL,
                        "decode_interval": DECODE_INTERVAL,
                        "clients": {
                            "adakv": {"floor": [0, 1]},
                            "keepkv": {"threshold": [-1, 1]},
                            "kvcrush": {"ratio": [0, 0.5]},
                        },
                    },
                }
            },
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.manager = self.scheduler._manager
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.runner = core.model_executor.driver_worker.worker.model_runner

    def params(self, max_tokens: int, **extra_args: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args or None
        )

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    def tokens(self, prompt: list[int], max_tokens: int, **extra_args: Any) -> list[int]:
        (result,) = self.generate([prompt], self.params(max_tokens, **extra_args))
        return list(result.outputs[0].token_ids)

    def reset(self) -> None:
        assert self.llm.reset_prefix_cache()

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    def assert_idle(self) -> None:
        assert self.free == self.pool.num_gpu_blocks - 1  # one is vLLM's null block
        assert not self.manager.slot_shift and not self.scheduler._tracked
        assert not self.scheduler._plans and not self.manager.req_to_blocks

    @contextlib.contextmanager
    def moves(self) -> Iterator[list[Any]]:
        """Records what moves tokens on the worker, a `Move` for each compaction."""
        from vllm_kvcrush.engine.worker.move import Move

        moves: list[Any] = []
        run = Move.run

        def spied(move: Any) -> None:
            moves.append(move)
            run(move)

        Move.run = spied
        try:
            yield moves
        finally:
            Move.run = run

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[dict[str, Any]]]:
        """Records every scheduled step: free blocks, requests running, blocks by request."""
        steps: list[dict[str, Any]] = []
        schedule = self.scheduler.schedule

        def spied(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            steps.append(
                {
                    "free": self.free,
                    "running": len(self.scheduler.running),
                    "held": {r: len(b) for r, b in self.manager.req_to_blocks.items()},
                    "compactions": list(output.kvcrush.commands),
                    "deferred": {r for r, t in self.scheduler._tracked.items() if t.deferred},
                    "preempted": set(output.preempted_req_ids or ()),
                    "scheduled": dict(output.num_scheduled_tokens),
                }
            )
            return output

        self.scheduler.schedule = spied
        try:
            yield steps
        finally:
            self.scheduler.schedule = schedule


class Plain:
    """vLLM without any plugin, in a process of its own."""

    def __init__(self, model_path: str):
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "VLLM_PLUGINS": "",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no children that could outlive it
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "plain_vllm.py"), model_path, str(MAX_MODEL_LEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def tokens(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise AssertionError(f"plain vLLM ended with {self.process.wait()}")


@pytest.fixture(scope="session")
def plain(model_path: str) -> Iterator[Plain]:
    plain = Plain(model_path)
    yield plain
    plain.process.kill()
    plain.process.communicate()


@pytest.fixture(scope="session")
def _engine(
    model_path: str, plain: Plain, tables: dict[str, Any]
) -> Engine:  # plain starts meanwhile
    os.environ.update(ENVIRONMENT)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return Engine(model_path)


@pytest.fixture
def engine(_engine: Engine) -> Iterator[Engine]:
    """The engine with a cold prefix cache; afterwards every block must be back."""
    _engine.reset()
    _engine.runner.on_select = None
    yield _engine
    _engine.assert_idle()


@pytest.fixture(scope="session")
def ids(_engine: Engine, text: str) -> list[int]:
    """Some ten thousand tokens of real text."""
    return _engine.llm.get_tokenizer().encode(text[:60000])
