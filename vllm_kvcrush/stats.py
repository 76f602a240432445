"""What the scheduler counts, in a form that crosses processes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Upper bounds of the compaction-time histogram, in seconds.
COMPACTION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# An engine that runs without stats never takes its samples; more than these are not kept.
_MOST_SAMPLES = 4096


@dataclass
class PolicyStats:
    """Compactions by one policy. `blocks_freed` counts blocks that really returned to the pool:
    one that another request still holds is not freed."""

    compactions: int = 0
    tokens_evicted: int = 0
    blocks_freed: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, tokens: int, blocks: int, seconds: float | None) -> None:
        """Counts one compaction."""
        self.compactions += 1
        self.tokens_evicted += tokens
        # Blocks that stay shared can make a compaction cost some; a counter cannot go down.
        self.blocks_freed += max(0, blocks)
        if seconds is not None:
            self.add_seconds(seconds)

    def add_seconds(self, seconds: float) -> None:
        """Adds one sample of the time a compaction took."""
        if len(self.seconds) < _MOST_SAMPLES:
            self.seconds.append(seconds)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and a list."""
        return {
            "compactions": self.compactions,
            "tokens_evicted": self.tokens_evicted,
            "blocks_freed": self.blocks_freed,
            "seconds": list(self.seconds),
        }


@dataclass
class Stats:
    """Counts since the last `take`.

    Increments rather than totals, because vLLM hands each snapshot to one of several API servers
    and their counters are added up: a total would be counted once in each.

    Attributes:
        policies: by name.
        deferrals: compactions put off, by reason ("shared", "no_room").
        policy_failures: compactions in which the policy failed, by its name.
        kv_bytes_held: bytes of KV that running requests hold now, by policy.
        kv_bytes_raw_equivalent: what they would hold without compression.
        worker_bytes: the most bytes that a worker has held beside its KV cache, by what for
            ("gathered": keys and values that a policy reads,
            "queries", "running": state of policies, "scratch": of kernels).
    """

    policies: dict[str, PolicyStats] = field(default_factory=dict)
    deferrals: dict[str, int] = field(default_factory=dict)
    policy_failures: dict[str, int] = field(default_factory=dict)
    kv_bytes_held: dict[str, int] = field(default_factory=dict)
    kv_bytes_raw_equivalent: dict[str, int] = field(default_factory=dict)
    worker_bytes: dict[str, int] = field(default_factory=dict)

    def record_compaction(
        self, policy: str, tokens: int, blocks: int, seconds: float | None = None
    ) -> None:
        """Counts one compaction: tokens evicted, blocks returned to the pool, and the time it
        took where that is known already."""
        self.policies.setdefault(policy, PolicyStats()).add(tokens, blocks, seconds)

    def record_seconds(self, policy: str, seconds: float) -> None:
        """Adds the time of a compaction that was counted before."""
        self.policies.setdefault(policy, PolicyStats()).add_seconds(seconds)

    def record_deferral(self, reason: str) -> None:
        """Counts one compaction put off."""
        self.deferrals[reason] = self.deferrals.get(reason, 0) + 1

    def record_policy_failure(self, policy: str) -> None:
        """Counts one compaction that kept sinks and newest tokens because the policy failed."""
        self.policy_failures[policy] = self.policy_failures.get(policy, 0) + 1

    def take(self) -> dict[str, Any]:
        """What `SchedulerStats.kv_connector_stats["kvcrush"]` carries; starts counting anew."""
        taken = {
            "policies": {name: stats.to_dict() for name, stats in self.policies.items()},
            "deferrals": self.deferrals,
            "policy_failures": self.policy_failures,
            "kv_bytes_held": self.kv_bytes_held,
            "kv_bytes_raw_equivalent": self.kv_bytes_raw_equivalent,
            "worker_bytes": dict(self.worker_bytes),
        }
        self.policies, self.deferrals, self.policy_failures = {}, {}, {}
        return taken
