"""What the scheduler tells the worker. Plain data: it travels pickled between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcrush.config import RequestParams
from vllm_kvcrush.plan import Part


@dataclass(frozen=True)
class Compaction:
    """One compaction of one request, to be run before the forward pass of this step.

    Args:
        request_id: vLLM's id of the request.
        computed: tokens whose KV is written when the compaction runs (true count, `n`).
        source: ids of the blocks before the tail, in slot order.
        compressed: how many of them, from the first, are the compressed region so far; the
            others are raw and full.
        compressed_tokens: tokens in those, the same number in every layer and head.
        target: ids of the blocks of the new compressed region, in slot order. May contain ids of
            `source` (compaction in place).
        parts: tokens that fill them, in every layer and head, by codec in slot order.
        tail: ids of the blocks after them, which stay as they are.
        tail_tokens: tokens in `tail`.
        evicted: what the slots of later tokens differ from their positions by: the tokens gone
            from the block table, as evicted or as packed closer than raw.
        same_as: a request whose compaction, earlier in this step, filled `target` with just what
            this one would: there is nothing to move. None of most.
    """

    request_id: str
    computed: int
    source: tuple[int, ...]
    compressed: int
    compressed_tokens: int
    target: tuple[int, ...]
    parts: tuple[Part, ...]
    tail: tuple[int, ...]
    tail_tokens: int
    evicted: int
    same_as: str | None = None

    @property
    def keep(self) -> int:
        """Tokens that stay, of those before the tail."""
        return sum(part.tokens for part in self.parts)


@dataclass(frozen=True)
class Admitted:
    """A request that runs under a policy, as the scheduler resolved it: workers parse nothing.

    Args:
        params: its policy and budget.
        num_prompt_tokens: for its plan.
    """

    params: RequestParams
    num_prompt_tokens: int


@dataclass(frozen=True)
class StepCommands:
    """Everything a worker needs to know in one step, attached to `SchedulerOutput.kvcrush`.

    Args:
        compactions: in the order in which they run.
        deferred: requests whose compaction is overdue (see `blocks.KVCrushManager.compact`), so
            that their newest queries must be remembered until it happens.
        admitted: those of this step's new and resumed requests that have a plan.
    """

    compactions: list[Compaction] = field(default_factory=list)
    deferred: frozenset[str] = frozenset()
    admitted: dict[str, Admitted] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerReport:
    """What a worker tells the scheduler, attached to `ModelRunnerOutput.kvcrush`.

    Args:
        seconds: (policy, time that a compaction took), for each since the last report.
        failures: (request, policy) of each compaction in which the policy failed.
        peaks: the most bytes that the worker has held beside its KV cache, by what for; see
            `stats.Stats.worker_bytes`.
    """

    seconds: list[tuple[str, float]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
