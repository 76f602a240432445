"""The API server's side: request parameters, usage and metrics, on vLLM's own classes."""

from __future__ import annotations

import asyncio
import inspect
import json
import pathlib
import re
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcrush import compat, server
from vllm_kvcrush.server import metrics, params, spans, usage, wrap
from vllm_kvcrush.stats import COMPACTION_BUCKETS, Stats

server.install(active=True)

MODEL = "test-model"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PROMPT = {"model": MODEL, "prompt": "Hi"}
INPUT = {"model": MODEL, "input": "Hi"}


def vllm_config(kvcrush: dict[str, Any] | None = None, **cache: Any) -> Namespace:
    return Namespace(
        additional_config={} if kvcrush is None else {"kvcrush": kvcrush},
        cache_config=Namespace(**{"block_size": 16, "num_gpu_blocks": None} | cache),
        model_config=Namespace(max_model_len=4096, served_model_name=MODEL),
        parallel_config=Namespace(
            data_parallel_size=1,
            data_parallel_size_local=1,
            data_parallel_rank_local=None,
            local_engines_only=False,
        ),
    )


ACTIVE = {
    "policy": "kvcrush",
    "budget": 0.25,
    "budget_max": 0.5,
    "allow": ["kvcrush", "h2o"],
    "config": {"clients": {"kvcrush": {"ratio": [0, 0.5]}}},
}


def sampled(cls: Any, body: dict[str, Any]) -> Any:
    return cls(**body).to_sampling_params(16, {})


def value(collector: Any, *labels: str) -> float:
    return collector.labels(*labels)._value.get()


@pytest.fixture(params=["chat", "completions", "responses"])
def endpoint(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return {
        "chat": (ChatCompletionRequest, CHAT),
        "completions": (CompletionRequest, PROMPT),
        "responses": (ResponsesRequest, INPUT),
    }[request.param]


# From JSON to extra_args


def test_top_level_fields_arrive_like_xargs(endpoint: Any) -> None:
    cls, body = endpoint
    wanted = {"kv_budget": 0.25, "kv_policy": "h2o"}
    assert sampled(cls, body | wanted).extra_args == wanted
    xargs = {name: v for name, v in wanted.items() if name != "kv_policy"}
    assert sampled(cls, body | {"vllm_xargs": xargs, "kv_policy": "h2o"}).extra_args == wanted
    # Given twice but alike, or left alone by an SDK.
    twice = {"vllm_xargs": {"kv_budget": 0.25}, "kv_budget": 0.25, "kv_policy": None}
    assert sampled(cls, body | twice).extra_args == {"kv_budget": 0.25}


def test_unknown_fields_never_travel_on(endpoint: Any) -> None:
    """An inactive server ignores unknown fields like plain vLLM: in the engine they could do
    harm."""
    cls, body = endpoint
    given = sampled(cls, body | {"kv_cache_hint": 10**30})
    assert not given.extra_args
    assert params.Front(vllm_config(None)).check(given) is None
    with pytest.raises(VLLMValidationError, match="kv_cache_hint"):
        params.Front(vllm_config(ACTIVE)).check(given)


def test_vllms_own_fields_are_left_alone(endpoint: Any) -> None:
    cls, body = endpoint
    own = sampled(cls, body | {"kv_transfer_params": {"a": 1}, "kv_cache_report_mode": "x"})
    assert own.extra_args == {"kv_transfer_params": {"a": 1}}
    assert not sampled(cls, body).extra_args
    assert sampled(cls, body | {"other": 1, "vllm_xargs": {"b": 2}}).extra_args == {"b": 2}


def test_a_contradiction_is_refused(endpoint: Any) -> None:
    cls, body = endpoint
    before = value(metrics.refusals(), MODEL, "conflict")
    with pytest.raises(VLLMValidationError, match="contradicts vllm_xargs") as caught:
        sampled(cls, body | {"kv_budget": 0.5, "vllm_xargs": {"kv_budget": 0.25}})
    assert caught.value.parameter == "kv_budget"
    assert value(metrics.refusals(), MODEL, "conflict") == before + 1


@pytest.mark.parametrize(
    ("cls", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, PROMPT)]
)
def test_beams_take_them_along(cls: Any, body: dict[str, Any]) -> None:
    """vLLM drops extra_args with beam search."""
    beams = body | {"use_beam_search": True, "n": 2}
    wanted = {"kv_budget": 0.5, "kv_policy": "h2o"}
    for extra, names in (
        (wanted, set(wanted)),
        ({"vllm_xargs": wanted | {"theirs": 1}}, set()),
        ({"vllm_xargs": {"kv_budget": 0.5}, "kv_policy": "h2o"}, {"kv_policy"}),
    ):
        made = cls(**beams, **extra).to_beam_search_params(16, {})
        sampling = vars(made)[params._SAMPLING]
        assert (sampling.extra_args, sampling.max_tokens) == (wanted, 16)
        assert set(vars(sampling)[params._FIELDS]) == names
    with pytest.raises(VLLMValidationError, match="contradicts"):
        cls(**beams, kv_budget=0.5, vllm_xargs={"kv_budget": 0.25}).to_beam_search_params(16, {})


def test_known_fields_are_not_logged_as_ignored(
    endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.serve.engine import protocol

    logged: list[Any] = []
    monkeypatch.setattr(protocol.logger, "debug", lambda *args: logged.append(args))
    cls, body = endpoint
    cls(**body, kv_budget=0.5, kv_policy="h2o")
    assert logged == []
    cls(**body, kv_budget=0.5, unknown=1)
    assert logged[0][1] == {"unknown"}


# Validation


@pytest.mark.parametrize(
    ("extra", "reason", "key"),
    [
        ({"kv_budget": 0}, "budget", "kv_budget"),
        ({"kv_budget": 17}, "budget", "kv_budget"),
        ({"kv_budget": 0.6}, "cap", "kv_budget"),
        ({"kv_policy": "nope"}, "policy", "kv_policy"),
        ({"kv_policy": "none"}, "policy", "kv_policy"),
        ({"kv_buget": 0.2}, "unknown_key", "kv_buget"),
        ({"kv_policy": "kvcrush(ratio=0.9)"}, "policy", "kv_policy"),
        ({"kv_policy": "kvcrush(h2o"}, "policy", "kv_policy"),
        ({"kv_policy": "x" * 300}, "policy", "kv_policy"),
        ({"kv_spans": "0:64"}, "spans", "kv_spans"),
        ({"kv_spans": "64:0"}, "spans", "kv_spans"),
        ({"kv_protect": [0, 64, 32, 90]}, "spans", "kv_protect"),
        ({"kv_protect": [0, 4000]}, "cap", "kv_protect"),
    ],
)
def test_bad_parameters_become_openais_error(
    endpoint: Any, extra: dict[str, Any], reason: str, key: str
) -> None:
    cls, body = endpoint
    front = params.Front(vllm_config(ACTIVE))
    before = value(metrics.refusals(), MODEL, reason)
    for given, name in ((extra, key), ({"vllm_xargs": extra}, f"vllm_xargs.{key}")):
        with pytest.raises(VLLMValidationError) as caught:
            front.check(sampled(cls, body | given))
        error = create_error_response(caught.value).error
        assert (error.code, error.type, error.param) == (400, "BadRequestError", name)
        assert key in error.message
    assert value(metrics.refusals(), MODEL, reason) == before + 2


def test_params_that_did_not_come_by_http_are_named_as_offline() -> None:
    front = params.Front(vllm_config(ACTIVE))
    with pytest.raises(VLLMValidationError) as caught:
        front.check(SamplingParams(extra_args={"kv_budget": 0}))
    assert caught.value.parameter == "extra_args.kv_budget"


def test_what_a_request_runs_with() -> None:
    front = params.Front(vllm_config(ACTIVE | {"budget_max": None, "allow": ["none"]}))
    for extra, policy in (
        (None, "kvcrush"),
        ({"kv_policy": "none"}, "none"),
        ({"kv_budget": 1.0}, "none"),
        ({"kv_transfer_params": {}}, "kvcrush"),
        ({"kv_policy": {"policy": "kvcrush"}}, "kvcrush"),
    ):
        kv = front.check(SamplingParams(extra_args=extra))
        assert kv is not None
        assert kv.label == policy


def test_counters_have_a_label_for_each_name_not_for_each_parameter() -> None:
    kvcrush = {
        "policy": "fair(kvcrush, fairness=0.75)",
        "allow": ["kvcrush", "kvcrush(h2o)", "fair", "none"],
        "config": {"clients": {"kvcrush": {"seed": [0, 1000]}}},
    }
    front = params.Front(vllm_config(kvcrush))
    before = {name: value(metrics.requests(), MODEL, name) for name in ("fair", "kvcrush", "none")}
    for extra, name in (
        ({}, "fair"),
        ({"kv_policy": "kvcrush(h2o)"}, "kvcrush"),
        ({"kv_policy": "fair(kvcrush)", "kv_spans": "0:8,8:16"}, "fair"),
        ({"kv_policy": "none"}, "none"),
        *(({"kv_policy": f"kvcrush(seed={seed})"}, "kvcrush") for seed in range(20)),
    ):
        kv = front.check(SamplingParams(extra_args=extra))
        assert kv is not None and kv.label == name
        front.count(kv)
    after = {name: value(metrics.requests(), MODEL, name) for name in before}
    assert {name: after[name] - before[name] for name in before} == {
        "fair": 2, "kvcrush": 21, "none": 1,
    }  # fmt: skip
    names = {sample.labels["policy"] for sample in metrics.requests().collect()[0].samples}
    assert not any(set("(=@") & set(name) for name in names)
    # So do the series that are there from the start.
    logger = metrics.KVCrushStatLogger(vllm_config(kvcrush), 11)
    assert logger.policies == {"fair", "kvcrush", "none"}
    found = {labels for labels in scraped() if "('engine', '11')" in labels and "policy" in labels}
    assert found and not any("kvcrush(" in labels or "fair(" in labels for labels in found)


def test_an_inactive_server_says_how_to_start_it() -> None:
    front = params.Front(vllm_config())
    assert front.check(SamplingParams(extra_args={"mine": 1, "kv_other": 2})) is None
    for key in ("kv_budget", "kv_policy"):
        with pytest.raises(VLLMValidationError, match="--kv-policy=kvcrush") as caught:
            front.check(sampled(CompletionRequest, PROMPT | {key: "none"}))
        assert caught.value.parameter == key
    # The hash-only kind of additional_config has no entries.
    config = vllm_config()
    config.additional_config = object()
    assert params.Front(config).rules is None


def test_a_request_that_never_fits_is_refused() -> None:
    # 0.25 × 3000 tokens are 46 blocks, and 2048 tokens more (128 blocks) while reading.
    kv = {"policy": "kvcrush"}
    given = SamplingParams(max_tokens=100)
    for blocks, fits in ((175, True), (174, False)):
        front = params.Front(vllm_config(kv, num_gpu_blocks=blocks))
        front.check(given)  # unknown length
        front.check(given, 100)
        if fits:
            front.check(given, 3000)
            continue
        with pytest.raises(VLLMValidationError, match="needs 174 KV blocks of the 173") as caught:
            front.check(given, 3000)
        assert caught.value.parameter == "extra_args.kv_budget"
        with pytest.raises(VLLMValidationError, match="another kv_policy"):
            front.check(SamplingParams(max_tokens=100, extra_args={"kv_policy": "none"}), 3000)
    # Output counts as far as the model's length goes; no limit means all of it.
    front = params.Front(vllm_config(kv, num_gpu_blocks=100))
    front.check(SamplingParams(max_tokens=100), 1000)
    with pytest.raises(VLLMValidationError, match="4096 tokens"):
        front.check(SamplingParams(max_tokens=None, extra_args={"kv_budget": 2000}), 1000)


def test_data_parallel_engines_do_not_share_their_blocks() -> None:
    config = vllm_config({"policy": "kvcrush"}, num_gpu_blocks=350)
    config.parallel_config.data_parallel_size = 2
    params.Front(config).check(SamplingParams(max_tokens=100), 3000)
    config.cache_config.num_gpu_blocks = 348
    with pytest.raises(VLLMValidationError, match="of the 173"):
        params.Front(config).check(SamplingParams(max_tokens=100), 3000)
    config.parallel_config.local_engines_only = True
    params.Front(config).check(SamplingParams(max_tokens=100), 3000)
    config.parallel_config.local_engines_only = False
    config.parallel_config.data_parallel_rank_local = 1
    params.Front(config).check(SamplingParams(max_tokens=100), 3000)


# What is known of a rendered prompt


def test_a_system_prompt_is_protected_unless_a_request_says_otherwise() -> None:
    front = params.Front(vllm_config({"policy": "snapkv", "allow": ["snapkv", "fair", "none"]}))

    def protected(located: spans.Located, length: int | None = 2000, **extra: Any) -> Any:
        given = sampled(ChatCompletionRequest, CHAT | extra)
        prompt = {"prompt_token_ids": [5] * 2000, spans.LOCATED: located}
        params._locate(given, prompt)
        params._locate(given, {"prompt_token_ids": [5]})  # nothing is known of this one
        return front.check(given, length)

    system = spans.Located(system=((4, 40), (50, 60)))
    assert protected(system).protect == system.system and protected(system).system
    assert protected(system, kv_protect=[]).protect == ()
    assert protected(system, kv_protect=[[0, 2]]).protect == ((0, 2),)
    assert protected(system, kv_policy="none").protect == ()
    assert protected(system, None).protect == ()  # later, when the length is known
    # Half of the budget of a request, its first tokens.
    assert protected(spans.Located(system=((4, 900),))).protect == ((4, 254),)
    named = {"kv_protect": ((7, 9),), "kv_spans": ((0, 7), (7, 20))}
    found = protected(
        spans.Located(named, system.system),
        kv_policy="fair(snapkv)",
        kv_protect=[{"message": 0}],
        kv_spans=[{"message": 0}, {"message": 1}],
    )
    assert (found.protect, found.spans, found.system) == (((7, 9),), ((0, 7), (7, 20)), False)
    # Where the text is not known.
    with pytest.raises(VLLMValidationError, match="give token ranges") as caught:
        protected(spans.Located(), kv_protect=[{"message": 0}])
    assert caught.value.parameter == "kv_protect"


def test_what_is_rendered_has_token_ranges() -> None:
    front = params.Front(vllm_config({"policy": "snapkv"}))
    made = sampled(ChatCompletionRequest, CHAT | {"kv_spans": None})
    setattr(made, params._LOCATED, spans.Located(system=((4, 40),)))
    params._write_spans(made, front.check(made, 2000))
    assert made.extra_args == {"kv_protect": [[4, 40]]}
    # A server that only renders knows no budget.
    made = sampled(ChatCompletionRequest, CHAT | {"kv_protect": [{"message": 0}]})
    setattr(made, params._LOCATED, spans.Located({"kv_protect": ((2, 5),)}, ((4, 40),)))
    params._write_spans(made, None)
    assert made.extra_args == {"kv_protect": [[2, 5]]}
    made = sampled(ChatCompletionRequest, CHAT)
    params._write_spans(made, None)
    assert not made.extra_args


# Where the checks are made


class Processor:
    """Stands for InputProcessor."""

    def __init__(self, config: Any):
        self.vllm_config = config

    def _validate_params(self, params: Any, supported_tasks: Any) -> str:
        return "watermarking"

    def process_inputs(self, request_id: str, prompt: Any, params: Any) -> Any:
        self._validate_params(params, ())
        # Clones lose what is not a field, as vLLM's do.
        return Namespace(sampling_params=params.clone(), prompt_token_ids=prompt, lora_request=None)


wrap(Processor, "_validate_params", params._checked_params)
wrap(Processor, "process_inputs", params._checked_inputs)


def test_vllms_classes_are_wrapped_once() -> None:
    method = InputProcessor.process_inputs
    server.install(active=True)
    assert InputProcessor.process_inputs is method
    # The arguments that the wrappers look for by name.
    for method, names in (
        (InputProcessor._validate_params, {"params"}),
        (InputProcessor.process_inputs, {"params"}),
        (AsyncLLM.generate, {"prompt", "sampling_params"}),
        (
            OpenAIServingResponses._generate_with_builtin_tools,
            {"engine_input", "sampling_params"},
        ),
        (OpenAIServingResponses.responses_full_generator, {"context"}),
        (OpenAIServingChat.chat_completion_full_generator, {"result_generator"}),
        (getattr(OpenAIServingChat, compat.CHAT_STREAM), {"result_generator"}),
        (OpenAIServingChatBatch.chat_completion_full_generator_batch, {"generators"}),
        (OpenAIServingCompletion.completion_stream_generator, {"result_generator"}),
        (OpenAIServingCompletion.request_output_to_completion_response, {"final_res_batch"}),
    ):
        assert method._kvcrush
        assert names <= set(inspect.signature(method).parameters)
    with pytest.raises(RuntimeError, match="no method missing"):
        wrap(Processor, "missing", lambda method: method)


def test_the_input_processor_checks_and_counts() -> None:
    processor = Processor(vllm_config(ACTIVE))
    assert processor._validate_params(SamplingParams(), ()) == "watermarking"
    assert processor._validate_params(object(), ()) == "watermarking"  # pooling
    before = value(metrics.requests(), MODEL, "h2o")
    processor.process_inputs("0", [1, 2], SamplingParams(extra_args={"kv_policy": "h2o"}))
    assert value(metrics.requests(), MODEL, "h2o") == before + 1
    with pytest.raises(VLLMValidationError):
        processor.process_inputs("0", [1, 2], SamplingParams(extra_args={"kv_policy": "x"}))
    assert value(metrics.requests(), MODEL, "h2o") == before + 1


def test_the_clone_is_named_by_the_original() -> None:
    processor = Processor(vllm_config({"policy": "kvcrush"}, num_gpu_blocks=174))
    given = sampled(CompletionRequest, PROMPT | {"vllm_xargs": {"kv_budget": 0.25}})
    with pytest.raises(VLLMValidationError) as caught:
        processor.process_inputs("0", [0] * 3000, given)
    assert caught.value.parameter == "vllm_xargs.kv_budget"


def test_a_stream_is_refused_before_it_starts() -> None:
    class Engine:
        def __init__(self) -> None:
            self.input_processor = Processor(vllm_config(ACTIVE))

        async def generate(
            self, prompt: Any, sampling_params: Any, request_id: str
        ) -> AsyncIterator[int]:
            yield 1

    class Serving:
        def __init__(self) -> None:
            self.engine_client = Engine()

        async def _generate_with_builtin_tools(
            self, request_id: str, engine_input: Any, sampling_params: Any
        ) -> AsyncIterator[int]:
            yield 2

    wrap(Engine, "generate", params._checked_generate)
    wrap(Serving, "_generate_with_builtin_tools", params._checked_turns)
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    bad = SamplingParams(extra_args={"kv_budget": 0})
    # Called, not awaited: an async generator would raise only once it is read.
    with pytest.raises(VLLMValidationError):
        Engine().generate(prompt, bad, "0")
    with pytest.raises(VLLMValidationError):
        Serving()._generate_with_builtin_tools("0", prompt, sampling_params=bad)

    async def read(outputs: Any) -> list[int]:
        return [item async for item in outputs]

    good = SamplingParams()
    assert asyncio.run(read(Engine().generate(prompt, good, request_id="0"))) == [1]
    turns = Serving()._generate_with_builtin_tools("0", engine_input=prompt, sampling_params=good)
    assert asyncio.run(read(turns)) == [2]
    # A raw prompt, whose length is not known yet.
    assert asyncio.run(read(Engine().generate("text", good, "0"))) == [1]


def test_the_api_server_answers_400() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)
    front = params.Front(vllm_config(ACTIVE))

    @app.post("/v1/chat/completions")
    async def create(request: ChatCompletionRequest) -> str:
        front.check(request.to_sampling_params(16, {}))
        return "fine"

    client = TestClient(app)
    assert client.post("/v1/chat/completions", json=CHAT | {"kv_budget": 0.5}).status_code == 200
    answer = client.post("/v1/chat/completions", json=CHAT | {"kv_budget": 2.5, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_budget"
    assert "kv_budget=2.5 is not a KV budget" in answer.json()["error"]["message"]


# Usage: from the engine's outputs


def report(
    held: int, raw: int, compactions: int = 1, failures: int = 0, **more: Any
) -> dict[str, Any]:
    """Returns an engine's report: blocks have 16 slots and 1,000 bytes, and a slot holds one
    token."""
    numbers = {
        "kv_tokens_held": held,
        "kv_tokens_raw": raw,
        "kv_slots_held": held,
        "kv_blocks_held": -(-held // 16),
        "kv_block_size": 16,
        "kv_block_bytes": 1000,
        "kv_side_bytes": 7,
        "compactions": compactions,
        "first_compaction": 64 if compactions else None,
        "reason": "budget",
        "policy_failures": failures,
        "policy": "kvcrush",
        "budget": 0.25,
    }
    return {"kvcrush": numbers, **more}


def kept(held: int, raw: int, compactions: int = 1, **more: Any) -> dict[str, Any]:
    """Returns the details of a request with such a report."""
    sizes = {"kv_bytes_held": -(-held // 16) * 1000 + 7, "kv_bytes_raw": -(-raw // 16) * 1000}
    counts = {"held": held, "raw": raw, "compactions": compactions}
    why = {"reason": "budget", "first_compaction": 64} if compactions else {}
    return counts | sizes | {"policy": "kvcrush"} | why | more


class Request:
    """Requests in a real OutputProcessor, without a tokenizer."""

    def __init__(self, n: int = 1, stream: bool = False, prompt: int = 100):
        self.processor = OutputProcessor(None, log_stats=False)
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        request = EngineCoreRequest(
            request_id="r",
            external_req_id="r",
            prompt_token_ids=[1] * prompt,
            mm_features=None,
            sampling_params=SamplingParams(n=n, detokenize=False, output_kind=kind, max_tokens=99),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        parent = ParentRequest(request) if n > 1 else None
        for index in range(n):
            child = request
            if parent is not None:
                child = EngineCoreRequest(
                    **{f: getattr(request, f) for f in request.__struct_fields__}
                )
                child.request_id, child.sampling_params = parent.get_child_info(index)
            self.processor.add_request(child, None, parent, index)

    def step(
        self, tokens: int, kv: Any = None, finish: bool = False, request_id: str = "r"
    ) -> RequestOutput | None:
        output = EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[5] * tokens,
            finish_reason=FinishReason.LENGTH if finish else None,
            kv_transfer_params=kv,
        )
        made = self.processor.process_outputs([output]).request_outputs
        return made[0] if made else None


def details(output: Any) -> Any:
    return getattr(output, "kv_tokens_details", None)


def test_the_last_report_counts() -> None:
    request = Request()
    assert request.step(1, report(100, 100, 0)) is None
    assert request.step(1, report(40, 101)) is None
    output = request.step(1, report(41, 102), finish=True)
    assert details(output) == kept(41, 102)
    assert output is not None
    assert output.kv_transfer_params is None


def test_between_reports_each_token_is_kept() -> None:
    request = Request()
    request.step(1, report(40, 100))
    for _ in range(3):
        request.step(1)
    # Ended by the front-end, as at a stop string: the engine's last report never comes.
    output = request.step(1, finish=True)
    assert details(output) == kept(44, 104)


def test_bytes_are_of_whole_blocks_as_they_fill() -> None:
    for tokens, blocks in ((8, 3), (9, 4)):
        request = Request()
        request.step(1, report(40, 100))
        output = request.step(tokens, finish=True)
        assert details(output)["kv_bytes_held"] == blocks * 1000 + 7
        assert details(output)["kv_bytes_raw"] == -(-(100 + tokens) // 16) * 1000
    # Tokens in fewer bits: many of them in few slots. And a block that is there already counts.
    few = report(100, 100)
    few["kvcrush"] |= {"kv_slots_held": 30, "kv_blocks_held": 3}
    request = Request()
    request.step(1, few)
    output = request.step(2, finish=True)
    found = details(output)
    assert (found["held"], found["kv_bytes_held"], found["kv_bytes_raw"]) == (102, 3007, 7000)


def test_failures_of_a_policy_are_told() -> None:
    request = Request()
    request.step(1, report(40, 100, 3, failures=2))
    assert details(request.step(1, finish=True)) == kept(41, 101, 3, policy_failures=2)


def test_without_a_report_nothing_was_evicted() -> None:
    request = Request(prompt=100)
    request.step(5)
    # 100 of the prompt and 5 of 6 of the output: the last token has no KV.
    assert details(request.step(1, finish=True)) == {"held": 105, "raw": 105, "compactions": 0}


def test_a_connectors_own_params_stay() -> None:
    output = Request().step(1, report(40, 100, remote_port=1), finish=True)
    assert output is not None
    assert output.kv_transfer_params == {"remote_port": 1}
    output = Request().step(1, {"remote_port": 1}, finish=True)
    assert output is not None
    assert output.kv_transfer_params == {"remote_port": 1}


def test_samples_add_up_in_whatever_order_they_end() -> None:
    request = Request(n=3)
    assert request.step(2, report(10, 100, 1), True, "1_r") is None
    request.step(1, report(20, 100, 0), False, "0_r")
    assert request.step(2, report(30, 100, 1), True, "2_r") is None
    output = request.step(4, None, True, "0_r")
    assert details(output) == {
        "held": 10 + 24 + 30,
        "raw": 304,
        "compactions": 2,
        "kv_bytes_held": 1007 + 2007 + 2007,
        "kv_bytes_raw": 3 * 7000,
        "policy": "kvcrush",
        "reason": "budget",
        "first_compaction": 64,
    }


def test_merged_stream_outputs_keep_the_sum() -> None:
    request = Request(n=2, stream=True)
    first = request.step(1, report(10, 100), True, "0_r")
    middle = request.step(1, None, False, "1_r")
    last = request.step(1, report(20, 100), True, "1_r")
    assert first is not None and middle is not None and last is not None
    assert details(first)["held"] == 10
    # The collector merges when the consumer is slow.
    first.add(middle, aggregate=True)
    assert details(first)["held"] == 10
    first.add(last, aggregate=True)
    assert details(first)["held"] == 30
    first.add(finished(None), aggregate=False)
    assert details(first)["held"] == 30


def test_totals() -> None:
    assert usage.total([]) is None
    part = {"held": 1, "raw": 2, "compactions": 3, "policy": "h2o"}
    assert usage.total([part]) == part
    mixed = usage.total([part, part | {"policy": "none"}])
    assert mixed == {"held": 2, "raw": 4, "compactions": 6}
    sized = part | {"kv_bytes_held": 5, "kv_bytes_raw": 7, "policy_failures": 1}
    assert usage.total([sized, sized])["kv_bytes_held"] == 10  # type: ignore[index]
    early, late = (part | {"reason": "pressure", "first_compaction": n} for n in (40, 90))
    both = usage.total([late, early, part])
    assert both is not None and (both["reason"], both["first_compaction"]) == ("pressure", 40)
    both = usage.total([late, early | {"reason": "budget"}])
    assert both is not None and "reason" not in both
    # Of one that ended before the engine said anything the size is not known.
    assert usage.total([sized, part]) == {
        "held": 2, "raw": 4, "compactions": 6, "policy_failures": 1, "policy": "h2o",
    }  # fmt: skip


# Usage: to the response


def finished(held: int | None, index: int = 0) -> RequestOutput:
    output = RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=[1, 2],
        prompt_logprobs=None,
        outputs=[CompletionOutput(index, 'text "choices":[]', [7], None, None, "stop")],
        finished=True,
    )
    if held is not None:
        output.kv_tokens_details = {"held": held, "raw": 100, "compactions": 1, "policy": "h2o"}
    return output


async def stream_of(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


def serving(cls: Any) -> Any:
    made = object.__new__(cls)
    vars(made).update(
        enable_force_include_usage=False,
        enable_prompt_tokens_details=False,
        enable_per_request_metrics=False,
        enable_log_outputs=False,
        system_fingerprint=None,
        request_logger=None,
        parser_cls=None,
        response_role="assistant",
        enable_auto_tools=False,
        _include_reasoning_tokens_details=False,
        return_tokens_as_token_ids=False,
    )
    return made


def test_completions() -> None:
    made = serving(OpenAIServingCompletion)
    request = CompletionRequest(model=MODEL, prompt=["a", "b"], max_tokens=5)

    def respond(*held: int | None) -> Any:
        batch = [finished(h) for h in held]
        args = (batch, request, "id", 0, MODEL, None, Namespace())
        return made.request_output_to_completion_response(*args).model_dump()

    both = respond(10, 20)
    assert both["usage"]["kv_tokens_details"] == {
        "held": 30,
        "raw": 200,
        "compactions": 2,
        "policy": "h2o",
    }
    assert both["usage"]["prompt_tokens"] == 4
    assert both["kv_transfer_params"] is None
    assert "kv_tokens_details" not in respond(None)["usage"]


def events(text: list[str]) -> Iterator[dict[str, Any]]:
    assert text[-1] == "data: [DONE]\n\n"
    for event in text[:-1]:
        assert event.startswith("data: ") and event.endswith("\n\n")
        yield json.loads(event[6:])


@pytest.mark.parametrize("held", [10, None])
def test_streamed_completions(held: int | None) -> None:
    request = CompletionRequest(
        model=MODEL, prompt=["a", "b"], max_tokens=5, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    made = serving(OpenAIServingCompletion)
    stream = made.completion_stream_generator(
        request, [{}, {}], stream_of((0, finished(held)), (1, finished(held))), "id", 0, MODEL,
        num_prompts=2, tokenizer=None, request_metadata=Namespace(),
    )  # fmt: skip
    *chunks, last = events(asyncio.run(collect(stream)))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ['text "choices":[]'] * 2
    assert all("kv_tokens_details" not in chunk["usage"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["usage"].get("kv_tokens_details", {}).get("held") == (None if held is None else 20)


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


def chat_arguments(outputs: Any, **fields: Any) -> tuple[Any, ...]:
    request = ChatCompletionRequest(**CHAT, **fields)
    return request, outputs, "id", MODEL, [], None, Namespace()


def test_chat() -> None:
    made = serving(OpenAIServingChat)
    response = asyncio.run(
        made.chat_completion_full_generator(*chat_arguments(stream_of(finished(10), finished(12))))
    )
    assert response.model_dump()["usage"]["kv_tokens_details"]["held"] == 12
    # No output at all: an ErrorResponse, passed on as it is.
    error = asyncio.run(made.chat_completion_full_generator(*chat_arguments(stream_of())))
    assert error.error.code == 500


def test_streamed_chats_at_the_same_time_do_not_mix() -> None:
    made = serving(OpenAIServingChat)
    fields = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}

    async def many() -> list[list[str]]:
        streams = [
            made.chat_completion_stream_generator(
                *chat_arguments(stream_of(finished(None, 0), finished(held, 1)), **fields)
            )
            for held in (10, 20, 30)
        ]
        return await asyncio.gather(*map(collect, streams))

    for held, text in zip((10, 20, 30), asyncio.run(many()), strict=True):
        *_, last = events(text)
        assert last["usage"]["kv_tokens_details"]["held"] == held


def test_chunks_that_are_no_events_yet_tell_it_too() -> None:
    """vLLM 0.33 streams chats in such chunks."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    class Source:
        async def stream(self, result_generator: Any) -> AsyncIterator[Any]:
            async for _ in result_generator:
                yield chunk(choices=[{"index": 0, "delta": {"content": "x"}}])
            yield chunk(choices=[])
            yield create_error_response("of another kind")

    def chunk(**fields: Any) -> ChatCompletionStreamResponse:
        return ChatCompletionStreamResponse(model=MODEL, usage=UsageInfo(), **fields)

    wrap(Source, "stream", usage._stream)
    found = asyncio.run(collect(Source().stream(stream_of(finished(10), finished(12)))))
    assert found[-1].error.message == "of another kind"
    dumped = [json.loads(c.model_dump_json(exclude_unset=True))["usage"] for c in found[:-1]]
    assert [d.get("kv_tokens_details", {}).get("held") for d in dumped] == [None, None, 12]
    silent = asyncio.run(collect(Source().stream(stream_of())))
    assert "kv_tokens_details" not in silent[0].usage.model_dump()


def test_a_stream_that_is_left_closes_its_source() -> None:
    closed = []

    class Source:
        async def stream(self, result_generator: Any) -> AsyncIterator[str]:
            try:
                async for item in result_generator:
                    yield item
            finally:
                closed.append(True)

    wrap(Source, "stream", usage._stream)

    async def leave() -> None:
        stream = Source().stream(stream_of("a", "b"))
        assert await anext(stream) == "a"
        await stream.aclose()
        # At once, not when the garbage collector comes by.
        assert closed == [True]

    asyncio.run(leave())


def test_batched_chat() -> None:
    made = serving(OpenAIServingChatBatch)
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest

    request = BatchChatCompletionRequest(model=MODEL, messages=[CHAT["messages"]] * 2)
    response = asyncio.run(
        made.chat_completion_full_generator_batch(
            request, [stream_of(finished(10)), stream_of(finished(20))], "id", MODEL, [[], []],
            None, Namespace(),
        )
    )  # fmt: skip
    assert response.model_dump()["usage"]["kv_tokens_details"]["held"] == 30


def test_responses() -> None:
    context = SimpleContext()
    context.append_output(finished(None))
    assert not hasattr(context, "kv_tokens_details")
    context.append_output(finished(12))

    class Serving:
        async def responses_full_generator(self, request: Any, context: Any) -> Any:
            return Namespace(usage=Namespace())

    wrap(Serving, "responses_full_generator", usage._responses)
    response = asyncio.run(Serving().responses_full_generator(None, context))
    assert response.usage.kv_tokens_details["held"] == 12


# Metrics


def test_stats_are_increments() -> None:
    stats = Stats()
    stats.record_compaction("h2o", "budget", blocks=6)
    stats.record_compaction("h2o", "pressure", blocks=-2)
    stats.record_moved("h2o", evicted=100, seconds=0.002)
    stats.record_moved("h2o", evicted=50, seconds=0.2)
    # One whose compaction was counted before the last `take`, and that dropped nothing.
    stats.record_moved("int8", evicted=0, seconds=0.1)
    stats.record_moved("int8", evicted=-1, seconds=0.1)
    stats.record_deferral("shared")
    stats.record_policy_failure("h2o")
    stats.record_policy_failure("h2o")
    stats.record_uncompressed()
    stats.record_uncompressed()
    stats.worker_bytes["staging"] = 9
    stats.kv_bytes_held = {"h2o": 7}
    taken = stats.take()
    assert taken["policies"] == {
        "h2o": {
            "compactions": {"budget": 1, "pressure": 1},
            "tokens_evicted": 150,
            "blocks_freed": 6,
            "seconds": [0.002, 0.2],
        },
        "int8": {
            "compactions": {},
            "tokens_evicted": 0,
            "blocks_freed": 0,
            "seconds": [0.1, 0.1],
        },
    }
    assert taken["deferrals"] == {"shared": 1}
    assert (taken["policy_failures"], taken["worker_bytes"]) == ({"h2o": 2}, {"staging": 9})
    assert taken["uncompressed"] == 2
    json.dumps(taken)  # crosses processes
    again = stats.take()
    assert (again["policies"], again["deferrals"], again["policy_failures"]) == ({}, {}, {})
    assert again["uncompressed"] == 0
    # Increments are the taker's: what is counted later is not added to them.
    stats.record_compaction("h2o", "budget", 1)
    assert taken["policies"]["h2o"]["compactions"] == {"budget": 1, "pressure": 1}
    # These are what is, not what was added.
    assert (again["kv_bytes_held"], again["worker_bytes"]) == ({"h2o": 7}, {"staging": 9})


def test_samples_that_nobody_takes_are_bounded() -> None:
    stats = Stats()
    for _ in range(2):
        for _ in range(5000):
            stats.record_compaction("h2o", "budget", 1)
            stats.record_moved("h2o", 3, 0.1)
        taken = stats.take()["policies"]["h2o"]
        assert (taken["compactions"], taken["tokens_evicted"]) == ({"budget": 5000}, 15000)
        assert 1000 < len(taken["seconds"]) < 5000


def scraped() -> dict[str, float]:
    from prometheus_client import REGISTRY

    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for metric in REGISTRY.collect()
        for s in metric.samples
        if s.name.startswith("vllm_kvcrush:")
    }


def test_the_logger_adds_up_and_can_be_made_again() -> None:
    config = vllm_config({"policy": "snapkv", "pressure": 0.8})
    stats = Stats(
        pressure=0.5, kv_bytes_held={"snapkv": 10}, kv_bytes_raw_equivalent={"snapkv": 40}
    )
    for engine in (0, 1, 0):
        logger = metrics.KVCrushStatLogger(config, engine)
        stats.record_compaction("snapkv", "budget", 6)
        stats.record_moved("snapkv", 100, 0.002)
        stats.record_uncompressed()
        stats.record_deferral("no_room")
        stats.record_policy_failure("snapkv")
        stats.worker_bytes = {"scratch": 100 + engine}
        logger.record(SchedulerStats(kv_connector_stats={"kvcrush": stats.take()}), None)
        logger.record(SchedulerStats(), None)
        logger.record(None, None)
    found = scraped()

    def at(name: str, engine: int, **more: str) -> float:
        labels = {"engine": str(engine), "model_name": MODEL, **more}
        return found[f"vllm_kvcrush:{name}{sorted(labels.items())}"]

    assert at("compactions_total", 0, policy="snapkv", reason="budget") == 2
    assert at("compactions_total", 1, policy="snapkv", reason="budget") == 1
    assert (at("pressure", 0), at("pressure_limit", 0)) == (0.5, 0.8)
    assert at("tokens_evicted_total", 0, policy="snapkv") == 200
    assert at("blocks_freed_total", 0, policy="snapkv") == 12
    assert at("deferrals_total", 0, reason="no_room") == 2
    assert at("deferrals_total", 0, reason="shared") == 0
    assert at("policy_failures_total", 0, policy="snapkv") == 2
    assert at("requests_uncompressed_total", 0) == 2
    assert at("requests_uncompressed_total", 1) == 1
    assert at("worker_peak_bytes", 1, kind="scratch") == 101
    assert at("kv_bytes_held", 1, policy="snapkv") == 10
    assert at("kv_bytes_raw_equivalent", 1, policy="snapkv") == 40
    assert at("compaction_seconds_count", 0, policy="snapkv") == 2
    assert at("compaction_seconds_bucket", 0, policy="snapkv", le="0.001") == 0
    assert at("compaction_seconds_bucket", 0, policy="snapkv", le="0.0025") == 2
    assert at("compaction_seconds_sum", 0, policy="snapkv") == pytest.approx(0.004)
    # When the last request of a policy has left, nobody names it any more.
    idle = Stats(kv_bytes_held={"none": 3}).take()
    logger.record(SchedulerStats(kv_connector_stats={"kvcrush": idle}), None)
    found = scraped()
    assert at("kv_bytes_held", 0, policy="snapkv") == 0
    assert at("kv_bytes_held", 0, policy="none") == 3
    assert at("kv_bytes_held", 1, policy="snapkv") == 10
    assert list(COMPACTION_BUCKETS) == sorted(set(COMPACTION_BUCKETS))


def test_all_that_may_be_counted_is_there_from_the_start() -> None:
    """A series that begins at 1 has no first increment for rate()."""
    config = vllm_config({"policy": "snapkv", "allow": ["snapkv", "tc8", "none"]})
    metrics.KVCrushStatLogger(config, 6)
    found = scraped()

    def at(name: str, **labels: str) -> float:
        return found[f"vllm_kvcrush:{name}{sorted((labels | {'model_name': MODEL}).items())}"]

    for policy in ("snapkv", "tc8"):
        for name in ("tokens_evicted_total", "blocks_freed_total"):
            assert at(name, engine="6", policy=policy) == 0
        assert at("compactions_total", engine="6", policy=policy, reason="budget") == 0
        assert at("policy_failures_total", engine="6", policy=policy) == 0
        assert at("compaction_seconds_count", engine="6", policy=policy) == 0
        assert at("requests_total", policy=policy) >= 0
    assert at("requests_total", policy="none") >= 0
    usage = pathlib.Path("docs/usage.md").read_text(encoding="utf-8")
    (row,) = (line for line in usage.splitlines() if "`vllm_kvcrush:refusals_total`" in line)
    assert re.findall(r"`(\w+)`", row.split("|")[3]) == [*metrics.REFUSALS, "inactive"]
    for reason in metrics.REFUSALS:
        assert at("refusals_total", reason=reason) >= 0


def test_policies_that_another_front_end_saw_are_set_too() -> None:
    """Each snapshot reaches one of several API servers, and /metrics shows the newest value of
    all."""
    config = vllm_config({"policy": "snapkv", "allow": ["snapkv", "tc8"]})
    logger = metrics.KVCrushStatLogger(config, 5)
    for gauge in (metrics.kv_bytes_held(), metrics.kv_bytes_raw_equivalent()):
        for policy in ("snapkv", "tc8", "none"):
            gauge.labels(MODEL, "5", policy).set(77)  # as another process would
    logger.record(SchedulerStats(kv_connector_stats={"kvcrush": Stats().take()}), None)
    for gauge in (metrics.kv_bytes_held(), metrics.kv_bytes_raw_equivalent()):
        for policy in ("snapkv", "tc8", "none"):
            assert value(gauge, MODEL, "5", policy) == 0


def test_engines_that_log_stats_get_our_logger() -> None:
    from vllm.v1.metrics.loggers import StatLoggerManager

    class Manager:
        def __init__(
            self, vllm_config: Any, engine_idxs: Any = None, custom_stat_loggers: Any = None
        ):
            self.loggers = custom_stat_loggers

    assert set(inspect.signature(Manager).parameters) < set(
        inspect.signature(StatLoggerManager).parameters
    )
    assert StatLoggerManager.__init__._kvcrush  # type: ignore[misc]
    wrap(Manager, "__init__", metrics._with_our_logger)
    ours = metrics.KVCrushStatLogger
    active = vllm_config(ACTIVE)
    assert Manager(active).loggers == [ours]
    assert Manager(vllm_config=active, custom_stat_loggers=[int]).loggers == [int, ours]
    assert Manager(vllm_config()).loggers is None


def test_an_inactive_logger_does_nothing() -> None:
    before = scraped()
    logger = metrics.KVCrushStatLogger(vllm_config(), 7)
    logger.record(SchedulerStats(kv_connector_stats={"kvcrush": Stats().take()}), None)
    logger.log_engine_initialized()
    assert scraped() == before


def test_connector_loggers_never_see_our_numbers() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    # Without a connector vLLM's own logger fails on any stats at all.
    KVConnectorLogging(None).observe({"kvcrush": {}})
    with pytest.raises(AttributeError):
        KVConnectorLogging(None).observe({"kvcrush": {}, "theirs": {}})

    class Theirs:
        def observe(self, transfer_stats_data: Any, engine_idx: int = 0) -> None:
            self.seen = (transfer_stats_data, engine_idx)

    wrap(Theirs, "observe", metrics._strip_kvcrush_stats)
    theirs = Theirs()
    theirs.observe({"kvcrush": {}, "theirs": 1}, 3)
    assert theirs.seen == ({"theirs": 1}, 3)
    theirs.observe({})
    assert theirs.seen == ({}, 0)
