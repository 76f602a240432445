"""MiKV: what another policy would evict stays in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcrush.policies.h2o import H2O


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
