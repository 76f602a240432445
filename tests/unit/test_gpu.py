"""The GPU kernels without a GPU: their tests, interpreted, and a sample of their compilation. Both
run in processes of their own, because Triton decides at import time how kernels run and because
vLLM's CPU build must not find it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def triton() -> dict[str, str]:
    """An environment in which Triton can be imported."""
    done = subprocess.run([ROOT / "scripts" / "triton.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([done.stdout.strip(), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_kernels_under_the_interpreter(
    triton: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        env=triton | {"TRITON_INTERPRET": "1", "KVCRUSH_GPU_TESTS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"\ntests/gpu, interpreted: {summary}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_compile_for_nvidia_and_amd(
    triton: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sample of `python -m benchmarks.gpu`, which fails where a kernel spills or has no tensor
    core instruction or no wide load."""
    result = tmp_path / "compiled.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "--quick"),
            *("--targets", "sm_90,gfx942", "--json", str(result)),
        ],
        env=triton | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert {r["target"] for r in rows} == {"sm_90", "gfx942"} and len(rows) == 6
    assert all(r["spills"] == 0 for r in rows)
    with capsys.disabled():
        print(f"\n{len(rows)} kernels compiled for sm_90 and gfx942, no spills")
