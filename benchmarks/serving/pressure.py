"""Measures what `--kv-pressure` gives up at rising load, against a fixed budget and plain vLLM.

Three engines (the demo model, float32) have one small pool each and take turns. A drive keeps so
many requests in the engine at once until all are done; their continuations are real text, forced
token by token, so that its likelihood says what compression cost. Plain vLLM's own drive at the
same load is the reference, request by request.

    python -m benchmarks.serving.pressure [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import time
from typing import Any

from benchmarks.overhead.child import Child, serve
from benchmarks.overhead.engine import BLOCK, TOKEN_BYTES, environment
from benchmarks.report import Run, arguments, interruptible, median, progress, say, table

BUDGET, LIMIT = 0.25, 0.8
PROMPT, OUTPUT = 640, 64
POOL = 4096  # tokens
MOST = 16  # requests at once
_POLICY = {"policy": "auto", "budget": BUDGET, "min_tokens": 0}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"policy": "none"},
    "fixed": _POLICY,
    "pressure": {**_POLICY, "pressure": LIMIT},
}
WHAT = {
    "plain": "plain vLLM",
    "fixed": f"`auto` at {BUDGET}",
    "pressure": f"the same with --kv-pressure={LIMIT}",
}


class Engine:
    """The child process: answers the jobs "start" and "drive"."""

    def handle(self, job: dict[str, Any]) -> Any:
        """Runs the job that `job["kind"]` names with its other entries."""
        kind = job.pop("kind")
        return self.start(**job) if kind == "start" else self.drive(**job)

    def start(self, model: str, config: dict[str, Any]) -> None:
        """Starts vLLM with these settings of the plugin's."""
        from vllm import LLM

        from benchmarks.quality import prose
        from benchmarks.quality.force import Forcing

        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=PROMPT + OUTPUT + BLOCK,
            kv_cache_memory_bytes=(POOL + BLOCK) * TOKEN_BYTES["float32"],
            max_num_batched_tokens=2048,
            max_num_seqs=MOST,
            logits_processors=[Forcing],
            additional_config={"kvcrush": config},
        )
        self.engine = self.llm.llm_engine
        self.ids = self.llm.get_tokenizer().encode(prose.span(0, prose.length()))
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.preempted = 0
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def drive(self, requests: int, at_once: int, seed: int) -> dict[str, Any]:
        """Returns what became of so many requests, of which `at_once` are in the engine."""
        from vllm import SamplingParams

        from benchmarks.quality.force import BOOK, KEY, Forced

        assert self.llm.reset_prefix_cache()
        self.preempted, names = 0, [f"{seed}/{i}" for i in range(requests)]
        starts = random.Random(seed).sample(range(len(self.ids) - PROMPT - OUTPUT), requests)
        waiting = list(zip(names, starts, strict=True))[::-1]
        running = peak = 0
        details: dict[str, dict[str, Any]] = {}
        began = time.perf_counter()
        while waiting or running:
            while waiting and running < at_once:
                name, first = waiting.pop()
                gold = self.ids[first + PROMPT : first + PROMPT + OUTPUT]
                BOOK[name] = Forced(gold, [True] * OUTPUT, [None] * OUTPUT)
                params = SamplingParams(
                    temperature=0, max_tokens=OUTPUT, ignore_eos=True, extra_args={KEY: name}
                )
                prompt = {"prompt_token_ids": self.ids[first : first + PROMPT]}
                self.engine.add_request(name, prompt, params)
                running += 1
            for output in self.engine.step():
                if output.finished:
                    running -= 1
                    details[output.request_id] = output.kv_tokens_details
            peak = max(peak, len(self.scheduler.running))
        seconds = time.perf_counter() - began
        own = [details[name] for name in names]
        return {
            "seconds": seconds,
            "peak_running": peak,
            "preemptions": self.preempted,
            "nll": [sum(BOOK.pop(name).nll.values()) / OUTPUT for name in names],
            "compactions": [found["compactions"] for found in own],
            "bytes_ratio": sum(d["kv_bytes_raw"] for d in own)
            / sum(d["kv_bytes_held"] for d in own),
        }


def measure(run: Run, loads: list[int], rounds: int) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Drives every engine with every load; a drive is a step of `run`."""
    from vllm_kvcrush.tools import demo_model

    jobs = [
        (f"{at_once}/{number}/{mode}", at_once, number, mode)
        for number in range(rounds)
        for at_once in loads
        for mode in random.Random(f"{number}/{at_once}").sample(list(MODES), len(MODES))
    ]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        if any(not run.has(step) for step, *_ in jobs):
            model = str(demo_model.prepare(say=say))
            for mode, config in MODES.items():
                command = [sys.executable, "-m", "benchmarks.serving.pressure", "child"]
                child = Child(f"the engine of {WHAT[mode]}", command, environment())
                children[mode] = stack.enter_context(child)
                child.send(kind="start", model=model, config=config)
            for child in children.values():
                child.receive()
                child.ask(kind="drive", requests=2, at_once=2, seed=-1)

        def ask(mode: str, at_once: int, number: int) -> Any:
            requests = 2 * at_once + 2
            return children[mode].ask(
                kind="drive", requests=requests, at_once=at_once, seed=100 * number + at_once
            )

        for step, at_once, number, mode in progress(jobs, "pressure"):
            result = run.step(step, functools.partial(ask, mode, at_once, number))
            found.setdefault((at_once, mode), []).append(result)
    return found


def report(run: Run, found: dict[tuple[int, str], list[dict[str, Any]]]) -> str:
    """Adds the rows and returns the table."""
    lines = []
    for (at_once, mode), drives in sorted(
        found.items(), key=lambda f: (f[0][0], list(MODES).index(f[0][1]))
    ):
        plain = found[at_once, "plain"]
        lost = [
            ours - theirs
            for own, other in zip(drives, plain, strict=True)
            for ours, theirs in zip(own["nll"], other["nll"], strict=True)
        ]
        whole = [not count for own in drives for count in own["compactions"]]
        tokens = OUTPUT * (2 * at_once + 2)
        speeds = [tokens / own["seconds"] for own in drives]
        ratios = [o["seconds"] / d["seconds"] for d, o in zip(drives, plain, strict=True)]
        values = {
            "peak_running": (max(d["peak_running"] for d in drives), "requests"),
            "preemptions": (sum(d["preemptions"] for d in drives) / len(drives), "requests"),
            "output_tokens_per_s": (median(speeds)[0], "tokens/s"),
            "ratio_output_tokens_per_s": (median(ratios)[0], "ratio"),
            "left_whole": (sum(whole) / len(whole), "ratio"),
            "delta_nll": (sum(lost) / len(lost), "nats"),
            "bytes_ratio": (median([d["bytes_ratio"] for d in drives])[0], "ratio"),
        }
        own = MODES[mode]
        where = {
            "policy": own["policy"],
            "budget": own.get("budget", 1.0),
            "context": PROMPT + OUTPUT,
            "task": f"closed-{at_once}",
            "mode": mode,
        }
        for metric, (value, unit) in values.items():
            run.add(metric, value, unit, n=len(lost), **where)
        lines.append([str(at_once), WHAT[mode], *(f"{value:.3g}" for value, _ in values.values())])
    return table(["at once", "engine", *values], lines)


def main() -> None:
    """Runs the benchmark; see --help."""
    if sys.argv[1:] == ["child"]:
        return serve(Engine().handle)
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, help="drives of every load; by default 3")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    loads = [2, 8] if args.quick else [1, 2, 4, 6, 8, 16]
    with interruptible("pressure"):
        run = Run("pressure", args)
        found = measure(run, loads, args.rounds)
    print(
        f"Requests of {PROMPT} + {OUTPUT} tokens in a pool of {POOL}; {args.rounds} drives each.\n"
    )
    print(report(run, found))
    run.finish(pool_tokens=POOL, limit=LIMIT)


if __name__ == "__main__":
    main()
