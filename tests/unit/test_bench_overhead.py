"""The overhead benchmark: its child processes, its statistics, and what it refuses to report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.overhead import engine, first, idle, share
from benchmarks.overhead.child import ROOT, Child
from benchmarks.report import Run

WORKER = """
import time
from benchmarks.overhead.child import serve

def handle(job):
    print("noise on stdout")
    if job.get("leave"):
        raise SystemExit(3)
    if job.get("wait"):
        time.sleep(job["wait"])
    return {"sum": job["a"] + job["b"]}

serve(handle)
"""


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    return new_run(tmp_path)


def new_run(folder: pathlib.Path) -> Run:
    return Run("overhead", argparse.Namespace(json=folder / "o.json", quick=True, restart=False))


def worker() -> Child:
    return Child("the adder", [sys.executable, "-c", WORKER], os.environ)


# -- children -----------------------------------------------------------------------------------


def test_child_answers_and_its_prints_do_not_mix() -> None:
    with worker() as child:
        assert [child.ask(a=1, b=n)["sum"] for n in range(3)] == [1, 2, 3]


def test_a_failing_job_shows_its_traceback() -> None:
    with worker() as child, pytest.raises(SystemExit, match=r"(?s)the adder failed.*KeyError: 'b'"):
        child.ask(a=1)


def test_a_child_that_ends_shows_its_last_words() -> None:
    with worker() as child, pytest.raises(SystemExit, match=r"(?s)ended with status 3.*noise"):
        child.ask(leave=True)


def test_a_child_that_hangs_is_given_up() -> None:
    with worker() as child, pytest.raises(SystemExit, match="gave no answer within 1 s"):
        child.send(a=1, b=1, wait=60)
        child.receive(timeout=1)


def test_a_child_outlives_neither_its_block_nor_its_parent() -> None:
    with worker() as child:
        process = child._process
        assert child.ask(a=1, b=1)["sum"] == 2
    assert process.returncode is not None
    # A parent that is killed closes no block.
    parent = f"""
import os, sys
from benchmarks.overhead.child import Child
child = Child("orphan", [sys.executable, "-c", {WORKER!r}], os.environ)
child.ask(a=1, b=1)
print(child._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    state = pathlib.Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        # An orphan that nobody reaps stays as a zombie.
        if not state.exists() or state.read_text().rpartition(") ")[2].startswith("Z"):
            return
        time.sleep(0.1)
    raise AssertionError("the child still runs")


# -- compaction's share -------------------------------------------------------------------------


class FakeEngine:
    """Stands in for `Child`. It answers at once, and counts the requests."""

    def __init__(self, compactions: int = 1, **started: Any):
        self.jobs: list[dict[str, Any]] = []
        self._compactions = compactions
        self._started = started

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def send(self, **job: Any) -> None:
        self.jobs.append(job)

    def receive(self) -> Any:
        return self._started

    def ask(self, **job: Any) -> Any:
        self.jobs.append(job)
        if job["kind"] == "steps":
            return {"tpot_s": 0.01, "wall_s": 0.1, "burnt_s": 0.0}
        return {"total_s": 2.0, "compaction_s": 0.004, "compactions": self._compactions}


def test_share_measures_everything_once_and_resumes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeEngine()
    monkeypatch.setattr(engine, "start", lambda *_, **__: fake)
    found = share.measure(new_run(tmp_path), "model", [512, 1024], 8, 2)
    assert sorted(found) == [(n, p) for n in (512, 1024) for p in sorted(share.POLICIES)]
    assert all(len(results) == 2 for results in found.values())
    timed = [j for j in fake.jobs if j["kind"] == "request" and j["output"] == 8]
    assert len(timed) == 2 * 2 * len(share.POLICIES)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an engine was started for nothing")

    monkeypatch.setattr(engine, "start", refuse)
    assert share.measure(new_run(tmp_path), "model", [512, 1024], 8, 2) == found


def test_share_refuses_lengths_that_are_never_compacted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "start", lambda *_, **__: FakeEngine(compactions=0))
    with pytest.raises(SystemExit, match="64 tokens is never compacted"):
        share.measure(run, "model", [64], 8, 1)


def test_share_says_whether_the_published_claim_holds(run: Run) -> None:
    def result(share: float) -> dict[str, Any]:
        return {"total_s": 10.0, "compaction_s": 10 * share, "compactions": 1}

    found = {
        (512, "kvcrush"): [result(s) for s in (0.003, 0.002, 0.004)],
        (512, "snapkv"): [result(s) for s in (0.004, 0.006, 0.007)],
        (512, "streaming"): [result(s) for s in (0.006, 0.006, 0.006)],
    }
    lines = share.report(run, found, 64).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["yes |", "in 1 of 3 |", "no |"]
    by_policy = {r["policy"]: r for r in run.rows if r["metric"] == "compaction_share"}
    kvcrush = by_policy["kvcrush"]
    assert (kvcrush["value"], kvcrush["low"], kvcrush["high"]) == pytest.approx(
        (0.003, 0.002, 0.004)
    )
    assert kvcrush["context"] == 512 and kvcrush["n"] == 3 and kvcrush["budget"] == share.BUDGET


# -- the idle plugin ----------------------------------------------------------------------------


def rounds_of(ratios: dict[str, list[float]], slow: list[float]) -> list[dict[str, Any]]:
    """Returns rounds in which the machine is `slow` times slower, for all engines alike."""
    rounds = []
    for number, factor in enumerate(slow):
        rounds.append(
            {
                name: {
                    "tpot_s": 0.05 * factor * ratios[name][number],
                    "wall_s": 1.0,
                    "burnt_s": 0.05,
                }
                for name in idle.ENGINES
            }
        )
    return rounds


def test_pairing_cancels_what_slows_the_whole_machine(run: Run) -> None:
    jitter = [0.995, 1.004, 0.998, 1.0, 1.0, 0.996, 1.005, 1.0]
    rounds = rounds_of(
        {
            "plain": [1.0] * 8,
            "plain_again": jitter,
            "no_policy": jitter[::-1],
            "opted_out": [1.1 * j for j in jitter],
        },
        slow=[1, 3, 1, 2, 5, 1, 1, 2],
    )
    lines = idle.report(run, rounds).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == [" |", " |", "none |", "10.0% slower |"]
    rows = {r["mode"]: r for r in run.rows if r["metric"] == "ratio_tpot_s"}
    assert set(rows) == {"plain_again", "no_policy", "opted_out"}
    assert rows["opted_out"]["low"] > 1.08 and rows["opted_out"]["n"] == 8
    assert rows["no_policy"]["low"] <= 1 <= rows["no_policy"]["high"]
    assert len([r for r in run.rows if r["metric"] == "tpot_s"]) == len(idle.ENGINES)


def test_a_difference_that_two_plain_engines_show_is_none() -> None:
    assert idle.difference((0.99, 0.98, 1.01), control=1.0) == "none"
    assert idle.difference((1.02, 1.01, 1.03), control=1.0) == "2.0% slower"
    assert idle.difference((0.97, 0.96, 0.98), control=1.01) == "3.0% faster"
    assert idle.difference((1.02, 1.01, 1.03), control=0.97).startswith("none (two plain")


def test_median_interval() -> None:
    value, low, high = idle.median_interval([1.0, 1.2, 0.9, 1.1, 5.0])
    assert value == 1.1 and 0.9 <= low < value < high <= 5.0
    assert idle.median_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    few, many = ([1, 2, 3, 4] * n for n in (2, 50))
    width = [high - low for _, low, high in (idle.median_interval(few), idle.median_interval(many))]
    assert width[1] < width[0]


def test_busy_waiting_engines_are_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = rounds_of({name: [1.0] * 5 for name in idle.ENGINES}, slow=[1] * 5)
    idle.report(run, rounds)
    assert "burnt" not in capsys.readouterr().err
    rounds[2]["plain"]["burnt_s"] = 6.0
    idle.report(run, rounds)
    assert "not to be trusted" in capsys.readouterr().err


def test_engines_that_are_not_what_they_should_be_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With VLLM_PLUGINS="" in the user's environment, plain vLLM would be compared with itself."""
    plain = {"scheduler": "Scheduler", "plugin": False}
    monkeypatch.setattr(engine, "start", lambda *_, **__: FakeEngine(**plain))
    with contextlib.ExitStack() as stack, pytest.raises(SystemExit, match="VLLM_PLUGINS unset"):
        idle._start(stack, "model", 8)


def test_every_round_measures_every_engine_in_changing_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[str]] = []
    log: list[str] = []

    def start(what: str, plugin: bool) -> FakeEngine:
        name = next(n for n, w in idle.WHAT.items() if w == what)
        ours = name == "opted_out"
        fake = FakeEngine(scheduler="KVCrushScheduler" if ours else "Scheduler", plugin=plugin)
        ask = fake.ask
        fake.ask = lambda **job: (log.append(name), ask(**job))[1]  # type: ignore[method-assign]
        return fake

    monkeypatch.setattr(engine, "start", start)
    rounds = idle.measure(run, "model", 6, 4)
    assert all(set(r) == set(idle.ENGINES) for r in rounds)
    size = len(idle.ENGINES)
    orders = [log[i : i + size] for i in range(0, len(log), size)]
    assert len(orders) == 7  # one to warm up
    assert all(sorted(order) == sorted(idle.ENGINES) for order in orders)
    assert len({json.dumps(order) for order in orders}) > 1


# -- first tokens -------------------------------------------------------------------------------


def test_first_tokens_are_compared_round_by_round(run: Run) -> None:
    plain, other = {"ttft_s": 4.0, "tpot_s": 0.1}, {"ttft_s": 3.0, "tpot_s": 0.05}
    slow = {"ttft_s": 8.0, "tpot_s": 0.2}
    rounds = [
        {line: dict(plain if line == first.PLAIN else other) for line in first.LINES},
        {line: dict(slow if line == first.PLAIN else other) for line in first.LINES},
        {line: dict(plain if line == first.PLAIN else other) for line in first.LINES},
    ]
    text = first.report(run, {3800: rounds}, "bfloat16")
    assert "| 3800 | plain vLLM | 4 s | 1 | 0.1 s | 1 |" in text
    assert "| 3800 | auto | 3 s | 0.75 (0.38 to 0.75) | 0.05 s | 0.50 (0.25 to 0.50) |" in text
    ratios = {r["policy"]: r["value"] for r in run.rows if r["metric"] == "ratio_ttft_s"}
    assert ratios == dict.fromkeys(("opted out", "auto", "int4"), 0.75)
