"""Memory that is given up only when it is needed: `--kv-pressure` in a real engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import BLOCK, POOL_BLOCKS, Engine, on_tiny_model
from tests.ledger import Ledger
from vllm_kvcrush.server import params
from vllm_kvcrush.server.rules import Rules

pytestmark = pytest.mark.engine
LIMIT = 0.8


@pytest.fixture
def pressed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Returns the engine as `--kv-pressure=0.8` would have it."""
    settings = dataclasses.replace(engine.scheduler._settings, pressure=LIMIT)
    monkeypatch.setattr(engine.scheduler, "_settings", settings)
    front = params.front_of(engine.llm.llm_engine.input_processor)
    monkeypatch.setattr(front, "_plain", Rules.of(settings))
    return engine


@pytest.fixture
def ledger(pressed: Engine) -> Iterator[Ledger]:
    ledger = Ledger(pressed.runner)
    yield ledger
    ledger.close()


def used(step: dict[str, Any]) -> int:
    """Returns the blocks that requests held in a step."""
    return POOL_BLOCKS - 1 - int(step["free"])


def test_requests_stay_whole_while_there_is_room(
    pressed: Engine, ids: list[int], plain: Any
) -> None:
    """They say what plain vLLM says; one that states a budget gets that at once."""
    prompts = [ids[:400], ids[2000:2300]]
    outputs = pressed.generate(prompts, pressed.params(24))
    assert [list(o.outputs[0].token_ids) for o in outputs] == plain.tokens(prompts, 24)
    for output in outputs:
        details = output.kv_tokens_details
        assert details["compactions"] == 0 and details["held"] == details["raw"]
        assert "reason" not in details and details["policy"] == "kvcrush"
    (output,) = pressed.generate([ids[:400]], pressed.params(24, kv_budget=0.5))
    assert output.kv_tokens_details["reason"] == "budget"
    assert output.kv_tokens_details["first_compaction"] <= 400


@on_tiny_model
@pytest.mark.parametrize("policy", ["kvcrush", "auto", "h2o", "mikv", "keepkv(adakv)@int8"])
def test_more_requests_than_the_pool_holds_raw(
    pressed: Engine, ledger: Ledger, ids: list[int], policy: str
) -> None:
    """They give blocks back step by step and are admitted instead of queued; those that come once
    there is room again stay whole."""
    prompts = [ids[i * 700 : i * 700 + 480] for i in range(8)]
    raw = -(-(480 + 60) // BLOCK)
    with pressed.watch() as steps:
        outputs = pressed.generate(prompts, pressed.params(60, kv_policy=policy))
        late = pressed.generate([ids[:200]], pressed.params(8, kv_policy=policy))
    assert max(step["running"] for step in steps) > (POOL_BLOCKS - 1) // raw
    assert not any(step["preempted"] for step in steps)
    found = [output.kv_tokens_details for output in outputs]
    touched = [details for details in found if details["compactions"]]
    assert touched and all(d["reason"] == "pressure" for d in touched)
    assert all(d["kv_bytes_held"] < d["kv_bytes_raw"] for d in touched)
    assert late[0].kv_tokens_details["compactions"] == 0
    assert sum(ledger.compactions.values()) >= len(touched) and not ledger.failures.total()
    # Nothing was compacted before the pool was nearly full.
    first = next(i for i, step in enumerate(steps) if step["compactions"])
    assert used(steps[first - 1]) + raw > LIMIT * (POOL_BLOCKS - 1)


@on_tiny_model
@pytest.mark.parametrize("policy", ["kvcrush", "auto"])
def test_a_prompt_longer_than_the_pool(pressed: Engine, ids: list[int], policy: str) -> None:
    """Alone or beside others, it is compacted while it is read."""
    prompts = [ids[:1980], ids[3000:3500]]
    outputs = pressed.generate(prompts, pressed.params(40, kv_policy=policy))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [40, 40]
    details = outputs[0].kv_tokens_details
    assert details["reason"] == "pressure" and 0 < details["first_compaction"] < 1980


@on_tiny_model
def test_a_stated_budget_is_kept_to_beside_requests_under_pressure(
    pressed: Engine, ids: list[int]
) -> None:
    prompts = [ids[i * 700 : i * 700 + 480] for i in range(6)]
    params = [pressed.params(40, **({"kv_budget": 0.5} if i % 2 else {})) for i in range(6)]
    outputs = pressed.generate(prompts, params)
    for i, output in enumerate(outputs):
        details = output.kv_tokens_details
        if i % 2:
            assert details["reason"] == "budget"
            assert details["kv_bytes_held"] <= 0.5 * details["kv_bytes_raw"] * 1.25
        else:
            assert details.get("reason", "pressure") == "pressure"


@on_tiny_model
def test_counters_say_why_and_the_gauge_how_full(
    pressed: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, reasons, seen = pressed.scheduler.kvcrush_stats, set(), []
    record, take = stats.record_compaction, stats.take

    def counted(policy: str, reason: str, blocks: int) -> None:
        reasons.add((policy, reason))
        record(policy, reason, blocks)

    def taken() -> dict[str, Any]:
        found = take()
        seen.append(found["pressure"])
        return found

    monkeypatch.setattr(stats, "record_compaction", counted)
    monkeypatch.setattr(stats, "take", taken)
    pressed.generate([ids[:300]], pressed.params(4, kv_budget=0.25))
    assert reasons == {("kvcrush", "budget")} and 0 < max(seen) < LIMIT
    pressed.generate([ids[i * 700 : i * 700 + 480] for i in range(6)], pressed.params(30))
    assert reasons == {("kvcrush", "budget"), ("kvcrush", "pressure")} and max(seen) > LIMIT
    assert seen[-1] == 0, "an idle engine has no next step to count again"
