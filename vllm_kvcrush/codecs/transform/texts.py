"""Text that every machine with vLLM has: what statistics are taken on, and what losses are measured
on. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence

# Packages that vLLM requires and whose descriptions are long: English with code and lists in it.
PACKAGES = ("openai", "torch")
# Letters of each that statistics are taken on; losses are measured on those that come after.
LETTERS = 4096


def fitting() -> str:
    """Returns the text to take statistics on."""
    return "\n\n".join(text[:LETTERS] for text in _descriptions())


def held_out() -> list[str]:
    """Returns the texts to measure losses on, of which `fitting` has no part."""
    return [text[LETTERS:] for text in _descriptions()]


def _descriptions() -> list[str]:
    """Returns the packages' descriptions, without paragraphs that have links or markup."""
    found = []
    for name in PACKAGES:
        description = importlib.metadata.metadata(name).json.get("description", "")
        paragraphs = str(description).split("\n\n")
        plain = [p for p in paragraphs if "](" not in p and "<" not in p and "://" not in p]
        found.append("\n\n".join(plain))
    return found


def excerpts(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    context: int,
    question: int,
    count: int,
) -> list[tuple[list[int], list[int]]]:
    """Returns pairs of a context and a question over it, `count` of them in all, as token ids. Half
    of a question goes on with the text, half repeats a part of the context, as questions and
    answers do.

    Args:
        encode: turns a text into token ids.
        context, question: their lengths in tokens; texts that are too short are repeated.
    """
    found = []
    half = question // 2
    each = -(-count // len(texts))
    for text in texts:
        ids = list(encode(text))
        while len(ids) < context + half + each:
            ids += ids
        step = min(context, (len(ids) - context - half) // each)
        for i in range(each):
            own = ids[i * step : i * step + context + half]
            again = (i + 1) * (context - half) // (each + 1)
            found.append((own[:context], own[context:] + own[again : again + half]))
    return found[:count]
