"""How fast this machine reads memory: the limit that decode attention cannot pass."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

REPEATS = 5


class Reader:
    """Sequential reads of a buffer of `size` bytes, far larger than the cache, in the way that
    proved fastest with this number of threads."""

    def __init__(self, size: int):
        self.bytes = size // 8 * 8
        whole = torch.ones(self.bytes // 8, dtype=torch.int64)  # written: every page is there
        floats, numbers = whole.view(torch.float32), whole.numpy()
        ways: dict[str, Callable[[], object]] = {
            "torch sum float32": floats.sum,
            "torch sum int64": whole.sum,
            "torch amax float32": floats.amax,
            "torch norm float32": lambda: torch.linalg.vector_norm(floats),
            "torch dot float32": lambda: torch.dot(floats, floats),
            "numpy or int64": lambda: np.bitwise_or.reduce(numbers),
        }
        best = {way: min(_seconds(read) for _ in range(REPEATS)) for way, read in ways.items()}
        self.way = min(best, key=best.__getitem__)
        self._read = ways[self.way]

    def __call__(self, index: int) -> None:
        """Reads the whole buffer."""
        self._read()


def _seconds(read: Callable[[], object]) -> float:
    began = time.perf_counter()
    read()
    return time.perf_counter() - began
