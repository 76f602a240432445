"""Times launches on a device, as the replay of a graph and one by one from Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], None]


class Burst:
    """Calls one after the other, often enough to be timed; `calls` go round the layers, so that
    none finds its data in a cache.

    Attributes:
        launches: calls of one run.
    """

    def __init__(self, run: Call, launches: int, seconds: float, device: str):
        self._run, self.launches, self._device = run, launches, device
        self._times = 1
        if device == "cuda":
            self._times = max(1, min(1000, math.ceil(seconds / max(self() * launches, 1e-7))))

    def __call__(self) -> float:
        """Seconds of one call."""
        if self._device != "cuda":
            began = time.perf_counter()
            self._run()
            return (time.perf_counter() - began) / self.launches
        event: Any = torch.cuda.Event  # untyped
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._times):
            self._run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self._times / self.launches


def eager(calls: Sequence[Call]) -> Call:
    """Returns a function that launches all calls from Python."""

    def run() -> None:
        for call in calls:
            call()

    return run


def graph(calls: Sequence[Call]) -> Call:
    """Returns a function that replays all calls as one graph. They must have run before, so that
    everything is compiled."""
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    captured.replay()
    torch.cuda.synchronize()
    return captured.replay


class Copy:
    """Copies on the device: the rate that shares are of. Bytes read and written both count."""

    def __init__(self, size: int, device: str):
        self.bytes = 2 * size
        self._from = torch.zeros(size, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)

    def __call__(self) -> None:
        self._to.copy_(self._from)


class Product:
    """A square product of 16-bit matrices: the rate that shares of prefill are of."""

    def __init__(self, size: int, dtype: torch.dtype, device: str):
        self.flops = 2 * size**3
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def __call__(self) -> None:
        torch.matmul(self._a, self._b, out=self._out)
