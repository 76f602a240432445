"""Client requests that vLLM runs as several engine requests: beam search, generative scoring."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm_kvcrush.server.usage import ATTRIBUTE, Details, total

# Attribute of a SamplingParams whose request was counted as part of another one.
COUNTED = "_kvcrush_counted"


class Several:
    """Stands in for the engine's client while one client request runs, and remembers what its
    parts, the engine requests, held.

    Args:
        client: the engine's client.
        prepare: gives the `SamplingParams` of a part the client's KV parameters.
        counted: whether /metrics has counted the client request already, so that its parts must
            not be counted.
    """

    def __init__(self, client: Any, prepare: Callable[[Any], None], counted: bool = False):
        self._client = client
        self._prepare = prepare
        self._counted = counted
        self._running = 0
        # Details of the parts that ran together last, and of the parts before them.
        self._together: list[Details] = []
        self._before: list[Details] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs of the client's `generate`. It is no generator itself, so that it
        raises at once what that raises at once."""
        self._prepare(sampling_params)
        if self._counted:
            setattr(sampling_params, COUNTED, True)
        outputs = self._client.generate(prompt, sampling_params, *args, **kwargs)
        if not self._running:
            self._before += self._together
            self._together = []
        self._running += 1
        return self._watched(outputs)

    async def _watched(self, outputs: Any) -> AsyncIterator[Any]:
        details = None
        try:
            async with aclosing(outputs) as stream:
                async for output in stream:
                    details = getattr(output, ATTRIBUTE, details)
                    yield output
        finally:
            self._running -= 1
            if details is not None:
                self._together.append(details)

    def details(self) -> Details | None:
        """Returns what the parts that ran together last held, with the compactions and failures of
        all parts, or None if nothing is known."""
        result = total(self._together)
        if result is not None:
            for name in ("compactions", "policy_failures"):
                if before := sum(part.get(name, 0) for part in self._before):
                    result[name] = result.get(name, 0) + before
        return result

    def tell(self, output: Any) -> None:
        """Puts the details on a `RequestOutput`."""
        if (details := self.details()) is not None:
            setattr(output, ATTRIBUTE, details)

    def add_to(self, response: Any) -> None:
        """Puts the details into a response that has a `usage`."""
        usage = getattr(response, "usage", None)
        if usage is not None and (details := self.details()) is not None:
            setattr(usage, ATTRIBUTE, details)
