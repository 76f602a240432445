"""A pytest plugin that prints, at the end of a run, where its time went, by file.

Wall time says how long a developer waits. CPU time (of the process and of those that it waited
for) hardly depends on what else the machine does, so a regression shows there. Tests that run
others in a process of their own (`tests/gpu`, interpreted) show those files too.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

LONGEST = 15
# A folder into which runs inside this run write what they spent.
INNER = "KVCRUSH_INNER_SECONDS"


def cpu_seconds() -> float:
    """Returns CPU seconds of this process and of its children that ended and were waited for."""
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


@dataclass
class Spent:
    """What the tests of one file took."""

    wall: float = 0.0
    cpu: float = 0.0
    tests: int = 0

    def add(self, other: Spent) -> None:
        self.wall += other.wall
        self.cpu += other.cpu
        self.tests += other.tests


class Seconds:
    """The pytest plugin that measures and prints."""

    def __init__(self) -> None:
        self._files: dict[str, Spent] = defaultdict(Spent)
        self._began = time.monotonic()
        # Where this run leaves its own figures, and where the runs inside it leave theirs.
        self._outer = os.environ.get(INNER)
        self._inner: tempfile.TemporaryDirectory[str] | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        # A worker of pytest-xdist leaves the runs inside it to its controller.
        if not hasattr(config, "workerinput"):
            self._inner = tempfile.TemporaryDirectory(prefix="seconds-")
            os.environ[INNER] = self._inner.name

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        item.stash[PHASE] = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        now = cpu_seconds()
        report.cpu_seconds, item.stash[PHASE] = now - item.stash[PHASE], now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds up a test's times. pytest calls it in the process that prints, also for tests that
        ran in a worker."""
        cpu = getattr(report, "cpu_seconds", 0.0)
        name = report.nodeid.split("::")[0]
        self._files[name].add(Spent(report.duration, cpu, report.when == "call"))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._files or self._inner is None:
            return
        if self._outer and os.path.isdir(self._outer):
            found = {name: vars(spent) for name, spent in self._files.items()}
            pathlib.Path(self._outer, f"{os.getpid()}.json").write_text(json.dumps(found))
        inner: dict[str, Spent] = defaultdict(Spent)
        for path in sorted(pathlib.Path(self._inner.name).iterdir()):
            for name, spent in json.loads(path.read_text()).items():
                inner[f"{name} (inside another)"].add(Spent(**spent))
        folders: dict[str, Spent] = defaultdict(Spent)
        for name, spent in self._files.items():
            folders[os.path.dirname(name) or "."].add(spent)
        terminalreporter.section("seconds by folder and file")
        terminalreporter.write_line(f"{'wall':>8} {'CPU':>8} {'tests':>6}")

        def rows(of: dict[str, Spent]) -> list[tuple[str, Spent]]:
            return sorted(of.items(), key=lambda row: -row[1].wall)

        for part in (rows(folders), rows(self._files | inner)[:LONGEST]):
            for name, spent in part:
                figures = f"{spent.wall:8.1f} {spent.cpu:8.1f} {spent.tests:6d}"
                terminalreporter.write_line(f"{figures}  {name}")
            terminalreporter.write_line("")
        elapsed = time.monotonic() - self._began
        tests = sum(spent.wall for spent in self._files.values())
        terminalreporter.write_line(f"{tests:.0f} s of tests in {elapsed:.0f} s")


PHASE = pytest.StashKey[float]()
