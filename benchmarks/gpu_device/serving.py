"""Compares plain vLLM with the plugin on this machine's GPU, where the gate allows it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu_device.machine import anonymous
from benchmarks.report import ROOT
from vllm_kvcrush import gate

POLICY = "int4"
_STOP_SECONDS = 60  # in which benchmarks.serving ends its servers


def refusal() -> str | None:
    """Returns why the pair cannot run on a GPU, in one sentence, or None."""
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        model_config=SimpleNamespace(enforce_eager=True),
        use_v2_model_runner=True,
    )
    if clauses := gate.refusals(config):
        return (
            f"The plugin refuses this platform: {'; '.join(clauses)}. {gate.UNVERIFIED_GPU}=1 "
            "lets this measurement through."
        )
    supported, sentence = gate.verdict()
    if not supported:
        return sentence
    runs, kernels = gate.kernels()
    if not runs:
        return f"vllm-kvcrush is not installed here ({kernels}): pip install --no-deps -e ."
    if not (pathlib.Path(sys.executable).parent / "vllm").exists():
        return f"there is no command vllm beside {pathlib.Path(sys.executable).name}."
    return None


def arguments(model: pathlib.Path | None, path: pathlib.Path) -> list[str]:
    """Returns the arguments of `python -m benchmarks.serving`."""
    flags = f"--attention-backend=TRITON_ATTN --kv-policy-allow={POLICY},none"
    found = ["--quick", "--policy", POLICY, "--dtype", "bfloat16", f"--policy-flags={flags}"]
    found += ["--workloads", "long_prompt", "long_decode", "--json", str(path)]
    return [*found, "--model", str(model)] if model else found


def run(model: pathlib.Path | None, path: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Runs the pair for at most `seconds`: {"ran", "why", "rows"}. What it finished is kept beside
    `path`, for the next run."""
    log = path.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving", *arguments(model, path)],
            env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"},
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": "out of time", "rows": []}
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            process.kill()
            process.wait()
    if status:
        why = anonymous(log.read_text(errors="replace")[-4000:], ROOT)
        return {"ran": False, "why": f"it ended with status {status}: {why}", "rows": []}
    return {"ran": True, "why": None, "rows": json.loads(path.read_text())["rows"]}
