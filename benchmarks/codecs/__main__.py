"""Measures what page contents lose at equal bytes when the question comes after compression.

Each item's context is prefilled once in transformers (float32), and its cache is encoded and
decoded by each content; question and gold answer are then forced over it. Figures compare with the
full cache on the same item. Bytes count whole pages, headers, exceptions, positions, the directory
and per-request statistics, but not the model's transform tables.

    python -m benchmarks.codecs [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Run, arguments, interruptible, interval, progress, say, table

TASKS = ("needle_single", "needle_multikey", "copy", "repeat", "text")
METRICS = (
    ("delta_nll", "nats"),
    ("kl", "nats"),
    ("agreement", "ratio"),
)
# Targets: least bytes ratio, most nats lost, most KL, least agreement.
TARGETS = ((8.0, 0.06, 0.04, 0.95), (4.0, 0.015, 0.01, 0.98))


def contents() -> dict[str, Any]:
    """Contents by name; a name says what a point is in bits, `+` what comes on top."""
    from benchmarks.codecs import contents as c
    from vllm_kvcrush.codecs.layout import Chunk

    return {
        "int8": c.flat("int8"),
        "int4 K/64": c.flat("int4"),
        **{point.name: c.transform(point.name) for point in points()},
        **{f"tada {bits}": c.tada(Chunk(bits)) for bits in (2, 3, 4)},
        "tada 2 over heads": c.tada_over_heads(2),
        "tada 4 over heads": c.tada_over_heads(4),
        **{f"gear {'/'.join(map(str, own))}": c.gear(Chunk(*own)) for own in GEARS},
        "tc6 + evict 20%": c.transform("tc6", keep=0.8),
        "tc8 + evict 15%": c.transform("tc8", keep=0.85),
        "evict to 25%": c.evicted(0.25),
    }


QUICK = ("int8", "int4 K/64", "tc4", "tc6", "tc8", "tada 3", "gear 4/1/8")
# Bits, rank, channels of a key for each one that a strip keeps apart (0: none).
GEARS = (
    *((bits, 1, 8) for bits in (2, 3, 4)),
    *((3, 2, 8), (4, 2, 8), (4, 4, 8), (4, 0, 8), (4, 1, 0), (4, 0, 0)),
)


def points() -> list[Any]:
    """Yields every point that a content needs tables for."""
    from dataclasses import replace

    from vllm_kvcrush.codecs.transform.points import POINTS

    tc4, tc6, tc8 = POINTS
    return [
        tc4,
        replace(tc4, name="tc4 local", local=True),
        replace(tc4, name="tc4 K4", key_bits=4.0),
        replace(tc4, name="tc4 V3", value_bits=3.0),
        replace(tc4, name="tc4 0%", exceptions=0.0),
        tc6,
        tc8,
        replace(tc8, name="tc8 rotated", local=False),
        replace(tc8, name="tc8 0%", exceptions=0.0),
        replace(tc8, name="tc8 2%", exceptions=0.02),
    ]


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument(
        "--contexts", type=lambda s: [int(x) for x in s.split(",")], help="tokens; else 1024,4096"
    )
    parser.add_argument("--per-task", type=int, help="items of each task; else 2 (quick: 1)")
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=list(TASKS))
    parser.add_argument("--contents", type=lambda s: s.split(","), help="names; else all")
    parser.add_argument("--text", type=pathlib.Path, help="calibration text; else own samples")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a raw page")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.contexts = args.contexts or ([768] if args.quick else [1024, 4096])
    args.per_task = args.per_task or (1 if args.quick else 2)
    known = contents()
    args.contents = args.contents or list(QUICK if args.quick else known)
    if unknown := [name for name in args.contents if name not in known]:
        parser.error(f"--contents {', '.join(unknown)}: choose from {', '.join(known)}.")
    return args


class Study:
    """One run: the model and its tables are loaded when the first step needs them."""

    def __init__(self, run: Run, args: argparse.Namespace, model: str) -> None:
        from transformers import AutoTokenizer

        self.run, self.args, self.model = run, args, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._loaded: Any = None

    def _load(self) -> Any:
        """Returns the Forcer and the Setting."""
        if self._loaded is None:
            from benchmarks.codecs.contents import Setting
            from benchmarks.codecs.model import Forcer
            from vllm_kvcrush.codecs.transform import calibrate
            from vllm_kvcrush.codecs.transform import tables as transform_tables

            # "tc8 + evict 15%" takes the tables of "tc8".
            named = {name.split(" + ")[0] for name in self.args.contents}
            wanted = [point for point in points() if point.name in named]
            with tempfile.TemporaryDirectory() as folder:
                # A figure must not come from a file that was made by other code.
                file = pathlib.Path(folder) / "tables.safetensors"
                calibrate.calibrate(self.model, file, self.args.text, wanted, calibrate.bar)
                forcer = Forcer(self.model)
                config, rope = forcer.probe.config, forcer.probe.rope
                tables = {p.name: transform_tables.load(file, config, p.name) for p in wanted}
            block = self.args.block_size
            # A page holds as many bytes of bfloat16 as of float32: block sizes differ.
            setting = Setting(
                tables,
                rope,
                rope.size**-0.5,
                ((block, 4), (block, 2)),
            )
            self._loaded = forcer, setting
        return self._loaded

    def item(self, item: Any, context: int) -> dict[str, dict[str, float]]:
        """Figures of one item by content."""
        name = f"{context}/{item.task}/{item.index}"
        steps = {c: f"{name}/{c}" for c in self.args.contents}
        if not all(map(self.run.has, steps.values())):
            self._measure(item, steps)
        return {c: self.run.step(step, dict) for c, step in steps.items()}

    def _measure(self, item: Any, steps: dict[str, str]) -> None:
        from benchmarks.codecs.contents import raw, raw_bytes
        from benchmarks.codecs.model import measure

        forcer, setting = self._load()
        cache = forcer.prefill(item.context)
        tokens, scored, _ = item.forced("question_after")
        full = forcer.force(raw(cache, setting), cache.length, tokens)
        known = contents()
        for content, step in steps.items():
            if self.run.has(step):
                continue
            coded = known[content](cache, setting)
            logp = forcer.force(coded, cache.length, tokens)
            figures = measure(logp, full, tokens, scored)
            for (block, itemsize), held in coded.bytes.items():
                figures[f"ratio_{8 * itemsize}"] = raw_bytes(cache, block, itemsize) / held
            self.run.step(step, lambda figures=figures: figures)


def verdict(ratio: float, delta: float, kl: float, agreement: float) -> str:
    """Returns which targets a content meets on average."""
    for least, most_delta, most_kl, least_agreement in TARGETS:
        if ratio >= least:
            good = delta <= most_delta and kl <= most_kl and agreement >= least_agreement
            return f"{'meets' if good else 'misses'} {least:g}x"
    return ""


def show(run: Run, context: int, found: Sequence[tuple[Any, dict[str, dict[str, float]]]]) -> str:
    """Adds the rows of one context length; returns its table."""
    lines = []
    for content in found[0][1]:
        figures = [by_content[content] for _, by_content in found]
        where = {"codec": content, "context": context, "mode": "question_after"}
        ratios = {}
        for bits in (16, 32):
            ratio = sum(f[f"ratio_{bits}"] for f in figures) / len(figures)
            # The budget column says of which raw cache: 16 or 32 bits a channel.
            run.add("bytes_ratio", ratio, "ratio", len(figures), **where, budget=bits)
            ratios[bits] = ratio
        cells, means = [], []
        for metric, unit in METRICS:
            mean, low, high = interval([f[metric] for f in figures])
            run.add(metric, mean, unit, len(figures), **where, low=low, high=high)
            means.append(mean)
            cells.append(
                f"{mean:.4f} [{low:.4f}, {high:.4f}]" if low is not None else f"{mean:.4f}"
            )
            for task in sorted({item.task for item, _ in found}):
                some = [b[content][metric] for item, b in found if item.task == task]
                run.add(metric, interval(some)[0], unit, len(some), **where, task=task)
        exact = sum(f["exact"] for f in figures)
        lines.append(
            [
                content,
                f"{ratios[16]:.2f}",
                f"{ratios[32]:.2f}",
                *cells,
                f"{exact:.0f}/{len(figures)}",
                verdict(ratios[16], *means),
            ]
        )
    header = ["content", "x bf16", "x float32", "ΔNLL", "KL", "agreement", "exact", "target"]
    return table(header, lines)


def main() -> None:
    args = parse()
    from benchmarks.quality.tasks import build
    from vllm_kvcrush.tools import demo_model

    run = Run("codecs", args)
    model = args.model or str(demo_model.prepare(say=say))
    study = Study(run, args, model)
    for context in args.contexts:
        items = build(study.tokenizer, args.tasks, context, args.per_task, args.seed)
        bar = progress(items, f"{context} tokens")
        found = [(item, study.item(item, context)) for item in bar]
        print(f"\n{context} tokens, {len(items)} items\n")
        print(show(run, context, found), flush=True)
    run.finish(model=pathlib.Path(model).name)


if __name__ == "__main__":
    with interruptible("codecs"):
        main()
