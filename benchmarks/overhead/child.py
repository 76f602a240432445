"""A process that answers jobs: one JSON line in, one JSON line out, and quiet in between."""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent


class Child:
    """The parent's end. Ends with the `with` block, and by itself when its parent dies."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=dict(environment),
            cwd=ROOT,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def send(self, **job: Any) -> None:
        """Hands the child a job; `receive` waits for its result."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("has ended") from None

    def receive(self, timeout: float = 1800) -> Any:
        """Returns the result of the job sent last. Raises SystemExit with the child's last words if
        it fails, ends, or takes longer than `timeout` seconds."""
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            raise self._failed(f"gave no answer within {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failed(f"ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.name} failed:\n{answer['error']}")
        return answer["result"]

    def ask(self, **job: Any) -> Any:
        """Sends a job and returns its result."""
        self.send(**job)
        return self.receive()

    def _failed(self, what: str) -> SystemExit:
        self._log.seek(0)
        return SystemExit(f"{self.name} {what}:\n{self._log.read()[-3000:]}")


def serve(handle: Callable[[dict[str, Any]], Any]) -> None:
    """Answers, in the child, every job with `handle(job)` until the parent closes the pipe.
    Whatever prints goes to stderr, so that nothing mixes with the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"result": handle(json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


class Quiet:
    """CPU-seconds that this process burns while it waits for its next job; its work between two
    calls of `begin` and `end` does not count."""

    def __init__(self) -> None:
        self._since = time.process_time()

    def begin(self) -> float:
        """Seconds burnt since `end`."""
        return time.process_time() - self._since

    def end(self) -> None:
        """Marks the work as done."""
        self._since = time.process_time()
