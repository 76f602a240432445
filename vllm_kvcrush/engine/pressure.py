"""Which requests are compacted, and how far, when the pool runs short. Pure.

With `--kv-pressure`, requests that state no budget of their own hold everything until the pool is
nearly full. Then they give blocks back by steps: those first that lose least, among these those
that free most, down to their budgets and no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vllm_kvcrush.plan import Plan, Shape

# Where the pool is too full, so much of the limit is aimed at, so that the next step does not
# compact something again.
RELIEF = 0.9
# From this share of the limit on, queries are kept for scores: a burst of prompts fills the rest in
# fewer steps than a window has tokens.
NEAR = 0.5
# A compaction reads all that a request holds, so giving back less of it is not worth while.
_WORTH_WHILE = 0.125


class Step(NamedTuple):
    """What one request may do next.

    Attributes:
        level: where it then is: 0 is raw, `levels(plan)` its budget.
        freed: blocks that this gives back to the pool.
        worth_while: whether they are many, for what it holds.
    """

    level: int
    freed: int
    worth_while: bool


@dataclass(frozen=True)
class Holder:
    """A request that may be compacted under pressure.

    Args:
        plan: its plan, under whose budget it is never squeezed.
        level: where it is.
        n, held: tokens with KV, and the slots that they take.
        region: blocks of its compressed region, and tokens in it.
        own: how many of its blocks before the tail nobody else holds.
        asks: whether every compaction asks its policy.
        ready: whether its policy could choose now: the queries that it needs were kept.
    """

    plan: Plan
    level: int
    n: int
    held: int
    region: tuple[int, int]
    own: int
    asks: bool = False
    ready: bool = True

    @property
    def candidates(self) -> int:
        """Tokens before the tail."""
        blocks, tokens = self.region
        return tokens + self.held - self.plan.tail(self.held) - blocks * self.plan.block_size

    def scores(self, level: int) -> bool:
        """Whether a compaction to this level asks the policy."""
        compressed = shape_at(self, level).compressed
        return self.asks or self.plan.needs_scores(compressed, self.candidates)

    def steps(self) -> Iterator[Step]:
        """Yields what it may do, those that lose least first."""
        if not self.plan.may_compact(self.n):
            return
        size = self.plan.block_size
        for level in range(max(1, self.level), levels(self.plan) + 1):
            freed = self.own - shape_at(self, level).compressed
            if freed <= 0 or not (self.ready or not self.scores(level)):
                continue
            # What grew since, no more often than under a budget.
            least = self.plan.decode_interval / size if level == self.level else 0.0
            yield Step(level, freed, freed >= max(least, _WORTH_WHILE * self.held / size))


def levels(plan: Plan) -> int:
    """Returns how many steps lead from raw tokens to the budget of a plan: all in one of its codecs
    after the other, or every other token of those that were left; the last is the budget."""
    if plan.packings:
        return len(plan.packings) + 1
    if isinstance(plan.budget, int):
        return 4
    return sum(plan.budget < part for part in (0.5, 0.25, 0.125)) + 1


def shape_at(holder: Holder, level: int) -> Shape:
    """Returns what a request holds after a compaction to a level, at least what its budget says."""
    plan = holder.plan
    tight = plan.shape(holder.n, holder.held)
    if level >= levels(plan):
        return tight
    if plan.packings:
        compressed = plan.packings[level - 1].blocks(holder.candidates)
        most = plan.packings[0].blocks(holder.candidates)
    else:
        compressed = (holder.n >> level) // plan.block_size
        most = holder.candidates // plan.block_size
    return Shape(max(tight.compressed, min(compressed, most)), tight.tail_tokens)


def may_score(holder: Holder) -> bool:
    """Returns whether one of the next steps of a request asks its policy."""
    last = levels(holder.plan)
    return any(holder.scores(min(last, holder.level + i)) for i in (0, 1) if holder.level + i)


def relieve(holders: Mapping[str, Holder], missing: int, small: bool = False) -> dict[str, Step]:
    """Chooses steps that together give back `missing` blocks, or all that can be.

    Each request takes at most one; it passes over levels only after all others have taken those
    that lose less.

    Args:
        small: whether steps that are not worth while are taken too, where the others do not
            suffice.
    """
    ways = [
        (worth_while, level, -freed, request_id)
        for request_id, holder in holders.items()
        for level, freed, worth_while in holder.steps()
    ]
    chosen: dict[str, Step] = {}
    for worth_while, level, lost, request_id in sorted(ways, key=lambda w: (not w[0], *w[1:])):
        if missing <= 0 or not (worth_while or small):
            break
        step = Step(level, -lost, worth_while)
        gained = step.freed - (chosen[request_id].freed if request_id in chosen else 0)
        if gained > 0:
            chosen[request_id] = step
            missing -= gained
    return chosen
