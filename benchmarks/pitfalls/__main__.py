"""Measures what each policy does to instructions in a prompt, in vLLM itself.

After "The Pitfalls of KV Cache Compression" (arXiv 2510.00231): instructions are left to the
policy, each is given its share (`fair`), or they are protected (`kv_protect`, as
--kv-protect-system does a chat's system prompt).

A task is a context with instructions, and a question that comes after compaction: the newer of two
conflicting instructions, a rule of a system prompt, a secret of a system prompt that must not be
told. The answer is forced; the rule is kept if its first token is likelier than that of the answer
which breaks the instruction. `neutral` is a number to be found behind a system prompt that says
nothing of it: what protection takes from the rest.

    python -m benchmarks.pitfalls [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.report import Run, arguments, codec, interruptible, interval, progress, say, table
from vllm_kvcrush import policies
from vllm_kvcrush.spec import ALIASES

TASKS = ("conflict", "system_rule", "system_secret", "neutral")
VARIANTS = ("plain", "fair", "protected")
# Where the instructions of a task are in its context.
INSTRUCTIONS = {
    "conflict": r"\n\n(?:Instruction|New instruction): .*? to say is [^.]*\.",
    "system_rule": r"^System: .*?(?=\n\n)",
    "system_secret": r"^System: .*?(?=\n\n)",
    "neutral": r"^System: .*?(?=\n\n)",
}
NEUTRAL = (
    "System: You are a careful assistant that works for a library. Answer in whole sentences. "
    "Say when you do not know something, and never make up a source. Be polite to everybody, "
    "whatever they say, and keep your answers short unless somebody asks for more.\n\n"
)
# Policies that wrap others, or keep every token.
APART = frozenset({"fair", "composed", "rerotate", "mikv", *ALIASES})
QUICK = ("streaming", "snapkv", "kvcrush")


def parse() -> argparse.Namespace:
    every = [name for name in policies.names() if name not in APART]
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument("--policies", help=f"else all (quick: {','.join(QUICK)})")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--context", type=int, help="tokens; else 512 (quick: 384)")
    parser.add_argument("--per-task", type=int, help="items of each task; else 3 (quick: 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.policies = (
        args.policies.split(",") if args.policies else list(QUICK if args.quick else every)
    )
    args.context = args.context or (384 if args.quick else 512)
    args.per_task = args.per_task or (2 if args.quick else 3)
    return args


def items(tokenizer: Any, args: argparse.Namespace) -> list[tuple[str, Any, list[tuple[int, int]]]]:
    """Returns (task, item, token ranges of its instructions)."""
    from dataclasses import replace

    from benchmarks.quality.tasks import build

    found = []
    for task in TASKS:
        source = "needle_single" if task == "neutral" else task
        head = list(tokenizer.encode(NEUTRAL)) if task == "neutral" else []
        size = args.context - len(head)
        for item in build(tokenizer, (source,), size, args.per_task, args.seed):
            item = replace(item, task=task, context=head + item.context)
            found.append((task, item, instructions(tokenizer, item)))
    return found


def instructions(tokenizer: Any, item: Any) -> list[tuple[int, int]]:
    """Returns the token ranges of an item's instructions."""
    from vllm_kvcrush.spans import tokens_of

    text, offsets = "", []
    for token in item.context:
        piece = tokenizer.decode([token])
        offsets.append((len(text), len(text) + len(piece)))
        text += piece
    spans = [
        tokens_of(offsets, *match.span())
        for match in re.finditer(INSTRUCTIONS[item.task], text, re.DOTALL)
    ]
    if not spans or None in spans:
        raise ValueError(f"{item.task} {item.index} has no instruction in {text[:80]!r}")
    return [span for span in spans if span is not None]


def parts(instructed: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Returns the spans of a context: each instruction, and what lies between them."""
    cuts = sorted({0, length, *(cut for span in instructed for cut in span)})
    return list(pairwise(cuts))


def jobs(found: Sequence[Any], policy: str, variant: str, budget: float) -> list[Any]:
    """Returns the engine's jobs for all items under a policy."""
    from benchmarks.quality.engine import Job

    made = []
    for task, item, instructed in found:
        tokens, scored, rivals = item.forced("question_after")
        extra: dict[str, Any] = {}
        if variant == "fair":
            extra["kv_spans"] = [list(s) for s in parts(instructed, len(item.context))]
        elif variant == "protected":
            extra["kv_protect"] = [list(s) for s in instructed]
        made.append(
            Job(
                f"{task}/{item.index}/{policy}/{variant}",
                item.context,
                tokens,
                scored,
                rivals,
                f"fair({policy})" if variant == "fair" else policy,
                budget,
                extra=extra,
            )
        )
    return made


class Bench:
    """One run. The engine is started when the first step needs it."""

    def __init__(self, run: Run, args: argparse.Namespace, model: str) -> None:
        from transformers import AutoTokenizer

        self.run, self.args, self.model = run, args, model
        self.items = items(AutoTokenizer.from_pretrained(model), args)
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        if self._engine is None:
            from benchmarks.quality.engine import Engine

            say("starting the engine …")
            pool = 2 * (self.args.context + 128) * len(self.items)
            self._engine = Engine(self.model, self.args.context + 256, pool)
        return self._engine

    def results(self, policy: str, variant: str) -> dict[str, Any]:
        """Returns what each item came to, by its place; or why the policy cannot be had so."""
        return self.run.step(f"{policy}/{variant}", lambda: self._measure(policy, variant))

    def _measure(self, policy: str, variant: str) -> dict[str, Any]:
        from vllm.exceptions import VLLMValidationError

        budget = 1.0 if policy == "none" else self.args.budget
        try:
            made = self.engine.forced(jobs(self.items, policy, variant, budget))
        except VLLMValidationError as error:
            return {"refused": str(error)}
        return {
            f"{task}/{item.index}": {
                "nll": _mean(made[f"{task}/{item.index}/{policy}/{variant}"]["nll"]),
                "margin": _first(made[f"{task}/{item.index}/{policy}/{variant}"]["margin"]),
            }
            for task, item, _ in self.items
        }

    def report(self) -> str:
        """Adds all rows; returns their table."""
        whole = self.results("none", "plain")
        lines = [self._line("none", "plain", whole, whole)]
        for policy in progress(self.args.policies, "policies"):
            for variant in VARIANTS:
                found = self.results(policy, variant)
                if "refused" in found:
                    say(f"{policy}, {variant}: {found['refused']}")
                    continue
                lines.append(self._line(policy, variant, found, whole))
        kept = [f"{task}, kept" for task in TASKS if task != "neutral"]
        return table(["policy", "", *kept, *(f"{task}, loss" for task in TASKS)], lines)

    def _line(
        self, policy: str, variant: str, found: dict[str, Any], whole: dict[str, Any]
    ) -> list[str]:
        cells, losses = [], []
        for task in TASKS:
            names = [name for name in whole if name.startswith(f"{task}/")]
            where = {
                "policy": policy,
                "codec": codec(policy),
                "budget": self.args.budget if policy != "none" else 1.0,
                "context": self.args.context,
                "task": task,
                "mode": variant,
            }
            loss, low, high = interval([found[n]["nll"] - whole[n]["nll"] for n in names])
            self.run.add("delta_nll", loss, "nats", len(names), low=low, high=high, **where)
            losses.append(f"{loss:.2f}")
            if task == "neutral":
                continue
            kept = [found[n]["margin"] > 0 for n in names]
            self.run.add("rule_kept", sum(kept) / len(kept), "ratio", len(names), **where)
            margin, low, high = interval([found[n]["margin"] for n in names])
            self.run.add("margin", margin, "nats", len(names), low=low, high=high, **where)
            cells.append(f"{sum(kept)}/{len(kept)} ({margin:+.1f})")
        return [policy, variant, *cells, *losses]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _first(values: Sequence[float]) -> float | None:
    return values[0] if values else None


def main() -> None:
    from vllm_kvcrush.tools import demo_model

    args = parse()
    model = args.model or str(demo_model.prepare(say=say))
    run = Run("pitfalls", args)
    print(Bench(run, args, model).report())
    run.finish()


if __name__ == "__main__":
    with interruptible("pitfalls"):
        main()
