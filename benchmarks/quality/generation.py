"""Prompts of published benchmarks, and how to read their files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generation:
    """A prompt to be answered freely; `task` ("ruler/vt") and `index` (the line in its file,
    from 0) name it."""

    task: str
    index: int
    # The most tokens that a prompt of its kind may have.
    context: int
    prompt: list[int]
    # Where in `prompt` the question begins, or what truncation left of it.
    question_start: int
    max_new_tokens: int
    answers: tuple[str, ...]
    # From the answer's text to 0..1.
    score: Callable[[str], float]

    def split(self, mode: str) -> tuple[list[int], list[int]]:
        """Returns what is read before compaction, and what is forced after it: the question, or in
        mode "question_before" the last token alone, so that not even the answer's first token comes
        from the uncompressed prompt."""
        at = len(self.prompt) - 1 if mode == "question_before" else self.question_start
        return self.prompt[:at], self.prompt[at:]


def folder_of(folder: pathlib.Path, what: str) -> pathlib.Path:
    """Returns `folder` if it is one. Raises ValueError otherwise."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to read {what} from")
    return folder


def records(path: pathlib.Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the first `limit` records of a JSON-lines file with their places (from 0), blank lines
    left out. Raises ValueError naming file and line."""
    found = 0
    with path.open(encoding="utf-8") as lines:
        for place, line in enumerate(lines):
            if limit is not None and found >= limit:
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise broken(path, place, f"is not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise broken(path, place, "is not a JSON object")
            found += 1
            yield place, record
    if not found:
        raise ValueError(f"{path} has no records")


def broken(path: pathlib.Path, place: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {place + 1}: {what}")


def text_field(path: pathlib.Path, place: int, record: dict[str, Any], field: str) -> str:
    """Returns a field that must be text."""
    if not isinstance(record.get(field), str):
        raise broken(path, place, f"the field {field!r} must be text")
    return str(record[field])


def texts_field(path: pathlib.Path, place: int, record: dict[str, Any], field: str) -> list[str]:
    """Returns a field that must be a list of at least one text."""
    values = record.get(field)
    if not (isinstance(values, list) and values and all(isinstance(v, str) for v in values)):
        raise broken(path, place, f"the field {field!r} must be a list of texts, and not empty")
    return list(values)


def encode(tokenizer: Any, text: str) -> Any:
    """Returns the tokenizer's encoding, with its own beginning unless the text has that already."""
    begins = tokenizer.bos_token and text.startswith(tokenizer.bos_token)
    return tokenizer(
        text, add_special_tokens=not begins, return_offsets_mapping=True, verbose=False
    )


def encode_at(tokenizer: Any, text: str, question: int) -> tuple[list[int], int]:
    """Returns token ids, and the first token that lies wholly in `text[question:]` (or else the
    last)."""
    encoded = encode(tokenizer, text)
    tokens = list(encoded["input_ids"])
    inside = (
        place
        for place, (start, end) in enumerate(encoded["offset_mapping"])
        if start >= question and end > start
    )
    return tokens, next(inside, len(tokens) - 1)
