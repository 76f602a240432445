"""Turns drives into rows: medians, paired ratios, and the table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report import Row, codec, median, row, table
from benchmarks.serving.workloads import Workload

PLAIN, POLICY = "plain", "policy"
UNITS = {
    "peak_running": "requests",
    "waiting": "requests",
    "preemptions": "requests",
    "ttft_s": "s",
    "tpot_s": "s",
    "output_tokens_per_s": "tokens/s",
    "kv_bytes_per_request": "bytes",
    "prefix_hit_rate": "ratio",
    "bytes_ratio": "ratio",
    "compaction_share": "ratio",
}

# One round: what the drive of each server measured, by metric.
Round = Mapping[str, Mapping[str, Any]]


def ratios(plain: Sequence[float], policy: Sequence[float]) -> list[float] | None:
    """Returns the policy's over plain's, round by round; None if plain has 0 in any of them."""
    if not all(plain):
        return None
    return [b / a for a, b in zip(plain, policy, strict=True)]


def rows(load: Workload, rounds: Sequence[Round], policy: str, budget: float | int) -> list[Row]:
    """Returns the rows of one workload: each server's medians over the rounds, and the medians of
    the rounds' ratios.

    Under mixed budgets the rows about the whole batch have no budget, and rows about the requests
    of each budget follow, whose ratios compare them with the same requests to plain vLLM. There
    budget 1.0 stands for the requests that opted out.
    """
    kept = {"policy": policy, "budget": None if load.budgets else budget}
    found = _rows(load, rounds, {PLAIN: {"policy": "none", "budget": 1.0}, POLICY: kept})
    for share in rounds[0][POLICY]["per_budget"]:
        part = [{role: drive["per_budget"][share] for role, drive in r.items()} for r in rounds]
        found += _rows(load, part, {POLICY: {"policy": policy, "budget": float(share)}})
    return found


def _rows(
    load: Workload, rounds: Sequence[Round], servers: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Rows about `servers`, which have these columns; ratios stand with the policy's."""
    where = {"context": load.context, "task": load.name, "mode": load.mode}
    found = []

    def add(metric: str, values: Sequence[float], unit: str, server: str) -> None:
        middle, low, high = median(values)
        # One round has no range.
        spread = {"low": low, "high": high} if len(values) > 1 else {}
        columns = {**where, "codec": codec(servers[server]["policy"]), **servers[server], **spread}
        found.append(row(metric, middle, unit, n=len(values), **columns))

    for metric, unit in UNITS.items():
        measured = {
            server: [drives[server][metric] for drives in rounds]
            for server in (PLAIN, POLICY)
            if all(metric in drives[server] for drives in rounds)
        }
        for server in servers:
            if server in measured:
                add(metric, measured[server], unit, server)
        if len(measured) == 2 and (paired := ratios(measured[PLAIN], measured[POLICY])):
            add(f"ratio_{metric}", paired, "ratio", POLICY)
    return found


def markdown(found: Iterable[Row]) -> str:
    """Returns the table of all rows: one line a metric, with what plain vLLM and the policy
    measured, and their ratio with its range."""
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in found:
        metric = r["metric"].removeprefix("ratio_")
        load = f"{r['task']}, {r['mode']}"
        if r["policy"] != "none" and r["task"] == "mixed_budgets" and r["budget"] is not None:
            load += f", budget {r['budget']:g}"
        column = "ratio" if metric != r["metric"] else PLAIN if r["policy"] == "none" else POLICY
        lines.setdefault((load, metric), {})[column] = r
    header = ["workload", "metric", "plain vLLM", "policy", "ratio"]
    return table(
        header,
        (
            [load, metric, *(_cell(cells.get(c), metric) for c in (PLAIN, POLICY)), _ratio(cells)]
            for (load, metric), cells in lines.items()
        ),
    )


def _cell(found: Row | None, metric: str) -> str:
    if found is None:
        return "–"
    value = found["value"]
    if metric == "kv_bytes_per_request":
        return f"{value / 2**20:.1f} MiB"
    if metric in ("prefix_hit_rate", "compaction_share"):
        return f"{value:.1%}"
    if found["unit"] == "requests":
        return f"{value:.0f}"
    unit = "" if found["unit"] == "ratio" else f" {found['unit']}"
    return f"{value:.3g}{unit}"


def _ratio(cells: Mapping[str, Row]) -> str:
    found = cells.get("ratio")
    if found is None:
        return "–"
    spread = f" ({found['low']:.2f}–{found['high']:.2f})" if found["low"] is not None else ""
    return f"{found['value']:.2f}{spread}"
