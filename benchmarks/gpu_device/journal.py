"""A pytest plugin that writes down each test as it ends, so that a crash or a hang loses one test.

Lines of JSON in the file that KVCRUSH_JOURNAL names: `collected`, `began`, or `test` with
`outcome`, `seconds` and `message`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

LOST = 86  # exit status: a kernel broke the device's context, and later tests would fail for it
_MESSAGE = 4000  # characters


def _write(**line: Any) -> None:
    with open(os.environ["KVCRUSH_JOURNAL"], "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Writes down all tests, before the first runs."""
    _write(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    """Writes down that a test has begun: one that is never heard of again has hung or crashed."""
    _write(began=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes one line a test, two where its teardown fails too."""
    if report.when == "call" or report.outcome != "passed":
        text = ""
        if report.outcome == "failed":
            text = f"{report.longreprtext[-_MESSAGE:]}\n{report.capstdout[-500:]}"
        elif report.outcome == "skipped":
            text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        _write(
            test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=text
        )  # fmt: skip
    if report.failed and not _alive():
        pytest.exit("the device's context is lost", returncode=LOST)


def _alive() -> bool:
    import torch

    initialized: Callable[[], bool] = torch.cuda.is_initialized
    if not initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
