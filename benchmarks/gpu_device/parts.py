"""The parts of a run, in order, each within its share of the time."""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from typing import Any

from benchmarks.gpu_device import kernels, machine, serving, suite
from benchmarks.gpu_device.kernels import Worker
from benchmarks.report import ROOT, Run, environment, say, table

# Ends of the parts as shares of the whole time: what one leaves unused, the next may have.
ENDS = {"correctness": 0.42, "kernels": 0.74, "serving": 1.0}
_START_SECONDS = 120  # for torch, Triton and the device's context


def parse(doc: str) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_device",
        description=doc.strip().split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, help="result file; else gpu-results.json")
    parser.add_argument("--minutes", type=float, default=18, help="for all parts together")
    parser.add_argument("--model", type=pathlib.Path, help="to serve; by default the demo model")
    parser.add_argument("--restart", action="store_true", help="measure all anew")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU"
    )
    args = parser.parse_args()
    args.json = (args.json or pathlib.Path(f"gpu-results{'-dry' * args.dry_run}.json")).absolute()
    args.tests = suite.digest()  # beside the other settings: other tests, other results
    args.quick = False
    return args


class Parts:
    """One run. Every part adds rows, and an entry of the file's `parts` that says how far it came.

    Attributes:
        facts: of the machine; made by `look`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self._began = args, time.monotonic()
        self.run = Run("gpu_device", args)
        self.worker = Worker(args.dry_run)
        self.parts: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self._journal = args.json.with_suffix(".tests.jsonl")

    def _deadline(self, part: str) -> float:
        return self._began + 60 * self.args.minutes * ENDS[part]

    def look(self) -> None:
        """Makes the environment report."""
        if not self.run.has("machine"):
            self._journal.unlink(missing_ok=True)
        ask = functools.partial(self.worker.ask, _START_SECONDS, kind="facts")
        self.facts = {**environment(), **self.run.step("machine", ask)}
        shown = {k: v for k, v in self.facts.items() if v is not None}
        print(table(["what", "value"], [[k, str(v)] for k, v in shown.items()]), flush=True)

    def correctness(self) -> None:
        """Runs tests/gpu on the device."""
        dry = self.args.dry_run
        tests = suite.SAMPLE if dry else suite.FILES
        began = time.monotonic()
        known = suite.run(self._journal, tests, dry, self._deadline("correctness") - began)
        found = suite.summary(known)
        mode = "interpreter" if dry else "cuda"
        lines = []
        for group, counts in found["groups"].items():
            for outcome, count in counts.items():
                self.run.add(
                    outcome.replace(" ", "_"), count, "tests", task="correctness",
                    mode=f"{mode},{group}",
                )  # fmt: skip
            lines.append(
                [group]
                + [str(counts.get(o, 0)) for o in ("passed", "failed", "skipped", "not run")]
            )
        print(f"\nCorrectness ({mode}), tests\n")
        print(table(["test", "passed", "failed", "skipped", "not run"], lines), flush=True)
        for failure in found["failures"]:
            say(f"FAILED {failure['test']}")
        self.parts["correctness"] = {
            "finished": bool(known.collected) and not known.left,
            "failures": found["failures"],
        }
        if not known.collected:
            log = self._journal.with_suffix(".log")
            self.parts["correctness"]["why"] = machine.anonymous(
                log.read_text(errors="replace")[-3000:], ROOT
            )

    def kernels(self) -> None:
        """Measures the speed of the kernels."""
        results, late = kernels.run_all(
            self.run, self.worker, self.args.dry_run, self.facts.get("l2_bytes"),
            self._deadline("kernels"),
        )  # fmt: skip
        self.worker.close()  # leaves the device's memory to the servers
        first = len(self.run.rows)
        kernels.add_rows(self.run, results)
        where = "one layer, medians; of the limit: of copying, and of a product for prefill"
        print(f"\nKernels: {where}\n\n{kernels.tables(self.run.rows[first:])}", flush=True)
        self.parts["kernels"] = {"finished": not late, "not_run": late}

    def serving(self) -> None:
        """Runs the pair of servers, or notes why there is none."""
        path = self.args.json.with_suffix(".serving.json")
        why = serving.refusal()
        if self.args.dry_run:
            _accepted(serving.arguments(self.args.model, path))
            why = why or "a dry run starts no servers."
        left = self._deadline("serving") - time.monotonic()
        if why is None and left < 1:
            why = "out of time"
        if why is not None:
            found: dict[str, Any] = {"ran": False, "why": why, "rows": []}
        elif self.run.has("serving"):
            found = self.run.step("serving", dict)
        else:
            found = serving.run(self.args.model, path, left)
            if found["ran"]:
                self.run.step("serving", lambda: found)
        self.run.rows += found["rows"]
        self.parts["serving"] = {"ran": found["ran"], "why": found["why"]}
        print(f"\nServing: {'measured' if found['ran'] else 'not run. ' + str(found['why'])}")

    def finish(self) -> None:
        """Writes the file and removes what only a killed run would need."""
        self.run.finish(
            environment=self.facts, dry_run=self.args.dry_run, parts=self.parts
        )  # fmt: skip
        for suffix in (".tests.jsonl", ".tests.log", ".serving.json", ".serving.log"):
            self.args.json.with_suffix(suffix).unlink(missing_ok=True)


def _accepted(arguments: list[str]) -> None:
    """Fails if benchmarks.serving does not know these arguments."""
    from benchmarks.serving.__main__ import parser

    parser().parse_args(arguments)


def run(doc: str) -> None:
    """Runs all parts."""
    args = parse(doc)
    if not args.dry_run and (sentence := machine.missing_gpu()):
        raise SystemExit(f"gpu_device: {sentence}")
    parts = Parts(args)
    try:
        parts.look()
        parts.correctness()
        parts.kernels()
        parts.serving()
    finally:
        parts.worker.close()
    parts.finish()
    failed = len(parts.parts["correctness"]["failures"])
    if failed:
        say(f"{failed} tests failed: the file has their messages.")
    if not args.dry_run:
        say(f"Please send {args.json}: docs/gpu.md says where. Thank you.")
