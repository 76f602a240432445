"""The GPU kernels without a GPU: their tests, interpreted, and a sample of their compilation. Both
run in processes of their own, because Triton decides at import time how kernels run and because
vLLM's CPU build must not find it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import report
from benchmarks.gpu_device.cases import FLASH, cases
from vllm_kvcrush import gate

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def triton() -> dict[str, str]:
    """Returns an environment in which Triton can be imported. What it compiles is cached beside the
    demo model for the next run."""
    done = subprocess.run([ROOT / "scripts" / "triton.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([done.stdout.strip(), str(ROOT)])
    kept = os.environ.get("VLLM_KVCRUSH_CACHE", str(ROOT / ".cache"))
    cache = os.path.join(kept, "triton-compiled")
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache}


RUNS = {
    "interpreted": (["tests/gpu"], {"TRITON_INTERPRET": "1"}),
    "compiled": (["tests/gpu/test_launches.py", "tests/gpu/test_asked.py"], {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_kernels(triton: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the kernels in the interpreter, against plain torch, and compiles them: as an engine
    launches them, and a sample of `python -m benchmarks.gpu`."""
    paths, more = RUNS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    environment = triton | {"KVCRUSH_GPU_TESTS": "1"} | more
    done = subprocess.run(
        [*command, "--durations=20"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    with capsys.disabled():
        summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"\ntests/gpu, {name}: {summary}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_device_benchmark_runs_dry(triton: dict[str, str], tmp_path: pathlib.Path) -> None:
    """Runs every part of `make bench-gpu`, at tiny sizes in the interpreter."""
    result = tmp_path / "dry.json"
    command = [sys.executable, "-m", "benchmarks.gpu_device", "--dry-run", "--minutes", "10"]
    done = subprocess.run(
        [*command, "--json", str(result)], env=triton, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.read(result)
    assert found["dry_run"] is True
    assert found["environment"]["gpu"] is None and found["environment"]["triton"]
    assert found["parts"]["correctness"] == {"finished": True, "failures": []}
    assert found["parts"]["kernels"] == {"finished": True, "not_run": []}
    assert found["parts"]["serving"]["ran"] is False
    assert gate.UNVERIFIED_GPU in found["parts"]["serving"]["why"] in done.stdout
    rows = found["rows"]
    assert {"passed", "skipped"} == {r["metric"] for r in rows if r["task"] == "correctness"}
    assert all(r["mode"].startswith("interpreter,") for r in rows if r["task"] == "correctness")
    timed = [r for r in rows if r["metric"] == "seconds" and r["value"] is not None]
    assert {(r["task"], r["codec"]) for r in timed} == {
        (case.task, name) for case in cases(dry=True) for name in case.candidates if name != FLASH
    }
    # Nothing that was interpreted can be taken for a device's.
    assert all(r["mode"].endswith(",interpreter") for r in timed)
    (absent,) = [r for r in rows if r["value"] is None]
    assert absent["policy"] == FLASH and "not measured: not importable" in absent["mode"]
    errors = [r["value"] for r in rows if r["metric"] == "relative_error"]
    assert len(errors) == 2 * 3 and max(errors) < 4e-3
    # A finished run leaves nothing to go on from.
    assert list(tmp_path.iterdir()) == [result]


def test_the_device_benchmark_says_what_is_missing(
    triton: dict[str, str], tmp_path: pathlib.Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_device", "--json", str(tmp_path / "x.json")]
    for env, words in (
        (triton | {"CUDA_VISIBLE_DEVICES": ""}, "gpu_device: no GPU can be used: torch "),
        (os.environ | {"PYTHONPATH": str(ROOT)}, "gpu_device: this Python lacks triton: "),
    ):
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(words) and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
