"""Attributes of the span that vLLM makes of each request (`--otlp-traces-endpoint`): what
`usage.kv_tokens_details` says of it, and its budget. docs/live.md describes each."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from vllm_kvcrush.server import Method, usage, wrap

# Of the request whose span is being made.
_attributes: ContextVar[dict[str, Any] | None] = ContextVar("kvcrush_attributes", default=None)


def install() -> None:
    """Wraps what makes vLLM's spans of requests. Without tracing vLLM does not call it."""
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap(OutputProcessor, "do_tracing", _tracing)
    wrap(output_processor, "instrument_manual", _instrumenting)


def _tracing(original: Method) -> Method:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any) -> None:
        token = _attributes.set(attributes(req_state))
        try:
            original(self, engine_core_output, req_state, *args)
        finally:
            _attributes.reset(token)

    return do_tracing


def _instrumenting(original: Method) -> Method:
    signature = inspect.signature(original)

    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if (ours := _attributes.get()) is not None:
            bound.arguments["attributes"] = {**(bound.arguments.get("attributes") or {}), **ours}
        return original(*bound.args, **bound.kwargs)

    return instrument_manual


def attributes(req_state: Any) -> dict[str, Any]:
    """Returns the attributes of a request that has ended, of vLLM's state of it."""
    if req_state.detokenizer is None:  # of pooling
        return {}
    details, budget = usage.details(req_state), usage.budget(req_state)
    found = {
        "policy": details.get("policy"),
        "budget": budget,
        "compactions": details["compactions"],
        "reason": details.get("reason"),
        "tokens_held": details["held"],
        "tokens_raw": details["raw"],
        "bytes_held": details.get("kv_bytes_held"),
        "bytes_raw": details.get("kv_bytes_raw"),
        "policy_failures": details.get("policy_failures"),
    }
    return {f"kvcrush.{name}": value for name, value in found.items() if value is not None}
