"""The kernels that are compared. A new one is a class elsewhere, listed here."""

from __future__ import annotations

from benchmarks.kernels.candidates import (
    Candidate,
    TorchSdpa,
    VllmBf16,
    VllmBf16Evicted,
    VllmFp32,
)
from benchmarks.kernels.ours import OURS

BASELINE: type[Candidate] = VllmBf16
CANDIDATES: tuple[type[Candidate], ...] = (VllmBf16, VllmFp32, VllmBf16Evicted, TorchSdpa, *OURS)
CODECS = tuple(dict.fromkeys(c.codec for c in CANDIDATES))
