"""How much of a prompt the prefix cache may give to a request that will be compacted."""

from __future__ import annotations

import pytest

from vllm_kvcrush.config import Demands
from vllm_kvcrush.engine.scheduler import KVCrushSchedulerMixin
from vllm_kvcrush.plan import Packing, Plan

QUERIES = Demands(frozenset({"queries"}))
BOTH = Demands(frozenset({"queries", "state"}), always=True)
ROOMY = (Packing("int4", (((64, 4),),)),)  # four times as many tokens as raw


def plan(budget: float, **more: object) -> Plan:
    return Plan(budget, 400, 16, window=40, prefill_interval=2048, decode_interval=8, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "demands", "last", "tokens"),
    [
        (plan(0.5), QUERIES, 420, 360),  # scored at the prompt's end
        (plan(0.5), Demands(), 420, 399),
        (plan(0.5, packings=ROOMY), QUERIES, 420, 399),  # every token stays, in fewer bits
        (plan(0.5, packings=ROOMY), BOTH, 420, 360),
        (plan(1.0), QUERIES, 420, None),
        (plan(0.5, packings=ROOMY, tiers=True), QUERIES, 420, 399),
    ],
)
def test_what_the_cache_may_give(
    found: Plan, demands: Demands, last: int, tokens: int | None
) -> None:
    assert KVCrushSchedulerMixin._exact_until(found, demands, last) == tokens


def test_a_window_that_reaches_back_before_the_first_compaction() -> None:
    """Everything fits at the prompt's end, and not any more a few tokens later."""
    seen = 0
    for budget in range(96, 512, 16):
        for prompt in (500, 508, 515):
            found = Plan(budget, prompt, 16, window=40, decode_interval=8, packings=ROOMY)
            first, scored = found.first_compaction(600), found.first_scoring(600)
            if first is not None and scored is not None and first < scored < first + 40:
                seen += 1
                cut = KVCrushSchedulerMixin._exact_until(found, QUERIES, 600)
                assert cut == min(first - 1, scored - 40)
    assert seen
