"""Engines with a policy, for the demo model and a tiny one, and one plain vLLM. Each is started
once for all end-to-end tests."""

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

from tests import tiny
from tests.ledger import Ledger
from vllm_kvcrush import policies

HERE = pathlib.Path(__file__).parent
BLOCK = 32
POOL_BLOCKS = 60
MAX_MODEL_LEN = 2048
PREFILL_INTERVAL, DECODE_INTERVAL = 256, 32
TINY = tiny.Shape(3, 4, 64, vocabulary=49152, positions=MAX_MODEL_LEN)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Engine:
    """vLLM in this process, with access to its scheduler, block pool and runner.

    Attributes:
        layers, heads, head_size: sizes of the model; heads are those of its queries.
    """

    def __init__(self, model_path: str, **config: Any):
        from vllm import LLM

        os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        model = json.loads(pathlib.Path(model_path, "config.json").read_text())
        self.layers, self.heads = model["num_hidden_layers"], model["num_attention_heads"]
        self.head_size = model.get("head_dim") or model["hidden_size"] // self.heads
        kv_heads, itemsize = model["num_key_value_heads"], 4
        block_bytes = self.layers * BLOCK * kv_heads * 2 * self.head_size * itemsize
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
                    "allow": [*policies.names(), "none"],
                    "config": {
                        "prefill_interval": PREFILL_INTERVAL,
                        "decode_interval": DECODE_INTERVAL,
                        # A base that needs the last queries, which much of this is about.
                        "kvcrush": {"base": "snapkv"},
                        "clients": {
                            "adakv": {"floor": [0, 1]},
                            "composed": {"other": ["h2o"]},
                            "keepkv": {"threshold": [-1, 1]},
                            "kvcrush": {"ratio": [0, 0.5]},
                            "lagkv": {"lag": [2, 1024]},
                        },
                        **config,
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
        """Records the worker's `Move` of each compaction."""
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
def tiny_model(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the path of a small random Llama with the demo model's tokenizer. It has 4 KV heads,
    so that two ranks own two each, and takes a tenth of the demo model's time."""
    from transformers import AutoTokenizer

    path = str(tmp_path_factory.mktemp("tiny"))
    tiny.save_model(path, TINY)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def demo_engine(model_path: str, plain: Plain, tables: dict[str, Any]) -> Engine:
    return Engine(model_path)  # plain starts meanwhile


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: str) -> Engine:
    tables = tiny_model + ".safetensors"
    tiny.save_tables(tiny_model, tables, TINY)
    return Engine(tiny_model, tables=tables)


# Policies that differ in what they score, with options that suit short prompts. Tests have them
# in one batch.
METHODS = (
    *("lacache", "knorm", "keydiff", "lagkv(lag=32)", "infinipot", "tova", "expected_attention"),
    *("gkv", "rkv", "critic", "gui_kv", "rerotate", "kvzip"),
)

# For tests of what happens to blocks and requests, whatever the model says.
on_tiny_model = pytest.mark.parametrize("engine", ["tiny_engine"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Yields the demo model's engine, or the tiny one's in tests `on_tiny_model`, with a cold
    prefix cache. Afterwards every block must be free again."""
    engine: Engine = request.getfixturevalue(getattr(request, "param", "demo_engine"))
    engine.reset()
    engine.runner.on_select = None
    yield engine
    engine.assert_idle()


@pytest.fixture
def ledger(engine: Engine) -> Iterator[Ledger]:
    """Yields what checks every compaction of the engine that the test uses."""
    ledger = Ledger(engine.runner)
    yield ledger
    ledger.close()


@pytest.fixture(scope="session")
def ids(model_path: str, text: str) -> list[int]:
    """Returns some ten thousand tokens of real text."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(model_path).encode(text[:60000]))
