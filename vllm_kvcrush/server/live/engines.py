"""Asks the engines of an API server for their snapshots."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from vllm_kvcrush.engine.snapshot import METHOD

logger = logging.getLogger("vllm.kvcrush")

# An engine that refused, as one does that is being stopped, is asked again after so many seconds.
_REST = 10.0


class Engines:
    """The engines that one API server sends requests to.

    An engine answers between two steps, and is asked again only when it has answered: however
    often `read` is called, one question at most waits for each.

    Args:
        client: vLLM's client of its engines (`AsyncLLM.engine_core`).
    """

    def __init__(self, client: Any):
        self._client = client
        self._asked: dict[int, asyncio.Task[dict[str, Any]]] = {}
        self._known: dict[int, dict[str, Any]] = {}
        self._resting: dict[int, float] = {}

    async def read(self, patience: float) -> tuple[list[dict[str, Any]], list[int]]:
        """Returns what each engine said last, as fields of `state.Engine`, and the ranks of those
        that have not answered now.

        Args:
            patience: seconds to wait for the slowest.
        """
        # Elastic data parallelism changes both lists.
        addresses = dict(
            zip(self._client.engine_ranks_managed, self._client.core_engines, strict=False)
        )
        self._take_answers()  # late ones to an earlier question: they are not of now
        for rank in set(self._known) - set(addresses):
            del self._known[rank]
        for rank, address in addresses.items():
            if rank not in self._asked and self._resting.get(rank, 0.0) < time.monotonic():
                question = self._client._call_utility_async(METHOD, engine=address)
                self._asked[rank] = asyncio.ensure_future(question)
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=patience)
        silent = sorted(set(addresses) - self._take_answers())
        return [
            {"engine": rank, "stale": rank in silent, **snapshot}
            for rank, snapshot in sorted(self._known.items())
        ], silent

    def _take_answers(self) -> set[int]:
        """Keeps the answers that have come, and returns the ranks of the engines."""
        answered = set()
        for rank, task in list(self._asked.items()):
            if not task.done():
                continue
            del self._asked[rank]
            if task.cancelled() or (error := task.exception()) is not None:
                why = "the question was cancelled" if task.cancelled() else error
                logger.debug("Engine %d gave no snapshot: %s", rank, why)
                self._resting[rank] = time.monotonic() + _REST
            else:
                self._known[rank] = task.result()
                answered.add(rank)
        return answered

    def close(self) -> None:
        """Stops waiting for answers."""
        for task in self._asked.values():
            task.cancel()
        self._asked.clear()
