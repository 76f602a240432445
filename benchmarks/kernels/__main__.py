"""Attention kernels against vLLM's own on the CPU, and against the speed of the memory.

Every candidate computes one layer's attention over the same data, and is checked against float64
attention first. Calls find none of their data in the processor's cache: the data lie in several
copies, or, where these would take more than half of the free memory or --quick wants fewer, the
cache is flushed between bursts. Bursts of all candidates and of a plain sequential read take turns;
ratios are taken round by round. One thread is timed by its CPU clock, which other work on the
machine hardly touches; several by the wall clock, as waiting for each other is part of their work:
those figures need a quiet machine.

Rows: `task` is decode, prefill, compaction or bandwidth; `policy` the kernel, the plugin's policy,
or the way of reading; `mode` is "SHAPE,batch=N,threads=N", for compaction with ",stage=STAGE", for
bandwidth "threads=N" alone; `low` and `high` are quartiles of `n` rounds, `seconds` is one call of
one layer.

    python -m benchmarks.kernels [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.kernels import worker
from benchmarks.kernels.cases import SHAPES, TooLarge, sizes
from benchmarks.kernels.compaction import BUDGET, STAGES, plan
from benchmarks.kernels.registry import BASELINE, CANDIDATES, CODECS
from benchmarks.kernels.timing import CLOCKS, quartiles, ratios
from benchmarks.overhead.child import Child
from benchmarks.report import Run, arguments, interruptible, progress, say, table

PREFILL_CONTEXT, PREFILL_CHUNK = 4096, 512
BURST = 0.05  # seconds
BUSY = 1.1
Job = dict[str, Any]


def positive(text: str) -> int:
    """Returns an argument that is a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def parse() -> argparse.Namespace:
    """Returns the command line, with --quick worked into it."""
    parser = arguments(__doc__)
    several: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": positive}
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contexts", **several, help="tokens, for decode and compaction")
    parser.add_argument("--batches", **several, help="sequences, for decode")
    parser.add_argument("--threads", **several, help="each in a process of its own")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--rounds", type=positive, help="bursts of everything")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    args.contexts = args.contexts or ([8192] if args.quick else [2048, 8192, 32768])
    args.batches = args.batches or ([8] if args.quick else [1, 8])
    args.threads = args.threads or ([1] if args.quick else [n for n in (1, 2) if n <= cores])
    args.rounds = args.rounds or (5 if args.quick else 15)
    if max(args.threads) > cores:
        parser.error(f"--threads {max(args.threads)}: there are {cores} cores")
    return args


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Job]]:
    """Yields what is measured with each number of threads: task, what the rows say of it, job. Says
    what is left out, and where memory makes a difference."""
    said: set[str] = set()

    def sized(task: str, where: dict[str, Any], once: Sequence[int], job: Job) -> Iterator[Any]:
        try:
            found = sizes(once, args.quick)
        except TooLarge as error:
            say(f"{task} {where} is left out: it {error}")
            return
        if found.cut is not None:
            text = (
                f"memory: the copies of each kernel's data take {found.copies >> 20} MB, not "
                f"{found.cut >> 20} MB"
            )
            if text not in said:
                say(text)
                said.add(text)
        job |= {"rounds": args.rounds, "seconds": BURST, "sizes": dataclasses.asdict(found)}
        yield task, where, job

    kinds = [c for c in CANDIDATES if c is BASELINE or c.codec in args.codecs]
    names = [c.name for c in kinds]
    for shape in args.shapes:
        heads = SHAPES[shape]
        token = heads.kv_heads * 2 * heads.head_size
        for batch in args.batches:
            for context in args.contexts:
                once = [batch * context * token * c.dtype.itemsize for c in kinds]
                job = {"shape": shape, "lengths": [context] * batch, "query_len": 1}
                where = {"shape": shape, "batch": batch, "context": context}
                job |= {"kind": "attention", "names": names}
                yield from sized("decode", where, once, job)
        job = {"shape": shape, "lengths": [PREFILL_CONTEXT], "query_len": PREFILL_CHUNK}
        where = {"shape": shape, "batch": 1, "context": PREFILL_CONTEXT}
        once = [PREFILL_CONTEXT * token * c.dtype.itemsize for c in kinds]
        yield from sized("prefill", where, once, job | {"kind": "attention", "names": names})
        for context in args.contexts:
            if plan(context).due(context, context):
                where = {"shape": shape, "batch": 1, "context": context}
                job = {"kind": "compaction", "shape": shape, "context": context}
                # Of K alone; V lies beside it and is not read.
                yield from sized("compaction", where, [context * token * 2] * 2, job)
            else:
                say(f"a prompt of {context} tokens is never compacted: only its attention is timed")


def measure(run: Run, threads: int, wanted: Sequence[tuple[str, Any, Job]]) -> list[Any]:
    """Results of the jobs, a step of `run` each, in one process with `threads` threads."""
    with contextlib.ExitStack() as stack:
        child: Child | None = None

        def ask(job: Job) -> Any:
            nonlocal child
            child = child or stack.enter_context(worker.start(threads))
            return child.ask(**job)

        return [
            run.step(f"{threads} threads/{task}/{where}", functools.partial(ask, job))
            for task, where, job in progress(wanted, f"threads={threads}")
        ]


class Report:
    """Turns the results of one number of threads into rows and lines of tables."""

    def __init__(self, run: Run, threads: int):
        self._run, self._threads = run, threads
        self._clock = CLOCKS.index("cpu" if threads == 1 else "wall")
        self._rates: dict[str, list[float]] = {}
        self._busy = [0.0, 0.0]

    def _pick(self, calls: Sequence[Sequence[float]]) -> list[float]:
        return [call[self._clock] for call in calls]

    def _mode(self, where: dict[str, Any]) -> str:
        return f"{where['shape']},batch={where['batch']},threads={self._threads}"

    def attention(self, task: str, where: dict[str, Any], result: Any) -> list[list[str]]:
        """Rows of one case; its lines of the table."""
        read = result["read"]
        rates = [read["bytes"] / s for s in self._pick(read["calls"])]
        self._rates.setdefault(read["way"], []).extend(rates)
        for clock in range(2):
            self._busy[clock] += sum(call[clock] for call in read["calls"])
        base = self._pick(result["candidates"][BASELINE.name]["calls"])
        lines = []
        for kind in CANDIDATES:
            if (found := result["candidates"].get(kind.name)) is None:
                continue
            seconds = self._pick(found["calls"])
            columns = {
                "policy": kind.name,
                "codec": kind.codec,
                "budget": kind.keep,
                "context": where["context"],
                "task": task,
                "mode": self._mode(where),
            }
            figures = {"seconds": (seconds, "s")}
            if task == "decode":  # a prefill chunk computes; it does not wait for memory
                used = [found["bytes"] / s for s in seconds]
                figures["bandwidth_share"] = (ratios(used, rates), "ratio")
            if kind is not BASELINE:
                figures["speedup_vs_vllm_bf16"] = (ratios(base, seconds), "ratio")
            for metric, (values, unit) in figures.items():
                self._add(metric, values, unit, columns)
            self._run.add("relative_error", found["error"], "ratio", **columns)
            share = figures.get("bandwidth_share")
            speedup = figures.get("speedup_vs_vllm_bf16")
            lines.append(
                [
                    where["shape"],
                    str(self._threads),
                    str(where["batch"]),
                    str(where["context"]),
                    kind.name,
                    f"{1e6 * quartiles(seconds)[0]:.0f} µs",
                    f"{quartiles(share[0])[0]:.0%}" if share else "–",
                    _times(speedup[0]) if speedup else "1",
                    f"{found['error']:.0e}",
                ]
            )
        return lines

    def compaction(self, where: dict[str, Any], result: Any) -> list[list[str]]:
        """Rows of one case; its lines of the table."""
        lines = []
        for policy, stages in result.items():
            columns = {
                "policy": policy,
                "codec": "raw",
                "budget": BUDGET,
                "context": where["context"],
                "task": "compaction",
            }
            line = [where["shape"], str(self._threads), str(where["context"]), policy]
            for stage in STAGES:
                seconds = self._pick(stages[stage])
                mode = f"{self._mode(where)},stage={stage}"
                self._add("seconds", seconds, "s", {**columns, "mode": mode})
                line.append(f"{1e3 * quartiles(seconds)[0]:.2f}")
            lines.append(line)
        return lines

    def bandwidth(self) -> list[list[str]]:
        """Returns the measured limit, over all rounds of all cases."""
        if self._threads == 1 and self._busy[0] > BUSY * self._busy[1]:
            say(
                f"the machine was busy: one thread got {self._busy[1] / self._busy[0]:.0%} of a "
                "core, so figures with more threads are not to be trusted"
            )
        lines = []
        for way, rates in self._rates.items():
            where = {"policy": way, "task": "bandwidth", "mode": f"threads={self._threads}"}
            self._add("read_bytes_per_s", rates, "bytes/s", where)
            value, low, high = (rate / 1e9 for rate in quartiles(rates))
            lines.append([str(self._threads), way, f"{value:.1f} ({low:.1f} to {high:.1f}) GB/s"])
        return lines

    def _add(self, metric: str, values: Sequence[float], unit: str, where: dict[str, Any]) -> None:
        value, low, high = quartiles(values)
        self._run.add(metric, value, unit, n=len(values), low=low, high=high, **where)


def _times(values: Sequence[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*quartiles(values))


def main() -> None:
    args = parse()
    run, wanted = Run("kernels", args), list(jobs(args))
    lines: dict[str, list[list[str]]] = {t: [] for t in ("decode", "prefill", "compaction")}
    limits: list[list[str]] = []
    for threads in args.threads:
        report = Report(run, threads)
        results = measure(run, threads, wanted)
        for (task, where, _), result in zip(wanted, results, strict=True):
            if task == "compaction":
                lines[task] += report.compaction(where, result)
            else:
                lines[task] += report.attention(task, where, result)
        limits += report.bandwidth()
    header = ["shape", "threads", "batch", "context", "kernel", "a call", "of read bandwidth"]
    header += [f"speed-up over {BASELINE.name}", "error"]
    print(f"\nSequential read, median (quartiles)\n\n{table(['threads', 'way', 'rate'], limits)}")
    print(f"\nDecode, one layer, medians (quartiles) of {args.rounds} rounds\n")
    print(table(header, lines["decode"]))
    print(f"\nPrefill, one layer, the last {PREFILL_CHUNK} of {PREFILL_CONTEXT} tokens\n")
    print(table(header, lines["prefill"]))
    print(f"\nCompaction, the plugin's maths of one layer, budget {BUDGET}, milliseconds\n")
    print(table(["shape", "threads", "prompt", "policy", *STAGES], lines["compaction"]))
    run.finish()


if __name__ == "__main__":
    with interruptible("kernels"):
        main()
