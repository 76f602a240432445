"""Canaries in a real engine: that they score with exact KV, alone, and leave nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequest

from tests.engine.conftest import BLOCK, Engine, on_tiny_model
from tests.ledger import Ledger
from vllm_kvcrush.engine import canaries
from vllm_kvcrush.server.canary import Difference, Due, Scored, _rows, compare

pytestmark = pytest.mark.engine
OUTPUT = 40


@pytest.fixture
def watched(engine: Engine) -> Iterator[Engine]:
    """Yields the engine as `--kv-canary` would have it; every compaction is checked."""
    settings = engine.scheduler._settings
    engine.scheduler._settings = dataclasses.replace(settings, canary=1.0)
    ledger = Ledger(engine.runner)
    yield engine
    ledger.close()
    engine.scheduler._settings = settings
    assert not engine.scheduler._canaries and not engine.scheduler._gave_way


def sampled(engine: Engine, prompt: list[int], **asked: Any) -> list[Scored]:
    """What the engine says of the tokens that it samples."""
    params = engine.params(OUTPUT, **asked)
    params.logprobs = 1
    (output,) = engine.generate([prompt], params)
    found = []
    for token, row in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        best = max(row, key=lambda i, row=row: row[i].logprob)
        found.append(Scored(token, row[token].logprob, best))
    return found


def send(engine: Engine, tokens: list[int], scored: list[Scored]) -> str:
    """Hands the engine a canary, past the front end; returns its id."""
    request = Due(tokens, scored, "", None, None, 0.0).request()
    engine.llm.llm_engine.engine_core.add_request(request)
    return request.request_id


def answer(engine: Engine, canary: str) -> Any:
    """Steps until a canary is answered."""
    for _ in range(200):
        for output in engine.llm.llm_engine.engine_core.get_output().outputs:
            assert output.request_id == canary and output.finished
            return output
    raise AssertionError("no answer")


def compared(engine: Engine, prompt: list[int], scored: list[Scored]) -> Difference:
    tokens = [*prompt, *(s.token for s in scored)]
    rows = answer(engine, send(engine, tokens, scored)).new_prompt_logprobs_tensors
    last = slice(-len(scored), None)
    return compare(scored, _rows(rows.logprob_token_ids[last], rows.logprobs[last]))


def test_without_loss_there_is_no_difference(watched: Engine, ids: list[int]) -> None:
    """Nor where the prefix cache has all of the tokens."""
    prompt = ids[:450]
    scored = sampled(watched, prompt, kv_policy="none")[-32:]
    prompt = [*prompt, *watched.tokens(prompt, OUTPUT - 32, kv_policy="none")]
    with watched.watch() as steps:
        found = compared(watched, prompt, scored)
    assert found.tokens == found.agreements == 32
    assert found.lost + found.gained < 1e-3
    # The exact blocks before the scored tokens were not computed again, and steps are short.
    computed = [sum(step["scheduled"].values()) for step in steps]
    assert 33 <= sum(computed) < 33 + 2 * BLOCK and max(computed) <= canaries.MOST_TOKENS


def test_what_is_lost_is_seen(watched: Engine, ids: list[int]) -> None:
    prompt = ids[:700]
    found = {}
    for policy, budget in (("int8", 0.5), ("int4", 0.25), ("streaming", 96)):
        first, *scored = sampled(watched, prompt, kv_policy=policy, kv_budget=budget)[:33]
        said = watched.tokens(prompt, 33, kv_policy=policy, kv_budget=budget)
        assert said == [first.token, *(s.token for s in scored)]  # whether it is drawn or not
        before = watched.pool.cached_block_hash_to_block._cache.copy()
        found[policy] = compared(watched, [*prompt, first.token], scored)
        # It leaves nothing in the prefix cache.
        assert watched.pool.cached_block_hash_to_block._cache.keys() <= before.keys()
    mean = {policy: (f.lost + f.gained) / f.tokens for policy, f in found.items()}
    assert mean["int8"] < mean["int4"] < mean["streaming"]
    assert mean["int8"] < 0.02 and mean["streaming"] > 0.05
    assert found["streaming"].lost > 2 * found["streaming"].gained
    assert found["streaming"].agreements < found["int8"].agreements


@on_tiny_model
def test_nobody_waits_for_a_canary(watched: Engine, ids: list[int]) -> None:
    """It ends in the step in which somebody else is there, who says what it would have said."""
    prompt, other = ids[:300], ids[2000:2600]
    alone = watched.tokens(prompt, 20)
    watched.reset()
    scored = [Scored(token, -1.0, 0) for token in other[-32:]]
    canary = send(watched, other, scored)
    core = watched.llm.llm_engine.engine_core
    with watched.watch() as steps:
        while len(steps) < 3:
            assert not core.get_output().outputs
        assert all(set(step["scheduled"]) == {canary} for step in steps)
        user = EngineCoreRequest(
            "user", prompt, None, watched.params(20), None, 0.0, None, None, None
        )
        core.add_request(user)
        told = []
        while not any(o.request_id == "user" and o.finished for o in told):
            told += core.get_output().outputs
    assert [str(o.finish_reason) for o in told if o.request_id == canary] == ["abort"]
    assert set(steps[3]["scheduled"]) == {"user"}  # in the very next step
    assert all(canary not in step["scheduled"] for step in steps[3:])
    assert [t for o in told if o.request_id == "user" for t in o.new_token_ids] == alone


@on_tiny_model
def test_of_several_canaries_one_runs(watched: Engine, ids: list[int]) -> None:
    """Several front ends may send one at a time."""
    core = watched.llm.llm_engine.engine_core
    scored = [Scored(token, -1.0, 0) for token in ids[168:200]]
    sent = [send(watched, ids[:200], scored) for _ in range(3)]
    told = {}
    while len(told) < 3:
        told.update({o.request_id: str(o.finish_reason) for o in core.get_output().outputs})
    assert told == {sent[0]: "length", sent[1]: "abort", sent[2]: "abort"}


def test_off_means_off(engine: Engine, ids: list[int]) -> None:
    """Without --kv-canary the mark means nothing: the request is refused as it always was."""
    assert not engine.scheduler._settings.canary
    scored = [Scored(token, -1.0, 0) for token in ids[168:200]]
    before = engine.scheduler.kvcrush_stats.uncompressed
    canary = send(engine, ids[:200], scored)
    assert not engine.scheduler._canaries
    assert engine.scheduler.kvcrush_stats.uncompressed == before + 1
    answer(engine, canary)
