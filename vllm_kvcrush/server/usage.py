"""`usage.kv_tokens_details`: what a request's KV cache held; docs/usage.md describes each field.

The scheduler reports in `EngineCoreOutput.kv_transfer_params = {"kvcrush": {...}}`, with a
request's first output, after each compaction and at its end. vLLM has the field for KV connectors,
which are refused together with this plugin. Between two reports a request gains one token of KV for
each token of output, and a block whenever its last one is full. This is needed when the front end
finishes a request itself, at a stop string: the engine's last report then never arrives.

The details are set on the `RequestOutput`, as attribute `kv_tokens_details` (also for users of
`LLM`). Each serving method is wrapped so that the outputs it receives can be read. Requests share
no state.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from vllm_kvcrush import compat
from vllm_kvcrush.plan import cdiv
from vllm_kvcrush.server import KEY, Method, wrap

ATTRIBUTE = "kv_tokens_details"
_REPORT = "_kvcrush_report"
_FINISHED = "_kvcrush_finished"

Details = dict[str, Any]


def install(http: bool = True) -> None:
    """Wraps vLLM's output processor and, where the OpenAI API is served, its serving classes."""
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestState

    wrap(RequestState, "make_request_output", _reporting)
    wrap(RequestOutput, "add", _merging)
    if not http:
        return
    from vllm.entrypoints.anthropic import protocol as anthropic
    from vllm.entrypoints.anthropic import serving as anthropic_serving
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses import context
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    wrap(OpenAIServingChat, "chat_completion_full_generator", _full)
    wrap(OpenAIServingChat, compat.CHAT_STREAM, _stream)
    wrap(OpenAIServingChatBatch, "chat_completion_full_generator_batch", _batch)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _completion)
    wrap(OpenAIServingCompletion, "completion_stream_generator", _stream)
    for cls in (context.SimpleContext, context.ParsableContext, context.HarmonyContext):
        wrap(cls, "append_output", _appending)
    wrap(OpenAIServingResponses, "responses_full_generator", _responses)
    wrap(ServingTokens, "serve_tokens_full_generator", _full)
    wrap(ServingTokens, "serve_tokens_stream_generator", _stream)
    # vLLM makes Anthropic's usage of a chat completion's, with a pydantic model that drops unknown
    # fields.
    wrap(anthropic_serving, "_build_anthropic_usage", _anthropic)
    if anthropic.AnthropicUsage.model_config.get("extra") != "allow":
        anthropic.AnthropicUsage.model_config["extra"] = "allow"
        for model in (
            anthropic.AnthropicUsage,
            anthropic.AnthropicMessagesResponse,
            anthropic.AnthropicStreamEvent,
        ):
            model.model_rebuild(force=True)


# All details have the counts, those with a report of the engine have bytes, and few have failures.
_COUNTS = ("held", "raw", "compactions")
_BYTES = ("kv_bytes_held", "kv_bytes_raw")
_FAILURES = "policy_failures"
_FIRST = "first_compaction"
_PROTECTED = "protected"


def total(parts: Iterable[Details]) -> Details | None:
    """Returns the details of a response with several choices or prompts: the sums of the details of
    its parts, or None if there are none. `policy` and `reason` are left out where they differ,
    and bytes where those of one part are not known."""
    parts = list(parts)
    if not parts:
        return None
    names = [*_COUNTS, *(name for name in _BYTES if all(name in part for part in parts))]
    result: Details = {name: sum(part[name] for part in parts) for name in names}
    for name in (_PROTECTED, _FAILURES):
        if count := sum(part.get(name, 0) for part in parts):
            result[name] = count
    for name in ("policy", "reason", "rule"):
        values = {part[name] for part in parts if name in part}
        if len(values) == 1 and (name != "policy" or all(name in part for part in parts)):
            result[name] = values.pop()
    if first := [part[_FIRST] for part in parts if _FIRST in part]:
        result[_FIRST] = min(first)
    return result


# From the engine's output to the RequestOutput


def _reporting(original: Method) -> Method:
    names = tuple(inspect.signature(original).parameters)[1:6]
    expected = (
        "new_token_ids",
        "pooling_output",
        "finish_reason",
        "stop_reason",
        "kv_transfer_params",
    )
    if names != expected:
        raise RuntimeError(
            f"this vLLM's RequestState.make_request_output takes {names}, not {expected}: "
            "run vllm-kvcrush doctor"
        )

    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if kv_transfer_params and KEY in kv_transfer_params:
            report = kv_transfer_params[KEY]
            setattr(self, _REPORT, (report, self.detokenizer.num_output_tokens()))
            # Clients see the field as in plain vLLM.
            others = {name: v for name, v in kv_transfer_params.items() if name != KEY}
            kv_transfer_params = others or None
        output = original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *args,
            **kwargs,
        )
        if pooling_output is not None:
            return output
        # The n samples of one request end at different times; vLLM joins them in the parent.
        owner = self.parent_req or self
        if finish_reason is not None:
            vars(owner).setdefault(_FINISHED, {})[self.request_index] = details(self)
        finished = vars(owner).get(_FINISHED)
        if output is not None and finished:
            setattr(output, ATTRIBUTE, total(finished.values()))
        return output

    return make_request_output


def budget(state: Any) -> float | int | None:
    """Returns the budget that a request ran with, of vLLM's state of it; None where the engine
    never reported."""
    report, _ = vars(state).get(_REPORT, (None, 0))
    return None if report is None else report["budget"]


def details(state: Any) -> Details:
    """Returns the details of a request, of which `state` is vLLM's `RequestState`, as they are
    now."""
    now = state.detokenizer.num_output_tokens()
    report, then = vars(state).get(_REPORT, (None, 0))
    if report is None:
        # The request finished before the engine reported. The last token of output has no KV yet.
        raw = max(0, state.prompt_len + now - 1)
        return {"held": raw, "raw": raw, "compactions": 0}
    since = now - then
    raw, size = report["kv_tokens_raw"] + since, report["kv_block_size"]
    blocks = max(report["kv_blocks_held"], cdiv(report["kv_slots_held"] + since, size))
    found: Details = {
        "held": report["kv_tokens_held"] + since,
        "raw": raw,
        "compactions": report["compactions"],
        "kv_bytes_held": blocks * report["kv_block_bytes"] + report["kv_side_bytes"],
        "kv_bytes_raw": cdiv(raw, size) * report["kv_block_bytes"],
        "policy": report["policy"],
    }
    if report["compactions"]:
        found["reason"], found[_FIRST] = report["reason"], report[_FIRST]
    if report.get(_PROTECTED):
        found[_PROTECTED] = report[_PROTECTED]
    if report.get("rule"):
        found["rule"] = report["rule"]
    if report.get(_FAILURES):
        found[_FAILURES] = report[_FAILURES]
    return found


def _merging(original: Method) -> Method:
    def add(self: Any, next_output: Any, *args: Any, **kwargs: Any) -> None:
        original(self, next_output, *args, **kwargs)
        details = getattr(next_output, ATTRIBUTE, None)
        if details is not None:
            setattr(self, ATTRIBUTE, details)

    return add


# From the RequestOutput to the response


class _Tap:
    """Passes outputs on and remembers the newest details of each prompt."""

    def __init__(self, outputs: AsyncIterator[Any], prompt: int = 0):
        self._outputs = outputs
        self._prompt = prompt
        self.seen: dict[int, Details] = {}

    def __aiter__(self) -> _Tap:
        return self

    async def __anext__(self) -> Any:
        item = await self._outputs.__anext__()
        # Completions of several prompts come as (prompt, output).
        prompt, output = item if isinstance(item, tuple) else (self._prompt, item)
        details = getattr(output, ATTRIBUTE, None)
        if details is not None:
            self.seen[prompt] = details
        return item

    async def aclose(self) -> None:
        close = getattr(self._outputs, "aclose", None)
        if close is not None:
            await close()


def _add(response: Any, details: Details | None) -> Any:
    # An ErrorResponse has no usage.
    usage = getattr(response, "usage", None)
    if usage is not None and details is not None:
        setattr(usage, ATTRIBUTE, details)
    return response


def _full(original: Method) -> Method:
    signature = inspect.signature(original)

    async def full_generator(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        tap = _Tap(bound.arguments["result_generator"])
        bound.arguments["result_generator"] = tap
        response = await original(*bound.args, **bound.kwargs)
        return _add(response, total(tap.seen.values()))

    return full_generator


def _batch(original: Method) -> Method:
    signature = inspect.signature(original)

    async def full_generator_batch(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        taps = [_Tap(outputs) for outputs in bound.arguments["generators"]]
        bound.arguments["generators"] = taps
        response = await original(*bound.args, **bound.kwargs)
        return _add(response, total(part for tap in taps for part in tap.seen.values()))

    return full_generator_batch


def _stream(original: Method) -> Method:
    signature = inspect.signature(original)

    async def stream_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        bound = signature.bind(*args, **kwargs)
        tap = _Tap(bound.arguments["result_generator"])
        bound.arguments["result_generator"] = tap
        async with aclosing(original(*bound.args, **bound.kwargs)) as events:
            async for event in events:
                yield _in_event(event, tap)

    return stream_generator


def _in_event(event: Any, tap: _Tap) -> Any:
    """Returns a server-sent event, or the chunk that one is made of, with the details added if it
    carries the usage of the whole response, which OpenAI's protocol marks by an empty list of
    choices."""
    if not isinstance(event, str):
        return event if getattr(event, "choices", True) else _add(event, total(tap.seen.values()))
    # Inside a JSON string the quotes would be escaped, so generated text cannot match.
    if '"choices":[]' not in event or not tap.seen:
        return event
    prefix, suffix = "data: ", "\n\n"
    if not (event.startswith(prefix) and event.endswith(suffix)):
        return event
    chunk = json.loads(event[len(prefix) :])
    if not chunk.get("usage"):
        return event
    chunk["usage"][ATTRIBUTE] = total(tap.seen.values())
    return prefix + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")) + suffix


def _completion(original: Method) -> Method:
    signature = inspect.signature(original)

    def to_response(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        details = [getattr(r, ATTRIBUTE, None) for r in bound.arguments["final_res_batch"]]
        response = original(*args, **kwargs)
        return _add(response, total(d for d in details if d is not None))

    return to_response


def _appending(original: Method) -> Method:
    def append_output(self: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        original(self, output, *args, **kwargs)
        details = getattr(output, ATTRIBUTE, None)
        if details is not None:
            # With built-in tools a response has several turns. Each reads all before it, so the
            # last one counts.
            setattr(self, ATTRIBUTE, details)

    return append_output


def _responses(original: Method) -> Method:
    signature = inspect.signature(original)

    async def full_generator(*args: Any, **kwargs: Any) -> Any:
        context = signature.bind(*args, **kwargs).arguments["context"]
        response = await original(*args, **kwargs)
        return _add(response, getattr(context, ATTRIBUTE, None))

    return full_generator


def _anthropic(original: Method) -> Method:
    def build_usage(usage: Any) -> Any:
        built = original(usage)
        details = getattr(usage, ATTRIBUTE, None)
        if details is not None:
            setattr(built, ATTRIBUTE, details)
        return built

    return build_usage
