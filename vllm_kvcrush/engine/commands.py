"""What the scheduler tells the workers, and what they answer. Plain data: it travels pickled
between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcrush.plan import Plan


@dataclass(frozen=True)
class Compact:
    """One compaction of one request, to be run before the forward pass of this step. It carries
    blocks; how many tokens of which layer and head fill them is the worker's business.

    Args:
        request_id: vLLM's id of the request.
        computed: tokens whose KV is written when the compaction runs (true count, `n`).
        source: ids of the blocks before the tail, in slot order.
        compressed: how many of them, from the first, are the compressed region so far; the
            others are raw and full.
        target: ids of the blocks of the new compressed region, in slot order. May contain ids of
            `source` (compaction in place).
        tail: ids of the blocks after them, which stay as they are.
        tail_tokens: tokens in `tail`.
        slot_shift: by how much the slots of later tokens lie before their positions, whether
            tokens were evicted or packed closer.
        same_as: a request whose compaction, earlier in this step, filled `target` with just what
            this one would: there is nothing to move. None of most.
    """

    request_id: str
    computed: int
    source: tuple[int, ...]
    compressed: int
    target: tuple[int, ...]
    tail: tuple[int, ...]
    tail_tokens: int
    slot_shift: int
    same_as: str | None = None


# What a worker does before a step, in order. Room for `Copy` between tiers of memory, `Swap`,
# `Index`: each a record of its own, which carries blocks.
Command = Compact


@dataclass(frozen=True)
class Admitted:
    """A request that runs under a policy, as the scheduler resolved it: workers parse nothing.

    Args:
        policy: with its parameters, in the grammar of `spec`.
        plan: when it is compacted, to how many blocks.
        spans: (first, end) token positions that a policy may treat each on its own.
        protect: (first, end) token positions that stay whatever a policy says.
    """

    policy: str
    plan: Plan
    spans: tuple[tuple[int, int], ...] = ()
    protect: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StepCommands:
    """Everything a worker needs to know in one step, attached to `SchedulerOutput.kvcrush`.

    Args:
        commands: in the order in which they run.
        admitted: those of this step's new and resumed requests that have a plan.
        observe: of how many of this step's newest tokens of a request the queries are to be kept,
            for a compaction to come.
    """

    commands: list[Command] = field(default_factory=list)
    admitted: dict[str, Admitted] = field(default_factory=dict)
    observe: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compacted:
    """What a compaction did.

    Args:
        request_id: whose.
        policy: the outermost name of its policy.
        seconds: how long it took.
        held: tokens in the compressed region, the mean over this rank's layers and KV heads.
        evicted: tokens that it dropped, likewise.
    """

    request_id: str
    policy: str
    seconds: float
    held: float
    evicted: float


@dataclass(frozen=True)
class WorkerReport:
    """What a worker tells the scheduler, attached to `ModelRunnerOutput.kvcrush`.

    Args:
        compacted: each compaction since the last report.
        failures: (request, policy) of compactions in which the policy failed, so that the sinks and
            the newest tokens were kept instead.
        peaks: the most bytes that the worker has held beside its KV cache, by what for; see
            `stats.Stats.worker_bytes`.
    """

    compacted: list[Compacted] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
