"""Clients through nginx and through HAProxy: all that plain vLLM answers, in the same shapes."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pydantic
import pytest

from deploy.fleet import Fleet, answers
from tests.fleet.conftest import NAME, PLAIN, client, server, start_router
from tests.server.conftest import details
from tests.waiting import eventually

pytestmark = pytest.mark.server
FRONTS = ("nginx", "haproxy")
# vLLM's router, from PyPI, knows some endpoints only.
ROUTED = (*FRONTS, "router")
REPLICAS = ("replica-0", "replica-1")
PREFIX = "vllm_kvcrush:"
SHORT = "Name three colours of the rainbow."
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CHOSEN = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
            "required": ["colour", "count"],
            "additionalProperties": False,
        },
    },
}


def chat(**more: Any) -> tuple[str, str, dict[str, Any]]:
    messages = [{"role": "user", "content": SHORT}]
    body = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0}
    return "POST", "/v1/chat/completions", body | more


def completion(**more: Any) -> tuple[str, str, dict[str, Any]]:
    body = {"model": NAME, "prompt": SHORT, "max_tokens": 12, "temperature": 0}
    return "POST", "/v1/completions", body | more


def response(**more: Any) -> tuple[str, str, dict[str, Any]]:
    body = {"model": NAME, "input": SHORT, "max_output_tokens": 12, "temperature": 0}
    return "POST", "/v1/responses", body | more


def message(**more: Any) -> tuple[str, str, dict[str, Any]]:
    messages = [{"role": "user", "content": SHORT}]
    body = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0}
    return "POST", "/v1/messages", body | more


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "chat": chat(),
    "chat: several": chat(n=2, seed=3, temperature=1),
    "chat: logprobs": chat(logprobs=True, top_logprobs=2),
    "chat: stream": chat(**USAGE),
    "chat: tool": chat(tools=[TOOL], tool_choice=CHOSEN, max_tokens=40),
    "chat: tool in a stream": chat(tools=[TOOL], tool_choice=CHOSEN, max_tokens=40, **USAGE),
    "chat: schema": chat(response_format=SCHEMA, max_tokens=40),
    "chat: no such model": chat(model="nobody"),
    "chat: bad value": chat(max_tokens=-1),
    "chat: too long": chat(messages=[{"role": "user", "content": "word " * 4000}]),
    "completion": completion(),
    "completion: two prompts": completion(prompt=[SHORT, "Why?"]),
    "completion: echo": completion(echo=True, logprobs=1),
    "completion: stream": completion(**USAGE),
    "completion: regex": completion(structured_outputs={"regex": "(yes|no)"}),
    "response": response(),
    "response: stream": response(stream=True),
    "message": message(),
    "message: stream": message(stream=True),
    "message: count": ("POST", "/v1/messages/count_tokens", message()[2]),
    "tokenize": ("POST", "/tokenize", {"model": NAME, "prompt": SHORT}),
    "detokenize": ("POST", "/detokenize", {"model": NAME, "tokens": [1, 2, 3]}),
    "render": ("POST", "/v1/chat/completions/render", chat()[2]),
    "embeddings": ("POST", "/v1/embeddings", {"model": NAME, "input": SHORT}),
    "no JSON": ("POST", "/v1/completions", "{"),
    "models": ("GET", "/v1/models", None),
    "health": ("GET", "/health", None),
    "ping": ("GET", "/ping", None),
    "version": ("GET", "/version", None),
    "load": ("GET", "/load", None),
    "nothing there": ("GET", "/v1/nothing", None),
}


def shape(value: Any) -> Any:
    """What a client's types say of an answer: keys and kinds, not values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


def shapes(answer: Any) -> Any:
    """The shape of an answer; of a stream those of its events, as tokens may come together."""
    if isinstance(answer, list):
        return [key for key, _ in itertools.groupby(shape(event) for event in answer)]
    return shape(answer)


def words(choices: Any) -> Any:
    """Choices less their log-probabilities, whose last digits are those of a kernel."""
    return [{k: v for k, v in choice.items() if "logprobs" not in k} for choice in choices]


def without_details(value: Any, found: list[Any]) -> Any:
    """The answer less what this plugin adds to it, which goes into `found`."""
    if isinstance(value, dict):
        if "kv_tokens_details" in value:
            found.append(value["kv_tokens_details"])
        items = ((k, v) for k, v in value.items() if k != "kv_tokens_details")
        return {key: without_details(item, found) for key, item in items}
    if isinstance(value, list):
        return [without_details(item, found) for item in value]
    return value


def ask(base: str, method: str, path: str, body: Any) -> tuple[int, str, Any]:
    """Status, content type and JSON of an answer; of a stream a list of its events."""
    content = body if isinstance(body, str | None) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=120, trust_env=False) as http:
        got = http.request(method, base + path, content=content, headers=headers)
    kind = got.headers.get("content-type", "").split(";")[0]
    if kind == "text/event-stream":
        lines = (x.removeprefix("data: ") for x in got.text.splitlines() if x.startswith("data:"))
        return got.status_code, kind, [x if x == "[DONE]" else json.loads(x) for x in lines]
    return got.status_code, kind, json.loads(got.text) if kind == "application/json" else got.text


@pytest.fixture(scope="module")
def plain(running: Fleet) -> Iterator[str]:
    """A vLLM without this plugin, and without a front."""
    running.replica(2, *PLAIN, plain=True)
    yield running.url("replica-2")
    running.stop("replica-2")


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_plain_vllm(running: Fleet, plain: str, front: str, name: str) -> None:
    method, path, body = REQUESTS[name]
    wanted = ask(plain, method, path, body)
    status, kind, answer = ask(running.url(front), method, path, body)
    added: list[Any] = []
    answer = without_details(answer, added)
    assert (status, kind) == wanted[:2]
    assert shapes(answer) == shapes(wanted[2])
    generates = status == 200 and path in (
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    )
    assert bool(added) == generates
    # A prompt this short is left alone, so that even the words are the same.
    if generates and isinstance(answer, dict) and "choices" in answer and "seed" not in body:
        assert words(answer["choices"]) == words(wanted[2]["choices"])


def test_there_are_the_same_endpoints(running: Fleet, plain: str) -> None:
    paths = [
        {
            path: sorted(methods)
            for path, methods in ask(base, "GET", "/openapi.json", None)[2]["paths"].items()
        }
        for base in (plain, running.url("nginx"), running.url("haproxy"))
    ]
    assert len(paths[0]) > 20 and paths[1] == paths[0] and paths[2] == paths[0]
    # The one that a front keeps to itself.
    assert answers(plain + "/metrics") and not answers(running.url("nginx") + "/metrics")
    assert not answers(running.url("haproxy") + "/metrics")


# -- clients ---------------------------------------------------------------------------------------


class Answer(pydantic.BaseModel):
    colour: str
    count: int


@pytest.mark.parametrize("front", ROUTED)
def test_openai_client(running: Fleet, plain: str, front: str, long: str) -> None:
    api, theirs = client(running, front), client(running, "replica-2")
    assert [model.id for model in api.models.list()] == [NAME]
    ours: Any = {"model": NAME, "temperature": 0}
    messages: Any = [{"role": "user", "content": SHORT}]
    said = api.chat.completions.create(messages=messages, max_tokens=12, **ours)
    assert said.choices[0].message.content and details(said)["compactions"] == 0
    (call,), (wanted,) = (
        asked.chat.completions.create(
            messages=messages, max_tokens=60, tools=[TOOL], tool_choice=CHOSEN, **ours
        )
        .choices[0]
        .message.tool_calls
        for asked in (api, theirs)
    )
    assert call.function == wanted.function and call.function.name == "weather"
    formed = api.chat.completions.create(
        messages=messages, max_tokens=40, response_format=SCHEMA, **ours
    )
    Answer.model_validate_json(formed.choices[0].message.content)
    for made in (
        api.completions.create(prompt=long, max_tokens=12, **ours),
        api.responses.create(input=long, max_output_tokens=12, **ours),
    ):
        assert details(made)["policy"] == "auto" and details(made)["compactions"] >= 1
        assert details(made)["kv_bytes_held"] < 0.5 * details(made)["kv_bytes_raw"]
    own = api.completions.create(
        prompt=long, max_tokens=12, extra_body={"kv_policy": "int8", "kv_budget": 0.5}, **ours
    )
    assert details(own)["policy"] == "int8" and details(own)["compactions"] >= 1
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(prompt="Hello", extra_body={"kv_budget": 0.9}, **ours)
    assert refused.value.body["param"] == "kv_budget"  # type: ignore[index]


@pytest.mark.parametrize("front", ROUTED)
def test_a_prompt_longer_than_the_pool(running: Fleet, front: str, text: str) -> None:
    api = client(running, front)
    prompt = text[: len(text) // 4]
    tokens = ask(running.url("replica-0"), "POST", "/tokenize", {"model": NAME, "prompt": prompt})
    prompt_ids = tokens[2]["tokens"][:1990]
    found = api.completions.create(model=NAME, prompt=prompt_ids, max_tokens=16)
    assert found.usage and found.usage.prompt_tokens == 1990  # of a pool of 1,920
    assert details(found)["compactions"] >= 2
    with pytest.raises(openai.BadRequestError, match="kv_policy"):
        api.completions.create(
            model=NAME, prompt=prompt_ids, max_tokens=16, extra_body={"kv_policy": "none"}
        )


@pytest.mark.parametrize("front", ROUTED)
def test_streams_come_as_they_are_made(running: Fleet, front: str, long: str) -> None:
    started = time.monotonic()
    at = []
    stream = client(running, front).chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": long}],
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        at.append(time.monotonic() - started)
    last = chunks[-1]
    assert last.usage and last.usage.completion_tokens == 60
    assert details(last)["compactions"] >= 1
    assert len(at) > 50
    # Nobody waited for the end, nor gathered tokens.
    assert at[0] < 0.6 * at[-1]
    assert max(b - a for a, b in itertools.pairwise(at)) < 0.5 * at[-1]


@pytest.mark.parametrize("front", ROUTED)
def test_async_clients_are_spread_over_replicas(running: Fleet, front: str, long: str) -> None:
    before = [server(running, r).metric(PREFIX + "requests_total") for r in REPLICAS]

    async def one(api: openai.AsyncOpenAI, number: int) -> Any:
        return await api.completions.create(
            model=NAME, prompt=f"{number} {long}", max_tokens=16, extra_body={"ignore_eos": True}
        )

    async def all_of_them() -> list[Any]:
        base = running.url(front) + "/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="-", max_retries=0) as api:
            stream = await api.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": long}],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert details(chunks[-1])["raw"] > 400
            return await asyncio.gather(*(one(api, number) for number in range(8)))

    for found in asyncio.run(all_of_them()):
        assert found.usage.completion_tokens == 16 and details(found)["compactions"] >= 1
    after = [server(running, r).metric(PREFIX + "requests_total") for r in REPLICAS]
    taken = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(taken) == 9 and min(taken) >= 3


@pytest.mark.parametrize("front", FRONTS)
def test_anthropic_client(running: Fleet, front: str, long: str) -> None:
    api = anthropic.Anthropic(base_url=running.url(front), api_key="-", max_retries=0)
    messages: Any = [{"role": "user", "content": long}]
    said = api.messages.create(
        model=NAME, max_tokens=12, messages=messages, extra_body={"kv_budget": 0.5}
    )
    assert said.content[0].type == "text" and said.usage.input_tokens > 400
    kept = said.usage.model_extra["kv_tokens_details"]  # type: ignore[index]
    assert kept["compactions"] >= 1
    with api.messages.stream(model=NAME, max_tokens=12, messages=messages) as stream:
        assert "".join(stream.text_stream)
    assert api.messages.count_tokens(model=NAME, messages=messages).input_tokens > 400
    with pytest.raises(anthropic.BadRequestError, match="kv_budget"):
        api.messages.create(
            model=NAME, max_tokens=12, messages=messages, extra_body={"kv_budget": 7.5}
        )


@pytest.mark.parametrize("policy", ["cache_aware", "consistent_hash"])
def test_vllms_router_keeps_conversations_together(running: Fleet, policy: str, text: str) -> None:
    """Each goes on where it began, and finds its prefix in that replica's cache."""
    start_router(running, f"router-{policy}", policy)
    api = client(running, f"router-{policy}")
    names = (PREFIX + "requests_total", "vllm:prefix_cache_hits_total")
    homes: list[int] = []
    talks = [text[4000 * n : 4000 * n + 1500] for n in range(20, 24)]
    for turn in range(3):
        for number, said in enumerate(talks):
            before = [[server(running, r).metric(name) for r in REPLICAS] for name in names]
            answer = api.completions.create(
                model=NAME,
                prompt=said,
                max_tokens=8,
                temperature=0,
                extra_headers={"X-Session-ID": f"talk-{number}"},
            )
            after = [[server(running, r).metric(name) for r in REPLICAS] for name in names]
            taken, hits = (
                [b - a for a, b in zip(*both, strict=True)]
                for both in zip(before, after, strict=True)
            )
            assert sorted(taken) == [0, 1]
            home = taken.index(1)
            if turn:
                assert home == homes[number]
                assert hits[home] > 100
            else:
                homes.append(home)
            talks[number] = said + answer.choices[0].text + " And then?"
    # New conversations go where fewer are; a hash of their names may put all in one place.
    assert policy != "cache_aware" or {*homes} == {0, 1}
    running.stop(f"router-{policy}")


# -- what goes wrong -------------------------------------------------------------------------------


def stream(running: Fleet, front: str, long: str, tokens: int) -> Any:
    found = client(running, front).completions.create(
        model=NAME,
        prompt=long,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(found))
    return found


def finished(found: Any) -> int:
    """Reads a stream to its end, which must be a whole answer's; returns its tokens."""
    chunks = list(found)
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert ends[-1] == "length"
    return int(chunks[-1].usage.completion_tokens)


def where(running: Fleet, number: float = 1) -> list[str]:
    """The replicas on which so many requests run."""
    name = "vllm:num_requests_running"
    return [r for r in REPLICAS if server(running, r).metric(name) == number]


@pytest.mark.parametrize("front", ROUTED)
def test_a_client_that_leaves_frees_its_replica(running: Fleet, front: str, long: str) -> None:
    streams = [stream(running, front, f"{n} {long}", 1400) for n in range(2)]
    assert where(running) == [*REPLICAS]  # one each
    for left in streams:
        left.close()
    assert eventually(lambda: where(running, 0) == [*REPLICAS])
    for replica in REPLICAS:
        assert server(running, replica).metric(PREFIX + "kv_bytes_held") == 0


def test_nginx_drains_a_replica(running: Fleet, long: str) -> None:
    """By `down` and a reload, and then by SIGTERM: the stream on it runs to its end."""
    streams = [stream(running, "nginx", f"drain {n} {long}", 250) for n in range(2)]
    assert where(running) == [*REPLICAS]
    config = running.folder / "nginx.conf"
    text = config.read_text(encoding="utf-8")
    port = running.port("replica-1")
    config.write_text(re.sub(rf"(server 127.0.0.1:{port}) [^;]*;", r"\1 down;", text))
    running.reload_nginx()
    taken = server(running, "replica-1").metric(PREFIX + "requests_total")
    api = client(running, "nginx")

    def elsewhere() -> bool:
        api.completions.create(model=NAME, prompt="Hello", max_tokens=2)
        return server(running, "replica-1").metric(PREFIX + "requests_total") == taken

    # The reload takes a moment.
    assert eventually(lambda: all(elsewhere() for _ in range(5)), 20)
    assert "replica-1" in where(running)
    running.running["replica-1"].send_signal(signal.SIGTERM)
    assert [finished(found) for found in streams] == [250, 250]
    running.running["replica-1"].wait(30)
    running.stop("replica-1")
    config.write_text(text, encoding="utf-8")
    running.reload_nginx()
    # One of the two replicas of its list is gone: clients see nothing of it.
    for _ in range(12):
        api.completions.create(model=NAME, prompt="Hello", max_tokens=2)


def test_fronts_do_without_a_dead_replica_and_take_it_back(
    running: Fleet, ours: tuple[str, ...], long: str
) -> None:
    def status() -> float:
        labels = {"proxy": "vllm", "server": "replica-1", "state": "UP"}
        return server(running, "haproxy-8404").metric("haproxy_server_status", **labels)

    assert eventually(lambda: status() == 0)
    for front in FRONTS:
        for _ in range(6):
            client(running, front).completions.create(model=NAME, prompt="Hello", max_tokens=2)
    running.replica(1, *ours)
    assert eventually(lambda: status() == 1)
    for front in FRONTS:
        before = server(running, "replica-1").metric(PREFIX + "requests_total")

        def back(front: str = front, before: float = before) -> bool:
            for left in [stream(running, front, f"back {n} {long}", 4) for n in range(2)]:
                left.close()
            return server(running, "replica-1").metric(PREFIX + "requests_total") > before

        assert eventually(back, 30), front


def test_haproxy_drains_a_replica(running: Fleet, long: str) -> None:
    def tell(command: str) -> None:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(running.folder / "haproxy.sock"))
            admin.sendall(command.encode() + b"\n")
            assert not admin.recv(1000).strip()

    streams = [stream(running, "haproxy", f"drain {n} {long}", 150) for n in range(2)]
    assert where(running) == [*REPLICAS]
    tell("set server vllm/replica-0 state drain")
    taken = server(running, "replica-0").metric(PREFIX + "requests_total")
    for _ in range(5):
        client(running, "haproxy").completions.create(model=NAME, prompt="Hello", max_tokens=2)
    assert server(running, "replica-0").metric(PREFIX + "requests_total") == taken
    assert [finished(found) for found in streams] == [150, 150]
    tell("set server vllm/replica-0 state ready")
