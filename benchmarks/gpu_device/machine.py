"""Finds out what this machine has and what it lacks. Importing it needs nothing but Python."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
from typing import Any

PACKAGES = ("numpy", "torch", "triton", "pytest", "tqdm")
SMI = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "utilization.gpu")


def missing_package() -> str | None:
    """Returns one sentence that names the packages that are missing, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return (
        f"this Python lacks {', '.join(absent)}: name one that has vLLM 0.32 for GPUs and pytest "
        "(make bench-gpu PYTHON=PATH), or for --dry-run this repository's .venv/bin/python with "
        "PYTHONPATH=$(scripts/triton.sh)."
    )


def missing_gpu() -> str | None:
    """Returns one sentence that says what is missing to run on a device, or None."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"no GPU can be used: torch {torch.__version__} is a build for CPUs; take a Python "
            "with vLLM 0.32 for GPUs, or add --dry-run to try this script without a GPU."
        )
    if not torch.cuda.is_available():
        return (
            f"no GPU can be used: torch {torch.__version__} finds none; see whether nvidia-smi "
            "does, or add --dry-run to try this script without a GPU."
        )
    return None


def facts() -> dict[str, Any]:
    """Returns the GPU, its driver and what runs on them; sizes in bytes. Without a GPU `gpu` is
    null."""
    import torch
    import triton

    found: dict[str, Any] = {
        "gpu": None,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if not torch.cuda.is_available():
        return found
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        **found,
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "processors": about.multi_processor_count,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "nvidia_smi": _smi(),
    }


def _smi() -> dict[str, str] | None:
    """Returns the driver, power limit (W), largest clocks (MHz), load (%) before anything ran."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits", "-i0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [v.strip() for v in done.stdout.strip().split(",")]
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else None


def anonymous(text: str, root: pathlib.Path) -> str:
    """Returns a text to publish, without this machine's paths."""
    return text.replace(str(root), ".").replace(os.path.expanduser("~"), "~")
