"""Request parameters: from the client's JSON to `SamplingParams.extra_args`, refused early.

Two checks, because neither place sees everything. The one in `InputProcessor` covers every way
into the engine, but for a streamed response it runs after HTTP 200 was sent. The one before it,
where the API server hands a request over, is in time for a 400.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_kvcrush.config import (
    BUDGET_KEY,
    FOREIGN_KEYS,
    POLICY_KEY,
    ConfigError,
    RequestParams,
    Settings,
)
from vllm_kvcrush.plan import cdiv
from vllm_kvcrush.server import Method, wrap

# On a SamplingParams that came from a request: which keys the client wrote at the top level.
_FIELDS = "_kvcrush_fields"
# And which kv_* fields of theirs nobody knows.
_UNKNOWN = "_kvcrush_unknown"
_FRONT = "_kvcrush_front"


def install(http: bool = True) -> None:
    """Wraps vLLM's input processor and, where the OpenAI API is served, its requests."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "_validate_params", _checked_params)
    wrap(InputProcessor, "process_inputs", _checked_inputs)
    if not http:
        return
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", _with_fields)
        _announce(request)
    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _without_beams)
    wrap(AsyncLLM, "generate", _checked_generate)
    # The Responses API calls AsyncLLM.generate from inside a generator, too late for a 400.
    wrap(OpenAIServingResponses, "_generate_with_builtin_tools", _checked_turns)


# The request


def _with_fields(original: Method) -> Method:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        fields = _fields(self)
        setattr(params, _FIELDS, frozenset(fields))
        # Typos are refused by an active server, and ignored as by plain vLLM elsewhere: they must
        # not travel on.
        unknown = sorted(key for key in fields if key not in (BUDGET_KEY, POLICY_KEY))
        setattr(params, _UNKNOWN, tuple(unknown))
        for key in unknown:
            del fields[key]
        xargs = params.extra_args or {}
        for key, value in fields.items():
            if key in xargs and xargs[key] != value:
                raise _refusal(
                    "conflict",
                    f"{key}={value!r} contradicts vllm_xargs.{key}={xargs[key]!r}: give one.",
                    key,
                    self.model,
                )
        if fields:
            params.extra_args = {**xargs, **fields}
        return params

    return to_sampling_params


def _without_beams(original: Method) -> Method:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        fields, xargs = _fields(self), self.vllm_xargs or {}
        for key in (BUDGET_KEY, POLICY_KEY):
            if key in fields or key in xargs:
                raise _refusal(
                    "beam_search",
                    f"{key} has no effect with beam search, which drops request parameters: "
                    "leave out one of them.",
                    key if key in fields else f"vllm_xargs.{key}",
                    self.model,
                )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _fields(request: Any) -> dict[str, Any]:
    # null is what many clients send for an option that their user left alone.
    return {
        key: value
        for key, value in (request.model_extra or {}).items()
        if key.startswith("kv_") and key not in FOREIGN_KEYS and value is not None
    }


def _announce(request: Any) -> None:
    # vLLM logs fields that it does not know as ignored; it asks this cache which it knows.
    known = set()
    for name, info in request.model_fields.items():
        known |= {name, info.alias} - {None}
    request.field_names = known | {BUDGET_KEY, POLICY_KEY}


# The checks


def _checked_params(original: Method) -> Method:
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, params, *args, **kwargs)
        _front(self).check(params)
        return result

    return _validate_params


def _checked_inputs(original: Method) -> Method:
    signature = inspect.signature(original)

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        front = _front(self)
        # The engine's copy of the params knows the output's length, the client's the names.
        given = signature.bind(self, *args, **kwargs).arguments["params"]
        kv = front.check(request.sampling_params, _prompt_length(request), named_by=given)
        if kv is not None:
            from vllm_kvcrush.server import metrics

            metrics.count_request(front.model_name, front.runs_with(kv))
        return request

    return process_inputs


def _checked_generate(original: Method) -> Method:
    signature = inspect.signature(original)

    # Not a generator itself, so that it raises when it is called, not when it is first read.
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        _front(self.input_processor).check(
            given["sampling_params"], _prompt_length(given["prompt"])
        )
        return original(self, *args, **kwargs)

    return generate


def _checked_turns(original: Method) -> Method:
    signature = inspect.signature(original)

    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        _front(self.engine_client.input_processor).check(
            given["sampling_params"], _prompt_length(given["engine_input"])
        )
        return original(self, *args, **kwargs)

    return _generate_with_builtin_tools


def _prompt_length(prompt: Any) -> int | None:
    """Tokens in a rendered prompt or an engine request; None where they are not known yet."""
    for name in ("prompt_token_ids", "prompt_embeds"):
        tokens = prompt.get(name) if isinstance(prompt, dict) else getattr(prompt, name, None)
        if tokens is not None:
            return len(tokens)
    return None


def _front(processor: Any) -> Front:
    front = vars(processor).get(_FRONT)
    if front is None:
        front = Front(processor.vllm_config)
        setattr(processor, _FRONT, front)
    return front


class Front:
    """What one engine's front-end checks requests against."""

    def __init__(self, vllm_config: Any):
        self.config = vllm_config
        extra = vllm_config.additional_config
        raw = extra.get("kvcrush") if isinstance(extra, Mapping) else None
        self.settings = None if raw is None else Settings.from_dict(raw)

    @property
    def model_name(self) -> str:
        """Label of vLLM's own metrics."""
        return str(self.config.model_config.served_model_name)

    def runs_with(self, params: RequestParams) -> str:
        """The policy that really applies: a budget of 1.0 applies none."""
        return params.policy if params.active else "none"

    def check(
        self, params: Any, prompt_length: int | None = None, named_by: Any = None
    ) -> RequestParams | None:
        """Validates a request's `SamplingParams`; other params pass. Without a prompt length,
        the size of the pool is not looked at. `named_by`: the params that the client's names
        are known of, if other ones.

        Returns:
            What the request will run with, or None where the plugin is not active.

        Raises:
            VLLMValidationError: HTTP 400, with `param` as the client called it.
        """
        from vllm.sampling_params import SamplingParams

        if not isinstance(params, SamplingParams):
            return None
        named_by = params if named_by is None else named_by
        extra_args = params.extra_args or {}
        if self.settings is None:
            for key in (BUDGET_KEY, POLICY_KEY):
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
        block_size = self.config.cache_config.block_size
        max_model_len = self.config.model_config.max_model_len
        for key in vars(named_by).get(_UNKNOWN, ()):
            raise self._refuse(
                "unknown_key",
                f"{key} is not a parameter: kv_policy and kv_budget are.",
                key,
                params,
            )
        try:
            kv = self.settings.validate_request(extra_args, block_size, max_model_len)
        except ConfigError as error:
            reason = _reason(self.settings, extra_args, block_size, max_model_len, error.key)
            raise self._refuse(reason, str(error), error.key, named_by) from error
        if prompt_length is not None:
            self._check_pool(kv, params, prompt_length, named_by)
        return kv

    def _check_pool(
        self, kv: RequestParams, params: Any, prompt_length: int, named_by: Any
    ) -> None:
        """A request whose bound is above the pool could wait for ever."""
        assert self.settings is not None
        cache, parallel = self.config.cache_config, self.config.parallel_config
        if not cache.num_gpu_blocks:
            return
        # vLLM sums the blocks of the engines behind one front-end; one block of each is its null
        # block.
        local = parallel.local_engines_only
        engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
        pool = cache.num_gpu_blocks // max(1, engines) - 1
        longest = self.config.model_config.max_model_len
        if cdiv(longest, cache.block_size) <= pool:
            return
        output = longest if params.max_tokens is None else params.max_tokens
        length = min(prompt_length + output, longest)
        need = self.settings.plan(kv, prompt_length, cache.block_size).bound(length)
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
            name = f"extra_args.{key}"  # not from HTTP
        elif key in fields or key not in (params.extra_args or {}):
            name = key
        else:
            name = f"vllm_xargs.{key}"
        return _refusal(reason, message, name, self.model_name)


def _reason(
    settings: Settings,
    extra_args: Mapping[str, Any],
    block_size: int,
    max_model_len: int,
    key: str,
) -> str:
    """A stable word for the refusals metric."""
    if key not in (BUDGET_KEY, POLICY_KEY):
        return "unknown_key"
    try:
        replace(settings, budget_max=None).validate_request(extra_args, block_size, max_model_len)
    except ConfigError:
        return "policy" if key == POLICY_KEY else "budget"
    return "cap"


def _refusal(reason: str, message: str, parameter: str, model_name: str | None) -> Exception:
    from vllm.exceptions import VLLMValidationError

    from vllm_kvcrush.server import metrics

    metrics.count_refusal(model_name or "", reason)
    error: Exception = VLLMValidationError(message, parameter=parameter)
    return error
