"""MiKV: tokens that another policy would evict stay in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcrush.policies.h2o import H2O


@dataclass
class MiKV(H2O):
    """MiKV, "No Token Left Behind" (arXiv 2402.18096): tokens that H2O would keep stay in eight
    bits, and those that it would evict stay in fewer and are never promoted again. How many get
    eight bits follows from the budget. Only tokens that do not even fit in the low bits are
    evicted.

    The paper's low bits are per-token integers behind an outlier balancer; here they are those of
    `tc8`, or of `int4` without the model's tables.

    Cost: O(w n D) on the pages themselves, no copy of the keys.

    Choose it where no token may vanish and some matter more than others.

    Attributes:
        recent: see `h2o`.
    """

    name: ClassVar[str] = "mikv"
    codecs: ClassVar[tuple[str, ...]] = ("int8", "tc8")
    tiers: ClassVar[bool] = True
