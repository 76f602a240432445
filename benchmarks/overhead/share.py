"""Measures which share of a request's time its compactions take, by prompt length."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.overhead import engine
from benchmarks.report import Run, median, progress, table

POLICIES = ("auto", "kvcrush", "snapkv", "streaming")
BUDGET = 0.25
# "less than 0.5% inference latency overhead", KVCrush (arXiv 2503.00022).
CLAIM = 0.005
WARM_UP = 512  # tokens


def measure(
    run: Run, model: str, prompts: Sequence[int], output: int, repeats: int
) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Measurements by prompt length and policy, one a repeat; a step of `run` each. The order
    of the policies is drawn anew for every length and repeat."""
    jobs = []
    for repeat in range(repeats):
        for prompt in prompts:
            order = random.Random(f"{repeat}/{prompt}").sample(POLICIES, len(POLICIES))
            jobs += [(f"share/{prompt}/{policy}/{repeat}", prompt, policy) for policy in order]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        child = None
        if any(not run.has(step) for step, _, _ in jobs):
            child = stack.enter_context(engine.start("with a policy", plugin=True))
            config = {"kvcrush": {"policy": "auto", "budget": BUDGET, "min_tokens": 0}}
            tokens = max(*prompts, WARM_UP) + output
            child.ask(kind="start", model=model, tokens=tokens, config=config)
            for policy in POLICIES:  # the first compaction of a process is slower
                child.ask(kind="request", prompt=WARM_UP, output=2, offset=0, extra=_extra(policy))

        def ask(step: str, prompt: int, policy: str) -> Any:
            assert child is not None
            result = child.ask(
                kind="request",
                prompt=prompt,
                output=output,
                offset=int(step.rpartition("/")[2]),
                extra=_extra(policy),
            )
            if not result["compactions"]:
                raise SystemExit(
                    f"a prompt of {prompt} tokens is never compacted at a budget of {BUDGET}: "
                    "leave that length out"
                )
            return result

        for step, prompt, policy in progress(jobs, "compaction's share"):
            result = run.step(step, functools.partial(ask, step, prompt, policy))
            found.setdefault((prompt, policy), []).append(result)
    return dict(sorted(found.items()))


def _extra(policy: str) -> dict[str, Any]:
    return {"kv_policy": policy, "kv_budget": BUDGET}


def below(shares: Sequence[float]) -> str:
    """Returns whether the published claim holds here: "yes" or "no" if in all repeats."""
    met = sum(share < CLAIM for share in shares)
    return "yes" if met == len(shares) else f"in {met} of {len(shares)}" if met else "no"


def report(run: Run, found: dict[tuple[int, str], list[dict[str, Any]]], output: int) -> str:
    """Adds the rows and returns the table."""
    lines = []
    for (prompt, policy), results in found.items():
        shares = [r["compaction_s"] / r["total_s"] for r in results]
        where = {
            "policy": policy,
            "codec": policy if policy == "auto" else "raw",
            "budget": BUDGET,
            "context": prompt,
            "task": "request",
            "mode": f"batch=1,output={output}",
        }
        for metric, values, unit in (
            ("compaction_share", shares, "ratio"),
            ("compaction_s", [r["compaction_s"] for r in results], "s"),
        ):
            value, low, high = median(values)
            run.add(metric, value, unit, n=len(values), low=low, high=high, **where)
        value, low, high = median(shares)
        lines.append(
            [
                str(prompt),
                policy,
                str(results[0]["compactions"]),
                f"{median([r['total_s'] for r in results])[0]:.2f} s",
                f"{1000 * median([r['compaction_s'] for r in results])[0]:.0f} ms",
                f"{value:.2%} ({low:.2%} to {high:.2%})",
                below(shares),
            ]
        )
    header = ["prompt", "policy", "compactions", "request", "compaction", "share", "below 0.5 %"]
    return table(header, lines)
