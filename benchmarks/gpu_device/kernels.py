"""Drives the worker through the cases, and turns what it measured into rows and tables."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_device.cases import FLASH, Case, cases
from benchmarks.gpu_device.machine import anonymous
from benchmarks.kernels.timing import quartiles, ratios
from benchmarks.overhead.child import Child
from benchmarks.report import ROOT, Run, progress, table

CASE_SECONDS = 90  # after which a case counts as hung; compilation included
SETTINGS = {"rounds": 15, "seconds": 0.005}
DRY_SETTINGS = {"rounds": 1, "seconds": 0.0, "working_set": 1}
LEAST_WORKING_SET = 2**28
CACHES = 4  # times the device's L2 that calls are spread over
Result = dict[str, Any]


class Worker:
    """The process that has the device; started when first asked, and anew when it failed."""

    def __init__(self, dry: bool):
        self._dry, self._child = dry, None  # type: tuple[bool, Child | None]

    def ask(self, timeout: float, **job: Any) -> Any:
        """Returns an answer. Raises SystemExit with the worker's last words; the next question goes
        to a new one."""
        if self._child is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1" if self._dry else "0"}
            device = "cpu" if self._dry else "cuda"
            command = [sys.executable, "-m", "benchmarks.gpu_device.worker", device]
            self._child = Child("the worker", command, environment)
        try:
            self._child.send(**job)
            return self._child.receive(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._child is not None:
            self._child.__exit__(None, None, None)
            self._child = None


def measure(worker: Worker, case: Case, settings: dict[str, Any], timeout: float) -> Result:
    """Returns a case's result. Where the whole fails, each candidate by itself: one that breaks the
    device must not hide the others."""

    def ask(names: Sequence[str]) -> Result:
        job = {**case.job(), "candidates": list(names)}
        return worker.ask(timeout, kind="measure", case=job, **settings)

    try:
        return ask(case.candidates)
    except SystemExit:
        merged: Result = {"candidates": {}, "missing": {}, "copy": [], "product": []}
    for name in case.candidates:
        try:
            found = ask([name])
        except SystemExit as error:
            merged["missing"][name] = anonymous(str(error)[-1500:], ROOT)
            continue
        # Its limits were measured in other rounds than the others', so they stay with it.
        for part in found["candidates"].values():
            part["copy"], part["product"] = found["copy"], found["product"]
        merged["candidates"].update(found["candidates"])
        merged["missing"].update(found["missing"])
    merged["alone"] = True
    return merged


def run_all(
    run: Run, worker: Worker, dry: bool, l2_bytes: int | None, deadline: float
) -> tuple[dict[Case, Result], list[str]]:
    """Results of the cases that were reached, and the names of the others."""
    settings = dict(DRY_SETTINGS if dry else SETTINGS)
    settings.setdefault("working_set", max(LEAST_WORKING_SET, CACHES * (l2_bytes or 0)))
    found: dict[Case, Result] = {}
    late = []
    for case in progress(cases(dry), "kernels"):
        left = deadline - time.monotonic()
        if left < 1 and not run.has(case.name):
            late.append(case.name)
            continue
        timeout = min(CASE_SECONDS, max(left, 10))
        found[case] = run.step(
            case.name, functools.partial(measure, worker, case, settings, timeout)
        )
    return found, late


def add_rows(run: Run, results: dict[Case, Result]) -> None:
    """Adds everything in long form."""
    limits: dict[str, list[float]] = {"copy": [], "product": []}
    for case, result in results.items():
        for limit, values in limits.items():
            values += result[limit]
        where = {"context": case.context, "task": case.task}
        at = f"{case.shape},batch={case.batch},rows={case.rows}"
        for name, why in result["missing"].items():
            columns = {**where, **_kernel(name), "mode": f"{at},not measured: {why}"}
            run.add("seconds", None, "s", n=0, **columns)
        flash = result["candidates"].get(FLASH)
        for name, found in result["candidates"].items():
            for mode, seconds in found["seconds"].items():
                columns = {**where, **_kernel(name), "mode": f"{at},{mode}"}
                for metric, values, unit in figures(case, found, result, mode, seconds):
                    _add(run, metric, values, unit, columns)
                if flash and name != FLASH and mode in flash["seconds"] and "alone" not in result:
                    speedups = ratios(flash["seconds"][mode], seconds)
                    _add(run, "speedup_vs_flash_attention", speedups, "ratio", columns)
            if found["error"] is not None:
                columns = {**where, **_kernel(name), "mode": at}
                run.add("relative_error", found["error"], "ratio", **columns)
            for note in found["notes"]:
                columns = {**where, **_kernel(name), "mode": f"{at},{note}"}
                run.add("seconds", None, "s", n=0, **columns)
    names = {"copy": ("copy_bytes_per_s", "bytes/s"), "product": ("product_flops_per_s", "1/s")}
    for limit, values in limits.items():
        if values:
            _add(run, names[limit][0], values, names[limit][1], {"task": "limits"})


def figures(
    case: Case, found: Result, result: Result, mode: str, seconds: Sequence[float]
) -> list[tuple[str, list[float], str]]:
    """Returns the metric, its value in each round, and unit of one candidate's launches in one
    mode."""
    made = [("seconds", list(seconds), "s")]
    if case.task == "prefill":
        rates, work, metric = found.get("product") or result["product"], "flops", "product_share"
    else:
        rates, work, metric = found.get("copy") or result["copy"], "bytes", "bandwidth_share"
    made.append((metric, ratios([found[work] / s for s in seconds], rates), "ratio"))
    return made


def _kernel(name: str) -> dict[str, Any]:
    if name == FLASH:
        return {"policy": name, "codec": "raw"}
    return {"policy": f"kvcrush-{name}", "codec": name}


def _add(
    run: Run, metric: str, values: Sequence[float], unit: str, columns: dict[str, Any]
) -> None:
    value, low, high = quartiles(values)
    run.add(metric, value, unit, n=len(values), low=low, high=high, **columns)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what a reader wants first: a line for each case, kernel and way to launch."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["task"] is None or not str(row["policy"]).startswith(("kvcrush-", FLASH)):
            continue
        key = (row["task"], row["context"], row["mode"], row["policy"])
        lines.setdefault(key, {})[row["metric"]] = row["value"]
    made = []
    for (task, context, mode, policy), metrics in lines.items():
        if "relative_error" in metrics:
            continue
        seconds = metrics.get("seconds")
        share = metrics.get("bandwidth_share", metrics.get("product_share"))
        speedup = metrics.get("speedup_vs_flash_attention")
        made.append(
            [
                task,
                str(context),
                mode.split(": ")[0],
                policy,
                "–" if seconds is None else f"{1e6 * seconds:.1f} µs",
                "–" if share is None else f"{share:.0%}",
                "–" if speedup is None else f"{speedup:.2f}",
            ]
        )
    header = ["task", "context", "mode", "kernel", "a call", "of the limit", "× FlashAttention"]
    return table(header, made)
