"""Policies that keep every token in fewer bits, and evict only what then still does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcrush.policies.kvcrush import KVCrush


@dataclass
class Quantized(KVCrush):
    """Stores the compressed region in pages of another codec. While the budget holds all tokens
    in them nothing is evicted; below that KVCrush chooses what stays, token by token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("level", self.level == "token", "token, the only level of packed pages")


@dataclass
class Int8(Quantized):
    """Eight bits a channel with one scale for each token, head and side."""

    name: ClassVar[str] = "int8"
    codec: ClassVar[str] = "int8"


@dataclass
class Int4(Quantized):
    """Four bits a channel: keys per channel over 64 tokens, values rotated by a Hadamard matrix,
    per token (the calibration-free forms that lose least, after KIVI, arXiv 2402.02750, and
    QuaRot, arXiv 2404.00456)."""

    name: ClassVar[str] = "int4"
    codec: ClassVar[str] = "int4"
