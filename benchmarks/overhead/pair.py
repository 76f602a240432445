"""The engine of two checkouts against each other: nothing may get slower by accident.

Each checkout, built in place, has a process of its own with one engine (the demo model, float32),
and the two take turns job by job, the first to go drawn anew each time. A ratio is that of two
neighbouring jobs. What is measured: one request alone, with its prompt and its compactions, and
decode steps of a batch that is compressed, and of one that opted out. The engines are started
several times, since a process differs from the next for good, by where its memory lies.

    python -m benchmarks.overhead.pair --old DIRECTORY [--new DIRECTORY] [--json FILE]
    python -m benchmarks.overhead.pair --old . --set THP_MEM_ALLOC_ENABLE=1

Prints medians of new / old with their quartiles: below 1 the new one is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import statistics
import sys
from typing import Any

from benchmarks.overhead import engine
from benchmarks.overhead.child import ROOT, Child

PROMPT, OUTPUT = 2048, 48
BATCH, CONTEXT, TOKENS = 4, 1024, 32
BUDGET = 0.25
JOBS: dict[str, dict[str, Any]] = {
    **{
        f"request {policy}": {
            "kind": "request",
            "prompt": PROMPT,
            "output": OUTPUT,
            "extra": {"kv_policy": policy, "kv_budget": BUDGET},
        }
        for policy in ("auto", "kvcrush", "int4")
    },
    **{
        f"steps {policy}": {
            "kind": "steps",
            "batch": BATCH,
            "prompt": CONTEXT,
            "tokens": TOKENS,
            "extra": {"kv_policy": policy},
        }
        for policy in ("auto", "none")
    },
}
FIGURES = ("total_s", "compaction_s", "tpot_s")


def start(
    stack: contextlib.ExitStack, name: str, where: pathlib.Path, model: str, more: dict[str, str]
) -> Child:
    """Starts the engine of a checkout, with more variables in its environment."""
    environment = {**engine.environment(), "PYTHONPATH": str(where.resolve()), **more}
    # By its path: a module of the working directory would be found before the checkout's.
    child = stack.enter_context(Child(name, [sys.executable, engine.__file__], environment))
    config = {"kvcrush": {"policy": "auto", "budget": BUDGET, "min_tokens": 0}}
    child.send(
        kind="start", model=model, tokens=PROMPT + OUTPUT, pool=BATCH * 2 * CONTEXT, config=config
    )
    return child


def ask(child: Child, job: dict[str, Any], number: int) -> dict[str, Any]:
    """Has a checkout do a job. Every round reads another text."""
    own = {**job, "offset": number} if job["kind"] == "request" else dict(job)
    found: dict[str, Any] = child.ask(**own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=pathlib.Path, required=True)
    parser.add_argument("--new", type=pathlib.Path, default=ROOT)
    parser.add_argument(
        "--set", nargs="*", default=[], help="environment of the new one: NAME=VALUE"
    )
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="of each start")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    from vllm_kvcrush.tools import demo_model

    model, draw = str(demo_model.prepare()), random.Random(os.getpid())
    sides = (
        ("the old checkout", args.old, {}),
        ("the new checkout", args.new, dict(pair.split("=", 1) for pair in args.set)),
    )
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for begun in range(args.starts):
        with contextlib.ExitStack() as stack:
            children = [start(stack, name, where, model, more) for name, where, more in sides]
            for child in children:
                child.receive()
            for number in range(-1, args.rounds):
                for name, job in JOBS.items():
                    order = draw.sample((0, 1), 2)
                    found = {i: ask(children[i], job, number + 1) for i in order}
                    for figure in FIGURES:
                        if number >= 0 and figure in found[0]:  # the first round warms up
                            pair = found[0][figure], found[1][figure]
                            ratios.setdefault((name, figure), []).append(pair)
                print(
                    f"start {begun + 1} of {args.starts}, round {number + 1} of {args.rounds}",
                    file=sys.stderr,
                )
    rows = []
    for (name, figure), pairs in ratios.items():
        low, middle, high = statistics.quantiles((new / old for old, new in pairs), n=4)
        before = statistics.median(old for old, _ in pairs)
        row = {"job": name, "figure": figure, "n": len(pairs), "ratio": middle}
        rows.append({**row, "low": low, "high": high, "old_seconds": before})
        print(f"{name:16} {figure:12} {middle:.3f} ({low:.3f}-{high:.3f}), old {before:.4f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
