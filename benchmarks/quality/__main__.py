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

from benchmarks.quality import chosen
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

FULL = "none"
# Requests that one call runs at once: a step of many takes little more time than one of a few.
SEATS = 96

# Tokens held after compaction by (task, index, mode, budget).
Kept = dict[tuple[str, int, str, Any], int]


def parse() -> argparse.Namespace:
    def budgets(text: str) -> list[float | int]:
        try:
            return chosen.budgets(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    words = chosen.words
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument(
        "--policies",
        type=words,
        help="names, some with budgets of their own (tc8:0.125/0.0625), and groups of them, "
        f"{', '.join(chosen.GROUPS)}; else {','.join(chosen.POLICIES)} "
        f"(quick: {','.join(chosen.QUICK_POLICIES)})",
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
    parser.add_argument("--presses", type=words, default=[], help="of kvpress; else all we know")
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
    args.policies = args.policies or list(chosen.QUICK_POLICIES if quick else chosen.POLICIES)
    args.budgets = args.budgets or ([0.5, 0.25] if quick else [0.5, 0.25, 0.125, 256])
    args.contexts = [int(c) for c in args.contexts or ([768] if quick else [1024, 2048])]
    args.per_task = args.per_task or (2 if quick else 8)
    if args.peers is None:
        args.peers = [] if quick else ["kvpress", "openvino"]
    try:
        args.settings = chosen.settings(args.policies, args.budgets)
    except ValueError as error:
        parser.error(f"--policies {error}")
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
                self.model,
                min(8192, longest + 512),
                self.args.pool_tokens,
                max_num_seqs=SEATS,
                # Options are not for clients to set, but where the whole is allowed.
                also=sorted({policy for policy, _ in self.args.settings if "=" in policy}),
            )
        return self._engine

    def _make_tables(self) -> None:
        """Makes the model's transform tables where a policy needs them and there are none."""
        from vllm_kvcrush import spec
        from vllm_kvcrush.codecs import FITTED
        from vllm_kvcrush.codecs.transform import calibrate

        named = [spec.parse(policy) for policy, _ in self.args.settings]
        codecs = {codec for own in named for codec in spec.storage(own).codecs}
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

    # -- generated items ------------------------------------------------------------------------

    def forced(self, items: Sequence[TokenItem], context: int) -> Kept:
        """Measures all settings on items of one context length. Returns how many tokens' KV the
        requests held once compacted, which is what a peer may keep."""
        # The exact contexts stay in the pool, for the prefix cache, next to what one call holds.
        size = max(1, int(self.args.pool_tokens * 0.4) // (context + 256))
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        kept: Kept = {}
        total = len(groups) * len(self.args.modes) * (1 + len(self.args.settings))
        with progress(None, f"{context} tokens", total) as bar:
            for number, group in enumerate(groups):
                for mode in self.args.modes:
                    found = self._group(group, mode, f"{context}/{number}/{mode}", bar)
                    reference = found[FULL, 1.0]
                    for (policy, budget), results in found.items():
                        for item, result, full in zip(group, results, reference, strict=True):
                            self._record(item, context, mode, policy, budget, result, full)
                            if codec(policy) == "raw":
                                kept[item.task, item.index, mode, budget] = result["kept"]
        return kept

    def _group(
        self, group: Sequence[TokenItem], mode: str, label: str, bar: Any
    ) -> dict[chosen.Setting, list[dict[str, Any]]]:
        """Returns the results of all settings, the uncompressed run first, item by item."""
        steps = {s: f"{label}/{s[0]}/{s[1]}" for s in [(FULL, 1.0), *self.args.settings]}
        missing = [s for s, step in steps.items() if not self.run.has(step)]
        bar.update(len(steps) - len(missing))
        if missing:
            # Also when it is known: the uncompressed run's distributions, which the others are
            # compared with, are too large to keep between runs.
            if missing[0] != (FULL, 1.0):
                missing.insert(0, (FULL, 1.0))
            for part in self._calls(missing, group):
                found = self._force(group, mode, part)
                for setting, results in found.items():
                    self.run.step(steps[setting], lambda results=results: results)
                bar.update(len(part))
            self.engine.forget()
        return {s: self.run.step(step, list) for s, step in steps.items()}

    def _calls(
        self, settings: Sequence[chosen.Setting], group: Sequence[TokenItem]
    ) -> Iterator[list[chosen.Setting]]:
        """Yields what one call measures: the uncompressed run, then as many as find room."""
        yield [settings[0]]
        context = max(len(item.context) for item in group) + 256
        room = self.args.pool_tokens * 0.9 - len(group) * context
        part: list[chosen.Setting] = []
        wanted = 0.0
        for policy, budget in settings[1:]:
            tokens = context * budget if isinstance(budget, float) else budget
            need = len(group) * (min(context, tokens) + 256)
            full = (len(part) + 1) * len(group) > SEATS or wanted + need > room
            if part and full:
                yield part
                part, wanted = [], 0.0
            part, wanted = [*part, (policy, budget)], wanted + need
        if part:
            yield part

    def _force(
        self, group: Sequence[TokenItem], mode: str, settings: Sequence[chosen.Setting]
    ) -> dict[chosen.Setting, list[dict[str, Any]]]:
        from benchmarks.quality.engine import Job

        jobs: dict[chosen.Setting, list[Job]] = {}
        for policy, budget in settings:
            for item in group:
                tokens, scored, rivals = item.forced(mode)
                name = f"{item.task}/{item.index}/{mode}"
                job = Job(
                    f"{name}/{policy}/{budget}",
                    item.prompt(mode),
                    tokens,
                    scored,
                    rivals,
                    policy,
                    budget,
                    reference=None if policy == FULL else f"{name}/{FULL}/1.0",
                )
                jobs.setdefault((policy, budget), []).append(job)
        results = self.engine.forced([job for own in jobs.values() for job in own])
        return {s: [results[job.name] for job in own] for s, own in jobs.items()}

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
        """Generates freely and greedily on LongBench's or RULER's items, scored by their own
        metrics."""
        from benchmarks.quality.engine import Job

        settings = [(FULL, 1.0), *self.args.settings]
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
        """Runs the same items at the same number of kept tokens through another project."""
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
                "presses": self.args.presses or list(peers.PRESSES),
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
