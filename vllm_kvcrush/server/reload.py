"""Reads the rules file again when it changes and on SIGHUP, in every process that takes requests.

A file counts as changed when its inode, size or time of modification does, with symbolic links
followed, as Kubernetes swaps those of a ConfigMap. It is read once it has stayed the same for
`INTERVAL`, so that one that is being written is left alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_kvcrush.server.rules import Rules, RulesError

logger = logging.getLogger("vllm.kvcrush")
INTERVAL = 0.5  # seconds
LOADED, REFUSED = "loaded", "refused"
# Device, inode, size and time of modification; zeros without a file.
_Stat = tuple[int, int, int, int]
# All of this process, for SIGHUP.
_watched: list[weakref.ref[Watched]] = []


class Watched:
    """The rules of a file, as it is now or was when it could last be used.

    Args:
        path: the file.
        load: reads it; raises RulesError.
        told: called with `LOADED` or `REFUSED` and the rules in force after each attempt but the
            first.

    Raises:
        RulesError: the file cannot be used now.
    """

    def __init__(
        self, path: str, load: Callable[[], Rules], told: Callable[[str, Rules], None]
    ) -> None:
        self._path, self._load, self._told = path, load, told
        self._seen = _stat(path)
        self.current = load()
        self._asked = False
        _watched[:] = [ref for ref in _watched if ref() is not None] + [weakref.ref(self)]
        # It holds no reference, so that it ends with the engine.
        thread = threading.Thread(
            target=_watch, args=(weakref.ref(self),), name="kv-budget-rules", daemon=True
        )
        thread.start()

    def ask(self) -> None:
        """Has the file read within `INTERVAL`, changed or not. It takes no lock, as it is called in
        a signal handler, which a second signal may interrupt."""
        self._asked = True

    def look(self, before: _Stat) -> _Stat:
        """Waits for `INTERVAL`, and reads the file if it was asked to, or if the file has changed
        and was the same `before`. Returns the file's state."""
        time.sleep(INTERVAL)
        asked = self._asked
        if asked:
            self._asked = False
        now = _stat(self._path)
        if asked or (now != self._seen and now == before):
            self._seen = now
            self._read()
        return now

    def _read(self) -> None:
        result = LOADED
        try:
            self.current = self._load()
        except Exception as error:  # a thread that ended would leave the rules as they are for good
            result = REFUSED
            why = str(error) if isinstance(error, RulesError) else repr(error)
            logger.error(
                "--kv-budget-rules: the file is refused, and the rules loaded before hold: %s", why
            )
        else:
            tell(self._path, self.current)
        self._told(result, self.current)


def tell(path: str, rules: Rules) -> None:
    """Logs what was loaded."""
    logger.info(
        "--kv-budget-rules: %s holds (%d beside the default, SHA-256 %s...).",
        path,
        len(rules.rules),
        rules.digest[:12],
    )
    for warning in rules.warnings:
        logger.warning("--kv-budget-rules: %s", warning)


def _watch(ref: weakref.ref[Watched]) -> None:
    state: _Stat = 0, 0, 0, 0
    while (watched := ref()) is not None:
        state = watched.look(state)
        del watched


def _stat(path: str) -> _Stat:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# -- SIGHUP ----------------------------------------------------------------------------------------


def on_hangup() -> None:
    """Makes SIGHUP read the files of this process again, and pass the signal on to those of its
    child processes that take it: the API servers, of which the parent alone is known to whoever
    sends it. It does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, _hangup)


def _hangup(signum: int, frame: Any) -> None:
    for ref in _watched:
        if (watched := ref()) is not None:
            watched.ask()
    for child in multiprocessing.active_children():
        if child.pid is not None and _catches(child.pid, signum):
            os.kill(child.pid, signum)


def _catches(pid: int, signum: int) -> bool:
    """Returns whether a process has a handler for a signal: others would be ended by it."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            masks = [line.split()[1] for line in status if line.startswith("SigCgt:")]
    except OSError:
        return False
    return any(int(mask, 16) >> (signum - 1) & 1 for mask in masks)
