"""One line for each method: what it loses at every budget, and on every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.quality.summary import ALL
from benchmarks.report import Row, table
from vllm_kvcrush.spec import ALIASED, ALIASES

MODES = {"question_after": "after", "question_before": "before"}


class Column(NamedTuple):
    """A mode, and a codec ("" for the raw one) at a budget."""

    mode: str
    codec: str
    budget: Any

    @property
    def title(self) -> str:
        """Returns what a table's head says."""
        return f"{self.codec} {self.budget:g}, {MODES[self.mode]}".lstrip()


def overview(found: Sequence[Row]) -> str:
    """Returns Markdown tables of lost nats a token, by method: at all budgets and modes, those that
    lose least with the question after first, then by task at a quarter."""
    cells: dict[tuple[str, Column, str], float] = {}
    for r in found:
        if r["metric"] == "delta_nll" and r["budget"] != 1.0 and not r["policy"].count("/"):
            policy, _, codec = r["policy"].partition("@")
            cells[policy, Column(r["mode"], codec, r["budget"]), r["task"]] = r["value"]
    _fold(cells)
    columns = sorted(
        {column for _, column, _ in cells},
        key=lambda c: (c.mode, bool(c.codec), c.codec, -c.budget),
    )
    quarter = Column("question_after", "", 0.25)

    def order(policy: str) -> tuple[float, str]:
        return cells.get((policy, quarter, ALL), float("inf")), policy

    policies = sorted({policy for policy, _, _ in cells}, key=order)

    def line(policy: str, wanted: Sequence[tuple[Column, str]]) -> list[str]:
        values = (cells.get((policy, column, task)) for column, task in wanted)
        return [f"`{policy}`", *("–" if v is None else f"{v:.2f}" for v in values)]

    everywhere = [(column, ALL) for column in columns]
    parts = [
        table(
            ["policy", *(column.title for column in columns)],
            [line(policy, everywhere) for policy in policies],
        )
    ]
    for mode, name in MODES.items():
        column = Column(mode, "", 0.25)
        tasks = sorted({task for _, c, task in cells if c == column and task != ALL})
        if tasks:
            lines = [line(policy, [(column, task) for task in tasks]) for policy in policies]
            parts.append(f"\nBy task at 0.25, question {name} compaction:\n")
            parts.append(table(["policy", *tasks], lines))
    return "\n".join(parts)


def _fold(cells: dict[tuple[str, Column, str], float]) -> None:
    """Puts a codec's own name, which stands for the policy ALIASED with that codec, into that
    policy's line, if it has one, where others have a column for it."""
    there = {column for policy, column, _ in cells if policy not in ALIASES}
    named = any(policy == ALIASED for policy, _, _ in cells)
    for policy, column, task in list(cells):
        at = column._replace(codec=policy)
        if named and policy in ALIASES and at in there:
            cells[ALIASED, at, task] = cells.pop((policy, column, task))
