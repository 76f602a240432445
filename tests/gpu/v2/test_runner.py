"""Tokens, lengths, blocks and slots of V2 against V1, which is tested against transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.gpu.v2.engine import BLOCK, VOCABULARY, Answer, Engine
from tests.ledger import Ledger
from vllm_kvcrush.policies import Room
from vllm_kvcrush.policies.adakv import AdaKV

RAW = ("streaming", "snapkv", "h2o", "kvcrush")
PACKED = ("int8", "int4", "mikv")
# Policies that divide pages, merge with a log bias, and wrap others.
WRAPPED = ("adakv", "keepkv(adakv(h2o))", "keepkv(streaming)@int8", "fair(kvcrush)@int4")


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


def assert_equal(got: list[Answer], want: list[Answer]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens
        assert a.compactions == b.compactions
        for mine, its in zip(a.steps, b.steps, strict=True):
            assert mine._replace(bound=None) == its._replace(bound=None)
            assert mine.bound == mine.length


def assert_slots_follow(answer: Answer) -> None:
    """Asserts that a step's tokens are written to the last slots that are held, in blocks of the
    request."""
    for step in answer.steps:
        places = range(step.length - step.rows, step.length)
        want = [step.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in places]
        assert step.slots == want


def test_both_runners_are_there(v1: Engine, v2: Engine) -> None:
    names = [type(e.runner).__mro__[0].__name__ for e in (v1, v2)]
    assert names == ["KVCrushCPUModelRunner", "KVCrushCPUModelRunnerV2"]


def test_graphs_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs
    from vllm.engine.arg_utils import EngineArgs

    vllm.envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": BLOCK,
        "additional_config": {"kvcrush": {"policy": "kvcrush"}},
    }
    assert EngineArgs(**arguments, enforce_eager=True).create_engine_config().use_v2_model_runner
    with pytest.raises(ValueError, match=r"the V2 model runner with graphs .*--enforce-eager"):
        EngineArgs(**arguments).create_engine_config()


@pytest.mark.parametrize("policy", (*RAW, *PACKED, *WRAPPED))
def test_a_request_alone(policy: str, v1: Engine, v2: Engine) -> None:
    spans = {"kv_spans": [[0, 90], [90, 250]]} if policy.startswith("fair") else {}
    job: tuple[Any, ...] = (prompts(250), 24, [{"kv_policy": policy, **spans}])
    got, want = v2.run(*job), v1.run(*job)
    assert want[0].compactions >= 3
    assert_equal(got, want)
    assert_slots_follow(got[0])
    # The budget binds: lengths are not those of 274 tokens.
    assert got[0].steps[-1].length < 274 - 4 * BLOCK


def test_pages_say_where_their_tokens_stand(v2: Engine) -> None:
    """All policies are in one run, since a step costs the same however many requests are in it."""
    every = (*RAW, *PACKED, *WRAPPED)
    ledger = Ledger(v2.runner)
    try:
        extra: list[dict[str, Any]] = [
            {"kv_policy": policy, "kv_budget": b} for policy in every for b in (0.3, 96)
        ]
        v2.run(prompts(*(240, 60) * len(every), seed=4), 150, extra)
    finally:
        ledger.close()
    labels = [policy.partition("(")[0] for policy in every]
    found = dict.fromkeys(labels, 0)
    for (policy, _), n in ledger.compactions.items():
        found[policy] += n
    assert all(n >= 8 * labels.count(own) for own, n in found.items()), found
    assert not ledger.failures.total()


def test_every_method(v1: Engine, v2: Engine) -> None:
    """Each in one request of one run, with several codecs and wrappers."""
    extra = [
        {"kv_policy": policy}
        for policy in (
            *("lacache", "knorm@int8", "kvcrush(keydiff)", "lagkv@int4", "infinipot", "tova"),
            *("expected_attention", "gkv", "rkv@int8", "critic", "fair(gui_kv)", "rerotate"),
        )
    ]
    job: tuple[Any, ...] = (prompts(*[150] * len(extra), seed=3), 20, extra)
    got, want = v2.run(*job), v1.run(*job)
    assert all(answer.compactions >= 1 for answer in want)
    assert_equal(got, want)


def test_methods_that_divide_layers_or_merge(v1: Engine, v2: Engine) -> None:
    """Each by its name, together in one batch."""
    every = ("pyramidkv", "cake", "duo", "surfacelogic", "d2o", "cam", "composed", "fair(duo)")
    extra: list[dict[str, Any]] = [{"kv_policy": policy, "kv_budget": 96} for policy in every]
    job: tuple[Any, ...] = (prompts(*[200] * len(every), seed=3), 12, extra)
    ledger = Ledger(v2.runner)
    try:
        got = v2.run(*job)
    finally:
        ledger.close()
    assert_equal(got, v1.run(*job))
    assert ledger.unequal and not ledger.failures.total()
    assert all(answer.compactions >= 2 for answer in got)


@pytest.mark.parametrize("policy", ["adakv", "keepkv(adakv)"])
def test_heads_that_keep_unequal_numbers(
    policy: str, v1: Engine, v2: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy gives the shares, since this random model's own heads attend to everything alike."""

    def allocate(self: AdaKV, demand: Any, room: Room) -> torch.Tensor:
        layers, heads = room.candidates.shape
        return 1.0 + 3.0 * ((torch.arange(layers)[:, None] + torch.arange(heads)) % 2)

    monkeypatch.setattr(AdaKV, "allocate", allocate)
    job: tuple[Any, ...] = (prompts(250, 90, seed=8), 40, [{"kv_policy": policy}] * 2)
    ledger = Ledger(v2.runner)
    try:
        got = v2.run(*job)
    finally:
        ledger.close()
    assert_equal(got, v1.run(*job))
    assert ledger.unequal and not ledger.failures.total()


def test_a_request_state_is_clean_for_the_next(v2: Engine) -> None:
    """vLLM gives the state of a request that is over to the next one."""
    (first,) = v2.run(prompts(150), 2, [{"kv_policy": "streaming"}])
    assert first.compactions > 0 and v2.runner._slot_shift.sum() > 0
    (answer,) = v2.run(prompts(40), 2, [{"kv_policy": "none"}])
    assert [step.length for step in answer.steps] == [40, 41]
    assert_slots_follow(answer)
    assert v2.runner._slot_shift.sum() == v2.runner._shift_device.gpu.sum() == 0


def test_a_batch_with_an_uncompressed_sibling(v1: Engine, v2: Engine) -> None:
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("snapkv", "none", "int4", "h2o")]
    job = (prompts(250, 130, 300, 140, seed=1), 24, extra)
    got, want = v2.run(*job), v1.run(*job)
    assert_equal(got, want)
    assert [a.compactions > 0 for a in got] == [True, False, True, True]
    sibling = got[1]
    assert [s.length for s in sibling.steps][-1] == 130 + 24 - 1
    # It is read as if alone.
    assert v1.run([job[0][1]], 24, [extra[1]])[0].tokens == sibling.tokens


def test_eviction_changes_what_is_said(v1: Engine, v2: Engine) -> None:
    """Otherwise the comparisons above would not test anything."""
    (prompt,) = prompts(250)
    answers = v2.run([prompt] * 2, 12, [{"kv_policy": "streaming"}, {"kv_policy": "none"}])
    assert answers[0].tokens != answers[1].tokens


def test_fitted_codecs(v1_fitted: Engine, v2_fitted: Engine) -> None:
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("tc4", "none", "auto", "tc8")]
    job = (prompts(250, 40, 300, 280, seed=6), 12, extra)
    want, got = (e.run(*job) for e in (v1_fitted, v2_fitted))
    assert_equal(got, want)
    assert [a.compactions > 0 for a in got] == [True, False, True, True]
    # And pages say where their tokens stand, after codecs of all kinds.
    ledger = Ledger(v2_fitted.runner)
    try:
        more = [{"kv_policy": p, "kv_budget": 96} for p in ("tc6", "mikv", "auto", "tc4")]
        v2_fitted.run(prompts(60, 70, 250, 200, seed=5), 150, more)
    finally:
        ledger.close()
    assert sum(ledger.compactions.values()) >= 12 and not ledger.failures.total()


def test_a_preempted_request_is_compacted_again(model: str) -> None:
    """The pool holds three of four requests; the newest is preempted, when it is compacted
    already."""
    extra: list[dict[str, Any]] = [{"kv_policy": "none"}] * 3 + [{"kv_policy": "kvcrush"}]
    job = (prompts(120, 121, 122, 240, seed=2), 40, extra)
    engines = [Engine(model, v2=v2, blocks=19) for v2 in (False, True)]
    want, got = (engine.run(*job) for engine in engines)
    for engine in engines:
        assert any(gone > 0 for _, gone in engine.preempted)
    assert_equal(got, want)
    for answer in got:
        assert_slots_follow(answer)


def test_asynchronous_scheduling(model: str, v1: Engine) -> None:
    engine = Engine(model, v2=True, asynchronous=True)
    assert type(engine.scheduler).__name__ == "KVCrushAsyncScheduler"
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("kvcrush", "none", "int8")]
    job = (prompts(250, 80, 300, seed=3), 24, extra)
    got, want = engine.run(*job), v1.run(*job)
    assert [a.tokens for a in got] == [a.tokens for a in want]
    assert [a.compactions for a in got] == [a.compactions for a in want]
