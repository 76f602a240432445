"""Starts the GPU kernels' tests, tests/gpu, in a process whose kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_kernels_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        env=os.environ | {"TRITON_INTERPRET": "1", "KVCRUSH_GPU_TESTS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"\ntests/gpu, interpreted: {summary}")
    assert done.returncode == 0, done.stdout + done.stderr
