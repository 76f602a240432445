"""Measures drift: whether a compressed request strays from what the model writes with exact KV.

The model continues each context greedily without compression. The same tokens are then forced under
each policy, with a compaction at the prompt's end and further ones as the answer grows, and the
token that the model would have written next is compared with the one that it wrote.

    python -m benchmarks.content.drift [--quick] [--policies auto,tc6] [--budgets 0.25,0.125]
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from benchmarks.report import ROOT, Run, arguments, interruptible, interval, say, table

QUARTERS = 4


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument("--policies", type=lambda s: s.split(","), default=["auto", "int4", "tc6"])
    parser.add_argument(
        "--budgets", type=lambda s: [float(x) for x in s.split(",")], default=[0.125, 0.0625],
        help="of raw float32",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=1536, help="tokens")
    parser.add_argument("--tokens", type=int, help="tokens to write; else 512 (quick: 128)")
    parser.add_argument("--excerpts", type=int, help="else 4 (quick: 2)")
    args = parser.parse_args()
    args.tokens = args.tokens or (128 if args.quick else 512)
    args.excerpts = args.excerpts or (2 if args.quick else 4)
    return args


def contexts(tokenizer: Any, size: int, count: int) -> list[list[int]]:
    """Returns contexts from the documentation, as token ids."""
    from vllm_kvcrush.codecs.transform.texts import excerpts

    body = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/*.md")))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return [context for context, _ in excerpts([body], encode, size, 2, count)]


class Study:
    """The engine, which is started when the first step needs it."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self._args, self._model = args, model
        self._engine: Any = None

    def measure(self, index: int) -> dict[str, dict[str, Any]]:
        """Returns by policy and budget what is told of one context."""
        from benchmarks.quality.engine import Engine, Job

        args = self._args
        if self._engine is None:
            length = args.context + args.tokens + 64
            self._engine = Engine(self._model, length, 8 * length)
        engine = self._engine
        prompt = contexts(engine.tokenizer, args.context, args.excerpts)[index]
        wrote = engine.forced([Job("wrote", prompt, [], [], [], free=args.tokens)])["wrote"]["free"]
        n = len(wrote)
        forced = prompt, wrote, [True] * n, [None] * n
        engine.forced([Job("exact", *forced)])
        found = {}
        for policy in args.policies:
            for budget in args.budgets:
                name = f"{policy}@{budget}"
                job = Job(name, *forced, policy=policy, budget=budget, reference="exact")
                own = engine.forced([job])[name]
                found[name] = {
                    "agree": [bool(x) for x in own["agree"]],
                    "kl": [float(x) for x in own["kl"]],
                    "held": own["held"]
                    / (engine._scheduler._block_bytes / 32)
                    / (args.context + n),
                }
        engine.forget()
        return found


def main() -> None:
    args = parse()
    from vllm_kvcrush.tools import demo_model

    run = Run("drift", args)
    model = args.model or str(demo_model.prepare(say=say))
    study = Study(args, model)
    found = [
        run.step(str(i), lambda i=i: study.measure(i))  # type: ignore[misc]
        for i in range(args.excerpts)
    ]
    lines = []
    for name in found[0]:
        policy, _, budget = name.partition("@")
        where = {"policy": policy, "budget": float(budget), "context": args.context}
        cells = [policy, budget, f"{interval([f[name]['held'] for f in found])[0]:.3f}"]
        for quarter in range(QUARTERS):
            shares, losses = [], []
            for each in found:
                agree, kl = each[name]["agree"], each[name]["kl"]
                size = len(agree) // QUARTERS or 1
                here = slice(quarter * size, (quarter + 1) * size)
                if agree[here]:
                    shares.append(sum(agree[here]) / len(agree[here]))
                    losses.append(sum(kl[here]) / len(kl[here]))
            if shares:
                mode = f"quarter {quarter + 1}"
                for metric, values, unit in (
                    ("agreement", shares, "ratio"),
                    ("kl", losses, "nats"),
                ):
                    mean, low, high = interval(values)
                    run.add(metric, mean, unit, len(values), **where, mode=mode, low=low, high=high)
                cells.append(f"{interval(shares)[0]:.3f} / {interval(losses)[0]:.4f}")
        lines.append(cells)
    print(f"\n{args.excerpts} contexts of {args.context} tokens, {args.tokens} written: ", end="")
    print("next-token agreement / KL by quarter of the answer\n")
    head = ["policy", "budget", "held", *(f"quarter {i + 1}" for i in range(QUARTERS))]
    print(table(head, lines), flush=True)
    run.finish(model=pathlib.Path(model).name)


if __name__ == "__main__":
    with interruptible("drift"):
        main()
