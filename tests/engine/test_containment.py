"""What one request must never do to an engine and to the others in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tests.engine.conftest import BLOCK, METHODS, Engine, on_tiny_model
from tests.ledger import Ledger
from vllm_kvcrush import policies
from vllm_kvcrush.policies import Policy, View

pytestmark = pytest.mark.engine
POLICIES = [name for name in policies.names() if not any(m.startswith(name) for m in METHODS)]


@on_tiny_model
@pytest.mark.parametrize("policy", POLICIES)
def test_pages_say_where_their_tokens_stand(
    engine: Engine, ledger: Ledger, ids: list[int], policy: str
) -> None:
    """This holds for fractions and few tokens, for prompts and decoding, whatever codecs follow
    each other."""
    prompts = [ids[100:700], ids[800:864], ids[900:1300]]
    extra: list[dict[str, Any]] = [{"kv_budget": b} for b in (0.25, 160, 96)]
    engine.generate(prompts, [engine.params(130, kv_policy=policy, **e) for e in extra])
    assert sum(ledger.compactions.values()) >= 8 and not ledger.failures.total()


@on_tiny_model
def test_demoted_tokens_come_together_in_one_codec(
    engine: Engine, ledger: Ledger, ids: list[int]
) -> None:
    """A region in two codecs is packed into the coarser one, and later has two again. Such a
    request once ended a server."""
    params = engine.params(1900, kv_policy="mikv", kv_budget=160)
    engine.generate([ids[1000:1064]], params)
    kinds = {codecs for policy, codecs in ledger.compactions}
    assert ("tc8",) in kinds and ("int8", "tc8") in kinds, kinds
    assert not ledger.failures.total()


# -- policies that fail -------------------------------------------------------------------------


@dataclass
class Faulty(Policy):
    """A policy that fails in one of several ways."""

    name: ClassVar[str] = "faulty"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "state"})
    how: ClassVar[str] = ""
    only_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.how == "constructor":
            raise RuntimeError("no licence")

    def _now(self, view: View, how: str) -> bool:
        return self.how == how and self.only_layer in (None, view.layer)

    def score(self, view: View) -> Any:
        scores = view.window_scores()
        if self._now(view, "score raises"):
            raise KeyError("weights")
        if self._now(view, "NaN"):
            scores[0, 3] = torch.nan
        if self._now(view, "shape"):
            return scores[:, :-1]
        if self._now(view, "integers"):
            return scores.long()
        if self._now(view, "state shape"):
            return scores, {"seen": scores[:1]}
        if self._now(view, "state of lists"):
            return scores, {"seen": scores.tolist()}
        if self._now(view, "a list of state"):
            return scores, [scores]
        return scores, {"seen": scores}

    def select(self, view: View, scores: torch.Tensor, keep: torch.Tensor) -> Any:
        kept = super().select(view, scores, keep)
        if self._now(view, "select raises"):
            raise ZeroDivisionError
        if self._now(view, "slots"):
            return kept.nonzero()
        if self._now(view, "one too many"):
            kept[0, kept[0].int().argmin()] = True
        if self._now(view, "too few"):
            kept[0, kept[0].int().argmax()] = False
        if self._now(view, "narrow"):
            return kept[:, 1:]
        if self._now(view, "numbers"):
            return kept.long()
        if self._now(view, "a list"):
            return kept.tolist()
        return kept


FAULTS = [
    *("constructor", "score raises", "NaN", "shape", "integers", "select raises", "slots"),
    *("one too many", "too few", "narrow", "numbers", "a list", "state shape", "state of lists"),
    "a list of state",
]


@pytest.fixture
def faulty(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    from vllm_kvcrush.policies import _CLASSES

    monkeypatch.setitem(_CLASSES, "faulty", Faulty)
    monkeypatch.setattr(Faulty, "how", "")
    for holder in (engine.scheduler, engine.runner):
        settings = holder._settings
        monkeypatch.setattr(
            holder, "_settings", type(settings).from_dict(
                settings.to_dict() | {"allow": [*settings.allow, "faulty"]}
            )
        )  # fmt: skip
    return Faulty


def was_built(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the policy known as if the server had built it at its start; workers build it when a
    request asks for it."""
    monkeypatch.setitem(engine.scheduler._settings._policies, "faulty", Faulty.__new__(Faulty))


@on_tiny_model
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_policy_costs_its_request_its_choice(
    engine: Engine,
    ledger: Ledger,
    ids: list[int],
    faulty: type[Faulty],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faulty, "how", fault)
    if fault in ("NaN", "select raises"):
        monkeypatch.setattr(faulty, "only_layer", engine.layers - 1)
    engine.runner._policies.pop("faulty", None)
    was_built(engine, monkeypatch)
    prompts = [ids[1300:1700], ids[1800:2200]]
    other = engine.tokens(prompts[1], 40, kv_policy="snapkv")
    engine.reset()
    counted: list[str] = []
    monkeypatch.setattr(engine.scheduler.kvcrush_stats, "record_policy_failure", counted.append)
    held: list[int] = []
    report = engine.scheduler._held_report

    def reported(request: Any) -> Any:
        found = report(request)
        tracked = engine.scheduler._tracked[request.request_id]
        if tracked.params.policy == "faulty":
            held.append(tracked.policy_failures)
        return found

    monkeypatch.setattr(engine.scheduler, "_held_report", reported)
    faulty_params = engine.params(40)
    faulty_params.extra_args = {"kv_policy": "faulty"}
    # Without the front end, which knows no such policy.
    monkeypatch.setattr(
        "vllm_kvcrush.server.params.Front.check", lambda *_, **__: None, raising=True
    )
    results = engine.generate(prompts, [faulty_params, engine.params(40, kv_policy="snapkv")])
    assert [len(r.outputs[0].token_ids) for r in results] == [40, 40]
    assert list(results[1].outputs[0].token_ids) == other, "the other request saw it"
    compactions = sum(n for (policy, _), n in ledger.compactions.items() if policy == "faulty")
    assert compactions >= 2 and counted == ["faulty"] * compactions
    assert +ledger.failures == {"faulty": compactions}
    assert held[-1] == compactions
    engine.runner._policies.pop("faulty", None)


@on_tiny_model
def test_a_policy_that_fails_keeps_sinks_and_newest(
    engine: Engine, ids: list[int], faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`streaming` keeps the same, so the same tokens follow."""
    monkeypatch.setattr(faulty, "how", "score raises")
    monkeypatch.setattr("vllm_kvcrush.server.params.Front.check", lambda *_, **__: None)
    engine.runner._policies.pop("faulty", None)
    was_built(engine, monkeypatch)
    prompt, params = ids[2300:2700], engine.params(40)
    params.extra_args = {"kv_policy": "faulty"}
    (result,) = engine.generate([prompt], params)
    engine.reset()
    assert list(result.outputs[0].token_ids) == engine.tokens(prompt, 40, kv_policy="streaming")
    engine.runner._policies.pop("faulty", None)


@pytest.mark.parametrize(
    "extra",
    [
        {"kv_policy": "no such"},
        {"kv_policy": ["int8"]},
        {"kv_policy": {"a": 1}},
        {"kv_policy": 7},
        {"kv_budget": "much"},
        {"kv_budget": float("nan")},
        {"kv_budget": -5},
        {"kv_budget": 20},
        {"kv_size": 7},
        {"kv_budget": [1]},
    ],
    ids=str,
)
def test_a_request_that_no_front_end_checked(
    engine: Engine, ids: list[int], plain: Any, extra: dict[str, Any], monkeypatch: Any
) -> None:
    """Such a request runs uncompressed, and the engine goes on."""
    monkeypatch.setattr("vllm_kvcrush.server.params.Front.check", lambda *_, **__: None)
    params = engine.params(12)
    params.extra_args = extra
    prompt = ids[2700:3100]
    (result,) = engine.generate([prompt], params)
    assert list(result.outputs[0].token_ids) == plain.tokens([prompt], 12)[0]


# -- seeds ----------------------------------------------------------------------------------------


@on_tiny_model
def test_seeds_where_a_prompt_is_prefilled_in_chunks(engine: Engine, ids: list[int]) -> None:
    """Such a prompt ends plain vLLM 0.32 on a CPU. The same seed gives the same tokens, whatever
    the prompt's chunks."""
    from vllm import SamplingParams

    def ask(prompt: list[int], **extra: Any) -> list[list[int]]:
        engine.reset()
        params = SamplingParams(
            n=3, temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, extra_args=extra or None
        )
        (result,) = engine.generate([prompt], params)
        return [list(choice.token_ids) for choice in result.outputs]

    long = ids[3200:3900]  # 512 tokens a step
    first = ask(long)
    assert first == ask(long) and len({tuple(tokens) for tokens in first}) == 3
    exact = ask(long, kv_policy="none")
    assert exact == ask(long, kv_policy="none")
    # A budget that is never exceeded changes no chunk's end and no token.
    assert exact == ask(long, kv_budget=1024)


# -- copies of a prompt ---------------------------------------------------------------------------


@on_tiny_model
def test_many_samples_of_one_prompt_share_their_compressed_blocks(
    engine: Engine, ledger: Ledger, ids: list[int]
) -> None:
    """The compaction of one sample would cost blocks, and so would compactions of all with separate
    results."""
    from vllm import SamplingParams

    prompt = ids[4000:4440]
    params = SamplingParams(
        n=6, temperature=1.0, seed=3, max_tokens=30, ignore_eos=True,
        extra_args={"kv_policy": "kvcrush", "kv_budget": 0.25},
    )  # fmt: skip
    with engine.watch() as steps:
        (result,) = engine.generate([prompt], params)
    assert len(result.outputs) == 6
    done = [c for s in steps for c in s["compactions"]]
    shared = [c for c in done if c.same_as is not None]
    assert len(shared) >= 4, [c.request_id for c in done]
    assert not any(s["deferred"] for s in steps), "nothing was put off"
    budget = int(0.25 * len(prompt)) // BLOCK
    most = max(max(s["held"].values()) for s in steps[-20:])
    assert most <= max(3, budget) + 2


# -- what is not needed ---------------------------------------------------------------------------


@on_tiny_model
@pytest.mark.parametrize(("policy", "budget"), [("int8", 0.5), ("auto", 0.5), ("kvcrush", 0.5)])
def test_queries_are_taken_only_where_a_compaction_scores(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch, policy: str, budget: float
) -> None:
    taken = []
    take = engine.runner._tap.take
    monkeypatch.setattr(engine.runner._tap, "take", lambda: taken.append(1) or take())
    params = engine.params(40, kv_policy=policy, kv_budget=budget)
    (result,) = engine.generate([ids[5000:5400]], params)
    assert result.kv_tokens_details["compactions"] >= 1
    assert bool(taken) == (policy == "kvcrush")
    peaks = engine.runner._peaks
    assert peaks["scratch"] > 0
    if taken:
        # One window of every layer.
        assert peaks["queries"] >= engine.layers * 16 * engine.heads * engine.head_size * 4
