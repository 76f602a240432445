"""From per-item measurements to rows and verdicts."""

from __future__ import annotations

import pytest

from benchmarks.quality.items import Item, TokenItem, Turn
from benchmarks.quality.summary import ALL, Record, Setting, compare, rows, tables, values


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = ["<begin>"] * add_special_tokens
        return [self.ids.setdefault(w, len(self.ids)) for w in [*begin, *text.split()]]


def item() -> TokenItem:
    turns = (
        Turn("what ?", "it is", "blue", rival="red"),
        Turn("and then ?", "", "green stone"),
    )
    return TokenItem.encode(Item("needle", 0, "a b c", turns), Words())


def test_the_question_is_read_or_forced_and_only_answers_count() -> None:
    it = item()
    before, after = it.forced("question_before"), it.forced("question_after")
    assert it.prompt("question_before") == it.context + it.turns[0].question
    assert it.prompt("question_after") == it.context
    assert it.context[0] not in it.context[1:] + before[0], "the beginning is marked once"
    assert after[0] == it.turns[0].question + before[0], "both modes force the same tokens"
    for tokens, scored, rivals in (before, after):
        answers = [t for t, wanted in zip(tokens, scored, strict=True) if wanted]
        assert answers == it.turns[0].answer + it.turns[1].answer
        assert not scored[0], "the first token comes from the uncompressed prefill"
        assert [i for i, r in enumerate(rivals) if r is not None] == [scored.index(True)]


def test_an_item_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="begin alike"):
        TokenItem.encode(Item("t", 0, "a", (Turn("q", "l", "x y", rival="x z"),)), Words())
    with pytest.raises(ValueError, match="lead"):
        TokenItem.encode(Item("t", 0, "a", (Turn("q", "", "x"),)), Words())


def test_values_compare_with_the_uncompressed_run() -> None:
    full = {"nll": [0.5, 0.5], "correct": [True, True], "margin": [1.0], "held": 4000}
    mine = {
        "nll": [1.0, 2.0],
        "correct": [True, False],
        "agree": [True, False],
        "kl": [0.1, 0.3],
        "margin": [-1.0],
        "held": 1000,
    }
    assert values(mine, full) == pytest.approx(
        {
            "held": 1000,
            "bytes_ratio": 4.0,
            "nll": 1.5,
            "delta_nll": 1.0,
            "token_accuracy": 0.5,
            "exact": 0.0,
            "kl": 0.2,
            "agreement": 0.5,
            "kept_rule": 0.0,
        }
    )


def records(policy: str, deltas: list[float]) -> list[Record]:
    setting = Setting(policy, "raw", 0.25, 1024, "question_after")
    return [
        Record(setting, "needle", i, {"delta_nll": d, "nll": 1 + d, "bytes_ratio": 4.0})
        for i, d in enumerate(deltas)
    ]


def test_rows_average_over_items_by_task_and_over_all() -> None:
    found = rows(records("kvcrush", [0.0, 1.0, 2.0]))
    by = {(r["task"], r["metric"]): r for r in found}
    assert by["needle", "delta_nll"]["value"] == by[ALL, "delta_nll"]["value"] == 1.0
    assert by[ALL, "delta_nll"]["n"] == 3
    assert by[ALL, "delta_nll"]["low"] < 1.0 < by[ALL, "delta_nll"]["high"]
    assert "kvcrush" in tables(found) and "needle" in tables(found)


@pytest.mark.parametrize(
    ("shift", "noise", "word"), [(-0.5, 0.1, "better"), (0.5, 0.1, "worse"), (0.01, 1.0, "none")]
)
def test_a_difference_inside_its_interval_is_none(shift: float, noise: float, word: str) -> None:
    theirs = [float(i % 7) for i in range(20)]
    # Items differ far more than policies do: only pairing shows the difference.
    mine = [t + shift + noise * (1 if i % 2 else -1) for i, t in enumerate(theirs)]
    both = records("kvcrush", mine) + records("snapkv", theirs)
    (verdict,) = compare(both, [("kvcrush", "snapkv")])
    assert verdict.word == word and verdict.n == 20
    assert verdict.delta == pytest.approx(shift)
