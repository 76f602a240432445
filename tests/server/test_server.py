"""A running server through the OpenAI client, as a user sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import NAME, Server, details

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


Ask = Callable[..., Any]


@pytest.fixture(scope="module", params=["chat", "completions", "responses"])
def ask(request: pytest.FixtureRequest, client: openai.OpenAI) -> Ask:
    """Returns a function that makes one request through an endpoint, for each endpoint, and returns
    the response."""

    def send(prompt: str, max_tokens: int = 8, **extra: Any) -> Any:
        common = {"model": NAME, "temperature": 0, "extra_body": extra}
        if request.param == "chat":
            messages = [{"role": "user", "content": prompt}]
            return client.chat.completions.create(
                messages=messages, max_tokens=max_tokens, **common
            )
        if request.param == "completions":
            return client.completions.create(prompt=prompt, max_tokens=max_tokens, **common)
        return client.responses.create(input=prompt, max_output_tokens=max_tokens, **common)

    return send


def test_default_budget_and_usage(ask: Ask, long: str) -> None:
    kept = details(ask(long))
    assert kept["policy"] == "kvcrush" and kept["compactions"] >= 1
    assert kept["raw"] > 400
    assert 64 <= kept["held"] <= 0.25 * kept["raw"] + 32


@pytest.mark.parametrize(
    "extra",
    [
        {"kv_budget": 0.5, "kv_policy": "snapkv"},
        {"vllm_xargs": {"kv_budget": 0.5, "kv_policy": "snapkv"}},
    ],
    ids=["top-level", "vllm_xargs"],
)
def test_a_request_states_its_own_budget(ask: Ask, long: str, extra: dict[str, Any]) -> None:
    kept = details(ask(long, **extra))
    assert kept["policy"] == "snapkv"
    assert 0.3 * kept["raw"] < kept["held"] <= 0.5 * kept["raw"] + 32


def test_an_absolute_budget(ask: Ask, long: str) -> None:
    kept = details(ask(long, kv_budget=160))
    assert 96 < kept["held"] <= 160 + 32
    kept = details(ask(long[:400], kv_budget=1024))  # never exceeded
    assert kept["compactions"] == 0 and kept["held"] == kept["raw"]


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"kv_budget": 1.5}, "kv_budget", "fraction"),
        ({"kv_budget": "much"}, "kv_budget", "much"),
        ({"kv_budget": 20}, "kv_budget", "smallest budget is 96"),
        ({"kv_budget": 0.9}, "kv_budget", "0.75"),
        ({"kv_policy": "h3o"}, "kv_policy", "kvcrush, snapkv, streaming, int4"),
        ({"kv_policy": "h2o"}, "kv_policy", "kvcrush, snapkv, streaming, int4"),
        ({"kv_budgte": 0.5}, "kv_budgte", "kv_budget"),
        ({"vllm_xargs": {"kv_budget": 7.5}}, "vllm_xargs.kv_budget", "7.5"),
        ({"vllm_xargs": {"kv_size": 2}}, "vllm_xargs.kv_size", "kv_size"),
    ],
)
def test_bad_values_are_400_with_param(
    ask: Ask, extra: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask("Hello", **extra)
    error = caught.value.body
    assert error["param"] == param  # type: ignore[index]
    assert error["type"] and says in error["message"], error  # type: ignore[index]
    assert "\n" not in error["message"]  # type: ignore[index]


def test_streams(client: openai.OpenAI, long: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            extra_body={"kv_budget": -1},
        )
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": long}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len(chunks) > 5
    assert details(chunks[-1])["compactions"] >= 1


def test_stop_string_reports_what_was_kept(client: openai.OpenAI, long: str) -> None:
    full = client.completions.create(model=NAME, prompt=long, max_tokens=40, temperature=0)
    text = full.choices[0].text
    stop = text[len(text) // 3 :][:5]
    stopped = client.completions.create(
        model=NAME, prompt=long, max_tokens=40, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert details(stopped)["held"] < 0.5 * details(stopped)["raw"]


def test_a_client_that_leaves_gives_its_blocks_back(
    server: Server, client: openai.OpenAI, long: str
) -> None:
    stream = client.completions.create(
        model=NAME, prompt=long, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(5), stream, strict=False):
        pass
    assert server.metric("vllm:num_requests_running") == 1
    stream.close()
    for _ in range(60):
        if server.metric("vllm:num_requests_running") == 0:
            break
        time.sleep(1)
    # A request that finishes afterwards makes the gauges current.
    client.completions.create(model=NAME, prompt="Hello", max_tokens=2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_metrics_and_the_start_up_line(server: Server, client: openai.OpenAI, long: str) -> None:
    prefix = "vllm_kvcrush:"
    counters = ("compactions_total", "tokens_evicted_total", "blocks_freed_total")
    before = {name: server.metric(prefix + name, policy="streaming") for name in counters}
    requests = server.metric(prefix + "requests_total", policy="streaming")
    seconds = server.metric(prefix + "compaction_seconds_count", policy="streaming")
    response = client.completions.create(
        model=NAME, prompt=long, max_tokens=8, extra_body={"kv_policy": "streaming"}
    )
    kept = details(response)
    gained = {
        name: server.metric(prefix + name, policy="streaming", engine="0") - before[name]
        for name in counters
    }
    assert gained["compactions_total"] == kept["compactions"]
    assert gained["tokens_evicted_total"] == kept["raw"] - kept["held"]
    assert 0 < gained["blocks_freed_total"] <= gained["tokens_evicted_total"] / 32
    assert server.metric(prefix + "requests_total", policy="streaming") == requests + 1
    assert (
        server.metric(prefix + "compaction_seconds_count", policy="streaming")
        == seconds + kept["compactions"]
    )

    refusals = server.metric(prefix + "refusals_total", reason="budget")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=NAME, prompt="Hello", extra_body={"kv_budget": 0})
    assert server.metric(prefix + "refusals_total", reason="budget") == refusals + 1

    stream = client.completions.create(
        model=NAME, prompt=long, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    held = raw = 0.0
    for index, _ in enumerate(stream):
        if index == 20:
            held = server.metric(prefix + "kv_bytes_held", policy="kvcrush")
            raw = server.metric(prefix + "kv_bytes_raw_equivalent", policy="kvcrush")
    assert 0 < held < 0.5 * raw
    assert held % (30 * 3 * 2 * 64 * 4 * 32) == 0  # whole blocks

    log = server.log.read_text()
    assert log.count("is active: policy=kvcrush budget=0.25") == 1
    assert "Traceback" not in log
