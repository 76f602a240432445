"""Thousands of random requests through real engines, with every policy, aborts and preemptions.

    python -m tests.soak [--minutes 20] [--seed 7] [--only 32-bfloat16]

Each configuration has an engine in a process of its own, on a tiny random model: block sizes 16, 32
and 128, float32 and bfloat16, synchronous and asynchronous scheduling. Every compaction is checked
by `tests.ledger`; at the end the pool must be empty, and memory must not have grown. The last line
of the output is a JSON object of what happened.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests import tiny

CONFIGURATIONS = [
    {"block": block, "dtype": dtype, "async": (block == 32) == (dtype == "float32")}
    for block in (16, 32, 128)
    for dtype in ("float32", "bfloat16")
]
MAX_MODEL_LEN = 2048
LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY = 2, 2, 64, 256
AT_ONCE = 12
TABLES = ".safetensors"  # beside the model's folder, where vLLM does not take them for weights
# A process's memory may still grow by this much in the last third of the run: in float32 oneDNN
# keeps something for each number of tokens that a step had. In bfloat16 nothing grows.
MOST_GROWTH = 64 * 2**20


def name_of(configuration: dict[str, Any]) -> str:
    return f"{configuration['block']}-{configuration['dtype']}"


def add_flaky_policy(draw: random.Random) -> Any:
    """Registers a third party's policy that fails at random, once its `awake` is set, and returns
    its class."""
    import torch

    from vllm_kvcrush import policies
    from vllm_kvcrush.policies import View

    @dataclass
    class Flaky(policies.get("snapkv").__class__):  # type: ignore[misc]
        name: ClassVar[str] = "flaky"
        awake: ClassVar[bool] = False

        def score(self, view: View) -> torch.Tensor:
            scores = super().score(view)
            if not self.awake:
                return scores
            if draw.random() < 0.1:
                raise RuntimeError("now and then")
            if draw.random() < 0.1:
                scores[0, 0] = torch.nan
            return scores

        def select(self, view: View, scores: torch.Tensor, keep: int) -> torch.Tensor:
            kept = super().select(view, scores, keep)
            return kept if not self.awake or draw.random() < 0.9 else kept.flip(1)

    policies._BUILT_IN["flaky"] = Flaky
    return Flaky


@dataclass
class Figures:
    """What happened in one engine."""

    configuration: str
    seed: int
    seconds: float = 0.0
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    preemptions: int = 0
    tokens: int = 0
    compactions: int = 0
    shared: int = 0
    policy_failures: int = 0
    deferrals: int = 0
    most_off: int = 0
    by_policy: dict[str, int] = field(default_factory=dict)
    rss: list[int] = field(default_factory=list)


def rss() -> int:
    """Returns the bytes of memory that this process holds."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def live(model: str, configuration: dict[str, Any], seed: int, seconds: float) -> Figures:
    """Runs one engine and returns what happened. Raises if the engine dies, or if anything is not
    as it must be."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from tests.engine.run_mode import force_async_scheduling
    from tests.ledger import Ledger

    draw = random.Random(seed)
    torch.manual_seed(seed)
    flaky = add_flaky_policy(random.Random(seed + 1))
    if configuration["async"]:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        force_async_scheduling()
    block, dtype = configuration["block"], configuration["dtype"]
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    # Too small for all that run at once, so that some are preempted.
    pool = MAX_MODEL_LEN // block + 12
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        block_size=block,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=pool * block * LAYERS * KV_HEADS * 2 * HEAD_SIZE * itemsize,
        max_num_batched_tokens=draw.choice([128, 512]),
        max_num_seqs=AT_ONCE - 2,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        additional_config={
            "kvcrush": {
                "policy": "auto",
                "budget": 0.25,
                "min_tokens": 0,
                "config": {
                    "prefill_interval": draw.choice([64, 256]),
                    "decode_interval": draw.choice([8, 32]),
                    "window": draw.choice([1, 8, 16]),
                    "tables": model + TABLES,
                },
            }
        },
    )
    flaky.awake = True  # the dry run at start-up is over
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler, manager = core.scheduler, core.scheduler._manager
    runner = core.model_executor.driver_worker.worker.model_runner
    ledger = Ledger(runner)
    figures = Figures(name_of(configuration), seed)
    preempt, compact = scheduler._preempt_request, runner._compact

    def preempting(*args: Any, **kwargs: Any) -> Any:
        figures.preemptions += 1
        return preempt(*args, **kwargs)

    def compacting(command: Any) -> None:
        figures.shared += command.same_as is not None
        compact(command)

    def deferring(reason: str) -> None:
        figures.deferrals += 1

    scheduler._preempt_request, runner._compact = preempting, compacting
    scheduler.kvcrush_stats.record_deferral = deferring
    policies = [*scheduler._settings.allow]
    texts = [[draw.randrange(VOCABULARY) for _ in range(MAX_MODEL_LEN)] for _ in range(6)]
    running: dict[str, int] = {}

    def add() -> None:
        length = min(MAX_MODEL_LEN - 8, int(draw.expovariate(1 / 300)) + 1)
        prompt = draw.choice(texts)[:length]
        output = min(MAX_MODEL_LEN - length, int(draw.expovariate(1 / 120)) + 1)
        extra: dict[str, Any] = {}
        if draw.random() < 0.9:
            extra["kv_policy"] = draw.choice(policies)
        if extra.get("kv_policy") != "none" and draw.random() < 0.9:
            smallest = scheduler._settings.smallest_budget(block)
            extra["kv_budget"] = draw.choice(
                [round(draw.uniform(0.02, 1.0), 3), draw.randint(smallest, smallest + 600)]
            )
        params = SamplingParams(
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.choice([None, 5]),
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra or None,
        )
        for _ in range(draw.choice([1, 1, 1, 1, 1, 1, 2, 6])):
            figures.requests += 1
            name = f"soak-{figures.requests}"
            try:
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            except VLLMValidationError:
                figures.refused += 1  # more than the pool, or pages too small for the codec
            else:
                running[name] = output

    began, deadline = time.monotonic(), time.monotonic() + seconds
    while running or time.monotonic() < deadline:
        if time.monotonic() < deadline and len(running) < AT_ONCE and draw.random() < 0.5:
            add()
        for output in engine.step():
            if output.finished:
                expected = running.pop(output.request_id)
                got = len(output.outputs[0].token_ids)
                assert got == expected, (output.request_id, got, expected)
                figures.finished += 1
                figures.tokens += got
        if running and draw.random() < 0.01:
            victim = draw.choice(list(running))
            del running[victim]
            engine.abort_request([victim])
            figures.aborted += 1
        if draw.random() < 0.002:
            llm.reset_prefix_cache()
        done = sum(ledger.compactions.values())
        if done // 100 > len(figures.rss):
            figures.rss.append(rss())
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()  # tells the worker who is gone
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == pool - 1
    assert (
        not manager.slot_shift and not manager.regions and not any(manager.req_to_blocks.values())
    )
    assert not scheduler._tracked and not scheduler._plans and not runner._requests
    figures.seconds = round(time.monotonic() - began, 1)
    figures.compactions = sum(ledger.compactions.values())
    figures.policy_failures, figures.most_off = ledger.failures.total(), ledger.drift
    by_policy: collections.Counter[str] = collections.Counter()
    for (policy, codecs), count in ledger.compactions.items():
        by_policy[f"{policy} ({'+'.join(codecs)})"] += count
    figures.by_policy = dict(sorted(by_policy.items()))
    assert set(+ledger.failures) <= {"flaky"}, "a policy of ours failed"
    if len(figures.rss) >= 6:
        growth = figures.rss[-1] - figures.rss[2 * len(figures.rss) // 3]
        assert growth < MOST_GROWTH, f"memory grew by {growth >> 20} MiB: {figures.rss}"
    return figures


def run(
    minutes: float, seed: int, only: str | None = None, say: Any = print
) -> list[dict[str, Any]]:
    """Runs the configurations one after the other, for `minutes` in all, and returns what happened
    in each.

    Raises:
        RuntimeError: an engine died or was not as it must be. The message has its output and says
            how to repeat it.
    """
    chosen = [c for c in CONFIGURATIONS if only is None or name_of(c) == only]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(pathlib.Path(folder, "model"))
        shape = tiny.Shape(LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY, MAX_MODEL_LEN)
        tiny.save_model(model, shape)
        tiny.save_tables(model, model + TABLES, shape)
        for number, configuration in enumerate(chosen):
            own = seed + 1000 * number if only is None else seed
            job = [model, json.dumps(configuration), str(own), str(60 * minutes / len(chosen))]
            done = subprocess.run(
                [sys.executable, "-m", "tests.soak", "--child", *job],
                capture_output=True,
                text=True,
                env=os.environ
                | {
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "OMP_NUM_THREADS": "1",
                },
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if done.returncode or not lines:
                repeat = f"python -m tests.soak --only {name_of(configuration)} --seed {own}"
                raise RuntimeError(f"{repeat}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
            found.append(json.loads(lines[-1].removeprefix("RESULT ")))
            say(json.dumps(found[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="in all, start-up not counted")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--only", choices=[name_of(c) for c in CONFIGURATIONS])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, configuration, seed, seconds = args.child
        figures = live(model, json.loads(configuration), int(seed), float(seconds))
        print("RESULT", json.dumps(figures.__dict__), flush=True)
        return
    print(f"soak: seed {args.seed}", flush=True)
    found = run(args.minutes, args.seed, args.only)
    numbers = ("requests", "finished", "aborted", "refused", "preemptions", "tokens")
    numbers += ("compactions", "shared", "policy_failures", "deferrals")
    print(json.dumps({"seed": args.seed} | {n: sum(f[n] for f in found) for n in numbers}))


if __name__ == "__main__":
    main()
