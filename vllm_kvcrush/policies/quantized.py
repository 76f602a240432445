"""Policies that keep every token in fewer bits, and evict only what then still does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcrush.policies.h2o import H2O
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
    codecs: ClassVar[tuple[str, ...]] = ("int8",)


@dataclass
class Int4(Quantized):
    """Four bits a channel: keys per channel over 64 tokens, values rotated by a Hadamard matrix,
    per token (the calibration-free forms that lose least, after KIVI, arXiv 2402.02750, and
    QuaRot, arXiv 2404.00456)."""

    name: ClassVar[str] = "int4"
    codecs: ClassVar[tuple[str, ...]] = ("int4",)


@dataclass
class TC4(Quantized):
    """Some four bits a channel by transform coding (`codecs.transform`): keys with their rotary
    embedding in components of unequal bits, so that the transform goes into the query; rotated
    values in four bits. Needs the model's tables."""

    name: ClassVar[str] = "tc4"
    codecs: ClassVar[tuple[str, ...]] = ("tc4",)


@dataclass
class TC6(Quantized):
    """Less than two and a half bits a channel: as `tc8`, but keys in 1.75 bits and values in 2.5.
    Needs the model's tables."""

    name: ClassVar[str] = "tc6"
    codecs: ClassVar[tuple[str, ...]] = ("tc6",)


@dataclass
class TC8(Quantized):
    """Less than two bits a channel by transform coding: keys without their rotary embedding in
    1.375 bits, values in 2.25, as means over all heads. Needs the model's tables."""

    name: ClassVar[str] = "tc8"
    codecs: ClassVar[tuple[str, ...]] = ("tc8",)


@dataclass
class Auto(Quantized):
    """As many bits as the budget pays for: the first codec in which all tokens fit, and with what
    that leaves the newest ones in the codec before. Evicts only what does not even fit in the last.
    Without the model's tables int4 stands for the transform codecs."""

    name: ClassVar[str] = "auto"
    codecs: ClassVar[tuple[str, ...]] = ("int8", "tc4", "tc6", "tc8")


@dataclass
class MiKV(H2O):
    """MiKV, "No Token Left Behind" (arXiv 2402.18096): tokens that H2O would keep stay in eight
    bits, those that it would evict in few, never to be promoted again; how many are important
    follows from the budget. Evicts only what does not even fit in the low bits.

    The paper's low bits are per-token integers behind an outlier balancer; here they are those of
    `tc8`, or of `int4` without the model's tables."""

    name: ClassVar[str] = "mikv"
    codecs: ClassVar[tuple[str, ...]] = ("int8", "tc8")
    tiers: ClassVar[bool] = True
