"""vLLM's V2 model runner without a GPU: its tests, interpreted, in a process of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_v2_runner_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    triton = subprocess.run([ROOT / "scripts" / "triton.sh"], capture_output=True, text=True)
    assert triton.returncode == 0, triton.stderr
    path = [triton.stdout.strip(), str(ROOT / "tests" / "gpu" / "v2" / "shim"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/v2"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "TRITON_INTERPRET": "1",
            "KVCRUSH_V2_TESTS": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"\ntests/gpu/v2, interpreted: {summary}")
    assert done.returncode == 0, done.stdout + done.stderr
