"""The child process: one vLLM engine that measures requests or decode steps when told to.

python -m benchmarks.overhead.engine    (driven by `child.Child`)
"""

from __future__ import annotations

import gc
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.overhead.child import Child, Quiet, serve

BLOCK = 32
BATCHED = 2048  # tokens of a step
# 30 layers, 3 KV heads of 64.
TOKEN_BYTES = {"float32": 30 * 3 * 2 * 64 * 4, "bfloat16": 30 * 3 * 2 * 64 * 2}


def environment() -> dict[str, str]:
    """Returns the environment of the process."""
    own = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    own.pop("VLLM_KVCRUSH_CACHE", None)  # vLLM warns about names that it does not know
    return own


def start(name: str, plugin: bool) -> Child:
    """Starts the process; the engine itself starts with the job "start"."""
    own = environment() if plugin else {**environment(), "VLLM_PLUGINS": ""}
    command = [sys.executable, "-m", "benchmarks.overhead.engine"]
    return Child(f"the engine {name!r}", command, own)


def steps_to_read(batch: int, prompt: int) -> int:
    """Returns the most steps in which so many prompts are read; chunks also end where compactions
    are due."""
    return batch * (prompt // 1024 + 2)


class Engine:
    """Answers the jobs "start", "request" and "steps"."""

    def __init__(self) -> None:
        self._quiet = Quiet()
        self._count = 0
        self._seconds: list[float] = []

    def handle(self, job: dict[str, Any]) -> Any:
        """Runs the job that `job["kind"]` names with its other entries."""
        burnt = self._quiet.begin()
        kinds: dict[str, Callable[..., dict[str, Any]]]
        kinds = {"start": self.start, "request": self.request, "steps": self.steps}
        gc.collect()
        result = kinds[job.pop("kind")](**job)
        self._quiet.end()
        return {**result, "burnt_s": burnt}

    def start(
        self,
        model: str,
        tokens: int,
        config: dict[str, Any],
        pool: int | None = None,
        dtype: str = "float32",
    ) -> dict[str, Any]:
        """Starts vLLM with a context limit of `tokens` and a pool of as many, or of `pool`;
        `config` is `additional_config`."""
        from vllm import LLM

        llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=tokens,
            kv_cache_memory_bytes=((pool or tokens) + 2 * BLOCK) * TOKEN_BYTES[dtype],
            max_num_batched_tokens=BATCHED,
            max_num_seqs=16,
            additional_config=config,
            disable_log_stats=False,  # as in a server
        )
        self.llm, self.engine = llm, llm.llm_engine
        topics = pydoc_data.topics.topics
        self.ids = llm.get_tokenizer().encode("\n\n".join(topics[k] for k in sorted(topics)))
        scheduler = self.engine.engine_core.engine_core.scheduler
        update = scheduler.update_from_output

        def watched(output: Any, result: Any) -> Any:
            if (report := getattr(result, "kvcrush", None)) is not None:
                # `pair` also asks older checkouts, whose reports have only the seconds.
                done = getattr(report, "compacted", None)
                own = report.seconds if done is None else [(c.policy, c.seconds) for c in done]
                self._seconds += [seconds for _, seconds in own]
            return update(output, result)

        scheduler.update_from_output = watched
        return {
            "scheduler": type(scheduler).__name__,
            "plugin": "vllm_kvcrush.plugin" in sys.modules,
        }

    def _add(self, prompt: int, output: int, offset: int, extra: dict[str, Any] | None) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, extra_args=extra)
        start = offset * 997 % (len(self.ids) - prompt)
        ids = self.ids[start : start + prompt]
        self._count += 1
        self.engine.add_request(str(self._count), {"prompt_token_ids": ids}, params)

    def request(
        self, prompt: int, output: int, offset: int, extra: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Measures one request alone, with a cold prefix cache, from submission to its last
        token."""
        assert self.llm.reset_prefix_cache()
        self._seconds.clear()
        began = time.perf_counter()
        self._add(prompt, output, offset, extra)
        first = None
        while self.engine.has_unfinished_requests():
            if self.engine.step() and first is None:
                first = time.perf_counter() - began
        total = time.perf_counter() - began
        return {
            "total_s": total,
            "ttft_s": first,
            "compaction_s": sum(self._seconds),
            "compactions": len(self._seconds),
        }

    def steps(
        self, batch: int, prompt: int, tokens: int, extra: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Seconds that a decode step takes, over `tokens` steps of `batch` requests."""
        # Those that are read first decode until the last one is read.
        reading = steps_to_read(batch, prompt)
        for number in range(batch):
            self._add(prompt, tokens + reading, number, extra)
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in self.engine.step()}
        began = time.perf_counter()
        for _ in range(tokens):
            assert len(self.engine.step()) == batch
        seconds = time.perf_counter() - began
        self.engine.abort_request(sorted(started))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {"tpot_s": seconds / tokens, "wall_s": seconds}


if __name__ == "__main__":
    serve(Engine().handle)
