"""What `make chaos` asks, and how it judges: held against settings and made-up fleets."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
from typing import Any

import pytest

from tests.chaos import __main__ as program
from tests.chaos import fuzz, judge
from tests.chaos.asks import BAD, Ask, Asks
from tests.chaos.load import BROKEN, LEFT, REFUSED, WHOLE, Sent
from tests.chaos.load import judge as judge_answer
from vllm_kvcrush.config import ConfigError, Settings
from vllm_kvcrush.server.params import _reason

SETTINGS = Settings.from_dict(
    {"policy": "auto", "budget": 0.25, "budget_max": 0.75, "allow": ",".join(program.POLICIES)}
)


def asks(count: int, **more: float) -> list[Ask]:
    made = Asks(7, "word " * 4000, program.NAME, (*program.POLICIES, *program.WRAPPED), **more)
    return [made.next() for _ in range(count)]


def test_good_requests_are_good() -> None:
    for ask in asks(2000, bad=0):
        SETTINGS.validate_request({k: v for k, v in ask.body.items() if k[:3] == "kv_"}, 32, 2048)


@pytest.mark.parametrize(("fields", "reason", "named"), BAD)
def test_bad_requests_are_bad(fields: dict, reason: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SETTINGS.validate_request(fields, 32, 2048)
    assert caught.value.key == named
    assert _reason(SETTINGS, fields, 32, 2048, named) == reason


def test_requests_are_of_all_kinds_and_come_again() -> None:
    found = asks(600)
    assert found == asks(600)
    assert {a.path.rpartition("/")[2] for a in found} == {
        *("completions", "responses", "messages"),
    }
    assert {a.leaves for a in found} >= {None, 0, 1, 10}
    assert 20 < sum(a.refused is not None for a in found) < 120


def test_an_answer_must_be_whole() -> None:
    kept = {"compactions": 2, "held": 5, "raw": 9}
    usage = {"usage": {"completion_tokens": 4, "kv_tokens_details": kept}}
    ask = Ask(1, "/v1/completions", {"stream": True}, tokens=4, most=4)

    def judged(events: list, ask: Ask = ask) -> Sent:
        sent = Sent(ask, 0.0)
        judge_answer(sent, events)
        return sent

    found = judged([{"created": 5}, usage, "[DONE]"])
    assert (found.outcome, found.tokens, found.compactions, found.created) == (WHOLE, 4, 2, 5)
    assert "did not end" in judged([usage]).why
    assert "no usage" in judged([{}, "[DONE]"]).why
    assert "boom" in judged([usage, {"error": "boom"}, "[DONE]"]).why
    less = {"usage": {**usage["usage"], "completion_tokens": 3}}
    assert "3 tokens instead of 4" in judged([less, "[DONE]"]).why
    assert "not refused" in judged([usage], Ask(1, "/v1/completions", {}, refused="cap")).why


def test_a_front_tells_which_replica_had_a_request() -> None:
    log = (
        '127.0.0.1 "POST /v1/completions?chaos=7 HTTP/1.1" 200 9 0.1 127.0.0.1:41 200 0.1\n'
        '127.0.0.1 "POST /v1/messages?chaos=8 HTTP/1.1" 200 9 0.1 127.0.0.1:41, 127.0.0.1:42'
        " 502, 200 -, 0.1\n"
        '127.0.0.1 "GET /health HTTP/1.1" 200 9 0.1 127.0.0.1:41 200 0.1\n'
    )
    to = judge.upstreams(log)
    assert to == {7: [41], 8: [41, 42]}
    life = judge.Life("replica-0", 41, started=10.0, ended=20.0)
    assert life.had(Sent(Ask(7, "", {}), 15.0), to)
    assert not life.had(Sent(Ask(7, "", {}), 25.0), to)
    assert not life.had(Sent(Ask(8, "", {}), 15.0), to)


def samples(**changed: float) -> dict[str, float]:
    found = {
        'vllm_kvcrush:requests_total{policy="auto"}': 2.0,
        'vllm_kvcrush:refusals_total{model_name="m",reason="cap"}': 1.0,
        "vllm:generation_tokens_total{}": 10.0,
        "vllm_kvcrush:compactions_total{}": 3.0,
        "vllm_kvcrush:compaction_seconds_count{}": 3.0,
        "vllm_kvcrush:policy_failures_total{}": 0.0,
    }
    return found | changed


def test_counters_are_what_clients_saw() -> None:
    plain = Ask(1, "", {}, most=10)
    sent = [
        Sent(plain, 0, outcome=WHOLE, tokens=6, compactions=1),
        Sent(plain, 0, outcome=WHOLE, tokens=4, compactions=2),
        Sent(Ask(2, "", {}, refused="cap"), 0, outcome=REFUSED),
    ]
    assert judge.accounts(samples(), sent, False) == []
    for key in samples():
        assert len(judge.accounts(samples(**{key: 7.0}), sent, False)) >= 1, key
    # What a client that left has cost is the server's to know, within limits.
    left = [*sent, Sent(plain, 0, outcome=LEFT)]
    more = samples(**{"vllm:generation_tokens_total{}": 20.0})
    assert judge.accounts(more, left, False) == []
    more["vllm:generation_tokens_total{}"] = 21.0
    assert len(judge.accounts(more, left, False)) == 1
    assert judge.accounts(more, left, True) == []
    assert len(judge.accounts(samples(), [*sent, Sent(plain, 0, answered=True)], False)) == 1
    assert Sent(plain, 0).outcome == BROKEN


def test_what_is_held_at_rest_is_told() -> None:
    assert judge.held({"vllm:kv_cache_usage_perc{}": 0.0}) == []
    assert judge.held({'vllm_kvcrush:kv_bytes_held{policy="auto"}': 64.0}) == [
        "vllm_kvcrush:kv_bytes_held is 64"
    ]


def test_growth_is_told_from_noise() -> None:
    mib = 2**20
    flat = [(float(t), 900 * mib + (t * 7919 % 50) * mib) for t in range(300)]
    assert judge.growth(flat[:80]) is None
    found = judge.growth(flat)
    assert found is not None and found.within_noise and abs(found.grown) < 8 * mib
    leak = [(t, size + int(t * mib)) for t, size in flat]
    found = judge.growth(leak)
    assert found is not None and not found.within_noise
    assert found.slope == pytest.approx(3600 * mib, rel=0.1)


def test_the_report_is_a_table() -> None:
    row = {"fault": "load", "seconds": 3.0, "saw": "a|b", "wrong": ["x"]}
    memory = {"replica": "r", "seconds": 9.0, "last": 2**30, "grown": 0.0, "noise": 1, "slope": 0}
    lines = program.table({"rows": [row], "memory": [memory]}).splitlines()
    assert lines[0] == "| fault | seconds | wrong | saw |" and lines[2].startswith("| load  | 3.0")


@pytest.mark.parametrize("asked", [(50,), (0, 50), (8, 30, 2), (8, 0, 3)])
def test_a_fuzzer_that_had_no_time_gets_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, asked: tuple[int, ...]
) -> None:
    given: list[tuple[int, str]] = []

    def run(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        options = dict(itertools.pairwise(command))
        entry = {"request": {"url": "http://x/y"}, "response": {"status": 404}}
        entries = [entry] * asked[len(given)]
        given.append((int(options["--max-time"]), options["--seed"]))
        (tmp_path / "fuzz.har").write_text(json.dumps({"log": {"entries": entries}}))
        return subprocess.CompletedProcess(command, 0, "Empty test suite", "")

    monkeypatch.setattr(fuzz, "document", lambda *_: {})
    monkeypatch.setattr(subprocess, "run", run)
    if sum(asked) < fuzz.FEWEST:
        with pytest.raises(RuntimeError, match="asked 11 times only:\nEmpty"):
            fuzz.run("http://x", "m", tmp_path, tmp_path, 20, 5)
    else:
        found = fuzz.run("http://x", "m", tmp_path, tmp_path, 20, 5)
        assert found.answers == {404: sum(asked)}
    # Of each turn what it had not asked before.
    assert given == [(20, "5"), (60, "6"), (120, "7")][: len(asked)]
