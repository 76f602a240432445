"""Calls that may end the process: LLVM aborts where it meets an internal error."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

ERROR = re.compile("error|bad machine code", re.IGNORECASE)


def call(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Returns what `work` returns in a process of its own, or None and why there is nothing. What
    the process writes to stderr is only read for that."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:

        def run() -> None:
            os.dup2(stderr.fileno(), 2)
            try:
                send.send((work(), None))
            except Exception as error:
                send.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))

        child = context.Process(target=run)
        child.start()
        send.close()
        try:
            found: tuple[Any, str | None] = receive.recv()
        except EOFError:
            found = (None, None)
        child.join()
        if child.exitcode:
            stderr.seek(0)
            said = [line.strip(" *\n") for line in stderr if ERROR.search(line)]
            # LLVM says what is wrong, often several times, and last how many times.
            bad = [line for line in said if not line.startswith("LLVM ERROR: Found")]
            found = (None, (bad or said or [f"exit status {child.exitcode}"])[0])
    return found
