"""What there is to say about each policy, from the docstrings of their classes."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from vllm_kvcrush import policies
from vllm_kvcrush.policies import Policy
from vllm_kvcrush.spec import ALIASES

_ATTRIBUTES = "\n\nAttributes:\n"
NEEDS = {
    "queries": "the last queries",
    "positions": "positions, 4 bytes a token, layer and head",
    "state": "running state, 4 bytes a token, layer and head",
    "repeat": "a second pass of the model over what is compacted",
}


@dataclass(frozen=True)
class Description:
    """One policy.

    Attributes:
        name: its name.
        title: the module's or the class's first sentence.
        source: the paper, or an empty string.
        text: paragraphs of the docstring but for the following ones.
        cost, choose: what it costs, and when to choose it; empty where it does not say.
        needs: what the engine keeps for it, in words.
        parameters: (name, default, meaning) of each.
    """

    name: str
    title: str
    source: str
    text: tuple[str, ...]
    cost: str
    choose: str
    needs: str
    parameters: tuple[tuple[str, str, str], ...]


def describe(name: str) -> Description:
    """Returns what the docstring of policy `name` says. Raises ValueError for an unknown one."""
    cls = policies.class_of(name)
    body = (inspect.getdoc(cls) or "").partition(_ATTRIBUTES)[0]
    paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
    module = inspect.getmodule(cls)
    title = (module.__doc__ if module else None) or paragraphs[0]
    source = re.search(r"arXiv \d{4}\.\d{5}|openreview \w+", paragraphs[0])
    special = {"Cost: ": "", "Choose it ": ""}
    text = []
    for paragraph in paragraphs:
        start = next((s for s in special if paragraph.startswith(s)), None)
        if start is None:
            text.append(paragraph)
        else:
            special[start] = paragraph.removeprefix(start)
    return Description(
        name,
        title.strip().split("\n")[0],
        source[0] if source else "",
        tuple(text),
        special["Cost: "],
        special["Choose it "],
        _needs(cls),
        tuple(_parameters(cls)),
    )


def _needs(cls: type[Policy]) -> str:
    try:
        policy = policies.get(cls.name)
    except ValueError:
        return ""
    return "; ".join(NEEDS[need] for need in NEEDS if need in policy.needs)


def _meanings(cls: type[Policy]) -> dict[str, str]:
    """Returns what docstrings say about each attribute, a class's own before those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        attributes = inspect.cleandoc(vars(each).get("__doc__") or "").partition(_ATTRIBUTES)[2]
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(attributes)):
            names, _, meaning = entry.partition(":")
            for name in names.split(","):
                found[name.strip()] = " ".join(meaning.split())
    return found


def _parameters(cls: type[Policy]) -> list[tuple[str, str, str]]:
    found, meanings = [], _meanings(cls)
    for own in fields(cls):
        if not own.init:
            continue
        if own.default is not MISSING:
            default = _word(own.default)
        elif own.default_factory is not MISSING:
            made = own.default_factory()
            default = made.name if isinstance(made, Policy) else _word(made)
        else:
            default = ""
        found.append((own.name, default, meanings.get(own.name, "")))
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def section(about: Description) -> str:
    """Returns a policy's part of the page, in Markdown."""
    parts = [f"## `{about.name}`", *(about.text)]
    facts = [
        f"- Needs: {about.needs or 'nothing beside the pages'}.",
        f"- Cost: {about.cost}" if about.cost else "",
        f"- Choose it {about.choose}" if about.choose else "",
    ]
    parts.append("\n".join(fact for fact in facts if fact))
    if about.parameters:
        rows = [f"| `{n}` | {f'`{d}`' if d else ''} | {m} |" for n, d, m in about.parameters]
        parts.append("\n".join(["| parameter | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def page(names: Sequence[str], figures: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Returns a page about policies, in Markdown: a table, if there are several, and a section of
    each.

    Args:
        names: which ones.
        figures: columns to add to the table: by heading, cells by policy.

    Raises:
        ValueError: an unknown name.
    """
    every = [describe(name) for name in names]
    parts = [section(about) for about in every]
    if len(every) > 1:
        figures = figures or {}
        header = ["policy", "in one line", "source", *figures]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for about in every:
            cells = [f"[`{about.name}`](#{about.name})", about.title, about.source or "–"]
            cells += [column.get(about.name, "–") for column in figures.values()]
            lines.append("| " + " | ".join(cells) + " |")
        parts.insert(0, "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def documented() -> tuple[str, ...]:
    """Returns the names of all policies but those that are another one with codecs."""
    return tuple(name for name in policies.names() if name not in ALIASES)
