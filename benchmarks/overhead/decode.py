"""Times decode steps over full contexts: plain vLLM and policies, in turns."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.overhead import engine
from benchmarks.report import Run, median, progress, table

PLAIN = "plain vLLM"
# Plain vLLM with next to nothing to attend to: what is left if attention costs nothing.
FLOOR = "plain vLLM, short context"
SHORT = 64  # tokens
# What each request carries, by name of the line.
POLICIES: dict[str, dict[str, Any]] = {
    "raw": {"kv_policy": "none"},
    "int4": {"kv_policy": "int4", "kv_budget": 0.25},
    "auto": {"kv_policy": "auto", "kv_budget": 0.25},
    "tc8": {"kv_policy": "tc8", "kv_budget": 0.125},
    "kvcrush": {"kv_policy": "kvcrush", "kv_budget": 0.25},
}
WARM_UP = 256  # tokens


def measure(
    run: Run, model: str, prompt: int, batches: Sequence[int], tokens: int, rounds: int
) -> dict[tuple[int, str], list[float]]:
    """Seconds of a decode step by batch size and line, one a round; a round is a step of `run`.
    Two engines live side by side, plain vLLM and one with the plugin, and work in turns. Their
    pools hold the prompts twice, so that rounds after the first read them from the prefix cache
    (a policy's up to where it compacts first)."""
    steps = [(f"decode/{prompt}/{b}/{r}", b, r) for r in range(rounds) for b in sorted(batches)]
    found: dict[tuple[int, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        children = {}
        if not all(run.has(step) for step, _, _ in steps):
            for name, config in ((PLAIN, {}), ("with a policy", _config())):
                child = stack.enter_context(engine.start(name, plugin=bool(config)))
                room = 2 * max(batches) * (prompt + tokens + 2 * engine.BLOCK)
                child.ask(
                    kind="start",
                    model=model,
                    tokens=prompt + tokens + engine.steps_to_read(max(batches), prompt) + 1,
                    config=config,
                    pool=room,
                )
                children[name] = child
                for extra in [None] if name == PLAIN else POLICIES.values():
                    child.ask(kind="steps", batch=1, prompt=WARM_UP, tokens=2, extra=extra)

        def one(batch: int, number: int) -> dict[str, float]:
            lines = [PLAIN, FLOOR, *POLICIES]
            random.Random(f"{batch}/{number}").shuffle(lines)
            seconds = {}
            for line in lines:
                child = children["with a policy" if line in POLICIES else PLAIN]
                seconds[line] = child.ask(
                    kind="steps",
                    batch=batch,
                    prompt=SHORT if line == FLOOR else prompt,
                    tokens=tokens,
                    extra=POLICIES.get(line),
                )["tpot_s"]
            return seconds

        for step, batch, number in progress(steps, "decode steps"):
            for line, seconds in run.step(step, functools.partial(one, batch, number)).items():
                found.setdefault((batch, line), []).append(seconds)
    return found


def _config() -> dict[str, Any]:
    return {"kvcrush": {"policy": "auto", "budget": 0.25, "min_tokens": 0}}


def report(run: Run, found: dict[tuple[int, str], list[float]], prompt: int) -> str:
    """Adds the rows and returns the table."""
    lines = []
    for (batch, line), seconds in sorted(found.items(), key=lambda x: x[0][0]):
        plain = found[batch, PLAIN]
        faster = [p / s for p, s in zip(plain, seconds, strict=True)]
        ours = line in POLICIES
        where = {
            "policy": line if ours and line != "raw" else "none",
            "codec": line if ours and line != "kvcrush" else "raw",
            "budget": POLICIES.get(line, {}).get("kv_budget", 1.0),
            "context": SHORT if line == FLOOR else prompt,
            "task": "decode",
            "mode": f"batch={batch}" + ("" if ours else ",plain"),
        }
        value, low, high = median(seconds)
        run.add("tpot_s", value, "s", n=len(seconds), low=low, high=high, **where)
        ratio = median(faster)
        cells = [str(batch), line, f"{1000 * value:.1f} ms", f"{batch / value:.1f}"]
        if line != PLAIN:
            run.add(
                "ratio_output_tokens_per_s",
                ratio[0],
                "ratio",
                n=len(faster),
                low=ratio[1],
                high=ratio[2],
                **where,
            )
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio))
        else:
            cells.append("1")
        lines.append(cells)
    return table(["requests", "policy", "a step", "tokens / s", "ratio to plain vLLM"], lines)
