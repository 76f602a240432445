"""The quality canary of a running server, which compares every compressed request."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import NAME, Server
from tests.waiting import eventually

pytestmark = pytest.mark.server
PREFIX = "vllm_kvcrush:canary_"


def total(server: Server, name: str, **labels: str) -> float:
    return server.metric(PREFIX + name, **labels)


def test_requests_are_compared(server: Server, long: str) -> None:
    """However they are asked; what their clients get has no log-probabilities, and one that asked
    gets its own."""
    client = server.client()
    streaming = {"kv_policy": "streaming", "kv_budget": 96, "ignore_eos": True}
    asks: list[dict[str, Any]] = [
        {"extra_body": streaming},
        {"extra_body": streaming, "stream": True},
        {"extra_body": streaming, "logprobs": True, "top_logprobs": 3},
        {"extra_body": {"kv_policy": "int4", "kv_budget": 0.5, "ignore_eos": True}},
    ]
    before = {
        (name, policy): total(server, name, policy=policy)
        for name in ("tokens_total", "agreements_total", "logprob_difference_sum", "nats_total")
        for policy in ("streaming", "int4")
    }

    def gained(name: str, policy: str) -> float:
        return total(server, name, policy=policy) - before[name, policy]

    for number, ask in enumerate(asks):
        messages = [{"role": "user", "content": f"{number} {long}"}]
        answer = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=40, temperature=0, **ask
        )
        choices = [c.choices[0] for c in answer] if ask.get("stream") else answer.choices
        for choice in choices:
            assert (choice.logprobs is None) == ("logprobs" not in ask)
            if choice.logprobs is not None:
                assert {len(one.top_logprobs) for one in choice.logprobs.content} == {3}
    assert eventually(
        lambda: gained("tokens_total", "streaming") == 96 and gained("tokens_total", "int4") == 32
    )
    assert gained("agreements_total", "int4") > 24
    assert 0 < gained("agreements_total", "streaming") <= 96
    difference = gained("logprob_difference_sum", "streaming")
    assert difference / 3 > gained("logprob_difference_sum", "int4") > 1e-5
    assert gained("nats_total", "streaming") == pytest.approx(32 * difference)
    assert total(server, "seconds_total") > 0


def test_no_client_can_send_one(server: Server) -> None:
    for extra in ({"kv_canary": 3}, {"vllm_xargs": {"kv_canary": 3}}):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().completions.create(model=NAME, prompt="Hello", extra_body=extra)
        assert "kv_canary is not a parameter" in caught.value.message


def test_requests_one_after_the_other_leave_no_idle_time(server: Server, long: str) -> None:
    """Each comes while the canary of the one before it would run: they are compared when all have
    ended, or not at all."""
    assert eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    client = server.client()
    before = total(server, "tokens_total")
    busy = total(server, "skipped_total", reason="busy")
    for number in range(12):
        client.completions.create(
            model=NAME, prompt=f"{number} {long[:800]}", max_tokens=6, temperature=0
        )
    assert total(server, "tokens_total") == before
    # Eight wait, and one may have been sent.
    assert eventually(
        lambda: total(server, "skipped_total", reason="busy") - busy >= 12 - 8 - 1, seconds=5
    )
    assert eventually(lambda: total(server, "tokens_total") > before)
    text = server.log.read_text()
    assert long[100:140] not in text and "Traceback" not in text
