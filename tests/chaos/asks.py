"""Random requests, good and bad, and what must come of each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

# The longest prompt in characters, some 1,100 tokens: with all that it generates it fits into a
# context of 2,048 however dense its text is.
LONGEST = 4500
MOST_TOKENS = 96


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        number: goes into the URL, so that a front's log tells which replica had it.
        tokens: how many it generates if it runs to its end, None if it may stop early.
        most: how many it may generate.
        leaves: events after which its client leaves; 0 is before the first. None: it stays.
        refused: label of the refusal on /metrics; None: it must be answered.
        named: the field that the refusal names.
    """

    number: int
    path: str
    body: dict[str, Any]
    tokens: int | None = None
    most: int = 0
    leaves: int | None = None
    refused: str | None = None
    named: str | None = None


# Bad fields: label on /metrics and the field that the message names.
BAD: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"kv_budget": 0.9}, "cap", "kv_budget"),
    ({"kv_budget": 2000}, "cap", "kv_budget"),
    ({"kv_policy": "none"}, "policy", "kv_policy"),
    ({"kv_policy": "nobody"}, "policy", "kv_policy"),
    ({"kv_policy": "fair(" * 40}, "policy", "kv_policy"),
    ({"kv_policy": ["int8"]}, "policy", "kv_policy"),
    ({"kv_budget": 7.5}, "budget", "kv_budget"),
    ({"kv_budget": -1}, "budget", "kv_budget"),
    ({"kv_budget": "much"}, "budget", "kv_budget"),
    ({"kv_budget": 40}, "budget", "kv_budget"),
    ({"kv_protect": [[9, 3]]}, "spans", "kv_protect"),
    ({"kv_protect": "0:1:2"}, "spans", "kv_protect"),
    ({"kv_policy": "int8", "kv_spans": [[0, 9]]}, "spans", "kv_spans"),
    ({"kv_budgte": 0.5}, "unknown_key", "kv_budgte"),
)


class Asks:
    """An endless supply of random requests.

    Args:
        text: prose that prompts are cut from.
        policies: what the servers allow.
        leaving, bad: shares of requests whose client leaves, and that must be refused.
    """

    def __init__(
        self,
        seed: int,
        text: str,
        model: str,
        policies: tuple[str, ...],
        leaving: float = 0.15,
        bad: float = 0.1,
    ):
        self.draw = random.Random(seed)
        self.text, self.model, self.policies = text, model, policies
        self.leaving, self.bad = leaving, bad
        self.count = 0

    def next(self) -> Ask:
        """Returns the next request."""
        draw = self.draw
        self.count += 1
        kind = draw.choice(("completions", "completions", "chat", "chat", "responses", "messages"))
        tokens = min(MOST_TOKENS, int(draw.expovariate(1 / 24)) + 1)
        prompt = self._prompt()
        path, body, whole = self._plain(kind, prompt, tokens)
        stream = draw.random() < 0.6
        if stream:
            body["stream"] = True
            if kind in ("completions", "chat"):
                body["stream_options"] = {"include_usage": True}
        if draw.random() < self.bad:
            fields, reason, named = draw.choice(BAD)
            return Ask(self.count, path, {**body, **fields}, refused=reason, named=named)
        body.update(self._fields())
        choices = body.get("n", 1)
        leaves = None
        if draw.random() < self.leaving:
            leaves = draw.choice((0, 0, 1, 3, 10))
        return Ask(
            self.count,
            path,
            body,
            tokens=tokens * choices if whole else None,
            most=tokens * choices,
            leaves=leaves,
        )

    def _prompt(self) -> str:
        length = min(LONGEST, int(self.draw.expovariate(1 / 1500)) + 10)
        first = self.draw.randrange(len(self.text) - length)
        # Some share a prefix, as turns of a conversation do.
        if self.draw.random() < 0.3:
            first = 1000 * self.draw.randrange(4)
        return self.text[first : first + length]

    def _plain(self, kind: str, prompt: str, tokens: int) -> tuple[str, dict[str, Any], bool]:
        """Returns path and body without our fields, and whether all tokens are generated."""
        draw = self.draw
        body: dict[str, Any] = {"model": self.model, "temperature": draw.choice((0, 1.0))}
        said = [{"role": "user", "content": prompt}]
        if kind == "responses":
            return "/v1/responses", body | {"input": prompt, "max_output_tokens": tokens}, False
        if kind == "messages":
            return "/v1/messages", body | {"messages": said, "max_tokens": tokens}, False
        body |= {"max_tokens": tokens, "ignore_eos": True}
        if draw.random() < 0.15:
            body["n"] = draw.choice((2, 3))
            body["temperature"] = 1.0
        if draw.random() < 0.2:
            body["seed"] = draw.randrange(100)
        if kind == "chat":
            if draw.random() < 0.1:
                body |= {"logprobs": True, "top_logprobs": 2}
            return "/v1/chat/completions", body | {"messages": said}, True
        if draw.random() < 0.1:
            body["logprobs"] = 2
        return "/v1/completions", body | {"prompt": prompt}, True

    def _fields(self) -> dict[str, Any]:
        """Returns fields of ours that these servers take."""
        draw = self.draw
        found: dict[str, Any] = {}
        if draw.random() < 0.7:
            found["kv_policy"] = draw.choice(self.policies)
        if draw.random() < 0.7:
            found["kv_budget"] = draw.choice((round(draw.uniform(0.05, 0.75), 3), 96, 160, 512))
        if isinstance(found.get("kv_budget"), float) and draw.random() < 0.2:
            first = draw.randrange(200)
            found["kv_protect"] = [[first, first + draw.randint(1, 60)]]
        if found.get("kv_policy", "").startswith("fair") and draw.random() < 0.5:
            found["kv_spans"] = draw.choice(("0:64,128:256", [[10, 90]]))
        return found
