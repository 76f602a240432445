"""Ranges of text: how they are read, and where they are in prompts of several chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from vllm_kvcrush.spans import (
    SpanError,
    disjoint,
    first_tokens,
    places,
    text_ranges,
    texts_of,
    tokens_of,
    with_texts,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are helpful<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips contents, as Llama's templates do.
STRIPS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|eot|>{% endfor %}"
# Puts the system prompt into the last user's turn, as Mistral's templates do.
LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
)
TWICE = "{{ messages[0].content }}|{{ messages[0].content }}|{{ messages[1].content }}"
CHANGED = "{{ messages[0].content | upper }}|{{ messages[1].content }}"
WITHOUT = "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}"
SYSTEM = "  Never tell the secret word. Answer in French.\n"


def rendered(template: str, contents: list[str]) -> str:
    roles = ["system", *("user", "assistant") * len(contents)]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return Environment().from_string(template).render(messages=messages, add_generation_prompt=True)


def found(template: str, contents: list[str], which: list[int]) -> dict[int, str] | None:
    """Returns what the prompt has in the places of some messages."""
    marked = [f"WORD{i}x" if i in which else text for i, text in enumerate(contents)]
    prompt = rendered(template, contents)
    words = {f"WORD{i}x": contents[i] for i in which}
    where = places(prompt, rendered(template, marked), words)
    return {
        int(word[4:-1]): prompt[place.at(0) : place.at(len(words[word]))]
        for word, place in where.items()
    }


@pytest.mark.parametrize("template", [CHATML, STRIPS, LAST])
def test_messages_are_found_where_the_template_puts_them(template: str) -> None:
    # The user quotes the system prompt, so that to look for its words would not do.
    contents = [SYSTEM, f"You said: {SYSTEM}", "Yes.", "And Rome?"]
    for which in ([0], [3], [0, 3], [0, 1, 3]):
        said = found(template, contents, which)
        expected = {i: contents[i] for i in which}
        if template == STRIPS:
            expected = {i: text.strip() for i, text in expected.items()}
        assert said == expected


@pytest.mark.parametrize("template", [TWICE, CHANGED])
def test_what_the_template_does_not_show_is_nowhere(template: str) -> None:
    assert found(template, [SYSTEM, "Hello"], [0]) == {}


def test_what_the_template_leaves_out_has_no_place() -> None:
    assert found(WITHOUT, [SYSTEM, "Hello", "Hi", "Rome?"], [0, 3]) == {3: "Rome?"}


def test_characters_that_were_stripped_are_the_nearest_ones() -> None:
    prompt, text = rendered(STRIPS, [SYSTEM, "Hi"]), SYSTEM
    place = places(prompt, rendered(STRIPS, ["WORDx", "Hi"]), {"WORDx": text})["WORDx"]
    assert prompt[place.at(2) : place.at(7)] == "Never" == prompt[place.at(0) : place.at(7)]
    assert prompt[place.at(len(text) - 8) : place.at(len(text))] == "French."


words = st.text("ab \n<|>", max_size=12)


@given(st.lists(words, min_size=2, max_size=5), st.sets(st.integers(0, 4), min_size=1))
def test_a_place_holds_the_text(contents: list[str], which: set[int]) -> None:
    chosen = sorted(i for i in which if i < len(contents)) or [0]
    said = found(CHATML, contents, chosen)
    assert said == {i: contents[i] for i in chosen}


def test_contents_of_several_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "a"}, image, {"type": "input_text", "text": "b"}]
    message = {"role": "system", "content": parts}
    assert texts_of(message) == ["a", "b"]
    assert with_texts(message, ["c", "d"])["content"] == [
        {"type": "text", "text": "c"},
        image,
        {"type": "input_text", "text": "d"},
    ]
    assert parts[0]["text"] == "a"
    for empty in ({"role": "assistant", "content": None}, {"role": "tool"}, "no message", None):
        assert texts_of(empty) == []


def test_token_ranges_are_not_text() -> None:
    for value in (None, [], [[0, 64]], [0, 64], "0:64", "none", 5):
        assert text_ranges(value) is None


def test_ranges_of_text_are_read() -> None:
    asked = [{"message": 0}, {"message": 2, "chars": [0, 9]}, {"message": 2, "chars": [9, 12]}]
    assert text_ranges(asked) == ((0, None), (2, (0, 9)), (2, (9, 12)))
    assert text_ranges([{"chars": [3, 4]}]) == ((None, (3, 4)),)


@pytest.mark.parametrize(
    "value",
    [
        [{}],
        [{"message": -1}],
        [{"message": True}],
        [{"message": "0"}],
        [{"chars": [0]}],
        [{"chars": [4, 4]}],
        [{"chars": [4, 2]}],
        [{"chars": "0:4"}],
        [{"chars": None}],
        [{"message": 0, "tokens": [0, 4]}],
        [{"message": 0}, [0, 64]],
        [[0, 64], {"message": 0}],
        [{"message": 1}, {"message": 0}],
        [{"message": 0}, {"message": 0, "chars": [0, 4]}],
        [{"message": 0, "chars": [0, 4]}, {"message": 0, "chars": [3, 6]}],
        [{"chars": [0, 4]}, {"message": 0, "chars": [5, 6]}],
        [{"message": i} for i in range(65)],
    ],
)
def test_others_are_refused(value: Any) -> None:
    with pytest.raises(SpanError):
        text_ranges(value)


def test_tokens_of_characters() -> None:
    # A special token of no text, a token of two characters, one character of two tokens.
    offsets = [(0, 0), (0, 2), (2, 3), (3, 4), (3, 4), (4, 6)]
    assert tokens_of(offsets, 0, 2) == (1, 2) and tokens_of(offsets, 1, 3) == (1, 3)
    assert tokens_of(offsets, 3, 4) == (3, 5) and tokens_of(offsets, 0, 99) == (1, 6)
    assert tokens_of(offsets, 6, 9) is None is tokens_of([], 0, 1)


def test_a_token_of_two_ranges_belongs_to_the_first() -> None:
    assert disjoint([(4, 8), (0, 5)]) == ((0, 5), (5, 8))
    assert disjoint([(0, 5), (4, 5), (5, 6)]) == ((0, 5), (5, 6)) and disjoint([]) == ()


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(-3, 60))
def test_the_first_tokens(lengths: list[int], most: int) -> None:
    spans, at = [], 0
    for length in lengths:
        spans.append((at + 1, at + 1 + length))
        at += length + 1
    kept = first_tokens(tuple(spans), most)
    chosen = [t for first, end in spans for t in range(first, end)][: max(0, most)]
    assert [t for first, end in kept for t in range(first, end)] == chosen
    assert all(first < end for first, end in kept)
