"""Measures what each policy costs at a compaction, and what it loses, on a real model's cache.

Cost is the processor time of one layer's scores and choice at the end of a prompt, with all copies
that the policy makes, and the layer's part of what dividing pages takes, one thread. Loss is
offline: each item's context is prefilled once in transformers, one compaction keeps what the policy
chooses, where it divides pages from as many as the others have, and question and gold answer are
forced over that. So no query of the question has been seen.

    python -m benchmarks.policies [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Run, arguments, interruptible, interval, median, progress, say, table

TASKS = ("needle_single", "needle_multikey", "copy", "repeat", "text")
METRICS = (("delta_nll", "nats"), ("kl", "nats"), ("agreement", "ratio"))
SCORERS = (
    *("streaming", "lacache", "knorm", "keydiff", "lagkv", "infinipot"),
    *("snapkv", "tova", "h2o", "expected_attention", "gkv", "rkv", "critic", "gui_kv"),
)
DIVIDERS = ("adakv", "pyramidkv", "cake", "duo", "surfacelogic")
MERGERS = ("d2o", "cam", "keepkv")
WRAPPERS = ("kvcrush", "rerotate", "composed")
VARIANTS = (
    *("kvcrush(snapkv)", "kvcrush(expected_attention)", "expected_attention(epsilon=0.01)"),
    "adakv(expected_attention(epsilon=0.01))",
    *("adakv(keydiff)", "surfacelogic(keydiff)", "cam(keydiff)"),
)
REPEATING = ("kvzip", "adakv(kvzip)")  # which cost a prefill, not a layer's scores
POLICIES = (*SCORERS, *DIVIDERS, *MERGERS, *WRAPPERS, *REPEATING, *VARIANTS)
COST = (*SCORERS, *DIVIDERS, *MERGERS, *WRAPPERS, "mikv", "fair")
LAYERS = 4  # whose cost is measured, evenly spaced


def parse() -> argparse.Namespace:
    def several(kind: type) -> Any:
        return lambda text: [kind(x) for x in text.split(",")]

    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument("--context", type=int, help="tokens, for losses; else 1024 (quick: 512)")
    parser.add_argument("--budgets", type=several(float), default=[0.5, 0.25])
    parser.add_argument("--per-task", type=int, help="items of each task; else 2 (quick: 1)")
    parser.add_argument("--tasks", type=several(str), default=list(TASKS))
    parser.add_argument("--policies", help="for losses, separated by semicolons; else all")
    parser.add_argument(
        "--cost-context", type=int, help="tokens, for costs; else 8192 (quick: 1024)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each layer's cost")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.context = args.context or (512 if args.quick else 1024)
    args.per_task = args.per_task or (1 if args.quick else 2)
    args.cost_context = args.cost_context or (1024 if args.quick else 8192)
    args.policies = args.policies.split(";") if args.policies else list(POLICIES)
    return args


class Study:
    """One run: the model is loaded when the first step needs it."""

    def __init__(self, run: Run, args: argparse.Namespace, model: str) -> None:
        self.run, self.args, self.model = run, args, model
        self._forcer: Any = None

    @property
    def forcer(self) -> Any:
        """The model in transformers."""
        if self._forcer is None:
            from benchmarks.codecs.model import Forcer

            self._forcer = Forcer(self.model)
        return self._forcer

    def items(self, tasks: Sequence[str], context: int, per_task: int) -> list[Any]:
        from transformers import AutoTokenizer

        from benchmarks.quality.tasks import build

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        return list(build(tokenizer, tasks, context, per_task, self.args.seed))

    def cost(self) -> str:
        """Adds the rows of the costs; returns their table."""
        names = [name for name in COST if not self.run.has(f"cost/{name}")]
        if names or not self.run.has("cost/prefill"):
            self._measure_cost(names)
        lines = []
        where = {"budget": 0.25, "context": self.args.cost_context, "task": "compaction"}
        mode = "one layer, threads=1"
        layers, spent = self.run.step("cost/prefill", list)
        context = self.args.cost_context
        self.run.add("prefill_s", spent / layers, "s", context=context, task="prefill", mode=mode)
        for name in COST:
            times = self.run.step(f"cost/{name}", list)
            value, low, high = median(times)
            self.run.add(
                "compaction_s",
                value,
                "s",
                len(times),
                policy=name,
                codec="raw",
                mode=mode,
                low=low,
                high=high,
                **where,
            )
            lines.append([name, *(f"{1000 * x:.2f} ms" for x in (value, low, high))])
        return table(["policy", "a layer", "least", "most"], lines)

    def _measure_cost(self, names: Sequence[str]) -> None:
        import torch

        from benchmarks.policies.layers import Compaction, Pages, seconds

        (item,) = self.items(("text",), self.args.cost_context, 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _ = self.forcer  # loaded before the time counts
        began = time.process_time()
        cache = self.forcer.prefill(item.context)
        spent = time.process_time() - began
        compaction = Compaction(cache, self.forcer.probe.rope, 0.25)
        layers, heads = len(cache.keys), cache.queries.shape[1]
        self.run.step("cost/prefill", lambda: [layers, spent])
        chosen = [i * layers // LAYERS + layers // LAYERS // 2 for i in range(LAYERS)]
        pages = {i: Pages(cache.keys[i], cache.values[i], heads) for i in chosen}
        for name in progress(names, "costs"):
            found = list(seconds(compaction, pages, name, self.args.rounds))
            self.run.step(f"cost/{name}", lambda found=found: found)
        torch.set_num_threads(threads)

    def loss(self) -> str:
        """Adds the rows of the losses; returns their table."""
        items = self.items(self.args.tasks, self.args.context, self.args.per_task)
        found: dict[tuple[str, float], list[dict[str, float]]] = {}
        for item in progress(items, "losses"):
            for key, figures in self._item(item).items():
                found.setdefault(key, []).append(figures)
        lines = []
        for (name, budget), figures in found.items():
            where = {"policy": name, "codec": "raw", "budget": budget, "task": "all"}
            where |= {"context": self.args.context, "mode": "question_after"}
            cells = []
            for metric, unit in METRICS:
                mean, low, high = interval([f[metric] for f in figures])
                self.run.add(metric, mean, unit, len(figures), low=low, high=high, **where)
                cells.append(
                    f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
                )
            exact = sum(f["exact"] for f in figures)
            lines.append([name, f"{budget:g}", *cells, f"{exact:.0f}/{len(figures)}"])
        return table(["policy", "budget", *(m for m, _ in METRICS), "exact"], lines)

    def _item(self, item: Any) -> dict[tuple[str, float], dict[str, float]]:
        """Figures of one item by policy and budget."""
        keys = [(name, budget) for budget in self.args.budgets for name in self.args.policies]
        steps = {key: f"loss/{item.task}/{item.index}/{key[0]}/{key[1]}" for key in keys}
        if not all(map(self.run.has, steps.values())):
            from benchmarks.codecs.model import Coded, measure
            from benchmarks.policies.layers import Compaction, received
            from vllm_kvcrush import policies

            cache = self.forcer.prefill(item.context)
            tokens, scored, _ = item.forced("question_after")
            full = self.forcer.force(Coded(cache.keys, cache.values, {}), cache.length, tokens)
            probe, again = self.forcer.probe, None
            for (name, budget), step in steps.items():
                if self.run.has(step):
                    continue
                told = None
                if "repeat" in policies.get(name).needs:
                    told = again = received(probe, item.context) if again is None else again
                coded = Compaction(cache, probe.rope, budget, told).coded(name)
                logp = self.forcer.force(coded, cache.length, tokens)
                figures = measure(logp, full, tokens, scored)
                self.run.step(step, lambda figures=figures: figures)
        return {key: self.run.step(step, dict) for key, step in steps.items()}


def main() -> None:
    args = parse()
    from vllm_kvcrush.tools import demo_model

    run = Run("policies", args)
    model = args.model or str(demo_model.prepare(say=say))
    study = Study(run, args, model)
    print(f"\nOne compaction at {args.cost_context} tokens\n\n{study.cost()}", flush=True)
    print(f"\nLosses at {args.context} tokens, question after\n\n{study.loss()}", flush=True)
    run.finish(model=pathlib.Path(model).name)


if __name__ == "__main__":
    with interruptible("policies"):
        main()
