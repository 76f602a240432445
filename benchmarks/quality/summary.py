"""Turns what every item measured into rows, tables and verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.report import Row, interval, row, table

ALL = "all"
# (key of a record, metric, unit)
METRICS = (
    ("nll", "nll", "nats"),
    ("delta_nll", "delta_nll", "nats"),
    ("kl", "kl", "nats"),
    ("agreement", "agreement", "ratio"),
    ("token_accuracy", "token_accuracy", "ratio"),
    ("exact", "exact_match", "ratio"),
    ("kept_rule", "rule_kept", "ratio"),
    ("score", "score", "ratio"),
    ("delta_score", "delta_score", "ratio"),
    ("bytes_ratio", "bytes_ratio", "ratio"),
    ("held", "kv_bytes_per_request", "bytes"),
)

# What rows of single tasks say; those of the uncompressed run, and of all tasks, say everything.
OF_TASKS = {"delta_nll", "rule_kept", "score", "delta_score"}


class Setting(NamedTuple):
    """What one line of a table is about."""

    policy: str
    codec: str
    budget: float | int
    context: int
    mode: str


@dataclass(frozen=True)
class Record:
    """Means over the scored tokens of one item under one setting; `values` by keys of METRICS."""

    setting: Setting
    task: str
    index: int
    values: dict[str, float]

    @property
    def item(self) -> tuple[str, int]:
        """Returns which item it is: the same under every setting, so that differences are
        paired."""
        return self.task, self.index


def values(result: dict[str, Any], full: dict[str, Any]) -> dict[str, float]:
    """Returns per-item figures from an engine's `result` and its uncompressed run."""

    def mean(x: Sequence[float]) -> float:
        return sum(x) / len(x)

    out = {"held": float(result["held"]), "bytes_ratio": full["held"] / result["held"]}
    if result["nll"]:
        out["nll"] = mean(result["nll"])
        out["delta_nll"] = out["nll"] - mean(full["nll"])
        out["token_accuracy"] = mean(result["correct"])
        out["exact"] = float(all(result["correct"]))
        if result.get("kl"):
            out["kl"], out["agreement"] = mean(result["kl"]), mean(result["agree"])
        if result["margin"]:
            out["kept_rule"] = mean([m > 0 for m in result["margin"]])
    if "score" in result:
        out["score"] = result["score"]
        out["delta_score"] = result["score"] - full["score"]
    return out


def rows(records: Iterable[Record]) -> list[Row]:
    """Means over items with bootstrap intervals, by setting, for each task and for all."""
    grouped: dict[tuple[Setting, str], list[Record]] = defaultdict(list)
    for record in records:
        for task in (record.task, ALL):
            grouped[record.setting, task].append(record)
    out = []
    for (setting, task), group in grouped.items():
        for key, metric, unit in METRICS:
            if task != ALL and setting.policy != "none" and metric not in OF_TASKS:
                continue
            found = [r.values[key] for r in group if key in r.values]
            if found:
                mean, low, high = interval(found)
                where = {**setting._asdict(), "task": task, "low": low, "high": high}
                out.append(row(metric, mean, unit, len(found), **where))
    return out


class Verdict(NamedTuple):
    """`delta` is the first policy's NLL minus the second's at the same budget, paired by item."""

    first: str
    second: str
    setting: Setting
    delta: float
    low: float | None
    high: float | None
    n: int

    @property
    def word(self) -> str:
        """Returns the difference in words; one whose interval holds zero is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "none"
        return "better" if self.delta < 0 else "worse"


def compare(records: Iterable[Record], pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
    """Returns the comparison of every pair of policies at equal budget, context and mode, over the
    items both have."""
    found: dict[Setting, dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        if "delta_nll" in record.values:
            found[record.setting][record.item] = record.values["delta_nll"]
    verdicts = []
    for first, second in pairs:
        for setting, mine in found.items():
            if setting.policy != first:
                continue
            for other, theirs in found.items():
                if other.policy == second and other[2:] == setting[2:]:
                    items = mine.keys() & theirs.keys()
                    if items:
                        mean, low, high = interval([mine[i] - theirs[i] for i in sorted(items)])
                        verdicts.append(
                            Verdict(first, second, setting, mean, low, high, len(items))
                        )
    return verdicts


def verdict_rows(verdicts: Iterable[Verdict]) -> list[Row]:
    """Verdicts in long form."""
    return [
        row(
            f"delta_nll_vs_{v.second}",
            v.delta,
            "nats",
            v.n,
            **v.setting._asdict(),
            task=ALL,
            low=v.low,
            high=v.high,
        )
        for v in verdicts
    ]


def _cell(found: Row | None, digits: int = 3) -> str:
    if found is None:
        return "–"
    text = f"{found['value']:.{digits}f}"
    if found["low"] is not None and found["metric"] in {"delta_nll", "delta_score"}:
        text += f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return text


def tables(found: Sequence[Row]) -> str:
    """Returns Markdown tables: for each context and mode what every policy loses at every budget,
    then the loss by task at the smallest budget that is a fraction."""
    by: dict[tuple[Any, ...], Row] = {
        (r["context"], r["mode"], r["policy"], r["budget"], r["task"], r["metric"]): r
        for r in found
    }
    parts = []
    for context, mode in sorted({k[:2] for k in by}):
        lines = []
        here = sorted(
            {k[2:4] for k in by if k[:2] == (context, mode)},
            key=lambda pb: (not isinstance(pb[1], float), -pb[1], "/" in pb[0], pb[0]),
        )
        for policy, budget in here:
            cells = [
                _cell(by.get((context, mode, policy, budget, ALL, metric)), digits)
                for metric, digits in (
                    ("bytes_ratio", 2),
                    ("delta_nll", 3),
                    ("kl", 3),
                    ("agreement", 3),
                    ("token_accuracy", 3),
                    ("exact_match", 2),
                    ("score", 3),
                )
            ]
            lines.append([policy, f"{budget:g}", *cells])
        header = ["policy", "budget", "× less memory", "ΔNLL (95 %)", "KL", "agreement"]
        header += ["token accuracy", "exact match", "score"]
        keep = [i for i in range(len(header)) if i < 2 or any(line[i] != "–" for line in lines)]
        parts.append(f"\n### {context} tokens, {mode.replace('_', ' ')} compaction\n")
        parts.append(table([header[i] for i in keep], [[line[i] for i in keep] for line in lines]))
        parts.append(_by_task(by, context, mode, here))
    return "\n".join(parts)


def _by_task(
    by: dict[tuple[Any, ...], Row], context: int, mode: str, here: Sequence[tuple[str, Any]]
) -> str:
    fractions = sorted({b for _, b in here if isinstance(b, float) and b < 1})
    if not fractions:
        return ""
    budget = 0.25 if 0.25 in fractions else fractions[0]
    policies = [p for p, b in here if b == budget]
    tasks = sorted(
        {
            k[4]
            for k in by
            if k[:2] == (context, mode) and k[3] == budget and k[5] == "delta_nll" and k[4] != ALL
        }
    )
    lines = []
    for task in tasks:
        cells = [by.get((context, mode, p, budget, task, "delta_nll")) for p in policies]
        full = by.get((context, mode, "none", 1.0, task, "nll"))
        sure = by.get((context, mode, "none", 1.0, task, "token_accuracy"))
        lines.append(
            [
                task,
                _cell(full, 2),
                _cell(sure, 2),
                *(_cell(c and {**c, "low": None}) for c in cells),
            ]
        )
    if not lines:
        return ""
    header = ["task", "full NLL", "full token accuracy", *policies]
    return f"\nΔNLL by task at budget {budget:g}:\n\n" + table(header, lines)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Returns Markdown tables: who is better than whom, with differences inside the interval called
    none."""
    lines = [
        [
            v.first,
            v.second,
            str(v.setting.context),
            v.setting.mode,
            f"{v.setting.budget:g}",
            f"{v.delta:+.3f}" + (f" [{v.low:+.3f}, {v.high:+.3f}]" if v.low is not None else ""),
            v.word,
        ]
        for v in sorted(verdicts, key=lambda v: (v.second, v.setting.mode, -v.setting.budget))
    ]
    header = ["policy", "against", "context", "mode", "budget", "ΔNLL difference (95 %)", "is"]
    return table(header, lines) if lines else ""
