"""What is held against what: a front's log, servers' counters, and their memory."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.load import BROKEN, LEFT, REFUSED, WHOLE, Sent

PREFIX = "vllm_kvcrush:"
# A server's memory may grow by this much in the second half of its life, without oneDNN's cache: a
# busy process takes a while to reach the most that it ever holds at once.
MOST_GROWTH = 64 * 2**20
# Of a shorter life nothing is said: for its first minutes a server grows into its caches.
SHORTEST_LIFE = 240
LINE = re.compile(r'"POST \S*[?&]chaos=(\d+) [^"]*" (\d+) (.*)')
UPSTREAM = re.compile(r"127\.0\.0\.1:(\d+)")

Metrics = Mapping[str, float]


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """Returns the sum of the samples of `name` that have all of these labels."""
    return sum(
        value
        for key, value in metrics.items()
        if key.partition("{")[0] == name
        and all(f'{label}="{wanted}"' in key for label, wanted in labels.items())
    )


def by(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    """Returns the sums of the samples of `name` by the values of a label."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        own = re.search(rf'[{{,]{label}="([^"]*)"', key)
        if key.partition("{")[0] == name and own:
            found[own[1]] = found.get(own[1], 0) + value
    return found


def upstreams(log: str) -> dict[int, list[int]]:
    """Returns the ports to which nginx sent each request of ours, in order, from its log."""
    return {
        int(match[1]): [int(port) for port in UPSTREAM.findall(match[3])]
        for match in LINE.finditer(log)
    }


@dataclass
class Life:
    """A replica from its start to its end.

    Attributes:
        before: its samples when we began to watch.
        clean: whether it was ended so that no request was lost.
        foreign: whether others than our clients ask it too.
        memory: time, and bytes of its processes.
    """

    name: str
    port: int
    started: float
    before: Metrics = field(default_factory=dict)
    ended: float | None = None
    clean: bool = False
    foreign: bool = False
    memory: list[tuple[float, int]] = field(default_factory=list)

    def had(self, sent: Sent, to: Mapping[int, list[int]]) -> bool:
        """Whether this was the replica that answered, or was to answer, a request."""
        ports = to.get(sent.ask.number)
        return (
            bool(ports)
            and ports[-1] == self.port
            and self.started <= sent.started
            and (self.ended is None or sent.started <= self.ended)
        )


def since(metrics: Metrics, before: Metrics) -> dict[str, float]:
    """Returns by how much samples have grown."""
    return {key: value - before.get(key, 0) for key, value in metrics.items()}


def held(metrics: Metrics) -> list[str]:
    """Returns what a server at rest still holds; nothing, if all is well."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    names += (PREFIX + "kv_bytes_held", PREFIX + "kv_bytes_raw_equivalent", PREFIX + "pressure")
    return [f"{name} is {total(metrics, name):g}" for name in names if total(metrics, name)]


def accounts(metrics: Metrics, sent: Iterable[Sent], foreign: bool) -> list[str]:
    """Returns which counters of a server at rest are not what its clients saw.

    Args:
        metrics: by how much its samples grew in its life.
        sent: all requests of its life.
        foreign: whether others asked it too, so that counters may be larger.
    """
    mine = [*sent]
    whole = [s for s in mine if s.outcome == WHOLE]
    # Whether a request whose client left was taken before is the server's to know.
    open_ends = [s for s in mine if s.outcome in (LEFT, BROKEN)]
    begun = [s for s in open_ends if s.answered]
    wrong = []

    def between(what: str, found: float, least: float, most: float) -> None:
        if not least <= found <= (float("inf") if foreign else most):
            wrong.append(f"{what}: {found:g}, and clients saw {least:g} to {most:g}")

    taken = len(whole) + len(begun)
    most = len(whole) + len(open_ends)
    between("requests_total", total(metrics, PREFIX + "requests_total"), taken, most)
    refused: dict[str, int] = {}
    for s in mine:
        if s.outcome == REFUSED:
            refused[str(s.ask.refused)] = refused.get(str(s.ask.refused), 0) + 1
    for reason, found in by(metrics, PREFIX + "refusals_total", "reason").items():
        count = refused.pop(reason, 0)
        between(f"refusals_total of {reason}", found, count, count)
    wrong += [f"refusals_total has no {reason}" for reason in refused]
    tokens = sum(s.tokens for s in whole)
    generated = total(metrics, "vllm:generation_tokens_total")
    between(
        "generation_tokens_total", generated, tokens, tokens + sum(s.ask.most for s in open_ends)
    )
    compactions = total(metrics, PREFIX + "compactions_total")
    seen = sum(s.compactions for s in whole)
    between("compactions_total", compactions, seen, seen if not open_ends else float("inf"))
    timed = total(metrics, PREFIX + "compaction_seconds_count")
    if timed != compactions:
        wrong.append(f"{compactions:g} compactions, and {timed:g} in compaction_seconds")
    for name in ("policy_failures_total", "requests_uncompressed_total"):
        if count := total(metrics, PREFIX + name):
            wrong.append(f"{name} is {count:g}")
    return wrong


@dataclass
class Growth:
    """How a process's memory went in the second half of its life.

    Attributes:
        slope: bytes an hour, the median of the slopes between all pairs of samples.
        noise: bytes, the median distance of samples from that line, times 1.48.
        grown: bytes by which the line rises over that half.
        last: bytes at its end.
    """

    seconds: float
    slope: float
    noise: float
    grown: float
    last: int

    @property
    def within_noise(self) -> bool:
        return self.grown <= max(MOST_GROWTH, 3 * self.noise)


def growth(samples: Sequence[tuple[float, int]]) -> Growth | None:
    """Returns how memory grew (Theil and Sen's line), None for a life that was too short to tell.

    Args:
        samples: time in seconds and bytes.
    """
    if len(samples) < 4 or samples[-1][0] - samples[0][0] < SHORTEST_LIFE:
        return None
    middle = (samples[0][0] + samples[-1][0]) / 2
    half = [s for s in samples if s[0] >= middle]
    # A few hundred points say as much as all, and all pairs of thousands take long.
    half = half[:: max(1, len(half) // 300)]
    slopes = [
        (later[1] - one[1]) / (later[0] - one[0])
        for one, later in itertools.combinations(half, 2)
        if later[0] > one[0]
    ]
    slope = statistics.median(slopes)
    start = statistics.median(y - slope * (x - middle) for x, y in half)
    off = statistics.median(abs(y - start - slope * (x - middle)) for x, y in half)
    seconds = half[-1][0] - half[0][0]
    # The very last one may be of a process that ends.
    last = statistics.median_low(size for _, size in samples[-5:])
    return Growth(seconds, 3600 * slope, 1.48 * off, slope * seconds, last)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as a Markdown table; all have the keys of the first."""
    names = [*rows[0]]
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in cells
    )
