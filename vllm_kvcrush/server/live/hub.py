"""One view of the engines for all who look: taken about once a second while there are viewers, and
sent to each as it can take it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_kvcrush.server.live.engines import Engines
from vllm_kvcrush.server.live.state import State

logger = logging.getLogger("vllm.kvcrush")

MOST_VIEWERS = 16
PERIOD = 1.0
# Snapshots take no more than this share of an engine's time.
_SHARE = 0.01
_PATIENCE = 5.0


class Full(Exception):
    """There are `MOST_VIEWERS` viewers already."""


class Viewer:
    """Who reads events. There is room for one: a new one takes the place of one that was not read
    yet, so that a slow reader costs events and not memory."""

    def __init__(self) -> None:
        self._event: bytes | None = None
        self._there = asyncio.Event()

    def offer(self, event: bytes) -> None:
        """Gives the viewer an event."""
        self._event = event
        self._there.set()

    async def take(self, timeout: float) -> bytes | None:
        """Returns the newest event, or None if none comes in `timeout` seconds."""
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._there.wait(), timeout)
        event, self._event = self._event, None
        self._there.clear()
        return event


class Hub:
    """Reads the engines and shares what they say.

    Args:
        engines: whom to ask.
        about: the fields of `State` that do not change.
        ending: says whether the server is being stopped: streams must end then, as it waits for
            them.
    """

    def __init__(self, engines: Engines, about: dict[str, Any], ending: Callable[[], bool]):
        self._engines, self._about, self._ending = engines, about, ending
        self._viewers: set[Viewer] = set()
        self._loop: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._state: State | None = None
        self._read_at = 0.0

    async def state(self) -> State:
        """Returns the state, which is not older than `PERIOD` seconds."""
        return await self._fresh(PERIOD, _PATIENCE)

    async def events(self) -> AsyncIterator[bytes]:
        """Yields server-sent events: first the whole state, then what changed.

        Raises:
            Full: there are too many viewers; before the first event.
        """
        if len(self._viewers) >= MOST_VIEWERS:
            raise Full
        viewer = Viewer()
        self._viewers.add(viewer)
        try:
            yield _event(await self.state())
            if self._loop is None or self._loop.done():
                self._loop = asyncio.create_task(self._run())
            while not self._ending():
                event = await viewer.take(PERIOD)
                if event is not None:
                    yield event
        finally:
            self._viewers.discard(viewer)

    async def _fresh(self, age: float, patience: float) -> State:
        async with self._lock:
            if self._state is None or time.monotonic() - self._read_at >= age:
                engines, silent = await self._engines.read(patience)
                about = {**self._about, "time": time.time()}
                self._state = State.model_validate({**about, "engines": engines, "silent": silent})
                self._read_at = time.monotonic()
            return self._state

    async def _run(self) -> None:
        before = self._state
        while self._viewers and not self._ending():
            try:
                # So long that all who are asked spend at most their share on it.
                slowest = max((e.seconds for e in before.engines), default=0.0) if before else 0.0
                await asyncio.sleep(max(PERIOD, slowest / _SHARE))
                state = await self._fresh(0.5 * PERIOD, PERIOD)
                event = _event(since(before, state))
                before = state
                for viewer in self._viewers:
                    viewer.offer(event)
            except Exception:
                logger.exception("The live page has no news.")
        if self._ending():
            self._engines.close()


def since(before: State | None, now: State) -> State:
    """Returns a state with only the new ones of what it lists of the past."""
    if before is None:
        return now
    old = {engine.engine: engine for engine in before.engines}
    return now.model_copy(
        update={"engines": [_news(old.get(engine.engine), engine) for engine in now.engines]}
    )


def _news(before: Any, now: Any) -> Any:
    if before is None:
        return now
    known = {c.seq for c in before.compactions.recent if c.seconds is not None}
    recent = [c for c in now.compactions.recent if c.seq not in known]
    history = [s for s in now.pressure.history if s[0] > before.time]
    return now.model_copy(
        update={
            "compactions": now.compactions.model_copy(update={"recent": recent}),
            "pressure": now.pressure.model_copy(update={"history": history}),
        }
    )


def _event(state: State) -> bytes:
    return f"event: state\ndata: {state.model_dump_json()}\n\n".encode()
