"""RULER (Hsieh et al., 2024) from files that its own scripts made: `<task>/validation.jsonl`.

`scripts/data/prepare.py` in NVIDIA/RULER (GitHub) makes them, for one length and one model's
template; the folder to name is the one that holds the tasks' folders.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import scores
from benchmarks.quality.generation import (
    Generation,
    broken,
    encode_at,
    folder_of,
    records,
    text_field,
    texts_field,
)


@dataclass(frozen=True)
class Kind:
    """How a kind of task is answered and scored, and the ways in which its question begins."""

    max_new_tokens: int
    openings: tuple[str, ...]
    metric: Callable[[str, Sequence[str]], float] = scores.match_all


_NEEDLES = Kind(128, ("What are all the special magic", "What is the special magic"))
_TRACKING = Kind(30, ("Question: Find all variables that are assigned",))
_COMMON = Kind(120, ("Question: What are the 10 most common words",))
_FREQUENT = Kind(50, ("Question: Do not provide any explanation.",))
_READING = Kind(
    32, ("Answer the question based on the given documents.",), metric=scores.match_part
)
TASKS: dict[str, Kind] = {
    "niah_single_1": _NEEDLES,
    "niah_single_2": _NEEDLES,
    "niah_single_3": _NEEDLES,
    "niah_multikey_1": _NEEDLES,
    "niah_multikey_2": _NEEDLES,
    "niah_multikey_3": _NEEDLES,
    "niah_multivalue": _NEEDLES,
    "niah_multiquery": _NEEDLES,
    "vt": _TRACKING,
    "cwe": _COMMON,
    "fwe": _FREQUENT,
    "qa_1": _READING,
    "qa_2": _READING,
}


def load(
    folder: pathlib.Path,
    tokenizer: Any,
    max_tokens: int,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Generation]:
    """Returns the first `limit` prompts of each task in `folder`, or of `tasks` among them.

    RULER makes its files for a length, so a prompt of more than `max_tokens` is refused, not cut.
    Raises ValueError naming file and line.
    """
    found = sorted(folder_of(folder, "RULER").glob("*/validation.jsonl"))
    paths = {path.parent.name: path for path in found}
    if not paths:
        raise ValueError(f"{folder} has no <task>/validation.jsonl of RULER")
    for task in paths if tasks is None else tasks:
        if task not in paths:
            raise ValueError(f"{folder} has no {task}/validation.jsonl; it has {', '.join(paths)}")
        if task not in TASKS:
            raise ValueError(f"{paths[task]} is not a task of RULER, which are {', '.join(TASKS)}")
    return [
        _generation(paths[task], place, record, tokenizer, max_tokens)
        for task in (paths if tasks is None else tasks)
        for place, record in records(paths[task], limit)
    ]


def _generation(
    path: pathlib.Path, place: int, record: dict[str, Any], tokenizer: Any, max_tokens: int
) -> Generation:
    kind = TASKS[path.parent.name]
    text = text_field(path, place, record, "input")
    answers = texts_field(path, place, record, "outputs")
    at = max(text.rfind(opening) for opening in kind.openings)
    if at < 0:
        raise broken(path, place, f"no question that begins with {' or '.join(kind.openings)!r}")
    # Newer files keep the beginning of the answer apart.
    if "answer_prefix" in record:
        text += text_field(path, place, record, "answer_prefix")
    prompt, start = encode_at(tokenizer, text, at)
    if len(prompt) > max_tokens:
        raise broken(
            path,
            place,
            f"a prompt of {len(prompt)} tokens, of which there may be {max_tokens}; "
            "name a folder of shorter ones",
        )
    return Generation(
        task=f"ruler/{path.parent.name}",
        index=place,
        context=max_tokens,
        prompt=prompt,
        question_start=start,
        max_new_tokens=kind.max_new_tokens,
        answers=tuple(answers),
        score=lambda prediction: kind.metric(prediction, answers),
    )
