"""Clients that send random requests and write down what came of each."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.asks import Ask, Asks

# Longer than any request may take on a busy machine.
PATIENCE = 300
WHOLE, LEFT, REFUSED, BROKEN = "whole", "left", "refused", "broken"


@dataclass
class Sent:
    """What came of a request.

    Attributes:
        outcome: WHOLE, LEFT by its client, REFUSED with HTTP 400, or BROKEN: anything else.
        why: of a broken one, what was wrong.
        answered: whether the server had begun to answer.
        tokens, compactions, failures: of a whole one, from its usage.
        created: when the server says that it was made, if it does.
    """

    ask: Ask
    started: float
    ended: float = 0.0
    status: int = 0
    outcome: str = BROKEN
    why: str = ""
    answered: bool = False
    tokens: int = 0
    compactions: int = 0
    failures: int = 0
    created: float = 0.0


def usage(answer: Any) -> Any:
    """Returns the usage of an answer or of an event, which is not always at the same place."""
    if not isinstance(answer, dict):
        return None
    return answer.get("usage") or usage(answer.get("response")) or usage(answer.get("message"))


def ends(events: list[Any], path: str) -> bool:
    """Whether these are all events of a stream, up to its end."""
    if not events:
        return False
    if path in ("/v1/completions", "/v1/chat/completions"):
        return bool(events[-1] == "[DONE]")
    last = events[-1].get("type", "") if isinstance(events[-1], dict) else ""
    return last in ("response.completed", "response.incomplete", "message_stop")


def judge(sent: Sent, answers: list[Any]) -> None:
    """Says of an answer with status 200 whether it is what was asked for.

    Args:
        answers: the JSON, or the events of a stream.
    """
    ask = sent.ask
    if ask.refused:
        sent.why = f"answered, and not refused ({ask.refused})"
        return
    errors = [a["error"] for a in answers if isinstance(a, dict) and a.get("error")]
    if errors:
        sent.why = f"an error in the answer: {errors[0]}"
        return
    if ask.body.get("stream") and not ends(answers, ask.path):
        sent.why = f"a stream of {len(answers)} events that did not end"
        return
    told = [found for found in map(usage, answers) if found]
    if not told:
        sent.why = "no usage"
        return
    last = told[-1]
    kept = next((t["kv_tokens_details"] for t in told if "kv_tokens_details" in t), None)
    sent.tokens = last.get("completion_tokens", last.get("output_tokens", 0)) or 0
    if ask.tokens is not None and sent.tokens != ask.tokens:
        sent.why = f"{sent.tokens} tokens instead of {ask.tokens}"
        return
    if kept is None:
        sent.why = "no kv_tokens_details"
        return
    sent.compactions = kept["compactions"]
    sent.failures = kept.get("policy_failures", 0)
    if kept["held"] > kept["raw"]:
        sent.why = f"more held than there was: {kept}"
        return
    made = next((a["created"] for a in answers if isinstance(a, dict) and "created" in a), 0)
    sent.created = float(made)
    sent.outcome = WHOLE


@dataclass
class Load:
    """Clients, each of which sends one request after the other, on a connection of its own.

    Attributes:
        base: URL of what they ask.
        clients: how many.
        most: requests after which they stop.
        sent: all requests that have ended.
        flying: those that run, by number.
    """

    base: str
    asks: Asks
    clients: int = 6
    most: int = 100_000
    sent: list[Sent] = field(default_factory=list)
    flying: dict[int, Sent] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the clients, in a thread."""
        self._stopped.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets each client end its request. Raises RuntimeError if one does not come back."""
        self._stopped.set()
        assert self._thread is not None
        self._thread.join(PATIENCE + 30)
        if self._thread.is_alive():
            raise RuntimeError(f"these requests never ended: {list(self.flying.values())}")

    async def _all(self) -> None:
        # A front that reads its configuration anew closes idle connections at any moment; a client
        # that has none loses no request to that.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.base, timeout=PATIENCE, trust_env=False, limits=limits
        ) as http:
            await asyncio.gather(*(self._client(http) for _ in range(self.clients)))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self._stopped.is_set() and self.asks.count < self.most:
            sent = Sent(self.asks.next(), time.time())
            self.flying[sent.ask.number] = sent
            try:
                await self._send(http, sent)
            except httpx.HTTPError as error:
                sent.why = f"{type(error).__name__}: {error}"
            except Exception as error:  # an answer that is not what it should be
                sent.why = f"{type(error).__name__}: {error}"
            sent.ended = time.time()
            self.sent.append(sent)
            del self.flying[sent.ask.number]
            if sent.outcome == BROKEN:
                # A front without replicas would refuse hundreds a second.
                await asyncio.sleep(1)

    async def _send(self, http: httpx.AsyncClient, sent: Sent) -> None:
        ask = sent.ask
        url = f"{ask.path}?chaos={ask.number}"
        if ask.leaves == 0:
            # Before there is an answer, at whatever point the request is.
            try:
                await asyncio.wait_for(http.post(url, json=ask.body), 0.02 + ask.number % 7 / 20)
            except asyncio.TimeoutError:
                sent.outcome = LEFT
                return
            # Served before its client could leave.
            sent.outcome, sent.answered = LEFT, True
            return
        async with http.stream("POST", url, json=ask.body) as got:
            sent.status = got.status_code
            if got.status_code != 200:
                self._turned_away(sent, (await got.aread()).decode(errors="replace"))
                return
            sent.answered = True
            if not ask.body.get("stream"):
                judge(sent, [json.loads(await got.aread())])
                return
            events: list[Any] = []
            async for line in got.aiter_lines():
                if not line.startswith("data:"):
                    continue
                text = line.removeprefix("data:").strip()
                events.append(text if text == "[DONE]" else json.loads(text))
                if ask.leaves is not None and len(events) >= ask.leaves:
                    sent.outcome = LEFT
                    return
            judge(sent, events)

    @staticmethod
    def _turned_away(sent: Sent, text: str) -> None:
        named = sent.ask.named
        if sent.status == 400 and named is not None and named in text:
            sent.outcome = REFUSED
        else:
            sent.why = f"HTTP {sent.status}: {text[:300]}"
