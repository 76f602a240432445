"""Measures what the plugin adds to a decode step when it compresses nothing."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.overhead import engine
from benchmarks.overhead.child import Child
from benchmarks.report import Run, median, progress, say, table

BATCH, PROMPT = 8, 65  # two whole blocks, which the prefix cache holds after the first round
# Engines by name: is the plugin loaded, `additional_config`, and what each request carries.
ENGINES: dict[str, tuple[bool, dict[str, Any], dict[str, Any] | None]] = {
    "plain": (False, {}, None),
    "plain_again": (False, {}, None),
    "no_policy": (True, {}, None),
    "opted_out": (
        True,
        {"kvcrush": {"policy": "kvcrush", "budget": 0.25, "min_tokens": 0}},
        {"kv_policy": "none"},
    ),
}
WHAT = {
    "plain": "plain vLLM, no plugin",
    "plain_again": "plain vLLM in another process (control)",
    "no_policy": "plugin installed, no policy configured",
    "opted_out": 'a policy configured, every request says kv_policy "none"',
}
# CPU-seconds that waiting engines may burn, as a share of the time measured. gloo's threads,
# which poll in every engine, burn some 0.05.
NOISE = 0.25


def measure(run: Run, model: str, rounds: int, tokens: int) -> list[dict[str, dict[str, float]]]:
    """Takes one measurement of every engine a round, in random order; a round is a step of `run`.
    The engines live side by side, so that whatever slows the machine slows all of them."""
    with contextlib.ExitStack() as stack:
        children = {}
        if not all(run.has(f"idle/{number}") for number in range(rounds)):
            children = _start(stack, model, tokens)
        return [
            run.step(f"idle/{number}", functools.partial(_round, children, number, tokens))
            for number in progress(range(rounds), "idle plugin")
        ]


def _start(stack: contextlib.ExitStack, model: str, tokens: int) -> dict[str, Child]:
    children = {}
    room = BATCH * (PROMPT + tokens + 2 * engine.BLOCK)
    for name, (plugin, config, _) in ENGINES.items():
        child = children[name] = stack.enter_context(engine.start(WHAT[name], plugin))
        child.send(kind="start", model=model, tokens=room, config=config)
    for name, (plugin, config, _) in ENGINES.items():
        started = children[name].receive()
        expected = {"plugin": plugin, "ours": bool(config)}
        really = {
            "plugin": started["plugin"],
            "ours": started["scheduler"].startswith("KVCrush"),
        }
        if really != expected:
            raise SystemExit(
                f"the engine for {WHAT[name]!r} is not what it should be ({really} instead of "
                f"{expected}): is vllm-kvcrush installed, and VLLM_PLUGINS unset?"
            )
    _round(children, -1, tokens)  # warm, and with prompts in the prefix cache
    return children


def _round(children: dict[str, Child], number: int, tokens: int) -> dict[str, dict[str, float]]:
    order = random.Random(number).sample(list(children), len(children))
    return {
        name: children[name].ask(
            kind="steps", batch=BATCH, prompt=PROMPT, tokens=tokens, extra=ENGINES[name][2]
        )
        for name in order
    }


def median_interval(
    values: Sequence[float], resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Returns the median and its percentile bootstrap interval, always with the same resamples."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    medians = np.median(x[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(x)), float(low), float(high)


def difference(ratio: tuple[float, float, float], control: float) -> str:
    """Returns the finding in words: "none" if the interval of `ratio` (value, low, high) contains
    1. Processes differ a little for good, by where their memory lies, which no number of rounds
    averages out: so it is none, too, where two plain engines differ as much (`control`)."""
    value, low, high = ratio
    if low <= 1 <= high:
        return "none"
    if abs(value - 1) <= abs(control - 1):
        return "none (two plain engines differ as much)"
    return f"{abs(value - 1):.1%} {'slower' if value > 1 else 'faster'}"


def report(run: Run, rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Adds the rows and returns the table."""
    seconds = {name: [r[name]["tpot_s"] for r in rounds] for name in ENGINES}
    ratios = {
        name: median_interval([a / b for a, b in zip(own, seconds["plain"], strict=True)])
        for name, own in seconds.items()
    }
    n, lines = len(rounds), []
    for name, ratio in ratios.items():
        where = {
            "policy": "none",
            "codec": "raw",
            "budget": 1.0,
            "context": PROMPT,
            "task": "idle",
            "mode": name,
        }
        value, low, high = median(seconds[name])
        run.add("tpot_s", value, "s", n=n, low=low, high=high, **where)
        line = [WHAT[name], f"{1000 * value:.2f} ms", "", ""]
        if name != "plain":
            run.add("ratio_tpot_s", ratio[0], "ratio", n=n, low=ratio[1], high=ratio[2], **where)
            line[2] = "{:.4f} ({:.4f} to {:.4f})".format(*ratio)
        if name not in ("plain", "plain_again"):
            line[3] = difference(ratio, control=ratios["plain_again"][0])
        lines.append(line)
    burnt, wall = (
        sum(r[name][key] for r in rounds for name in ENGINES) for key in ("burnt_s", "wall_s")
    )
    if burnt > NOISE * wall:
        say(f"waiting engines burnt {burnt:.2f} CPU-seconds: these ratios are not to be trusted")
    return table(["", "a decode step", "ratio to plain vLLM", "difference"], lines)
