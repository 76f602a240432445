"""The workloads that servers are given, and the prompts of one drive. Pure."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Budgets that the requests of "mixed_budgets" take in turn; None opts out.
MIXED = (0.125, 0.25, 0.5, None)


@dataclass(frozen=True)
class Workload:
    """One kind of load at one intensity.

    `prompt`, `output` and `prefix` are tokens; every prompt is `prefix` tokens that all requests
    share and `prompt` tokens of its own. `concurrency` is the number of requests under way in a
    closed loop; None means Poisson arrivals. `budgets` are taken in turn by the requests to the
    server with a policy; without any, all run under the server's own.
    """

    name: str
    prompt: int
    output: int
    requests: int
    concurrency: int | None
    prefix: int = 0
    budgets: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.prompt, self.requests, self.concurrency or 1)
        if min(sizes) < 1 or self.output < 2 or self.prefix < 0:
            raise ValueError(
                f"{self.name}: give at least one request, one prompt token and two output tokens "
                "(the second one's delay is the time per output token)"
            )

    @property
    def mode(self) -> str:
        """Returns the name of the load: "closed-16" is a closed loop of 16 requests; "poisson":
        Poisson arrivals."""
        return "poisson" if self.concurrency is None else f"closed-{self.concurrency}"

    def budget_of(self, number: int) -> float | None:
        """Returns the budget of a request by its place in the drive; None opts out."""
        return self.budgets[number % len(self.budgets)]

    @property
    def context(self) -> int:
        """Returns the number of prompt tokens of a request."""
        return self.prefix + self.prompt

    @property
    def tokens(self) -> int:
        """Tokens of a request when it ends."""
        return self.context + self.output


@dataclass(frozen=True)
class Prompt:
    """One request: token ids, and fields that only the server with a policy gets."""

    tokens: list[int]
    fields: dict[str, Any]


def workloads(quick: bool) -> list[Workload]:
    """Returns the workloads of a run. A closed loop of "long_prompt" precedes its Poisson
    arrivals."""
    if quick:
        return [
            Workload("long_prompt", 768, 32, requests=4, concurrency=4),
            Workload("long_prompt", 768, 32, requests=18, concurrency=16),
            Workload("long_prompt", 768, 32, requests=8, concurrency=None),
            Workload("long_decode", 128, 160, requests=16, concurrency=16),
            Workload("shared_prefix", 64, 32, requests=12, concurrency=4, prefix=512),
            Workload("mixed_budgets", 512, 48, requests=8, concurrency=8, budgets=MIXED),
        ]
    return [
        Workload("long_prompt", 1500, 64, requests=12, concurrency=4),
        Workload("long_prompt", 1500, 64, requests=32, concurrency=16),
        Workload("long_prompt", 1500, 64, requests=64, concurrency=48),
        Workload("long_prompt", 1500, 64, requests=32, concurrency=None),
        Workload("long_decode", 128, 512, requests=64, concurrency=48),
        Workload("shared_prefix", 128, 64, requests=48, concurrency=16, prefix=1024),
        Workload("mixed_budgets", 1024, 128, requests=32, concurrency=16, budgets=MIXED),
    ]


def pool_blocks(quick: bool) -> int:
    """Blocks of 32 tokens that a run's pool has: few enough for plain vLLM to run out of them."""
    return 128 if quick else 480


def resize(
    loads: Sequence[Workload],
    prompt: int | None = None,
    output: int | None = None,
    requests: int | None = None,
    concurrency: Sequence[int] | None = None,
) -> list[Workload]:
    """Returns `loads` with other sizes where any are given. `concurrency` becomes the closed loops
    of "long_prompt" and bounds that of every other workload."""
    sized: list[Workload] = []
    for load in loads:
        changes = {"prompt": prompt, "output": output, "requests": requests}
        if load.prefix and prompt is not None:
            changes["prefix"] = prompt
        loops: list[int | None] = [load.concurrency]
        if concurrency and load.concurrency is not None:
            if load.name == "long_prompt":
                loops = [*sorted(concurrency)]
            else:
                loops = [min(load.concurrency, max(concurrency))]
        for loop in loops:
            wanted: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
            new = dataclasses.replace(load, concurrency=loop, **wanted)
            if (new.name, new.mode) not in {(s.name, s.mode) for s in sized}:
                sized.append(new)
    return sized


def choose(loads: Sequence[Workload], names: Sequence[str] | None) -> list[Workload]:
    """Returns those of `loads` with one of these names; all without names. Raises ValueError for a
    name that is none."""
    known = list(dict.fromkeys(load.name for load in loads))
    for name in names or ():
        if name not in known:
            raise ValueError(f"no such workload: {name!r}; choose some of {', '.join(known)}")
    return [load for load in loads if not names or load.name in names]


def text() -> str:
    """Returns real English prose that every Python ships."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def prompts(load: Workload, words: Sequence[int], round_: int, block: int) -> list[Prompt]:
    """Returns the prompts of one drive: pieces of `words` (token ids of real text), no two of which
    begin with the same `block` tokens, so that only the workload's own prefix is ever shared.
    Another round gets other pieces, both servers of a round the same."""
    draw = random.Random(f"{load.name} {load.mode} {round_}")
    longest = max(load.prompt, load.prefix)
    if len(words) <= longest:
        raise ValueError(
            f"{load.name}: the text has {len(words)} tokens, too few for prompts of {longest}"
        )

    def piece(size: int) -> list[int]:
        start = draw.randrange(len(words) - size)
        return list(words[start : start + size])

    prefix = piece(load.prefix) if load.prefix else []
    found: dict[tuple[int, ...], list[int]] = {}
    for _ in range(100 * load.requests):
        own = piece(load.prompt)
        found.setdefault(tuple(own[:block]), own)
        if len(found) == load.requests:
            break
    else:
        raise ValueError(f"{load.name}: the text has no {load.requests} prompts that begin apart")
    result = []
    for number, own in enumerate(found.values()):
        fields: dict[str, Any] = {}
        if load.budgets:
            budget = load.budget_of(number)
            fields = {"kv_policy": "none"} if budget is None else {"kv_budget": budget}
        result.append(Prompt(prefix + own, fields))
    return result
