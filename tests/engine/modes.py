"""Engines in processes of their own, for modes that need other start-up options."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tests.engine.conftest import ENVIRONMENT, HERE


def run(tmp_path: pathlib.Path, job: dict[str, Any], *flags: str, **environment: str) -> Any:
    """Returns what `run_mode.py` says of a job, which it describes."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    ranks = job["engine"].get("tensor_parallel_size", 1)
    cores = [str(core) for core in sorted(os.sched_getaffinity(0)) * 2]
    # One memory node holds both ranks here, which vLLM does not bind by itself.
    bind = "|".join(cores[:ranks]) if ranks > 1 else "nobind"
    done = subprocess.run(
        [sys.executable, str(HERE / "run_mode.py"), str(path), *flags],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": bind, **environment},
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def save_adapter(model: str, tmp_path: pathlib.Path) -> str:
    """Saves a random LoRA adapter for a model, and returns its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(
            r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")
