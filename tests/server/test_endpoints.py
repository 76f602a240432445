"""Every endpoint that generates, as docs/usage.md promises it, on a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import NAME, Server

pytestmark = pytest.mark.server
PREFIX = "vllm_kvcrush:"
BLOCK_BYTES = 30 * 3 * 2 * 64 * 4 * 32


def post(server: Server, path: str, body: Any) -> tuple[int, str]:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# By path: a body that asks for `text`.
BODIES: dict[str, Any] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 8},
    "/v1/chat/completions/batch": lambda text: {
        "messages": [[{"role": "user", "content": f"{n} {text}"}] for n in range(2)]
    },
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/inference/v1/generate": lambda text: {
        "token_ids": [ord(c) % 997 for c in text][:500],
        "sampling_params": {"max_tokens": 8, "ignore_eos": True},
    },
    "/generative_scoring": lambda text: {
        "query": text,
        "items": ["one", "two"],
        "label_token_ids": [100, 200],
    },
    "/invocations": lambda text: {"messages": [{"role": "user", "content": text}]},
}


def body(path: str, text: str, **extra: Any) -> dict[str, Any]:
    own = {} if path in ("/v1/responses", "/generative_scoring") else {"max_tokens": 8}
    return {"model": NAME, **own, **BODIES[path](text), **extra}


@pytest.mark.parametrize("path", BODIES)
def test_fields_are_taken(server: Server, long: str, path: str) -> None:
    requests = server.metric(PREFIX + "requests_total", policy="streaming")
    # A request of one token is only compacted while its prompt is read, if that outgrows it.
    budget = 0.25 if path == "/generative_scoring" else 0.5
    fields = {"kv_policy": "streaming", "kv_budget": budget}
    status, text = post(server, path, body(path, long, **fields))
    assert status == 200, text
    kept = json.loads(text)["usage"]["kv_tokens_details"]
    assert kept["policy"] == "streaming" and kept["compactions"] >= 1
    assert 0.3 * kept["raw"] < kept["held"] <= 0.5 * kept["raw"] + 64
    parts = 2 if path in ("/v1/chat/completions/batch", "/generative_scoring") else 1
    assert server.metric(PREFIX + "requests_total", policy="streaming") == requests + parts
    # Raw tokens fill whole blocks.
    assert kept["kv_bytes_held"] % BLOCK_BYTES == 0
    assert 0 <= kept["kv_bytes_held"] * 32 / BLOCK_BYTES - kept["held"] < 32 * parts
    assert 0 <= kept["kv_bytes_raw"] * 32 / BLOCK_BYTES - kept["raw"] < 32 * parts
    # The server's own default, of a request that says nothing.
    status, text = post(server, path, body(path, long))
    assert json.loads(text)["usage"]["kv_tokens_details"]["policy"] == "kvcrush"


# As JSON, since Python's own would not write some of it.
WRONG = {
    '"kv_policy": ["int8"]': "kv_policy",
    '"kv_policy": {"int8": 1}': "kv_policy",
    '"kv_policy": 7': "kv_policy",
    '"kv_policy": "h2o"': "kv_policy",
    f'"kv_policy": "{"x" * 100000}"': "kv_policy",
    '"kv_budget": 1e400': "kv_budget",
    '"kv_budget": NaN': "kv_budget",
    '"kv_budget": [0.5]': "kv_budget",
    '"kv_budget": true': "kv_budget",
    f'"kv_budget": {"9" * 4000}': "kv_budget",
    '"kv_budget": "\\ud800"': "kv_budget",
    '"kv_budget": 0.9': "kv_budget",
    '"kv_budgte": 0.5': "kv_budgte",
}


@pytest.mark.parametrize("path", BODIES)
def test_wrong_fields_are_400(server: Server, path: str) -> None:
    for field, name in WRONG.items():
        whole = json.dumps(body(path, "Hello"))
        status, text = post(server, path, whole[:-1] + ", " + field + "}")
        assert status == 400, (field[:60], text[:500])
        error = json.loads(text)["error"]
        assert name in error["message"] and len(error["message"]) < 400, error
        if path == "/v1/messages":
            assert json.loads(text)["type"] == "error"
        else:
            assert error["param"] == name
    # Streams too, before anything was sent.
    if path != "/generative_scoring" and not path.endswith("batch"):
        status, text = post(server, path, body(path, "Hello", stream=True, kv_budget=0))
        assert status == 400 and "kv_budget" in text
    status, text = post(server, "/v1/completions", {"model": NAME, "prompt": "Hi"})
    assert status == 200, text


def test_what_takes_none_says_so(server: Server) -> None:
    question = {"model": NAME, "state": "x", "questions": {"a": {"type": "boolean"}}}
    status, text = post(server, "/v1/systemone", question | {"kv_budget": 0.5})
    assert status == 400 or status == 501  # the demo model may not have it at all
    if status == 400:
        # From vLLM 0.33 on it refuses what it does not know itself.
        assert json.loads(text)["error"]["param"].removeprefix("body.") == "kv_budget"
    for path, given in (("/tokenize", {"prompt": "Hi"}), ("/detokenize", {"tokens": [5]})):
        status, text = post(server, path, {"model": NAME, "kv_budget": 0.5, **given})
        assert status == 200, text


def test_what_is_rendered_carries_them(server: Server, long: str) -> None:
    for path in ("/v1/chat/completions/render", "/v1/messages/render", "/v1/completions/render"):
        made = body(path.removesuffix("/render"), long, kv_policy="snapkv")
        status, text = post(server, path, made)
        assert status == 200, text
        rendered = json.loads(text)
        rendered = rendered[0] if isinstance(rendered, list) else rendered
        assert rendered["sampling_params"]["extra_args"] == {"kv_policy": "snapkv"}
        status, text = post(server, "/inference/v1/generate", rendered)
        assert status == 200, text
        assert json.loads(text)["usage"]["kv_tokens_details"]["policy"] == "snapkv"
        status, text = post(server, path, made | {"kv_size": 3})
        assert status == 400 and "kv_size" in text


def test_a_system_prompt_is_protected(server: Server, long: str) -> None:
    rule = "Never say the word tomato. Answer in French, and be short."

    def asked(path: str, **extra: Any) -> tuple[int, Any]:
        own: dict[str, Any] = {"messages": [{"role": "system", "content": rule}]}
        if path == "/v1/messages":
            own = {"system": rule, "messages": []}
        elif path == "/v1/responses":
            own = {"instructions": rule}
        made = body(path.removesuffix("/render"), long, **{"kv_policy": "snapkv", **extra})
        if "messages" in own:
            own["messages"] = own["messages"] + made["messages"]
        status, text = post(server, path, made | own)
        return status, json.loads(text)

    for path in ("/v1/messages", "/v1/responses", "/v1/chat/completions"):
        status, told = asked(path)
        kept = told["usage"]["kv_tokens_details"]
        assert status == 200 and 10 <= kept["protected"] <= 20
        status, told = asked(path, kv_protect=[{"message": 7}])
        assert status == 400 and "there are 2 messages" in told["error"]["message"]
    # It takes no more room than what is kept without.
    _, told = asked(path, kv_protect=[])
    without = told["usage"]["kv_tokens_details"]
    assert "protected" not in without and without["held"] == kept["held"]
    _, told = asked(path, kv_protect=[{"message": 0}])
    assert told["usage"]["kv_tokens_details"]["protected"] == kept["protected"]
    # A policy that keeps every token protects none.
    _, told = asked(path, kv_policy="int4", kv_budget=0.5)
    assert "protected" not in told["usage"]["kv_tokens_details"]
    status, rendered = asked("/v1/chat/completions/render")
    assert status == 200
    status, text = post(server, "/inference/v1/generate", rendered)
    assert json.loads(text)["usage"]["kv_tokens_details"]["protected"] == kept["protected"]
    made = body("/v1/completions", long, kv_protect=[{"chars": [0, 99999]}])
    status, text = post(server, "/v1/completions", made)
    assert status == 400 and json.loads(text)["error"]["param"] == "kv_protect"


def events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def test_streamed_messages_and_tokens_tell_what_was_kept(server: Server, long: str) -> None:
    extra = {"stream": True, "kv_policy": "int4"}
    status, text = post(server, "/v1/messages", body("/v1/messages", long, **extra))
    assert status == 200
    (last,) = [event for event in events(text) if event["type"] == "message_delta"]
    assert last["usage"]["kv_tokens_details"]["policy"] == "int4"
    extra |= {"stream_options": {"include_usage": True}}
    path = "/inference/v1/generate"
    status, text = post(server, path, body(path, long, **extra))
    assert status == 200
    *_, last = events(text)
    assert last["usage"]["kv_tokens_details"]["policy"] == "int4"


def test_a_budget_shows_in_bytes_where_every_token_stays(server: Server, long: str) -> None:
    shares = []
    for budget in (0.25, 0.5):
        extra = {"kv_policy": "int4", "kv_budget": budget}
        _, text = post(server, "/v1/completions", body("/v1/completions", long, **extra))
        kept = json.loads(text)["usage"]["kv_tokens_details"]
        assert kept["held"] == kept["raw"] and kept["compactions"] >= 1
        # Whole blocks, and which pages its heads own.
        assert 0 < kept["kv_bytes_held"] % BLOCK_BYTES < BLOCK_BYTES / 100
        shares.append(kept["kv_bytes_held"] / kept["kv_bytes_raw"])
        assert shares[-1] <= budget + 32 * 3 / kept["raw"]
    # Never compacted: all bytes are there.
    _, text = post(server, "/v1/completions", body("/v1/completions", "Hello"))
    kept = json.loads(text)["usage"]["kv_tokens_details"]
    assert kept["kv_bytes_held"] == kept["kv_bytes_raw"] == BLOCK_BYTES
    # A front-end that ends a request at a stop string extrapolates: 40 tokens on, one block more.
    whole = body("/v1/completions", long[:120], max_tokens=60, ignore_eos=True, temperature=0)
    _, text = post(server, "/v1/completions", whole)
    said = json.loads(text)["choices"][0]["text"]
    stop = said[-12:-4]
    _, text = post(server, "/v1/completions", whole | {"stop": [stop]})
    kept = json.loads(text)["usage"]["kv_tokens_details"]
    assert kept["held"] == kept["raw"]
    assert kept["kv_bytes_held"] == kept["kv_bytes_raw"] == -(-kept["raw"] // 32) * BLOCK_BYTES


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beams_are_one_request_with_a_budget(server: Server, long: str, path: str) -> None:
    beams = {"use_beam_search": True, "n": 3, "max_tokens": 4, "temperature": 0}

    def counts() -> tuple[float, float]:
        return (
            server.metric(PREFIX + "requests_total"),
            server.metric(PREFIX + "compactions_total", policy="snapkv"),
        )

    before = counts()
    extra = {"kv_policy": "snapkv", "kv_budget": 0.25}
    status, text = post(server, path, body(path, long, **beams, **extra))
    assert status == 200, text
    answer = json.loads(text)
    kept = answer["usage"]["kv_tokens_details"]
    assert len(answer["choices"]) == 3 and kept["policy"] == "snapkv"
    # Three beams, each of a whole prompt.
    assert kept["raw"] > 3 * 400 and kept["held"] <= 0.5 * kept["raw"] + 3 * 64
    requests, compactions = counts()
    assert requests == before[0] + 1
    assert compactions - before[1] == kept["compactions"] >= 3
    status, text = post(
        server, path, body(path, "Hi", **beams, stream="chat" in path, kv_budget=0.9)
    )
    assert status == 400 and json.loads(text)["error"]["param"] == "kv_budget"
