"""Peers: kvpress and OpenVINO GenAI on the same items at the same kept bytes.

Each lives in an environment of its own, which `setup.sh` makes, and runs in a process that is given
a job and streams records. A job is

    {"model": directory, "threads": n, "presses": [names],
     "items": [{"task": str, "index": int, "modes": {mode: {
         "prompt": [ids], "forced": [ids], "scored": [bools], "kept": {budget: tokens}}}}]}

where `presses` are some of PRESSES (OpenVINO needs none), and `kept` says how many tokens' KV the
engine held under that budget, in whole blocks. A record names `task`, `index`, `mode`, `policy`
("kvpress/snapkv"), `budget` (null for "kvpress/full") and `kept`, and brings what the peer can
measure: kvpress `nll`, `token_accuracy`, `exact`, `n_scored`, `agreement`, `kl`; OpenVINO `exact`,
`n_scored`, `codec`, `peak` (tokens held before its eviction), or `skipped` with a reason. `cpu_s`
is the processor time that the record took.
"""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from benchmarks.quality.peers.kvpress_run import PRESSES

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent.parent
NAMES = ("kvpress", "openvino")
__all__ = ["NAMES", "PRESSES", "PeerError", "kvpress", "openvino"]
# The longest silence of a child, and the longest set-up, in seconds. A busy machine is slow.
SILENCE_S = 1800.0
SETUP_S = 3600.0

Record = dict[str, Any]


class PeerError(RuntimeError):
    """A peer could not be set up or run; the message says why."""


def kvpress(job: dict[str, Any], on_record: Callable[[Record], object]) -> None:
    """Runs a job with kvpress; `on_record` gets each record when it is there."""
    _run("kvpress", job, on_record)


def openvino(job: dict[str, Any], on_record: Callable[[Record], object]) -> None:
    """Runs a job with OpenVINO GenAI; `on_record` gets each record when it is there. Records come
    in the order of OpenVINO's settings, not of the items."""
    _run("openvino", job, on_record)


def _run(name: str, job: dict[str, Any], on_record: Callable[[Record], object]) -> None:
    check(job)
    command = [str(set_up(name)), "-I", str(HERE / f"{name}_run.py")]
    stream(name, command, job, on_record)


def check(job: dict[str, Any]) -> None:
    """Raises ValueError if `job` is none."""
    if missing := {"model", "threads", "items"} - job.keys():
        raise ValueError(f"the job lacks {', '.join(sorted(missing))}")
    for item in job["items"]:
        if missing := {"task", "index", "modes"} - item.keys():
            raise ValueError(f"an item of the job lacks {', '.join(sorted(missing))}")
        for mode, parts in item["modes"].items():
            where = f"{item['task']} {item['index']} ({mode})"
            if missing := {"prompt", "forced", "scored", "kept"} - parts.keys():
                raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
            if len(parts["forced"]) != len(parts["scored"]):
                raise ValueError(f"{where} has not one mark for each forced token")


def environment_root() -> pathlib.Path:
    """Returns the folder of the peers' environments."""
    own = os.environ.get("VLLM_KVCRUSH_CACHE")
    return (pathlib.Path(own).expanduser().absolute() if own else ROOT / ".cache") / "peers"


def set_up(name: str) -> pathlib.Path:
    """Returns the Python of a peer's environment, which is made first if it is not there yet."""
    if name not in NAMES:
        raise PeerError(f"no such peer: {name}; there are {', '.join(NAMES)}")
    root = environment_root()
    env = {"PYTHON": sys.executable, **os.environ, "VLLM_KVCRUSH_CACHE": str(root.parent)}
    command = [str(HERE / "setup.sh"), name]
    try:
        # Its words go to stderr: tables go to stdout.
        subprocess.run(command, env=env, stdout=2, timeout=SETUP_S, check=True)
    except subprocess.CalledProcessError as error:
        raise PeerError(f"could not set up {name}; what {command[0]} says is above") from error
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{command[0]} {name} did not end in {SETUP_S:.0f} s") from error
    return root / name / "bin" / "python"


def stream(
    name: str,
    command: Sequence[str],
    job: dict[str, Any],
    on_record: Callable[[Record], object],
    silence_s: float = SILENCE_S,
) -> None:
    """Runs `command` on a file with `job`, and hands over the records that it prints, one JSON
    object a line. Raises PeerError if it fails, prints something else or is silent too long."""
    threads = str(job["threads"])
    env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix=f"peer-{name}-") as folder:
        path = pathlib.Path(folder, "job.json")
        path.write_text(json.dumps(job))
        with pathlib.Path(folder, "stderr").open("w+b") as errors:
            child = subprocess.Popen(
                [*command, str(path)], env=env, stdout=subprocess.PIPE, stderr=errors
            )
            assert child.stdout is not None
            try:
                count = 0
                for line in _lines(name, child.stdout, silence_s):
                    on_record(_record(name, line))
                    count += 1
                status = child.wait(timeout=silence_s)
            finally:
                child.kill()  # no effect on one that has ended
                child.wait()
                child.stdout.close()
            if status:
                raise PeerError(_failure(name, status, count, errors))


def _lines(name: str, output: BinaryIO, silence_s: float) -> Iterator[bytes]:
    rest = b""
    while True:
        if not select.select([output], [], [], silence_s)[0]:
            raise PeerError(f"{name} has said nothing for {silence_s:.0f} s and was stopped")
        piece = os.read(output.fileno(), 1 << 16)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    # What is left is half a line of a child that was killed; its exit status tells.


def _record(name: str, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise PeerError(f"{name} printed {line[:200]!r} where a record should be")
    return record


def _failure(name: str, status: int, count: int, errors: BinaryIO) -> str:
    errors.seek(0)
    lines = [s.strip() for s in errors.read().decode(errors="replace").splitlines()]
    last = " / ".join([s for s in lines if s][-3:]) or "it printed no reason"
    how = (
        f"was killed by {signal.Signals(-status).name}"
        if status < 0
        else f"stopped with exit status {status}"
    )
    return f"{name} {how} after {count} records: {last}"
