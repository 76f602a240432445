"""The cases that are measured. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

FLASH = "vllm-flash-attn"
OURS = ("raw", "int8", "int4")
# Heads of a layer: query heads, KV heads, head size.
SHAPES = {"llama": (32, 8, 128), "smol": (9, 3, 64), "tiny": (4, 2, 64)}
BLOCK_SIZE = 128  # tokens of a raw page, as in benchmarks.gpu


@dataclass(frozen=True)
class Case:
    """One measurement of one layer; whatever is compared is measured in turn.

    Attributes:
        task: decode, prefill, store, gather, encode, scores or compact.
        context: tokens that each sequence holds, these rows' included.
        rows: query rows of each sequence; tokens that `store` stores of each; the window of
            `scores`.
        candidates: codecs of ours, and for attention FLASH.
    """

    task: str
    shape: str
    batch: int
    context: int
    rows: int
    candidates: tuple[str, ...]
    block_size: int = BLOCK_SIZE

    @property
    def name(self) -> str:
        """Returns a name that is unique among the cases of a run."""
        return (
            f"{self.task} {self.shape} batch={self.batch} context={self.context} rows={self.rows}"
        )

    def job(self) -> dict[str, Any]:
        """Returns what the worker is asked."""
        return dataclasses.asdict(self)


def cases(dry: bool) -> list[Case]:
    """Returns the cases of a run, what matters most first: a run that is out of time lacks the
    last."""
    attention = (FLASH, *OURS)
    if dry:
        tiny: dict[str, Any] = {"shape": "tiny", "block_size": 16}
        return [
            Case("decode", batch=2, context=80, rows=1, candidates=attention, **tiny),
            Case("prefill", batch=1, context=48, rows=8, candidates=OURS, **tiny),
            Case("store", batch=2, context=16, rows=2, candidates=("raw",), **tiny),
            Case("gather", batch=1, context=64, rows=1, candidates=OURS, **tiny),
            Case("encode", batch=1, context=64, rows=1, candidates=OURS, **tiny),
            Case("scores", batch=1, context=64, rows=8, candidates=OURS, **tiny),
            Case("compact", batch=1, context=64, rows=1, candidates=("int4",), **tiny),
        ]
    found = []
    for batch, context in ((8, 8192), (1, 32768), (64, 2048), (1, 8192), (8, 32768), (1, 131072)):
        found.append(Case("decode", "llama", batch, context, 1, attention))
    for context in (8192, 32768):
        found.append(Case("prefill", "llama", 1, context, 2048, attention))
    for batch, rows in ((1, 2048), (64, 1)):
        found.append(Case("store", "llama", batch, rows, rows, ("raw",)))
    found += [
        Case("gather", "llama", 1, 8192, 1, OURS),
        Case("encode", "llama", 1, 8192, 1, OURS),
        Case("scores", "llama", 1, 8192, 64, OURS),
        Case("compact", "llama", 1, 8192, 1, ("raw", "int8", "int4")),
    ]
    for batch, context in ((64, 8192), (1, 2048), (8, 2048)):
        found.append(Case("decode", "llama", batch, context, 1, attention))
    found.append(Case("decode", "smol", 8, 8192, 1, attention))
    return found
