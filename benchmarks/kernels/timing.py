"""Times calls in turns, so that what disturbs one disturbs all, and derives figures from that."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# What one burst measured: seconds a call by part of it, on both clocks (wall, CPU).
Parts = dict[str, tuple[float, float]]
CLOCKS = ("wall", "cpu")


def now() -> tuple[float, float]:
    """Returns both clocks. The CPU's counts all threads of this process."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Seconds on both clocks."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def turns(seconds: float, one: float, sets: int, flush: Callable[[], None] | None) -> int:
    """Calls of `one` seconds in a burst."""
    wanted = max(1, math.ceil(seconds / one))
    return wanted if flush is None else min(wanted, sets)


class Burst:
    """Calls `call(index)` long enough to be timed, going round the copies 0 … sets - 1 so that
    none is still in the cache when its turn comes again. With `flush`, which empties the cache and
    is not timed, at most once round."""

    def __init__(
        self,
        call: Callable[[int], None],
        sets: int,
        seconds: float,
        flush: Callable[[], None] | None = None,
    ):
        self._call, self._sets, self._next, self._flush = call, sets, 0, flush
        self._times = 1
        self()  # the first call pays for what others find ready
        self._times = turns(seconds, self()["call"][0], sets, flush)

    def __call__(self) -> Parts:
        if self._flush is not None:
            self._flush()
        began = now()
        for _ in range(self._times):
            self._call(self._next)
            self._next = (self._next + 1) % self._sets
        wall, cpu = since(began)
        return {"call": (wall / self._times, cpu / self._times)}


def take_turns(
    bursts: Mapping[str, Callable[[], Parts]], rounds: int, seed: int = 0
) -> dict[str, list[Parts]]:
    """Measures one burst of everything a round, in an order drawn anew for every round."""
    found: dict[str, list[Parts]] = {name: [] for name in bursts}
    draw = random.Random(seed)
    for _ in range(rounds):
        for name in draw.sample(list(bursts), len(bursts)):
            found[name].append(bursts[name]())
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, lower and upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Returns the ratios round by round: what slowed a whole round cancels."""
    return [a / b for a, b in zip(over, under, strict=True)]
