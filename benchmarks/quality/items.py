"""An item of the quality benchmark: a context, and turns of a question and its gold answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One question over the context, as text.

    Everything is forced token by token; only `answer` is scored. `lead` opens the answer ("The
    number is") and is never empty in an item's first turn: the first token after a prompt comes
    from the uncompressed prefill, so it must not be one that counts.
    """

    question: str
    lead: str
    answer: str
    # Another answer that could be given here, whose first token differs from `answer`'s: an older
    # instruction, a refusal. The probability of that first token is recorded.
    rival: str = ""


@dataclass(frozen=True)
class Item:
    """One item. `task` is its kind, `index` its place among the items of that kind."""

    task: str
    index: int
    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class TokenTurn:
    """A turn as token ids; `rival` is one token, or None."""

    question: list[int]
    lead: list[int]
    answer: list[int]
    rival: int | None = None


@dataclass(frozen=True)
class TokenItem:
    """An item as token ids; `task` and `index` as in `Item`."""

    task: str
    index: int
    context: list[int]
    turns: list[TokenTurn]

    @classmethod
    def encode(cls, item: Item, tokenizer: Any) -> TokenItem:
        """Encodes piece by piece, so that every mode and every peer sees the same tokens."""

        def ids(text: str, first: bool = False) -> list[int]:
            # Models with a token for the beginning need it there, and nowhere else.
            return list(tokenizer.encode(text, add_special_tokens=first)) if text else []

        turns = []
        for number, turn in enumerate(item.turns):
            answer, rival = ids(turn.answer), ids(turn.rival)
            if not answer or (number == 0 and not turn.lead):
                raise ValueError(f"{item.task} {item.index}: a turn lacks its answer or its lead")
            if rival and rival[0] == answer[0]:
                raise ValueError(f"{item.task} {item.index}: rival and answer begin alike")
            turns.append(
                TokenTurn(ids(turn.question), ids(turn.lead), answer, rival[0] if rival else None)
            )
        return cls(item.task, item.index, ids(item.context, first=True), turns)

    def prompt(self, mode: str) -> list[int]:
        """Returns what is read before compaction: the context, and in mode "question_before" the
        first question too."""
        return self.context + (self.turns[0].question if mode == "question_before" else [])

    def forced(self, mode: str) -> tuple[list[int], list[bool], list[int | None]]:
        """Returns what follows the prompt: token ids, which of them are scored, and rival
        tokens."""
        tokens: list[int] = []
        scored: list[bool] = []
        rivals: list[int | None] = []
        for number, turn in enumerate(self.turns):
            before = (
                turn.lead
                if number == 0 and mode == "question_before"
                else (turn.question + turn.lead)
            )
            tokens += before + turn.answer
            scored += [False] * len(before) + [True] * len(turn.answer)
            rivals += [None] * len(before) + [turn.rival] + [None] * (len(turn.answer) - 1)
        return tokens, scored, rivals


MODES = ("question_before", "question_after")
