"""What the scheduler counts, in a form that can be sent between processes. Imports neither vLLM
nor torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Upper bounds of the compaction-time histogram, in seconds.
COMPACTION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Why requests are compacted: they are over their budget, or the pool runs short.
REASONS = ("budget", "pressure")
# An engine that runs without stats never takes its samples, so their number is limited.
_MOST_SAMPLES = 4096


@dataclass
class PolicyStats:
    """Counts of the compactions by one policy.

    Attributes:
        compactions: how many there were, by reason (`REASONS`).
        tokens_evicted: tokens whose KV they dropped.
        blocks_freed: blocks that returned to the pool; a block that another request still holds
            is not freed.
        seconds: the time that each took, at most _MOST_SAMPLES of them.
    """

    compactions: dict[str, int] = field(default_factory=dict)
    tokens_evicted: int = 0
    blocks_freed: int = 0
    seconds: list[float] = field(default_factory=list)

    def add_seconds(self, seconds: float) -> None:
        """Adds the time of one compaction."""
        if len(self.seconds) < _MOST_SAMPLES:
            self.seconds.append(seconds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as plain numbers and a list."""
        return {
            "compactions": dict(self.compactions),
            "tokens_evicted": self.tokens_evicted,
            "blocks_freed": self.blocks_freed,
            "seconds": list(self.seconds),
        }


@dataclass
class Stats:
    """Counts since the last `take`, and bytes, which `take` does not reset.

    Counts are increments rather than totals, because vLLM hands each snapshot to one of several API
    servers and their counters are added up: a total would be counted once in each.

    Attributes:
        policies: counts of compactions, by the policy's name.
        deferrals: compactions put off, by reason ("shared", "no_room").
        policy_failures: compactions in which the policy failed, by the policy's name.
        kv_bytes_held: bytes of KV that running requests hold now, by policy.
        kv_bytes_raw_equivalent: bytes that they would hold without compression, by policy.
        kv_codec_bytes: bytes of the blocks that they hold, by the codec of their pages.
        worker_bytes: the most bytes that a worker has held beside its KV cache, by their use:
            "gathered" (keys and values that a policy reads), "queries" (of the window), "running"
            (state that policies keep), "scratch" (working memory of kernels).
        pressure: blocks in use, and those that the next step asks for, as a share of the pool.
        uncompressed: requests whose parameters could not be used where nobody could refuse them.
    """

    policies: dict[str, PolicyStats] = field(default_factory=dict)
    deferrals: dict[str, int] = field(default_factory=dict)
    policy_failures: dict[str, int] = field(default_factory=dict)
    kv_bytes_held: dict[str, int] = field(default_factory=dict)
    kv_bytes_raw_equivalent: dict[str, int] = field(default_factory=dict)
    kv_codec_bytes: dict[str, int] = field(default_factory=dict)
    worker_bytes: dict[str, int] = field(default_factory=dict)
    pressure: float = 0.0
    uncompressed: int = 0

    def record_compaction(self, policy: str, reason: str, blocks: int) -> None:
        """Counts one compaction and the blocks that it returned to the pool."""
        own = self.policies.setdefault(policy, PolicyStats())
        own.compactions[reason] = own.compactions.get(reason, 0) + 1
        # Blocks that stay shared can make a compaction cost some; a counter cannot go down.
        own.blocks_freed += max(0, blocks)

    def forget_compaction(self, policy: str, reason: str) -> None:
        """Takes back one that was counted since `take` and will not be run, as its request was
        preempted in the same step."""
        self.policies[policy].compactions[reason] -= 1

    def record_moved(self, policy: str, evicted: int, seconds: float) -> None:
        """Adds what the workers report of a compaction that was counted before: the tokens that it
        evicted and the seconds that it took."""
        own = self.policies.setdefault(policy, PolicyStats())
        own.tokens_evicted += max(0, evicted)
        own.add_seconds(seconds)

    def record_uncompressed(self) -> None:
        """Counts one request that asked for what is not served here, but runs uncompressed because
        it reached the scheduler without passing a front end that could refuse it."""
        self.uncompressed += 1

    def record_deferral(self, reason: str) -> None:
        """Counts one compaction put off."""
        self.deferrals[reason] = self.deferrals.get(reason, 0) + 1

    def record_policy_failure(self, policy: str) -> None:
        """Counts one compaction that kept sinks and newest tokens because the policy failed."""
        self.policy_failures[policy] = self.policy_failures.get(policy, 0) + 1

    def take(self) -> dict[str, Any]:
        """Returns what `SchedulerStats.kv_connector_stats["kvcrush"]` carries, and resets the
        counts."""
        taken = {
            "policies": {name: stats.to_dict() for name, stats in self.policies.items()},
            "deferrals": self.deferrals,
            "policy_failures": self.policy_failures,
            "kv_bytes_held": self.kv_bytes_held,
            "kv_bytes_raw_equivalent": self.kv_bytes_raw_equivalent,
            "kv_codec_bytes": self.kv_codec_bytes,
            "worker_bytes": dict(self.worker_bytes),
            "pressure": self.pressure,
            "uncompressed": self.uncompressed,
        }
        self.uncompressed = 0
        self.policies, self.deferrals, self.policy_failures = {}, {}, {}
        return taken
