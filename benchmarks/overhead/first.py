"""Time to the first token of long prompts, and decode steps over them, against plain vLLM.

Two engines with the demo model in bfloat16, which CPUs with AMX or AVX-512 BF16 are served in, or
in another dtype: plain vLLM and one with a policy. They take turns, request by request, the order
drawn anew each round; a ratio is that of one round. What a request asks for is a line of the table:
`opted out` is a request with the policy `none`.

    python -m benchmarks.overhead.first [--dtype bfloat16] [--prompts 3800 7600] [--json FILE]
"""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any

from benchmarks.overhead import engine
from benchmarks.report import Run, arguments, interruptible, median, progress, say, table

PLAIN = "plain vLLM"
LINES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "opted out": {"kv_policy": "none"},
    "auto": {"kv_policy": "auto", "kv_budget": 0.25},
    "int4": {"kv_policy": "int4", "kv_budget": 0.25},
}
CONFIG = {"kvcrush": {"policy": "auto", "budget": 0.25, "min_tokens": 0}}
BATCH, TOKENS = 8, 24  # of decode steps
Round = dict[str, dict[str, float]]


def measure(run: Run, model: str, args: Any) -> dict[int, list[Round]]:
    """Returns rounds by prompt length: by line, seconds to the first token and of a decode step."""
    steps = [(f"{args.dtype}/{p}/{r}", p, r) for r in range(args.rounds) for p in args.prompts]
    found: dict[int, list[Round]] = {}
    with contextlib.ExitStack() as stack:
        children = {}
        longest = max(args.prompts)
        if not all(run.has(step) for step, _, _ in steps):
            for name, config in ((PLAIN, {}), ("with a policy", CONFIG)):
                child = stack.enter_context(engine.start(name, plugin=bool(config)))
                child.ask(
                    kind="start",
                    model=model,
                    tokens=longest + TOKENS + engine.steps_to_read(BATCH, longest) + 1,
                    config=config,
                    pool=(BATCH + 1) * (longest + 512),
                    dtype=args.dtype,
                )
                child.ask(kind="request", prompt=512, output=2, offset=0, extra=None)
                children[name] = child

        def one(prompt: int, number: int) -> Round:
            lines = list(LINES)
            random.Random(f"{prompt}/{number}").shuffle(lines)
            result = {}
            for line in lines:
                child = children[PLAIN if line == PLAIN else "with a policy"]
                extra = LINES[line]
                first = child.ask(
                    kind="request", prompt=prompt, output=2, offset=number, extra=extra
                )
                step = child.ask(
                    kind="steps", batch=BATCH, prompt=prompt, tokens=TOKENS, extra=extra
                )
                result[line] = {"ttft_s": first["ttft_s"], "tpot_s": step["tpot_s"]}
            return result

        for step, prompt, number in progress(steps, "rounds"):
            found.setdefault(prompt, []).append(
                run.step(step, functools.partial(one, prompt, number))
            )
    return found


def report(run: Run, found: dict[int, list[Round]], dtype: str) -> str:
    """Adds rows to the result and returns the table."""
    lines = []
    for prompt, rounds in found.items():
        for line in LINES:
            cells = [str(prompt), line]
            for metric in ("ttft_s", "tpot_s"):
                columns = {
                    "policy": "none" if line == PLAIN else line,
                    "context": prompt,
                    "task": "first",
                    "mode": f"{dtype},batch={1 if metric == 'ttft_s' else BATCH}",
                    "n": len(rounds),
                }
                middle, low, high = median([r[line][metric] for r in rounds])
                run.add(metric, middle, "s", low=low, high=high, **columns)
                cells.append(f"{middle:.3g} s")
                if line == PLAIN:
                    cells.append("1")
                    continue
                # Above 1 the plugin is slower.
                middle, low, high = median([r[line][metric] / r[PLAIN][metric] for r in rounds])
                run.add(f"ratio_{metric}", middle, "ratio", low=low, high=high, **columns)
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
            lines.append(cells)
    head = ["prompt", "request", "first token", "over plain's", "step of 8", "over plain's"]
    return table(head, lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=sorted(engine.TOKEN_BYTES), default="bfloat16")
    parser.add_argument("--prompts", type=int, nargs="+", help="prompt lengths, in tokens")
    parser.add_argument("--rounds", type=int, help="of every prompt length")
    args = parser.parse_args()
    args.prompts = args.prompts or ([1900] if args.quick else [3800, 7600])
    args.rounds = args.rounds or (2 if args.quick else 3)
    if args.rounds < 1 or not all(512 <= p <= 7900 for p in args.prompts):
        parser.error("--prompts takes 512 to 7900 tokens, --rounds 1 or more")

    from vllm_kvcrush.tools import demo_model

    model = str(demo_model.prepare(say=say))
    run = Run("first", args)
    found = measure(run, model, args)
    print(f"\nMedians of {args.rounds} (smallest to largest ratio of a round).\n")
    print(report(run, found, args.dtype))
    run.finish()


if __name__ == "__main__":
    with interruptible("first"):
        main()
