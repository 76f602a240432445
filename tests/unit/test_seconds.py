"""The table of seconds at the end of a test run."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tests.seconds import Seconds

def pytest_configure(config):
    config.pluginmanager.register(Seconds(), "seconds")
"""
BUSY = """
import time

def test_busy():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass

def test_idle():
    time.sleep(0.3)
"""
INNER = """
import subprocess, sys

def test_a_run_of_its_own():
    subprocess.run([sys.executable, "-m", "pytest", "busy/test_busy.py"], check=True)
"""


def test_waiting_and_computing_are_told_apart(tmp_path: pathlib.Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    for name, text in (("busy", BUSY), ("inner", INNER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "busy", "inner"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, table = done.stdout.partition("seconds by folder and file")
    rows = [line.split(maxsplit=3) for line in table.splitlines() if "busy" in line]
    found = {name: [float(figure) for figure in figures] for *figures, name in rows}
    assert set(found) == {"busy", "busy/test_busy.py", "busy/test_busy.py (inside another)"}
    for wall, cpu, tests in found.values():
        assert wall >= 0.6 and 0.3 <= cpu <= wall - 0.25 and tests == 2
    # Whoever shows the last line of a run still shows its outcome.
    assert done.stdout.splitlines()[-1].startswith("3 passed in ")
