"""Where the front-end is installed, every endpoint of vLLM, and what no client may break."""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import pickle
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, UsageInfo
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from tests.unit.test_params import ACTIVE, CHAT, INPUT, MODEL, PROMPT, Processor, value
from tests.unit.test_params import vllm_config as bare_config
from vllm_kvcrush import plugin, server
from vllm_kvcrush.server import metrics, params, usage, wrap
from vllm_kvcrush.server.rules import Rules
from vllm_kvcrush.server.several import Several
from vllm_kvcrush.spec import parse

ROOT = pathlib.Path(__file__).parents[2]
OURS = "vllm_kvcrush.engine.scheduler.KVCrushScheduler"
# What the engine gets of {"kv_policy": "h2o"}.
RESOLVED = {"kv_policy": "h2o", "kv_budget": 0.25, "kv_elastic": False}


def vllm_config(kvcrush: Any = None, scheduler: str | None = OURS, **cache: Any) -> Namespace:
    config = bare_config(kvcrush, **cache)
    config.scheduler_config = Namespace(scheduler_cls=scheduler)
    return config


# Where it is installed


def test_whoever_makes_an_engine_gets_the_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may be made from a finished config, as in one of several API servers, or by a
    framework."""
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(server, "install", lambda active, http: seen.append((active, http)))

    class Engine:
        def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool = True):
            assert seen  # before anything of the engine's own
            self.made = (vllm_config, executor_class, log_stats)

    wrap(Engine, "__init__", lambda original: server._constructed(original, http=True))
    config = vllm_config(ACTIVE)
    assert Engine(config, 1).made == (config, 1, True)
    Engine(executor_class=2, vllm_config=vllm_config(scheduler=None))
    assert seen == [(True, True), (False, True)]
    # The two that vLLM has.
    server.register()
    server.register()
    assert AsyncLLM.__init__._kvcrush and LLMEngine.__init__._kvcrush  # type: ignore[misc]


def test_a_config_that_nobody_configured_is_refused() -> None:
    with pytest.raises(ValueError, match="EngineArgs") as caught:
        AsyncLLM(vllm_config(ACTIVE, scheduler=None), None, True)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_processes_that_parse_nothing_get_the_flags() -> None:
    """One of several API servers gets parsed flags, and reads them before it loads a plugin."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--kv-policy=int8", "--kv-budget", "0.5", "--kv-policy-config.window=32"]
    base = ["--additional-config", '{"theirs": 1}']
    parsed = parser.parse_args([*base, *flags])
    wanted = {"policy": "int8", "budget": "0.5", "config": {"window": 32}}
    sent = pickle.loads(pickle.dumps(parsed))
    assert sent.additional_config == {"theirs": 1, "kvcrush": wanted}
    # A second time changes nothing, and what was given there stays.
    plugin._fold(sent)
    assert sent.additional_config == {"theirs": 1, "kvcrush": wanted}
    both = [*flags, "--additional-config", '{"kvcrush": {"policy": "int4", "budget_max": 0.75}}']
    assert parser.parse_args(both).additional_config["kvcrush"] == wanted | {"budget_max": 0.75}
    assert parser.parse_args(base).additional_config == {"theirs": 1}
    plugin._fold(argparse.Namespace())


# Endpoints


def test_every_endpoint_of_vllm_is_decided() -> None:
    """A POST route that docs/usage.md does not list fails here until someone decides."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", MODEL, "--enable-scale-out"])
    paths = set()
    for tasks in (("generate",), ("generate", "transcription", "realtime"), ("embed", "classify")):
        for route in build_app(args, tasks, None).routes:  # type: ignore[arg-type]
            if (
                "POST" in (getattr(route, "methods", None) or ())
                or "WebSocket" in type(route).__name__
            ):
                paths.add(route.path)  # type: ignore[attr-defined]
    text = (ROOT / "docs" / "usage.md").read_text()
    rows = text.split("<!-- endpoints -->")[1].split("<!-- /endpoints -->")[0]
    decided = set(re.findall(r"`(/[^`]*)`", rows))
    assert paths - decided == set()
    assert {"/v1/messages", "/inference/v1/generate", "/generative_scoring"} <= paths


class Raw:
    """Stands for the HTTP request."""

    def __init__(self, body: Any):
        self.body = body

    async def json(self) -> Any:
        return self.body


class Chat(OpenAIServingChat):
    """Stands for the classes that vLLM derives from it: Anthropic's and Cohere's endpoints."""

    def __init__(self, front: params.Front):
        self.front = front


def translated(serving: Any, request: Any, raw: Any) -> Any:
    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        sampling = request.to_sampling_params(16, {})
        self.front.check(sampling)
        return sampling

    return asyncio.run(params._translated(create)(serving, request, raw))


def test_messages_take_the_fields_and_refuse_others() -> None:
    front = params.Front(vllm_config(ACTIVE))

    def ask(**extra: Any) -> Any:
        body = {"model": MODEL, "max_tokens": 4, "messages": CHAT["messages"], **extra}
        return translated(Chat(front), ChatCompletionRequest(**CHAT), Raw(body))

    assert ask(kv_policy="h2o", kv_budget=0.3).extra_args == {"kv_policy": "h2o", "kv_budget": 0.3}
    more: dict[str, Any] = {
        "kv_policy": {"policy": "kvcrush", "ratio": 0.5},
        "kv_protect": [[0, 9]],
    }
    assert ask(**more).extra_args == more
    assert not ask(kv_policy=None, other=1, kv_transfer_params={}).extra_args
    for extra, says in (
        ({"kv_budget": 2.5}, "kv_budget=2.5"),
        ({"kv_budgte": 0.5}, "kv_budgte is not a parameter"),
        ({"kv_policy": {"a": 1}}, "kv_policy={'a': 1} is not served here"),
        ({"kv_policy": "kvcrush(ratio=0.75)"}, "kvcrush.ratio=0.75 is not from 0 to 0.5"),
        ({"kv_policy": ["h2o"]}, "kv_policy=a list is not a policy"),
        ({"kv_spans": {"a": 1}}, "kv_spans=a JSON object is not a list of token ranges"),
        ({"kv_protect": [[1, 0]]}, "kv_protect=[[1, 0]] is not a list of token ranges"),
    ):
        answer = ask(**extra)
        assert isinstance(answer, ErrorResponse) and answer.error.code == 400
        assert says in answer.error.message
    # A plain chat request has them already: nothing is read again.
    plain = object.__new__(OpenAIServingChat)
    plain.front = front  # type: ignore[attr-defined]
    with pytest.raises(VLLMValidationError):
        translated(plain, ChatCompletionRequest(**CHAT, kv_budget=7.5), None)
    inactive = Chat(params.Front(vllm_config()))
    answer = translated(inactive, ChatCompletionRequest(**CHAT), Raw({"kv_policy": "h2o"}))
    assert "--kv-policy=kvcrush" in answer.error.message


def test_messages_tell_what_was_kept() -> None:
    from vllm.entrypoints.anthropic import serving
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent

    assert issubclass(AnthropicServingMessages, OpenAIServingChat)
    found = {"held": 3, "raw": 9, "compactions": 1}
    for told, wanted in ((found, found), (None, None)):
        used = UsageInfo(prompt_tokens=5, completion_tokens=2)
        if told is not None:
            usage._add(Namespace(usage=used), told)
        built = serving._build_anthropic_usage(used)
        answer = AnthropicMessagesResponse(id="m", content=[], model=MODEL, usage=built)
        dumped = answer.model_dump(exclude_none=True)["usage"]
        assert dumped["input_tokens"] == 5 and dumped.get("kv_tokens_details") == wanted
        event = AnthropicStreamEvent(type="message_delta", usage=built)
        streamed = event.model_dump(exclude_unset=True)["usage"]
        assert streamed.get("kv_tokens_details") == wanted


def test_tokens_in_tokens_out() -> None:
    class Serving:
        engine_client = Namespace(input_processor=Processor(vllm_config(ACTIVE)))

        async def serve_tokens(self, request: Any, raw_request: Any = None) -> Any:
            return request.sampling_params.extra_args

    wrap(Serving, "serve_tokens", params._checked_tokens)

    def ask(body: dict[str, Any], **extra_args: Any) -> Any:
        given = Namespace(
            sampling_params=SamplingParams(extra_args=extra_args or None), model=MODEL
        )
        return asyncio.run(Serving().serve_tokens(given, Raw(body)))

    assert ask({"kv_policy": "h2o"}, mine=1) == {"mine": 1, "kv_policy": "h2o"}
    assert ask({}, kv_policy="h2o") == {"kv_policy": "h2o"}
    for body, args, name in (
        ({"kv_budget": 3.5}, {}, "kv_budget"),
        ({}, {"kv_budget": 3.5}, "extra_args.kv_budget"),
        ({"kv_budget": 0.2}, {"kv_budget": 0.3}, "kv_budget"),
        ({"kv_": 0.2}, {}, "kv_"),
        ({"kv_budget": 10**30}, {}, "kv_budget"),
    ):
        with pytest.raises(VLLMValidationError) as caught:
            ask(body, **args)
        assert caught.value.parameter == name


def test_rendered_requests_are_checked_where_they_can_be() -> None:
    class Render:
        def __init__(self, config: Any):
            engine = Namespace(input_processor=Processor(config))
            self.models = Namespace(engine_client=engine) if config else Namespace()

        async def render(self, request: Any, raw_request: Any = None) -> Any:
            return [Namespace(sampling_params=request.to_sampling_params(16, {}))]

    wrap(Render, "render", params._rendered)
    active = Render(vllm_config(ACTIVE))
    raw = Raw({"kv_policy": "h2o"})
    (made,) = asyncio.run(active.render(ChatCompletionRequest(**CHAT), raw))
    assert made.sampling_params.extra_args == {"kv_policy": "h2o"}
    with pytest.raises(VLLMValidationError, match="kv_size"):
        asyncio.run(active.render(ChatCompletionRequest(**CHAT, kv_size=1)))
    # A server that only renders has no limits.
    (made,) = asyncio.run(Render(None).render(ChatCompletionRequest(**CHAT, kv_budget=7.5)))
    assert made.sampling_params.extra_args == {"kv_budget": 7.5}


def test_an_endpoint_that_cannot_take_them_says_so() -> None:
    class Decisions:
        def __init__(self, config: Any):
            self.engine_client = Namespace(input_processor=Processor(config))

        async def create_decision(self, request: Any, raw_request: Any = None) -> str:
            return "decided"

    wrap(Decisions, "create_decision", params._without_fields)

    def ask(config: Any, **extra: Any) -> Any:
        return asyncio.run(Decisions(config).create_decision(Namespace(model_extra=extra)))

    assert ask(vllm_config(ACTIVE), other=1, kv_budget=None) == "decided"
    for extra in ({"kv_budget": 0.5}, {"kv_other": 1}):
        with pytest.raises(VLLMValidationError, match="leave it out"):
            ask(vllm_config(ACTIVE), **extra)
    assert ask(vllm_config(), kv_other=1) == "decided"
    with pytest.raises(VLLMValidationError):
        ask(vllm_config(), kv_policy="int8")


# Several engine requests that are one


class Engine:
    """Stands for AsyncLLM: every request holds ten tokens."""

    def __init__(self, config: Any):
        self.input_processor = Processor(config)
        self.seen: list[Any] = []

    async def _run(self) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        output = Namespace()
        setattr(output, usage.ATTRIBUTE, {"held": 10, "raw": 40, "compactions": 1})
        yield output

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
        given = self.input_processor.process_inputs(request_id, [1, 2], sampling_params)
        self.seen.append(given.sampling_params.extra_args)
        return self._run()


class Beams:
    """Three rounds of three beams, as vLLM runs them."""

    def __init__(self, config: Any):
        self.engine_client: Any = Engine(config)

    async def beam_search(self, prompt: Any, request_id: str, params: Any) -> AsyncIterator[Any]:
        sampling = SamplingParams(max_tokens=1)
        for _ in range(3):

            async def read(stream: Any) -> list[Any]:
                return [output async for output in stream]

            beams = [self.engine_client.generate(prompt, sampling, "r") for _ in range(3)]
            await asyncio.gather(*map(read, beams))
        yield Namespace()


wrap(Beams, "beam_search", params._checked_beams)


def beam_params(**extra: Any) -> Any:
    request = CompletionRequest(**PROMPT, use_beam_search=True, n=3, **extra)
    return request.to_beam_search_params(16, {})


def test_beams_are_one_request() -> None:
    made = Beams(vllm_config(ACTIVE))
    before = value(metrics.requests(), MODEL, "h2o"), value(metrics.requests(), MODEL, "kvcrush")

    async def search(given: Any) -> list[Any]:
        return [o async for o in made.beam_search({"prompt_token_ids": [1]}, "r", params=given)]

    (output,) = asyncio.run(search(beam_params(kv_policy="h2o")))
    # The last three hold what they hold; compactions were nine.
    assert getattr(output, usage.ATTRIBUTE) == {"held": 30, "raw": 120, "compactions": 9}
    assert made.engine_client.seen == [RESOLVED] * 9
    after = value(metrics.requests(), MODEL, "h2o"), value(metrics.requests(), MODEL, "kvcrush")
    assert after == (before[0] + 1, before[1])
    # Made by someone else's code: the server's defaults.
    (output,) = asyncio.run(search(BeamSearchParams(beam_width=3, max_tokens=3)))
    assert getattr(output, usage.ATTRIBUTE)["held"] == 30
    assert value(metrics.requests(), MODEL, "kvcrush") == before[1] + 1
    # Before a streamed response has begun.
    with pytest.raises(VLLMValidationError) as caught:
        made.beam_search({}, "r", params=beam_params(kv_budget=0.9))
    assert caught.value.parameter == "kv_budget"
    with pytest.raises(VLLMValidationError) as caught:
        made.beam_search({}, "r", params=beam_params(vllm_xargs={"kv_budget": 0.9}))
    assert caught.value.parameter == "vllm_xargs.kv_budget"


def test_scoring_takes_them_for_every_item() -> None:
    class Scoring:
        def __init__(self, config: Any):
            self.engine_client: Any = Engine(config)

        async def create_generative_scoring(self, request: Any, raw_request: Any = None) -> Any:
            for _ in range(2):
                stream = self.engine_client.generate("p", SamplingParams(max_tokens=1), "r")
                assert [o async for o in stream]
            return Namespace(usage=Namespace())

    wrap(Scoring, "create_generative_scoring", params._checked_scoring)

    def ask(made: Scoring, **extra: Any) -> Any:
        request = Namespace(model_extra=extra, model=MODEL)
        return asyncio.run(made.create_generative_scoring(request))

    made = Scoring(vllm_config(ACTIVE))
    response = ask(made, kv_policy="h2o")
    assert made.engine_client.seen == [RESOLVED] * 2
    assert response.usage.kv_tokens_details["compactions"] == 2
    for extra in ({"kv_budget": 0.9}, {"kv_size": 1}):
        with pytest.raises(VLLMValidationError):
            ask(made, **extra)
    assert len(made.engine_client.seen) == 2


def test_what_stands_for_the_client_is_like_it() -> None:
    client = Namespace(errored=False, generate=None)
    several = Several(client, lambda params: None)
    assert several.errored is False and several.details() is None
    response = Namespace(usage=Namespace())
    several.add_to(response)
    several.tell(response)
    assert not vars(response.usage) and list(vars(response)) == ["usage"]


# Not from HTTP, and from no reasonable client


def test_a_request_made_by_its_caller_is_checked_and_counted() -> None:
    """Such a request does not pass the input processor, in AsyncLLM and in LLMEngine."""

    class Engine:
        def __init__(self) -> None:
            self.input_processor = Processor(vllm_config(ACTIVE))

        def add_request(self, request_id: str, prompt: Any, params: Any) -> Any:
            return prompt

    for cls in (AsyncLLM, LLMEngine):
        assert cls.add_request._kvcrush  # type: ignore[attr-defined]
    wrap(Engine, "add_request", params._checked_ready_made)

    def made(**extra_args: Any) -> EngineCoreRequest:
        return EngineCoreRequest(
            request_id="r", prompt_token_ids=[1], mm_features=None, pooling_params=None,
            sampling_params=SamplingParams(extra_args=extra_args or None), arrival_time=0.0,
            lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip

    before = value(metrics.requests(), MODEL, "h2o")
    Engine().add_request("r", made(kv_policy="h2o"), None)
    Engine().add_request("r", "text", SamplingParams(extra_args={"kv_budget": 9.5}))
    assert value(metrics.requests(), MODEL, "h2o") == before + 1
    with pytest.raises(VLLMValidationError) as caught:
        Engine().add_request("r", prompt=made(kv_policy=["h2o"]), params=None)
    assert caught.value.parameter == "extra_args.kv_policy"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
NASTY = st.sampled_from(
    [["int8"], {"int8": 1}, "x" * 10**5, "1" * 10**4, 10**400, -(10**5000), float("nan"),
     float("inf"), 1e308, -0.0, True, "", " ", "\ud800", "a\nb\x00", "²", "١٢", "nan", "1e400",
     "KVCRUSH", {}, []]
)  # fmt: skip
VALUES = JSON | NASTY
SPANS = st.lists(st.lists(st.integers(-1, 5000), min_size=1, max_size=3), max_size=70) | st.lists(
    st.integers(-1, 5000), max_size=140
)
NAMES = st.sampled_from(
    ["kvcrush", "h2o", "fair", "none", "kvcrush(ratio=0.5)", "int4", "", "x" * 90]
)
SPECS = st.recursive(
    NAMES,
    lambda inner: (
        st.fixed_dictionaries(
            {"policy": NAMES},
            optional={"base": inner, "codecs": JSON, "ratio": JSON, "x" * 90: JSON, "a b": JSON},
        )
        | st.tuples(NAMES, inner.map(str)).map("{0[0]}({0[1]})".format)
    ),
    max_leaves=4,
)
VALUES |= SPANS | SPECS
KEYS = st.sampled_from(["kv_budget", "kv_policy", "kv_policy", "kv_spans", "kv_protect"]) | st.text(
    max_size=5
).map("kv_".__add__)
BAD = st.dictionaries(KEYS | st.just("kv_" + "y" * 1000), VALUES, max_size=3)
FRONT = params.Front(vllm_config(ACTIVE, num_gpu_blocks=200))


def refused_or_fine(check: Any, at_http: bool = True) -> None:
    """Asserts that a check raises nothing but a 400 with one bounded sentence that names the
    parameter."""
    try:
        kv = check()
    except VLLMValidationError as error:
        info = create_error_response(error).error
        assert info.code == 400 and info.param and info.param.isprintable()
        assert len(info.param) < 130 and len(info.message) < 400
        assert info.message.isprintable(), info.message
        info.model_dump_json()
    else:
        allowed: Any = FRONT.rules and FRONT.rules.default.settings.allow
        assert kv is None or all(own.name in allowed for own in parse(kv.policy).chain)
        assert kv is None or kv.budget > 0
        assert kv is None or kv.label in ("kvcrush", "h2o", "none")


@settings(max_examples=300, deadline=None)
@given(BAD, st.sampled_from([(ChatCompletionRequest, CHAT), (CompletionRequest, PROMPT),
                             (ResponsesRequest, INPUT)]))  # fmt: skip
def test_no_field_is_more_than_a_400(fields: dict[str, Any], endpoint: Any) -> None:
    cls, body = endpoint
    fields = {k: v for k, v in fields.items() if k not in ("kv_transfer_params",)}
    request = cls(**body, **fields)
    refused_or_fine(lambda: FRONT.check(request.to_sampling_params(16, {}), 100))


@settings(max_examples=300, deadline=None)
@given(BAD | st.dictionaries(st.integers() | st.text(), JSON) | JSON)
def test_no_extra_args_are_more_than_a_400(extra_args: Any) -> None:
    """Code that calls AsyncLLM.generate or LLM.generate may give extra_args of any type."""
    sampling = SamplingParams()
    sampling.extra_args = extra_args
    for front in (FRONT, params.Front(vllm_config())):
        refused_or_fine(lambda front=front: front.check(sampling, 100))  # type: ignore[misc]


def test_a_policy_may_have_a_long_name() -> None:
    name = "mine_" * 40
    front = params.Front(vllm_config(ACTIVE))
    assert front.rules is not None
    front._plain = Rules.of(replace(front.rules.default.settings, allow=(name, "none")))
    kv = front.check(SamplingParams(extra_args={"kv_policy": name}))
    assert kv is not None and kv.policy == name
    with pytest.raises(
        VLLMValidationError, match=r"kv_policy='mine_mine.* is not served here: choo"
    ):
        front.check(SamplingParams(extra_args={"kv_policy": name + "x"}))
    with pytest.raises(VLLMValidationError, match="is not a policy: give for example 'kvcrush'"):
        front.check(SamplingParams(extra_args={"kv_policy": name * 2}))
