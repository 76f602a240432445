"""What the scheduler tells the workers, and what they answer: plain data, pickled between
processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcrush.plan import Plan


@dataclass(frozen=True)
class Compact:
    """One compaction of one request, to be run before the forward pass of this step. It names
    blocks; the workers decide how many tokens of each layer and head fill them.

    Args:
        request_id: vLLM's id of the request.
        computed: number of tokens whose KV has been computed when the compaction runs (`n`).
        source: ids of the blocks before the tail, in slot order.
        compressed: how many of them, from the first, are the compressed region so far; the
            others are raw and full.
        target: ids of the blocks of the new compressed region, in slot order. They may include ids
            of `source` (compaction in place).
        tail: ids of the blocks of the tail, which stay as they are.
        tail_tokens: number of tokens in `tail`.
        slot_shift: position minus slot of later tokens, whether tokens were evicted or packed
            closer.
        same_as: id of a request whose compaction, earlier in this step, filled `target` with what
            this one would, so that there is nothing to move; None for most.
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


# What a worker does before a step. Other kinds, such as copies between tiers of memory, would be
# further records in a union.
Command = Compact


@dataclass(frozen=True)
class Admitted:
    """A request that runs under a policy, as the scheduler resolved its parameters.

    Args:
        policy: the policy with its parameters, in the grammar of `spec`.
        plan: when the request is compacted, and to how many blocks.
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
        commands: commands in the order in which they run.
        admitted: by id, those of this step's new and resumed requests that have a plan.
        observe: by request id, the number of this step's newest tokens whose queries are to be
            kept, for a compaction to come.
    """

    commands: list[Command] = field(default_factory=list)
    admitted: dict[str, Admitted] = field(default_factory=dict)
    observe: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compacted:
    """What a compaction did.

    Args:
        request_id: vLLM's id of the request.
        policy: the outermost name of the request's policy.
        seconds: how long the compaction took.
        held: tokens in the compressed region, the mean over this rank's layers and KV heads.
        evicted: tokens that the compaction dropped, the same mean.
        pages: this rank's pages of the compressed region in each codec; empty where its pages are
            raw ones in the order of their blocks.
    """

    request_id: str
    policy: str
    seconds: float
    held: float
    evicted: float
    pages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerReport:
    """What a worker tells the scheduler, attached to `ModelRunnerOutput.kvcrush`.

    Args:
        compacted: the compactions since the last report.
        failures: (request id, policy) of compactions in which the policy failed, so that the sinks
            and the newest tokens were kept instead.
        peaks: the most bytes that the worker has held beside its KV cache, by their use; see
            `stats.Stats.worker_bytes`.
        losses: what codecs lose on the model, `config.Settings.losses`, told once if the worker
            measured it.
    """

    compacted: list[Compacted] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
