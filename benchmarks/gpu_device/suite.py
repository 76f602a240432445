"""Runs the kernels' tests, tests/gpu, on the device or in Triton's interpreter, within a time."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_device.journal import LOST
from benchmarks.gpu_device.machine import anonymous
from benchmarks.report import ROOT, progress

FILES = ("test_tiles.py", "test_attention.py", "test_compaction.py", "test_device.py")
# Of a dry run: one test of everything, the quick ones.
SAMPLE = (
    "test_tiles.py::test_rotation",
    "test_attention.py::test_misfits_are_refused",
    "test_attention.py::test_only_the_log_sum",
    "test_compaction.py::test_store_refuses_another_dtype",
    "test_device.py::test_a_graph_follows_lengths",
    "test_device.py::test_pages_far_into_the_pool",
)
_TEST_SECONDS = 90  # after which a test counts as hung; compilation included
_START_SECONDS = 240  # that a process may take between tests: imports, the device's context
_POLL = 0.2


def digest() -> str:
    """Returns a digest of the tests: results of two versions are never mixed."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "tests" / "gpu").glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@dataclass
class Journal:
    """What the tests have said so far: outcomes by test, and tests that never ended."""

    collected: list[str] = field(default_factory=list)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None

    @classmethod
    def read(cls, path: pathlib.Path) -> Journal:
        """Returns the records of a file that may end in the middle of a line."""
        found = cls()
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            for test in line.get("collected", ()):
                if test not in found.collected:
                    found.collected.append(test)
            if "began" in line:
                found.running = line["began"]
            elif "test" in line:
                name = line.pop("test")
                if name not in found.tests or line["outcome"] == "failed":
                    found.tests[name] = line
                found.running = None
        return found

    @property
    def left(self) -> list[str]:
        """Tests without an outcome, in order."""
        return [test for test in self.collected if test not in self.tests]


def run(path: pathlib.Path, tests: Sequence[str], interpret: bool, seconds: float) -> Journal:
    """Runs what the journal at `path` does not know yet.

    Args:
        tests: files or tests of tests/gpu.
        seconds: after which it stops; what is not done is left in the journal.
    """
    deadline = time.monotonic() + seconds
    known = Journal.read(path)
    wanted = known.left or ([] if known.collected else [f"tests/gpu/{test}" for test in tests])
    bar = progress(None, "correctness", len(known.collected) or None)
    bar.update(len(known.tests))
    while wanted and time.monotonic() < deadline:
        done = len(known.tests)
        _process(path, wanted, interpret, deadline, bar)
        known = Journal.read(path)
        wanted = known.left
        if len(known.tests) == done:
            break  # nothing can be collected or started at all
    bar.close()
    return known


def _process(
    path: pathlib.Path, tests: Sequence[str], interpret: bool, deadline: float, bar: Any
) -> None:
    """Runs one process, until it ends, or a test hangs, or the time is over."""
    environment = {**os.environ, "KVCRUSH_GPU_TESTS": "1", "KVCRUSH_JOURNAL": str(path)}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    # The options of pyproject.toml ask for a plugin that a machine with a GPU may not have.
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_device.journal"]
    options += ["-o", "addopts=", "-W", "ignore"]
    with path.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    size, heard, limit = 0, time.monotonic(), _START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL)
            now = path.stat().st_size if path.exists() else 0
            if now == size:
                if time.monotonic() - heard > limit:
                    break
                continue
            known = Journal.read(path)
            size, heard = now, time.monotonic()
            limit = _START_SECONDS if known.running is None else _TEST_SECONDS
            bar.total = len(known.collected)
            bar.update(len(known.tests) - bar.n)
    finally:
        process.kill()
        status = process.wait()
    known = Journal.read(path)
    bar.update(len(known.tests) - bar.n)
    late = time.monotonic() >= deadline
    if known.running is not None and not late and status != LOST:
        seconds = time.monotonic() - heard
        message = "hung" if seconds > limit else f"its process ended with status {status}"
        ended: dict[str, Any] = {"test": known.running, "outcome": "failed"}
        ended |= {"seconds": seconds, "message": message}
        with path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(ended) + "\n")


def summary(known: Journal) -> dict[str, Any]:
    """Counts by file and function, and the failures in full."""
    groups: dict[str, dict[str, int]] = {}
    failures = []
    for name in known.collected:
        outcome = known.tests.get(name, {"outcome": "not run"})
        group = name.split("[")[0].split("/")[-1]
        counts = groups.setdefault(group, {})
        counts[outcome["outcome"]] = counts.get(outcome["outcome"], 0) + 1
        if outcome["outcome"] == "failed":
            message = anonymous(outcome["message"], ROOT)
            failures.append({"test": name, "seconds": outcome["seconds"], "message": message})
    return {"groups": groups, "failures": failures}
