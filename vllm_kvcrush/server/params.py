"""Moves request parameters from the client's JSON or headers to `SamplingParams.extra_args`, and
refuses bad ones.

They are checked in two places. Every request passes `InputProcessor`, but a streamed one only after
HTTP 200 was sent. So they are also checked before that, where the API server hands a request over,
which is early enough for HTTP 400. What they come to, under the rule that the request meets, is
what the engine gets (`RequestParams.to_args`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from vllm_kvcrush.config import (
    BUDGET_KEY,
    FOREIGN_KEYS,
    KEYS,
    POLICY_KEY,
    PROTECT_KEY,
    SPANS_KEY,
    ConfigError,
    RequestParams,
    Settings,
    parse_budget,
)
from vllm_kvcrush.plan import cdiv
from vllm_kvcrush.server import Method, caller, configured, reload, rules, spans, wrap
from vllm_kvcrush.server.caller import Caller
from vllm_kvcrush.server.reload import Watched
from vllm_kvcrush.server.rules import REQUEST_HEADERS, Rule, Rules
from vllm_kvcrush.server.several import COUNTED, Several
from vllm_kvcrush.spec import MAX_LENGTH, SpecError, parse

# Attribute of a request's SamplingParams: what the kv_* keys that were not in its vllm_xargs are
# called in the client's request.
_FIELDS = "_kvcrush_fields"
# Attribute of the same: those of them that are no parameters.
_UNKNOWN = "_kvcrush_unknown"
# Attribute of the same: the name by which the client asked for the model, or None.
_MODEL = "_kvcrush_model"
# Attribute of the engine's SamplingParams: that they have been resolved.
_RESOLVED = "_kvcrush_resolved"
# Attribute of the same: what is known of where the prompt has what (`spans.Located`), or None.
_LOCATED = "_kvcrush_located"
# Attribute of a BeamSearchParams, which has no extra_args: a SamplingParams with the above.
_SAMPLING = "_kvcrush_sampling"
# Attribute of an InputProcessor: its Front.
_FRONT = "_kvcrush_front"
# Longer values are shortened when they are quoted to the client.
_QUOTED = 100
# In place of a LoRA request that is not known yet: an adapter is asked for as a model.
_AS_MODEL = object()


def install(http: bool = True) -> None:
    """Wraps vLLM's input processor and engines and, where HTTP is served, all endpoints that
    docs/usage.md lists."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(InputProcessor, "_validate_params", _checked_params)
    wrap(InputProcessor, "process_inputs", _checked_inputs)
    wrap(AsyncLLM, "generate", _checked_generate)
    for engine in (AsyncLLM, LLMEngine):
        wrap(engine, "add_request", _checked_ready_made)
    if not http:
        return
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
    from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _with_fields)
        _announce(request)
    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _with_beam_fields)
    spans.install(_given, lambda message, key, model: _refusal("spans", message, key, model))
    wrap(BeamSearchOnlineMixin, "beam_search", _checked_beams)
    # Anthropic's and Cohere's endpoints make a chat request of the fields that they know.
    wrap(OpenAIServingChat, "create_chat_completion", _translated)
    # The Responses API calls AsyncLLM.generate from inside a generator, too late for a 400.
    wrap(OpenAIServingResponses, "_generate_with_builtin_tools", _checked_turns)
    wrap(ServingTokens, "serve_tokens", _checked_tokens)
    wrap(ServingGenerativeScoring, "create_generative_scoring", _checked_scoring)
    wrap(ServingStructuredDecisions, "create_decision", _without_fields)
    wrap(ServingRender, "render_chat_request", _rendered)
    for name in ("render_completion_request", "render_responses_request"):
        wrap(ServingRender, name, _rendered)


# The request


def _with_fields(original: Method) -> Method:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        _attach(_fields(self.model_extra), params, self.model)
        return params

    return to_sampling_params


def _with_beam_fields(original: Method) -> Method:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.sampling_params import SamplingParams

        params = original(self, *args, **kwargs)
        # vLLM drops vllm_xargs here, so our keys in them are taken along.
        ours = {key: v for key, v in (self.vllm_xargs or {}).items() if _is_ours(key)}
        sampling = SamplingParams(max_tokens=params.max_tokens, extra_args=ours or None)
        _attach(_fields(self.model_extra), sampling, self.model)
        setattr(params, _SAMPLING, sampling)
        return params

    return to_beam_search_params


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("kv_") and key not in FOREIGN_KEYS


def _fields(given: Mapping[str, Any] | None) -> dict[str, Any]:
    # Many clients send null for an option that their user left alone.
    return {key: v for key, v in (given or {}).items() if _is_ours(key) and v is not None}


def _given(request: Any) -> dict[str, Any]:
    """Returns the kv_* fields of an API's request, wherever they are in it."""
    xargs = getattr(request, "vllm_xargs", None) or {}
    return {**{key: v for key, v in xargs.items() if _is_ours(key)}, **_fields(request.model_extra)}


def _attach(fields: dict[str, Any], params: Any, model: str | None) -> None:
    """Moves top-level fields, and headers that stand for some, into the `extra_args` of a
    `SamplingParams`. Raises VLLMValidationError if one is given two values."""
    setattr(params, _MODEL, model)
    sender = caller.of(params)
    headers = sender.parameters if sender is not None else {}
    named = {key: key for key in fields}
    for key, value in headers.items():
        given = fields.get(key, (params.extra_args or {}).get(key))
        if given is None:
            fields, named = {**fields, key: value}, {**named, key: REQUEST_HEADERS[key]}
        elif not _alike(key, given, value):
            name = REQUEST_HEADERS[key]
            raise _refusal(
                "conflict",
                f"{name}: {_quoted(value)} contradicts {key}={_quoted(given)} of the body: give "
                "one.",
                name,
                model,
            )
    setattr(params, _FIELDS, named)
    # An active server refuses typos; any other ignores them, as plain vLLM does, so they must not
    # get into extra_args.
    unknown = tuple(sorted(key for key in fields if key not in KEYS))
    setattr(params, _UNKNOWN, unknown)
    fields = {key: v for key, v in fields.items() if key not in unknown}
    xargs = params.extra_args or {}
    for key, value in fields.items():
        if key in xargs and xargs[key] != value:
            # NaN differs from itself, but would be refused anyway.
            raise _refusal(
                "conflict",
                f"{key}={_quoted(value)} contradicts vllm_xargs.{key}={_quoted(xargs[key])}: "
                "give one.",
                key,
                model,
            )
    if fields:
        params.extra_args = {**xargs, **fields}


def _alike(key: str, given: Any, header: str) -> bool:
    """Returns whether the header, which is text, has the value that the body has."""
    try:
        if key == BUDGET_KEY:
            return parse_budget(given, key) == parse_budget(header, key)
        return parse(given) == parse(header)
    except (ConfigError, SpecError, RecursionError):
        return bool(given == header)


async def _top_level(raw_request: Any) -> dict[str, Any]:
    """Returns the kv_* fields of a JSON body, whose pydantic model drops unknown fields."""
    if raw_request is None:
        return {}
    body = await raw_request.json()
    return _fields(body) if isinstance(body, Mapping) else {}


def _announce(request: Any) -> None:
    # vLLM logs that it ignores the fields that are not in this cache of known ones.
    known = set()
    for name, info in request.model_fields.items():
        known |= {name, info.alias} - {None}
    request.field_names = known | set(KEYS)


# The endpoints


def _translated(original: Method) -> Method:
    async def create_chat_completion(
        self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
        from vllm.exceptions import VLLMValidationError

        if type(self) is OpenAIServingChat:
            return await original(self, request, raw_request, *args, **kwargs)
        request.model_extra.update(await _top_level(raw_request))
        try:
            return await original(self, request, raw_request, *args, **kwargs)
        except VLLMValidationError as error:
            # If it is returned, the error has these endpoints' format, and no stack trace is
            # logged.
            return create_error_response(error)

    return create_chat_completion


def _rendered(original: Method) -> Method:
    """Returns the wrapper of a renderer, whose result a client sends to /inference/v1/generate."""

    async def render(self: Any, request: Any, raw_request: Any = None) -> Any:
        if hasattr(request, "to_sampling_params"):
            request.model_extra.update(await _top_level(raw_request))
        given = (self, request) if raw_request is None else (self, request, raw_request)
        token = spans.collected.set([])
        try:
            result = await original(*given)
            located = spans.collected.get() or []
        finally:
            spans.collected.reset(token)
        # A server that only renders knows no limits; the one that generates checks them.
        engine = getattr(self.models, "engine_client", None)
        for number, made in enumerate(result if isinstance(result, list) else [result]):
            params = getattr(made, "sampling_params", None)
            if params is None:
                continue
            if number < len(located):
                setattr(params, _LOCATED, located[number])
            kv = None
            if engine is not None:
                kv = front_of(engine.input_processor).check(params, _prompt_length(made))
            _write_spans(params, kv)
        return result

    return render


def _write_spans(params: Any, kv: RequestParams | None) -> None:
    """Puts token ranges in place of ranges of text, which whoever generates cannot know, and says
    which tokens of the system prompt are protected."""
    located = vars(params).get(_LOCATED)
    if located is None:
        return
    found = dict(located.named)
    if kv is not None and kv.system:
        found[PROTECT_KEY] = kv.protect
    if found:
        ranges = {key: [list(pair) for pair in value] for key, value in found.items()}
        params.extra_args = {**(params.extra_args or {}), **ranges}


def _checked_tokens(original: Method) -> Method:
    async def serve_tokens(
        self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        fields, sender = await _top_level(raw_request), caller.current()
        if fields or (sender is not None and sender.parameters):
            _attach(fields, request.sampling_params, request.model)
        setattr(request.sampling_params, _MODEL, request.model)
        # Here, because vLLM's error for a value that it cannot send on names no parameter.
        front_of(self.engine_client.input_processor).check(request.sampling_params)
        return await original(self, request, raw_request, *args, **kwargs)

    return serve_tokens


def _checked_scoring(original: Method) -> Method:
    async def create_generative_scoring(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.sampling_params import SamplingParams

        sampling = SamplingParams(max_tokens=1)
        _attach(_fields(request.model_extra), sampling, request.model)
        front_of(self.engine_client.input_processor).check(sampling)
        own = copy.copy(self)
        own.engine_client = several = Several(self.engine_client, lambda p: _as(sampling, p))
        response = await original(own, request, *args, **kwargs)
        several.add_to(response)
        return response

    return create_generative_scoring


def _without_fields(original: Method) -> Method:
    async def create_decision(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        front, fields = front_of(self.engine_client.input_processor), _fields(request.model_extra)
        sender = caller.current()
        headers = sender.parameters if sender is not None else {}
        for key in (*fields, *(REQUEST_HEADERS[key] for key in headers)):
            if front.rules is not None or key in KEYS:
                raise _refusal(
                    "endpoint",
                    f"{key} is not taken by this endpoint, whose requests run with the server's "
                    "defaults: leave it out.",
                    key,
                    front.model_name,
                )
        return await original(self, request, *args, **kwargs)

    return create_decision


def _checked_beams(original: Method) -> Method:
    signature = inspect.signature(original)

    # Not a generator itself, like `generate` below.
    def beam_search(*args: Any, **kwargs: Any) -> Any:
        from vllm.sampling_params import SamplingParams

        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        sampling = vars(given["params"]).get(_SAMPLING)
        if sampling is None:  # params that `_with_beam_fields` did not make
            sampling = SamplingParams(max_tokens=given["params"].max_tokens)
        _locate(sampling, given["prompt"])
        front = front_of(given["self"].engine_client.input_processor)
        kv = front.check(sampling, _prompt_length(given["prompt"]))
        if kv is None:
            return original(*args, **kwargs)
        front.count(kv)
        own = given["self"] = copy.copy(given["self"])
        own.engine_client = several = Several(
            own.engine_client, lambda p: _as(sampling, p), counted=True
        )
        return _told(original(*bound.args, **bound.kwargs), several)

    return beam_search


async def _told(outputs: Any, several: Several) -> AsyncIterator[Any]:
    async with aclosing(outputs) as stream:
        async for output in stream:
            several.tell(output)
            yield output


def _as(given: Any, params: Any) -> None:
    """Gives a `SamplingParams` the KV parameters of another one."""
    for name in (_FIELDS, _UNKNOWN, _MODEL, _LOCATED):
        if name in vars(given):
            setattr(params, name, vars(given)[name])
    if given.extra_args:
        params.extra_args = {**(params.extra_args or {}), **given.extra_args}


# The checks


def _checked_params(original: Method) -> Method:
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, params, *args, **kwargs)
        front_of(self).check(params)
        return result

    return _validate_params


def _checked_inputs(original: Method) -> Method:
    signature = inspect.signature(original)

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        front = front_of(self)
        # The engine's copy of the params has the output's length, the client's has our attributes.
        given = signature.bind(self, *args, **kwargs).arguments["params"]
        front.admit(request, given, counted=COUNTED in vars(given))
        return request

    return process_inputs


def _checked_generate(original: Method) -> Method:
    signature = inspect.signature(original)

    # Not a generator itself, so that it raises when it is called, not when it is first read.
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        _locate(given["sampling_params"], given["prompt"])
        front_of(self.input_processor).check(
            given["sampling_params"],
            _prompt_length(given["prompt"]),
            lora=given.get("lora_request"),
        )
        return original(self, *args, **kwargs)

    return generate


def _checked_ready_made(original: Method) -> Method:
    signature = inspect.signature(original)

    # Not a coroutine function even for AsyncLLM, so that it raises when it is called.
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        prompt = signature.bind(self, *args, **kwargs).arguments["prompt"]
        if isinstance(prompt, EngineCoreRequest):
            # A request that its caller made does not pass the input processor.
            front_of(self.input_processor).admit(prompt, prompt.sampling_params)
        return original(self, *args, **kwargs)

    return add_request


def _checked_turns(original: Method) -> Method:
    signature = inspect.signature(original)

    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        _locate(given["sampling_params"], given["engine_input"])
        front_of(self.engine_client.input_processor).check(
            given["sampling_params"], _prompt_length(given["engine_input"])
        )
        return original(self, *args, **kwargs)

    return _generate_with_builtin_tools


def _locate(params: Any, prompt: Any) -> None:
    """Tells the params of a request what is known of its rendered prompt. What they were told of
    another one, as of the turn before, they keep if nothing is known of this one."""
    located = prompt.get(spans.LOCATED) if isinstance(prompt, dict) else None
    if located is not None:
        setattr(params, _LOCATED, located)


def _prompt_length(prompt: Any) -> int | None:
    """Returns the number of tokens of a rendered prompt or an engine request, or None if it is not
    known yet."""
    for name in ("prompt_token_ids", "token_ids", "prompt_embeds"):
        tokens = prompt.get(name) if isinstance(prompt, dict) else getattr(prompt, name, None)
        if tokens is not None:
            return len(tokens)
    return None


def start(processor: Any, http: bool) -> None:
    """Makes an engine ready to check requests: reads the rules, if there is a file. Of a process
    that may serve HTTP, SIGHUP reads them again; of others it is none of ours."""
    front = front_of(processor)
    if http and front.protects:
        spans.protect_system_prompts()
    if http and front.reads:
        reload.on_hangup()


def front_of(processor: Any) -> Front:
    """Returns the Front of an `InputProcessor`, which is made when it is first asked for."""
    front = vars(processor).get(_FRONT)
    if front is None:
        front = Front(processor.vllm_config)
        setattr(processor, _FRONT, front)
    return front


def pool_blocks(vllm_config: Any) -> int | None:
    """Returns the blocks that requests of one engine have, or None before that is known."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if not cache.num_gpu_blocks:
        return None
    # num_gpu_blocks is the sum over the engines behind one front-end, each of which has a null
    # block.
    local = parallel.local_engines_only
    engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
    if parallel.data_parallel_rank_local is not None:
        engines = 1  # each rank has its own front-end, as with `LLM`
    return int(cache.num_gpu_blocks) // max(1, engines) - 1


class Front:
    """Checks the requests that enter one engine.

    Args:
        vllm_config: the engine's configuration.
    """

    def __init__(self, vllm_config: Any):
        self.config = vllm_config
        raw = configured(vllm_config)
        self._settings = settings = None if raw is None else Settings.from_dict(raw)
        self._watched: Watched | None = None
        self._plain = None if settings is None else Rules.of(settings)
        if settings is not None and settings.rules is not None:
            self._watched = self._watch(settings.rules, settings)

    def _watch(self, path: str, settings: Settings) -> Watched:
        from vllm_kvcrush.server import metrics

        model_name, config = self.model_name, self.config

        def load() -> Rules:
            block_size = config.cache_config.block_size
            return rules.load(path, settings, block_size, config.model_config.max_model_len)

        def told(result: str, now: Rules) -> None:
            metrics.count_reload(model_name, result)
            metrics.show_rules(model_name, [rule.name for rule in now], result)

        watched = Watched(path, load, told)
        metrics.show_rules(model_name, [rule.name for rule in watched.current])
        return watched

    @property
    def reads(self) -> bool:
        """Returns whether rules are read from a file."""
        return self._watched is not None

    @property
    def protects(self) -> bool:
        """Returns whether system prompts may be protected, by the flags or by rules to come."""
        settings = self._settings
        return settings is not None and (settings.protect_system > 0 or self.reads)

    @property
    def rules(self) -> Rules | None:
        """Returns the rules that hold now, or None where the plugin is not active."""
        return self._plain if self._watched is None else self._watched.current

    @property
    def model_name(self) -> str:
        """Returns the `model_name` label of vLLM's own metrics."""
        return str(self.config.model_config.served_model_name)

    def count(self, params: RequestParams) -> None:
        """Counts a request that was taken."""
        from vllm_kvcrush.server import metrics

        metrics.count_request(self.model_name, params.label)
        if params.rule is not None:
            metrics.count_rule(self.model_name, params.rule)

    def admit(self, request: Any, given: Any, counted: bool = False) -> None:
        """Validates an `EngineCoreRequest` for the last time, counts it unless it is `counted`, and
        puts what it runs with in place of what its client asked for. `given` are the params whose
        attributes tell of the client. Raises VLLMValidationError."""
        params = request.sampling_params
        if params is None or _RESOLVED in vars(params):
            return
        kv = self.check(params, _prompt_length(request), given, request.lora_request)
        if kv is None:
            return
        if not counted:
            self.count(kv)
        others = {k: v for k, v in (params.extra_args or {}).items() if not _is_ours(k)}
        tell = self._rules_of(caller.of(given)).rule_in_usage
        params.extra_args = {**others, **kv.to_args(tell)}
        setattr(params, _RESOLVED, True)

    def _rules_of(self, sender: Caller | None) -> Rules:
        """Returns the rules for a request: the same from its first check to its last."""
        assert self.rules is not None
        if sender is None:
            return self.rules
        sender.rules = sender.rules or self.rules
        return sender.rules

    def _rule(self, held: Rules, sender: Caller | None, named_by: Any, lora: Any) -> Rule:
        model = vars(named_by).get(_MODEL) or self.model_name
        adapter = model if lora is _AS_MODEL else getattr(lora, "lora_name", None)
        return held.match(sender, model, adapter)

    def check(
        self,
        params: Any,
        prompt_length: int | None = None,
        named_by: Any = None,
        lora: Any = _AS_MODEL,
    ) -> RequestParams | None:
        """Validates a request's `SamplingParams`; params of other types are not checked.

        Args:
            prompt_length: tokens of the prompt; without it the pool's size is not checked.
            named_by: the params whose attributes tell where in the client's JSON each parameter
                was, and who sent it, if not `params`.
            lora: the request's `LoRARequest` or None; where it is left out, the adapter is the one
                that has the name of the model that was asked for.

        Returns:
            What the request will run with, or None where the plugin is not active.

        Raises:
            VLLMValidationError: HTTP 400, with `param` as in the client's JSON.
        """
        from vllm.sampling_params import SamplingParams

        if not isinstance(params, SamplingParams):
            return None
        named_by = params if named_by is None else named_by
        extra_args = params.extra_args or {}
        if not isinstance(extra_args, Mapping):
            if self.rules is None:
                return None
            # vLLM accepts any type here, and would fail later with a stack trace.
            raise self._refuse(
                "unknown_key", "extra_args is not a dictionary of parameters.", "", named_by
            )
        if self.rules is None:
            for key in KEYS:
                if key in extra_args:
                    raise self._refuse(
                        "inactive",
                        f"{key} is not served here, as this server was started without "
                        "--kv-policy: start it with --kv-policy=kvcrush, or with "
                        "--kv-policy=none to activate it for requests that ask.",
                        key,
                        named_by,
                    )
            return None
        sender = caller.of(named_by)
        held = self._rules_of(sender)
        self._refuse_headers(sender, held)
        rule = self._rule(held, sender, named_by, lora)
        settings = rule.settings
        extra_args = {key: v for key, v in extra_args.items() if _is_ours(key)}
        for key in (*vars(named_by).get(_UNKNOWN, ()), *extra_args):
            if key not in KEYS:
                known = f"{', '.join(KEYS[:-1])} and {KEYS[-1]} are"
                message = f"{_name(key)} is not a parameter: {known}."
                raise self._refuse("unknown_key", message, key, named_by)
        located = vars(named_by).get(_LOCATED) or spans.Located()
        for key, ranges in located.named.items():
            if key in extra_args:
                extra_args[key] = [list(pair) for pair in ranges]
        self._refuse_unreadable(extra_args, settings.policy, named_by)
        block_size = self.config.cache_config.block_size
        max_model_len = self.config.model_config.max_model_len
        try:
            kv = settings.validate_request(extra_args, block_size, max_model_len)
        except ConfigError as error:
            reason = _reason(settings, extra_args, block_size, max_model_len, error.key)
            raise self._refuse(reason, str(error), error.key, named_by) from error
        if prompt_length is not None:
            if located.system and PROTECT_KEY not in extra_args:
                length = self._length(params, prompt_length)
                kv = settings.with_system(
                    kv, located.system, prompt_length, length, block_size, max_model_len
                )
            self._check_pool(settings, kv, params, prompt_length, named_by)
        return replace(kv, rule=rule.name) if held.from_file else kv

    def _refuse_headers(self, sender: Caller | None, held: Rules) -> None:
        """Raises for headers that a client may not send, or not twice."""
        if sender is None:
            return
        if (name := sender.repeated(held.headers)) is not None:
            message = f"The header {name} is there more than once: send it once."
            raise _refusal("header", message, name, self.model_name)
        ours = [REQUEST_HEADERS[key] for key in sender.parameters]
        if ours and not held.request_headers:
            message = (
                f"The header {ours[0]} is not taken here: give {next(iter(sender.parameters))} in "
                "the body."
            )
            raise _refusal("header", message, ours[0], self.model_name)
        if held.request_headers and (name := sender.others(held.headers)) is not None:
            known = " and ".join(REQUEST_HEADERS.values())
            message = f"The header {_name(name)} is none of this server's: {known} are."
            raise _refusal("header", message, _name(name), self.model_name)

    def _refuse_unreadable(self, extra_args: Mapping[str, Any], policy: str, named_by: Any) -> None:
        """Raises for values of types or lengths that no parameter can have, before they are
        parsed."""
        kinds: dict[str, tuple[Any, str, str, str]] = {
            POLICY_KEY: (str | Mapping, "policy", "a policy", repr(policy)),
            BUDGET_KEY: (str | int | float | None, "budget", "a KV budget", "0.25"),
            SPANS_KEY: (str | list | tuple, "spans", "a list of token ranges", "[[0, 64]]"),
            PROTECT_KEY: (str | list | tuple, "spans", "a list of token ranges", "[[0, 64]]"),
        }
        for key, (kind, reason, what, example) in kinds.items():
            value = extra_args.get(key)
            most = _QUOTED if key == BUDGET_KEY else MAX_LENGTH * (1 + 4 * (reason == "spans"))
            if key not in extra_args or (isinstance(value, kind) and _short(value, most)):
                continue
            message = f"{key}={_quoted(value)} is not {what}: give for example {example}."
            raise self._refuse(reason, message, key, named_by)

    def _length(self, params: Any, prompt_length: int) -> int:
        """Returns the most tokens that a request comes to, its prompt included."""
        longest = int(self.config.model_config.max_model_len)
        output = longest if params.max_tokens is None else params.max_tokens
        return min(prompt_length + output, longest)

    def _check_pool(
        self, settings: Settings, kv: RequestParams, params: Any, prompt_length: int, named_by: Any
    ) -> None:
        """Raises for a request whose bound exceeds the pool, since it could wait forever."""
        if (pool := pool_blocks(self.config)) is None:
            return
        cache = self.config.cache_config
        longest = self.config.model_config.max_model_len
        if cdiv(longest, cache.block_size) <= pool:
            return
        length = self._length(params, prompt_length)
        need = settings.plan(kv, prompt_length, cache.block_size).bound(length)
        if need <= pool:
            return
        if kv.policy == "none":
            key, now = POLICY_KEY, "with kv_policy='none'"
            advice = "ask for another kv_policy"
        else:
            key, now = BUDGET_KEY, f"with kv_budget={kv.budget}"
            advice = "lower kv_budget"
        raise self._refuse(
            "pool",
            f"This request of up to {length} tokens {now} needs {need} KV blocks of the "
            f"{pool} that this server has: {advice}, shorten the prompt, or ask for fewer "
            "output tokens.",
            key,
            named_by,
        )

    def _refuse(self, reason: str, message: str, key: str, params: Any) -> Exception:
        fields = vars(params).get(_FIELDS)
        if fields is None:
            name = f"extra_args.{_name(key)}".removesuffix(".")  # not from HTTP
        elif key in fields or key not in (params.extra_args or {}):
            name = _name(fields.get(key, key))
        else:
            name = f"vllm_xargs.{_name(key)}"
        return _refusal(reason, message, name, self.model_name)


def _short(value: Any, most: int = _QUOTED) -> bool:
    # An int of more than 4,300 digits cannot even be printed.
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, str) or len(value) <= most


def _quoted(value: Any) -> str:
    """Returns a value in the form in which the client is shown it: one line of bounded length."""
    if isinstance(value, Mapping):
        return "a JSON object"
    if isinstance(value, list | tuple | set):
        return "a list"
    if isinstance(value, int) and not _short(value):
        return f"a number of {value.bit_length()} bits"
    return _name(repr(value[: _QUOTED + 1] if isinstance(value, str) else value))


def _name(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _QUOTED + 2 else f"{text[:_QUOTED]}..."


def _reason(
    settings: Settings,
    extra_args: Mapping[str, Any],
    block_size: int,
    max_model_len: int,
    key: str,
) -> str:
    """Returns a refusal's `reason` label on /metrics."""
    if key not in KEYS:
        return "unknown_key"
    try:
        replace(settings, budget_max=None).validate_request(extra_args, block_size, max_model_len)
    except ConfigError:
        return {POLICY_KEY: "policy", BUDGET_KEY: "budget"}.get(key, "spans")
    return "cap"


def _refusal(reason: str, message: str, parameter: str, model_name: str | None) -> Exception:
    from vllm.exceptions import VLLMValidationError

    from vllm_kvcrush.server import metrics

    metrics.count_refusal(model_name or "", reason)
    error: Exception = VLLMValidationError(message, parameter=parameter)
    return error
