"""The quality benchmark's tasks: deterministic, of the length asked for, and answerable from their
contexts alone."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.quality import prose
from benchmarks.quality.items import TokenItem
from benchmarks.quality.tasks import TASKS, Draw, build

NAMES = list(TASKS)
# Tasks whose answers stand in the context word for word, and how often.
HIDDEN = {
    "needle_single": 1,
    "needle_multikey": 1,
    "needle_multivalue": 1,
    "needle_multiquery": 1,
    "copy": 1,
    "repeat": 1,
    "multi_turn": 1,
    "conflict": 1,
    "system_rule": 1,
    "system_secret": 1,
}


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def items(tokenizer: Any) -> dict[str, list[TokenItem]]:
    """Returns four items of each task at 600 tokens."""
    return {name: build(tokenizer, [name], 600, 4, seed=7) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_items(tokenizer: Any, items: dict[str, list[TokenItem]], name: str) -> None:
    assert build(tokenizer, [name], 600, 2, seed=7) == items[name][:2], "however many are built"
    other = build(tokenizer, [name], 600, 2, seed=8)
    assert all(a.context != b.context for a, b in zip(other, items[name], strict=False))
    assert len({tuple(item.context) for item in items[name]}) == 4


@pytest.mark.parametrize("tokens", [256, 300, 1000, 3000])
@pytest.mark.parametrize("name", NAMES)
def test_contexts_have_the_length_asked_for(tokenizer: Any, name: str, tokens: int) -> None:
    for item in build(tokenizer, [name], tokens, 3, seed=1):
        assert 0.98 * tokens <= len(item.context) <= tokens


@pytest.mark.parametrize("name", NAMES)
def test_an_item_asks_the_same_at_every_length(tokenizer: Any, name: str) -> None:
    short, long = (build(tokenizer, [name], tokens, 2, seed=3) for tokens in (400, 900))
    assert [item.turns for item in short] == [item.turns for item in long]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_join_to_natural_tokens(
    tokenizer: Any, items: dict[str, list[TokenItem]], name: str
) -> None:
    for item in items[name]:
        tokens = item.context + item.forced("question_after")[0]
        assert tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forced_is_short(items: dict[str, list[TokenItem]], name: str) -> None:
    longest = max(len(item.forced("question_after")[0]) for item in items[name])
    assert longest <= (200 if name == "multi_turn" else 120)


@pytest.mark.parametrize("name", HIDDEN)
def test_answers_stand_once_in_the_context_and_not_in_the_question(
    tokenizer: Any, items: dict[str, list[TokenItem]], name: str
) -> None:
    for item in items[name]:
        context = tokenizer.decode(item.context)
        asked = tokenizer.decode(item.turns[0].question + item.turns[0].lead)
        for turn in item.turns:
            answer = tokenizer.decode(turn.answer).strip()
            assert context.count(answer) == HIDDEN[name]
            assert answer not in asked
            # The words that lead to an answer stand before it there too.
            if turn.lead and name not in ("needle_multivalue", "repeat"):
                lead = tokenizer.decode(turn.lead).strip()
                assert f"{lead} {answer}" in context


def test_needles_lie_at_depths_spread_evenly(tokenizer: Any) -> None:
    thirds = Counter()
    for item in build(tokenizer, ["needle_single"], 1000, 9, seed=0):
        context = tokenizer.decode(item.context)
        answer = tokenizer.decode(item.turns[0].answer).strip()
        thirds[int(3 * context.index(answer) / len(context))] += 1
    assert len(thirds) == 3 and min(thirds.values()) >= 2


def test_the_key_asked_is_one_of_eight(tokenizer: Any, items: dict[str, list[TokenItem]]) -> None:
    places = []
    for item in items["needle_multikey"]:
        told = re.findall(r"number for (\w+) is (\d{7})\.", tokenizer.decode(item.context))
        assert len(dict(told)) == 8
        key = re.search(r"number for (\w+)\?", tokenizer.decode(item.turns[0].question))
        assert key and dict(told)[key[1]] == tokenizer.decode(item.turns[0].answer).strip()
        places.append([k for k, _ in told].index(key[1]))
    assert len(set(places)) > 1


def test_values_and_queries_are_all_asked(
    tokenizer: Any, items: dict[str, list[TokenItem]]
) -> None:
    for name in ("needle_multivalue", "needle_multiquery"):
        for item in items[name]:
            told = re.findall(r"\d{7}", tokenizer.decode(item.context))
            asked = [tokenizer.decode(turn.answer).strip() for turn in item.turns]
            assert sorted(asked) == sorted(told) and len(set(told)) == 4
            assert name == "needle_multiquery" or asked == told, "in the order of the text"


def test_variables_form_one_chain(tokenizer: Any, items: dict[str, list[TokenItem]]) -> None:
    for item in items["variable_tracking"]:
        links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", tokenizer.decode(item.context))
        names = [name for name, _ in links]
        assert [tokenizer.decode(turn.answer).strip() for turn in item.turns] == names
        assert [source for _, source in links[1:]] == names[:-1]
        assert f"the value {links[0][1]} in" in tokenizer.decode(item.turns[0].question)


@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
@pytest.mark.parametrize("tokens", [256, 2000])
def test_the_words_asked_are_the_most_frequent(tokenizer: Any, name: str, tokens: int) -> None:
    for item in build(tokenizer, [name], tokens, 3, seed=5):
        body = tokenizer.decode(item.context).split("\n\n", 1)[1]
        counts = Counter(re.findall(r"\w+", body)).most_common(4)
        answers = [tokenizer.decode(turn.answer).strip() for turn in item.turns]
        assert [word for word, _ in counts[:3]] == answers
        assert len({times for _, times in counts}) == 4, "no ties"


def test_text_goes_on_after_its_context(tokenizer: Any, items: dict[str, list[TokenItem]]) -> None:
    whole = prose.span(0, 2 * prose.length())
    for item in items["text"]:
        (turn,) = item.turns
        read = tokenizer.decode(item.context + turn.lead + turn.answer)
        assert read in whole
        assert 50 <= len(turn.answer) <= 80 and not turn.question


def test_repeat_asks_for_a_passage_of_the_context(
    tokenizer: Any, items: dict[str, list[TokenItem]]
) -> None:
    for item in items["repeat"]:
        (turn,) = item.turns
        passage = tokenizer.decode(turn.question + turn.lead + turn.answer).strip()
        assert tokenizer.decode(item.context).count(passage) == 1
        assert len(turn.question) >= 8, "the cue is the question, seen before compaction or not"


def test_rivals_begin_unlike_the_answer(tokenizer: Any, items: dict[str, list[TokenItem]]) -> None:
    for name, held in items.items():
        for item in held:
            rivals = [turn.rival for turn in item.turns if turn.rival is not None]
            assert len(rivals) == (name in ("conflict", "system_rule", "system_secret"))
            assert all(rival != item.turns[0].answer[0] for rival in rivals)
            if name in ("conflict", "system_secret"):
                assert rivals[0] in item.context, "the older word, the secret"
            if name.startswith("system"):
                assert tokenizer.decode(item.context).startswith("System: ")


def test_the_newer_instruction_comes_later(
    tokenizer: Any, items: dict[str, list[TokenItem]]
) -> None:
    for item in items["conflict"]:
        told = re.findall(
            r"nstruction: .*code word to say is (.*)\.", tokenizer.decode(item.context)
        )
        assert len(told) == 2 and told[1] == tokenizer.decode(item.turns[0].answer).strip()


def test_prose_reads_like_prose() -> None:
    text = prose.span(0, prose.length())
    assert not re.search(r"[^A-Za-z \n.,:;?()'/-]", text), "a number in a context is a needle"
    assert len(text.split()) == prose.length() > 10_000
    starts = [*prose.boundaries(0, prose.length() - 1), prose.length()]
    sentences = [prose.span(*pair).strip() for pair in pairwise(starts)]
    assert len(sentences) == len(set(sentences)) > 500, "none stands there twice"
    assert all(re.fullmatch(r"[A-Z].*\.", sentence) for sentence in sentences)
    assert prose.span(-3, 0) + prose.span(0, 2) == prose.span(
        prose.length() - 3, prose.length() + 2
    )
    around = prose.boundaries(-500, 500)
    assert around == sorted(around) and around[0] < 0 < around[-1]
    assert all(re.match(r"\s+[A-Z]", prose.span(first, first + 1)) for first in around)


def test_items_use_different_regions() -> None:
    places = {Draw("needle_single", index, 0).end for index in range(20)}
    assert len(places) == 20


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="there is no task 'needle'; there are needle_single"):
        build(tokenizer, ["needle"], 300, 1, seed=0)
    with pytest.raises(ValueError, match=r"needle_multikey does not fit .* 100 tokens: it takes"):
        build(tokenizer, ["needle_multikey"], 100, 1, seed=0)
    with pytest.raises(ValueError, match=r"text has text for a context of .* a shorter context"):
        build(tokenizer, ["text"], 100_000, 1, seed=0)
