"""Which policies and budgets a run of the quality benchmark measures, and how they are shown."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pictures import spread
from benchmarks.quality import chosen
from benchmarks.quality.overview import overview
from benchmarks.report import row


def test_policies_are_separated_by_commas_outside_brackets() -> None:
    text = "snapkv,composed(keydiff,other=snapkv)@tc4:0.5/256,,fair(kvcrush(h2o,ratio=0.2))"
    assert chosen.words(text) == [
        "snapkv",
        "composed(keydiff,other=snapkv)@tc4:0.5/256",
        "fair(kvcrush(h2o,ratio=0.2))",
    ]


def test_settings_are_policies_at_their_own_budgets_or_at_all() -> None:
    found = chosen.settings(["int4", "composed(keydiff,other=h2o)@tc4:0.125/64", "int4"], [0.5])
    assert found == [
        ("int4", 0.5),
        ("composed(keydiff, other=h2o)@tc4", 0.125),
        ("composed(keydiff, other=h2o)@tc4", 64),
    ]


@pytest.mark.parametrize("group", chosen.GROUPS)
def test_groups_name_policies_that_there_are(group: str) -> None:
    found = chosen.settings([group], [0.5, 0.25])
    assert len(found) == len(set(found)) >= len(chosen.GROUPS[group])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkw", "snapkw: 'snapkw' is not a policy"),
        ("snapkv(pool=4)", r"snapkv\(pool=4\): .*pool=4 is not an odd"),
        ("snapkv:1.5", "'1.5': give fractions such as 0.25"),
        ("kvcrush(", "lacks a policy's name"),
    ],
)
def test_what_cannot_be_measured_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        chosen.settings([text], [0.5])


def test_the_overview_has_a_line_for_each_method() -> None:
    def loss(policy: str, budget: float, value: float, task: str = "all") -> dict[str, object]:
        where = {"budget": budget, "context": 1024, "mode": "question_after", "task": task}
        return row("delta_nll", value, "nats", policy=policy, **where)

    found = [
        loss("none", 1.0, 0.0),
        *(loss("snapkv", 0.25, 2.0), loss("snapkv", 0.25, 3.0, "copy")),
        *(loss("keydiff", 0.25, 0.5), loss("keydiff", 0.25, 0.1, "copy")),
        *(loss("keydiff", 0.5, 0.125), loss("keydiff@int4", 0.125, 1.5)),
        loss("kvcrush", 0.25, 1.0),
        *(loss("int4", 0.125, 0.75), loss("int4", 0.25, 0.0), loss("kvpress/keydiff", 0.25, 0.4)),
    ]
    first, by_task = overview(found).split("\nBy task at 0.25, question after compaction:\n\n")
    assert first.splitlines() == [
        "| policy | 0.5, after | 0.25, after | int4 0.125, after |",
        "| --- | --- | --- | --- |",
        "| `int4` | – | 0.00 | – |",
        "| `keydiff` | 0.12 | 0.50 | 1.50 |",
        "| `kvcrush` | – | 1.00 | 0.75 |",
        "| `snapkv` | – | 2.00 | – |",
    ]
    assert by_task.splitlines()[3::2] == ["| `keydiff` | 0.10 |", "| `snapkv` | 3.00 |"]


@given(st.lists(st.floats(0, 100), max_size=9), st.floats(1, 10))
def test_names_beside_a_picture_do_not_overlap(heights: list[float], gap: float) -> None:
    heights = sorted(heights)
    found = spread(heights, gap, 0, 100)
    assert len(found) == len(heights)
    assert all(b - a > gap - 1e-6 for a, b in itertools.pairwise(found))
    assert all(-1e-6 <= y <= 100 + 1e-6 for y in found)
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        assert found == pytest.approx(heights), "what has room stays where it is"
