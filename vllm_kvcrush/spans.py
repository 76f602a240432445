"""Ranges of a prompt's text: how a request names them, and which tokens they are.

A request names a range by tokens, `[first, end]`, by characters of a completion's prompt,
`{"chars": [first, end]}`, or by a chat's message, `{"message": 0}` or `{"message": 0, "chars":
[first, end]}`. Where a message is in the prompt follows from rendering the chat once more with
other words in place of the message. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

MOST_SPANS = 64
# Roles of messages that are instructions to the model.
SYSTEM_ROLES = frozenset({"system", "developer"})

Spans = tuple[tuple[int, int], ...]


class SpanError(ValueError):
    """A range that cannot be used; the message goes on after the parameter's name."""


class TextRange(NamedTuple):
    """A range of text: characters [first, end) of a message, or of a completion's prompt if
    `message` is None. If `chars` is None, it is all of the message."""

    message: int | None
    chars: tuple[int, int] | None

    def __str__(self) -> str:
        of = "the prompt" if self.message is None else f"message {self.message}"
        return of if self.chars is None else f"characters {list(self.chars)} of {of}"


def text_ranges(value: Any) -> tuple[TextRange, ...] | None:
    """Returns the ranges of text in the value of a parameter, or None if it has none.

    Raises:
        SpanError: they are not well-formed, or not ascending, or overlap.
    """
    if not isinstance(value, list | tuple) or not any(isinstance(x, Mapping) for x in value):
        return None
    if len(value) > MOST_SPANS:
        raise SpanError(f"has {len(value)} ranges: give up to {MOST_SPANS}")
    found = [_text_range(item) for item in value]
    for before, after in pairwise(found):
        if before.message == after.message:
            apart = before.chars and after.chars and before.chars[1] <= after.chars[0]
        else:
            apart = (before.message or 0) < (after.message or 0)
        if not apart or (before.message is None) != (after.message is None):
            raise SpanError(
                f"has {after} after {before}: give ascending ranges that do not overlap"
            )
    return tuple(found)


def _text_range(item: Any) -> TextRange:
    bad = SpanError(
        "has a range that cannot be read: give tokens, [0, 64], or all of them as text, such as "
        '{"message": 0}, {"message": 0, "chars": [0, 200]}, or for /v1/completions {"chars": '
        "[0, 200]}"
    )
    if not isinstance(item, Mapping) or not item or not item.keys() <= {"message", "chars"}:
        raise bad
    message, chars = item.get("message"), item.get("chars")
    if message is not None and not _is_count(message):
        raise bad
    if chars is None:
        if message is None:
            raise bad
        return TextRange(message, None)
    if not isinstance(chars, list | tuple) or len(chars) != 2 or not all(map(_is_count, chars)):
        raise bad
    if chars[0] >= chars[1]:
        raise bad
    return TextRange(message, (chars[0], chars[1]))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# -- where text is in a prompt ---------------------------------------------------------------------


class Place(NamedTuple):
    """Where a text is in a prompt.

    Attributes:
        first: its first character's place in the prompt.
        skipped: characters at its start that the prompt lacks, because the template strips it.
        length: characters of it that the prompt has.
    """

    first: int
    skipped: int
    length: int

    def at(self, char: int) -> int:
        """Returns the place in the prompt of a character of the text, or of the nearest one that
        the prompt has."""
        return self.first + min(max(0, char - self.skipped), self.length)


def texts_of(message: Any) -> list[str]:
    """Returns the texts of a chat message: its content, or those of the content's parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        return []
    return [part["text"] for part in content if _is_text(part)]


def with_texts(message: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Returns a chat message with other texts in place of `texts_of` it."""
    if isinstance(message["content"], str):
        return {**message, "content": texts[0]}
    left = iter(texts)
    parts = [{**p, "text": next(left)} if _is_text(p) else p for p in message["content"]]
    return {**message, "content": parts}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def places(prompt: str, marked: str, texts: Mapping[str, str]) -> dict[str, Place]:
    """Returns where texts are in a prompt.

    Args:
        prompt: the rendered prompt.
        marked: the same with other words, the keys of `texts`, in place of some texts.
        texts: the texts by the words that replace them.

    Returns:
        A place for each word that `marked` has. There is none at all if the two do not match, as
        where the template writes a text twice or changes it other than by stripping it.
    """
    if not texts:
        return {}
    pieces = re.split(f"({'|'.join(map(re.escape, texts))})", marked)
    if len(set(pieces[1::2])) != len(pieces) // 2 or not prompt.startswith(pieces[0]):
        return {}
    found, at = {}, len(pieces[0])
    for word, after in zip(pieces[1::2], pieces[2::2], strict=True):
        written = next(
            (f for f in _forms(texts[word]) if prompt.startswith(f[1] + after, at)), None
        )
        if written is None:
            return {}
        start, form = written
        found[word] = Place(at, start, len(form))
        at += len(form) + len(after)
    return found if at == len(prompt) else {}


def _forms(text: str) -> list[tuple[int, str]]:
    """Returns what a template may write of a text, each with the characters that it leaves out
    before."""
    left = len(text) - len(text.lstrip())
    return [(0, text), (left, text.strip()), (left, text.lstrip()), (0, text.rstrip())]


def tokens_of(offsets: Sequence[tuple[int, int]], first: int, end: int) -> tuple[int, int] | None:
    """Returns the tokens [first, end) that have any of the characters [first, end) of a prompt, or
    None if none has.

    Args:
        offsets: for each token its first character and the one after its last; equal for tokens
            that stand for no text.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > first and a < b]
    return (inside[0], inside[-1] + 1) if inside else None


def disjoint(spans: Sequence[tuple[int, int]]) -> Spans:
    """Returns token ranges in ascending order, in which a token of two belongs to the first."""
    found: list[tuple[int, int]] = []
    last = 0
    for first, end in sorted(spans):
        if max(first, last) < end:
            found.append((max(first, last), end))
            last = end
    return tuple(found)


def first_tokens(spans: Spans, most: int) -> Spans:
    """Returns the first `most` tokens of token ranges."""
    found = []
    for first, end in spans:
        if most > 0:
            found.append((first, min(end, first + most)))
        most -= end - first
    return tuple(found)
