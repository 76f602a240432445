"""The text that statistics are taken and losses are measured on."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs.transform import texts


def test_held_out_text_was_not_fitted_to() -> None:
    fitted, held = texts.fitting(), texts.held_out()
    assert len(held) == len(texts.PACKAGES) and len(fitted) > 2 * texts.LETTERS
    for body in held:
        assert len(body) > texts.LETTERS
        paragraphs = [p for p in body.split("\n\n") if len(p) > 80]
        assert paragraphs and not any(p in fitted for p in paragraphs)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.integers(4, 200),
    st.integers(1, 20).map(lambda half: 2 * half),
    st.integers(1, 6),
)
def test_excerpts(lengths: list[int], context: int, question: int, count: int) -> None:
    """Whatever the texts' lengths: as many as asked for, each a piece of one text, and a question
    that goes on with it and then repeats what was there."""
    question = min(question, 2 * (context // 2))
    bodies = [
        "".join(chr(256 * i + 1000 + j % 200) for j in range(n)) for i, n in enumerate(lengths)
    ]

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    found = texts.excerpts(bodies, encode, context, question, count)
    assert len(found) == count
    for own, asked in found:
        assert (len(own), len(asked)) == (context, question)
        half = question // 2
        assert any(asked[half:] == own[i : i + half] for i in range(context - half + 1))
    if min(lengths) >= 8 * context:
        starts = [(own[0], own[1]) for own, _ in found]
        assert len(set(starts)) == len(starts), "of different places"


def test_a_text_that_goes_on() -> None:
    ((first, asked), (second, _)) = texts.excerpts(["x"], lambda _: range(100), 20, 8, 2)
    assert (first, second) == (list(range(20)), list(range(20, 40)))
    assert asked == [20, 21, 22, 23, 5, 6, 7, 8]
    assert len(texts.excerpts(["x", "y"], lambda _: range(9), 20, 8, 3)) == 3, "repeated"
