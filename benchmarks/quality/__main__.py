"""Measures how much quality each policy loses at each memory budget, in vLLM itself.

Every item is a context and questions over it. The context (mode question_after) or the context
and the first question (mode question_before) is prefilled and compacted; what follows is forced
token by token. Gold tokens are scored on the raw logits: their negative log-likelihood, whether
greedy decoding would have given them, and how far the distribution is from the uncompressed
run's. Memory is what a request held while it answered: whole blocks and side tensors.

    python -m benchmarks.quality [--quick] [--json FILE]
    python -m benchmarks.quality --longbench DIR --ruler DIR --tasks ""   # data that you have
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.quality.items import MODES, TokenItem
from benchmarks.quality.peers import PeerError
from benchmarks.quality.summary import (
    Record,
    Setting,
    compare,
    rows,
    tables,
    values,
    verdict_rows,
    verdict_table,
)
from benchmarks.report import Run, arguments, codec, environment, interruptible, progress, say

POLICIES = (
    "streaming",
    "snapkv",
    "h2o",
    "kvcrush",
    "int8",
    "int4",
    "tc4",
    "tc6",
    "tc8",
    "auto",
    "mikv",
)
# A quick run: KVCrush beside its base, the simplest rival, and fewer bits.
QUICK_POLICIES = ("streaming", "snapkv", "kvcrush", "int4", "auto")
FULL = "none"

# Tokens held after compaction by (task, index, mode, budget).
Kept = dict[tuple[str, int, str, Any], int]


def parse() -> argparse.Namespace:
    from vllm_kvcrush import policies
    from vllm_kvcrush.config import parse_budget

    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    def budgets(text: str) -> list[float | int]:
        try:
            return [parse_budget(w, "") for w in words(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give fractions such as 0.25 and whole numbers of tokens such as 256"
            ) from None

    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument(
        "--policies", type=words, help=f"else all (quick: {','.join(QUICK_POLICIES)})"
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        help="fractions and tokens; else 0.5,0.25,0.125 and 256 (quick: 0.5,0.25)",
    )
    parser.add_argument("--modes", type=words, default=list(MODES))
    parser.add_argument("--contexts", type=words, help="tokens; else 1024,2048 (quick: 768)")
    parser.add_argument("--tasks", type=words, help='names, or "" for none; else all')
    parser.add_argument("--per-task", type=int, help="items a task; else 8 (quick: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=words, help="else kvpress,openvino (quick: none)")
    parser.add_argument(
        "--peer-per-task", type=int, default=2, help="items a task that peers get; they are slow"
    )
    parser.add_argument(
        "--peer-budgets", type=int, default=2, help="how many of the budgets, from the first"
    )
    parser.add_argument("--longbench", type=pathlib.Path, help="folder with LongBench's *.jsonl")
    parser.add_argument("--ruler", type=pathlib.Path, help="folder with RULER's */validation.jsonl")
    parser.add_argument("--limit", type=int, default=20, help="items of each of their files")
    parser.add_argument(
        "--no-tables",
        action="store_true",
        help="take statistics at start-up where the model has no tables, instead of making them",
    )
    parser.add_argument("--pool-tokens", type=int, default=49152, help="KV pool, in raw tokens")
    args = parser.parse_args()
    quick = args.quick
    args.policies = args.policies or list(QUICK_POLICIES if quick else POLICIES)
    args.budgets = args.budgets or ([0.5, 0.25] if quick else [0.5, 0.25, 0.125, 256])
    args.contexts = [int(c) for c in args.contexts or ([768] if quick else [1024, 2048])]
    args.per_task = args.per_task or (2 if quick else 8)
    if args.peers is None:
        args.peers = [] if quick else ["kvpress", "openvino"]
    if unknown := set(args.policies) - set(policies.names()):
        names = ", ".join(policies.names())
        parser.error(f"--policies {','.join(sorted(unknown))}: choose from {names}.")
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"--modes {','.join(sorted(unknown))}: choose from {', '.join(MODES)}.")
    if unknown := set(args.peers) - {"kvpress", "openvino"}:
        parser.error(f"--peers {','.join(sorted(unknown))}: choose from kvpress, openvino.")
    return args


class Bench:
    """One run: items in, records out. The engine is started when the first step needs it."""

    def __init__(self, run: Run, args: argparse.Namespace, model: str) -> None:
        from transformers import AutoTokenizer

        self.run, self.args, self.model = run, args, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.records: list[Record] = []
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        if self._engine is None:
            from benchmarks.quality.engine import Engine

            self._make_tables()
            say("starting the engine …")
            longest = 8192 if self.args.longbench or self.args.ruler else max(self.args.contexts)
            self._engine = Engine(
                self.model, min(8192, longest + 512), self.args.pool_tokens, max_num_seqs=64
            )
        return self._engine

    def _make_tables(self) -> None:
        """Makes the model's transform tables where a policy needs them and there are none."""
        from vllm_kvcrush import spec
        from vllm_kvcrush.codecs import FITTED
        from vllm_kvcrush.codecs.transform import calibrate

        chosen = [spec.parse(policy) for policy in self.args.policies if policy != FULL]
        codecs = {codec for own in chosen for codec in spec.storage(own).codecs}
        path = calibrate.output_path(self.model)
        if codecs & set(FITTED) and not path.exists() and not self.args.no_tables:
            say("making the model's transform tables, once …")
            path.parent.mkdir(parents=True, exist_ok=True)
            calibrate.calibrate(self.model, path, progress=calibrate.bar)

    def stop(self) -> None:
        """Gives the engine's memory back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def settings(self) -> Iterator[tuple[str, float | int]]:
        """Policies and budgets to measure."""
        for policy in self.args.policies:
            for budget in self.args.budgets:
                yield policy, budget

    # -- generated items ------------------------------------------------------------------------

    def forced(self, items: Sequence[TokenItem], context: int) -> Kept:
        """Measures all settings on items of one context length. Returns how many tokens' KV the
        requests held once compacted, which is what a peer may keep."""
        # What one batch reads must fit the pool, next to the blocks that compaction writes.
        size = max(1, int(self.args.pool_tokens * 0.6) // (context + 256))
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        settings = [(FULL, 1.0), *self.settings()]
        kept: Kept = {}
        with progress(
            None, f"{context} tokens", len(groups) * len(self.args.modes) * len(settings)
        ) as bar:
            for number, group in enumerate(groups):
                for mode in self.args.modes:
                    steps = {s: f"{context}/{number}/{mode}/{s[0]}/{s[1]}" for s in settings}
                    if not all(self.run.has(step) for step in steps.values()):
                        # Also when it is known: the uncompressed run's distributions, which the
                        # others are compared with, are too large to keep between runs.
                        full = self._force(group, mode, FULL, 1.0)
                        self.run.step(steps[FULL, 1.0], lambda full=full: full)
                    for policy, budget in settings:
                        results = self.run.step(
                            steps[policy, budget],
                            lambda at=(group, mode, policy, budget): self._force(*at),
                        )
                        if policy == FULL:
                            reference = results
                        for item, result, full in zip(group, results, reference, strict=True):
                            self._record(item, context, mode, policy, budget, result, full)
                            if codec(policy) == "raw":
                                kept[item.task, item.index, mode, budget] = result["kept"]
                        bar.update()
                    if self._engine is not None:
                        self._engine.forget()
        return kept

    def _force(
        self, group: Sequence[TokenItem], mode: str, policy: str, budget: float | int
    ) -> list[dict[str, Any]]:
        from benchmarks.quality.engine import Job

        jobs = []
        for item in group:
            tokens, scored, rivals = item.forced(mode)
            name = f"{item.task}/{item.index}/{mode}"
            jobs.append(
                Job(
                    f"{name}/{policy}/{budget}",
                    item.prompt(mode),
                    tokens,
                    scored,
                    rivals,
                    policy,
                    budget,
                    reference=None if policy == FULL else f"{name}/{FULL}/1.0",
                )
            )
        results = self.engine.forced(jobs)
        return [results[job.name] for job in jobs]

    def _record(
        self,
        item: Any,
        context: int,
        mode: str,
        policy: str,
        budget: float | int,
        result: dict[str, Any],
        full: dict[str, Any],
    ) -> None:
        setting = Setting(policy, codec(policy), budget, context, mode)
        self.records.append(Record(setting, item.task, item.index, values(result, full)))

    # -- data that the user has -----------------------------------------------------------------

    def generated(self, items: Sequence[Any], label: str) -> None:
        """Free greedy generation on LongBench's or RULER's items, scored by their own metrics."""
        from benchmarks.quality.engine import Job

        settings = [(FULL, 1.0), *self.settings()]
        with progress(None, label, len(items) * len(self.args.modes) * len(settings)) as bar:
            for item in items:
                for mode in self.args.modes:
                    prompt, question = item.split(mode)
                    for policy, budget in settings:

                        def measure(
                            at: tuple[Any, ...] = (item, mode, prompt, question, policy, budget),
                        ) -> dict[str, Any]:
                            item, mode, prompt, question, policy, budget = at
                            job = Job(
                                f"{item.task}/{item.index}/{mode}/{policy}/{budget}",
                                prompt,
                                question,
                                [False] * len(question),
                                [None] * len(question),
                                policy,
                                budget,
                                free=item.max_new_tokens,
                            )
                            result = self.engine.forced([job])[job.name]
                            text = self.tokenizer.decode(result["free"], skip_special_tokens=True)
                            return {**result, "score": item.score(text)}

                        step = f"{label}/{item.task}/{item.index}/{mode}/{policy}/{budget}"
                        result = self.run.step(step, measure)
                        if policy == FULL:
                            full = result
                        self._record(item, item.context, mode, policy, budget, result, full)
                        bar.update()

    # -- peers ----------------------------------------------------------------------------------

    def peers(self, name: str, items: Sequence[TokenItem], context: int, kept: Kept) -> None:
        """The same items at the same number of kept tokens through another project."""
        from benchmarks.quality import peers

        budgets = self.args.budgets[: self.args.peer_budgets]
        jobs, stored = [], {}
        for item in items:
            step = f"{context}/{name}/{item.task}/{item.index}"
            if self.run.has(step):
                stored[item.task, item.index] = self.run.step(step, list)
                continue
            modes = {}
            for mode in self.args.modes:
                tokens, scored, _ = item.forced(mode)
                modes[mode] = {
                    "prompt": item.prompt(mode),
                    "forced": tokens,
                    "scored": scored,
                    "kept": {str(b): kept[item.task, item.index, mode, b] for b in budgets},
                }
            jobs.append({"task": item.task, "index": item.index, "modes": modes})
        if jobs:
            job = {
                "model": self.model,
                "threads": _threads(),
                "presses": list(peers.PRESSES),
                "items": jobs,
            }
            with progress(None, f"{name}, {context} tokens", len(jobs)) as bar:
                arrived: dict[tuple[str, int], list[dict[str, Any]]] = {}

                def store() -> None:
                    for place, found in arrived.items():
                        step = f"{context}/{name}/{place[0]}/{place[1]}"
                        stored[place] = self.run.step(step, lambda found=found: found)
                        bar.update()
                    arrived.clear()

                def on_record(record: dict[str, Any]) -> None:
                    place = record["task"], record["index"]
                    # OpenVINO goes through the items once for each setting.
                    if name == "kvpress" and arrived and place not in arrived:
                        store()
                    arrived.setdefault(place, []).append(record)

                getattr(peers, name)(job, on_record)
                store()
        for item in items:
            for record in stored.get((item.task, item.index), ()):
                self._peer(record, stored[item.task, item.index], item, context)

    def _peer(
        self, found: dict[str, Any], beside: list[dict[str, Any]], item: TokenItem, context: int
    ) -> None:
        if "skipped" in found:
            return
        mode, full = found["mode"], found["policy"].endswith("/full")
        # Its own uncompressed run, in its own numbers.
        (whole,) = [r for r in beside if r["mode"] == mode and r["policy"].endswith("/full")]
        scored = item.forced(mode)[1]
        # Nominal: the tokens it keeps and those it decodes before the last scored one.
        last = max(i for i, wanted in enumerate(scored) if wanted)
        raw = len(item.prompt(mode)) + last
        held = raw if full else found["kept"] + last
        out = {"bytes_ratio": raw / held}
        for key in ("nll", "token_accuracy", "exact", "agreement", "kl"):
            if found.get(key) is not None:
                out[key] = found[key]
        if "nll" in out:
            out["delta_nll"] = out["nll"] - whole["nll"]
        budget = 1.0 if full else next(b for b in self.args.budgets if str(b) == found["budget"])
        setting = Setting(found["policy"], found.get("codec") or "raw", budget, context, mode)
        self.records.append(Record(setting, item.task, item.index, out))


def _threads() -> int:
    return int(environment()["threads"])


def main() -> None:
    args = parse()
    try:
        _run(args)
    except (ValueError, ImportError, PeerError) as error:
        raise SystemExit(f"quality: {error}") from error


def _run(args: argparse.Namespace) -> None:
    from benchmarks.quality import tasks
    from vllm_kvcrush.tools import demo_model

    model = args.model or str(demo_model.prepare(say=say))
    names = list(tasks.TASKS) if args.tasks is None else args.tasks
    run = Run("quality", args)
    bench = Bench(run, args, model)
    built = {
        context: tasks.build(bench.tokenizer, names, context, args.per_task, args.seed)
        for context in (args.contexts if names else [])
    }
    given = {}
    for label, folder in (("longbench", args.longbench), ("ruler", args.ruler)):
        if folder is not None:
            files = importlib.import_module(f"benchmarks.quality.{label}")
            given[label] = files.load(folder, bench.tokenizer, 8192 - 512, limit=args.limit)
    kept = {context: bench.forced(items, context) for context, items in built.items()}
    for label, items in given.items():
        bench.generated(items, label)
    bench.stop()
    for name in args.peers:
        for context, items in built.items():
            few = [item for item in items if item.index < args.peer_per_task]
            bench.peers(name, few, context, kept[context])

    found = rows(bench.records)
    seen = {r.setting.policy for r in bench.records}
    rivals = [p for p in sorted(seen) if p != "kvcrush" and p != FULL and not p.endswith("/full")]
    verdicts = compare(bench.records, [("kvcrush", other) for other in rivals])
    print(tables(found))
    if verdicts:
        print("\n### KVCrush against the others, paired by item\n")
        print(verdict_table(verdicts))
    run.rows = found + verdict_rows(verdicts)
    run.finish()


if __name__ == "__main__":
    with interruptible("quality"):
        main()
