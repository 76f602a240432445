"""Real English text that every Python ships: the language reference in `pydoc_data.topics`, cleaned
of markup until it reads like prose. It has no digits, so a number in a context is a needle.

The text differs a little between Python versions, and so do items made from it.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from bisect import bisect_left, bisect_right
from functools import cache

_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "–": "-", "—": "-", **dict.fromkeys('“”"*')})
_SENTENCE = re.compile(r"[A-Z][a-z]*,? [a-z](?:[A-Za-z ,.:?()/-]|; |(?<=[a-z])'(?=[a-z]))*[.]")
_NOTICE = re.compile(r"(Changed|New|Added|Deprecated|See) ")
# Longer words are identifiers; they would make contexts hard to cut to a length.
_LONGEST_WORD = 18


def _sentences(block: str) -> list[str]:
    """Returns the sentences of a block of documentation that are plain prose."""
    text = " ".join(block.translate(_TYPOGRAPHY).split())
    text = re.sub(r" ?\[\d+\]", "", text)
    text = re.sub(r"(?<=[a-z])- (?=[a-z])", "-", text)  # broken at the end of a line
    return [
        sentence
        for sentence in re.split(r"(?<=[a-z)][.]) (?=[A-Z])", text)
        if _SENTENCE.fullmatch(sentence)
        and not _NOTICE.match(sentence)
        and 6 <= len(sentence.split()) <= 60
        and max(map(len, sentence.split())) <= _LONGEST_WORD
    ]


@cache
def _text() -> tuple[list[str], list[int]]:
    """Returns all words, each with the white space before it, and the words at which sentences
    begin. No sentence occurs twice."""
    words: list[str] = []
    starts: list[int] = []
    seen: set[str] = set()
    topics = pydoc_data.topics.topics
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            sentences = [s for s in _sentences(block) if s not in seen]
            seen.update(sentences)
            if sum(len(s.split()) for s in sentences) < 12:
                continue  # a lone short sentence refers to what was left out
            for number, sentence in enumerate(sentences):
                starts.append(len(words))
                first, *rest = sentence.split()
                words += [(" " if number else "\n\n") + first, *(" " + word for word in rest)]
    return words, starts


def length() -> int:
    """Words in the text."""
    return len(_text()[0])


def boundary(place: float) -> int:
    """Returns the first word of a sentence, near `place` (0..1) of the text."""
    words, starts = _text()
    return starts[min(bisect_left(starts, place * len(words)), len(starts) - 1)]


def boundaries(start: int, end: int) -> list[int]:
    """Returns the words from `start` to `end`, both included, that begin a sentence."""
    words, starts = _text()
    found = []
    for lap in range(start // len(words), end // len(words) + 1):
        shift = lap * len(words)
        low, high = bisect_left(starts, start - shift), bisect_right(starts, end - shift)
        found += [first + shift for first in starts[low:high]]
    return found


def span(start: int, end: int) -> str:
    """Words `start` to `end` (excluded), with the white space before the first. Before its
    beginning and after its end the text goes round."""
    words, _ = _text()
    return "".join(words[place % len(words)] for place in range(start, end))
