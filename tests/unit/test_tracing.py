"""What spans of requests say, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace as Namespace
from typing import Any

import pytest

from vllm_kvcrush.server import tracing, usage

REPORT = {
    "kv_tokens_held": 40, "kv_tokens_raw": 100, "kv_slots_held": 40, "kv_blocks_held": 3,
    "kv_block_size": 16, "kv_block_bytes": 1000, "kv_side_bytes": 7, "compactions": 2,
    "first_compaction": 64, "reason": "pressure", "policy_failures": 0, "policy": "h2o",
    "budget": 0.25,
}  # fmt: skip


def state(report: dict[str, Any] | None, tokens: int = 9) -> Any:
    detokenizer = Namespace(num_output_tokens=lambda: tokens)
    made = Namespace(detokenizer=detokenizer, prompt_len=92)
    if report is not None:
        setattr(made, usage._REPORT, (report, tokens))
    return made


def test_attributes_say_what_usage_says() -> None:
    assert tracing.attributes(state(REPORT)) == {
        "kvcrush.policy": "h2o",
        "kvcrush.budget": 0.25,
        "kvcrush.compactions": 2,
        "kvcrush.reason": "pressure",
        "kvcrush.tokens_held": 40,
        "kvcrush.tokens_raw": 100,
        "kvcrush.bytes_held": 3007,
        "kvcrush.bytes_raw": 7000,
    }
    failed = tracing.attributes(state({**REPORT, "compactions": 0, "policy_failures": 1}))
    assert failed["kvcrush.policy_failures"] == 1 and "kvcrush.reason" not in failed
    # One that ended before the engine reported, and one of pooling.
    unreported = {"compactions": 0, "tokens_held": 100, "tokens_raw": 100}
    assert tracing.attributes(state(None)) == {f"kvcrush.{k}": v for k, v in unreported.items()}
    assert tracing.attributes(Namespace(detokenizer=None)) == {}


def test_only_the_span_of_the_request_has_them() -> None:
    spans: list[dict[str, Any]] = []

    def instrument_manual(span_name: str, start_time: int, attributes: Any = None) -> None:
        spans.append({"name": span_name, **(attributes or {})})

    wrapped = tracing._instrumenting(instrument_manual)

    def do_tracing(self: Any, output: Any, req_state: Any, stats: Any) -> None:
        wrapped(span_name="llm_request", start_time=1, attributes={"gen_ai.request.id": "a"})
        if stats == "raise":
            raise ValueError

    traced = tracing._tracing(do_tracing)
    traced(None, None, state(REPORT), "stats")
    with pytest.raises(ValueError):
        traced(None, None, state(REPORT), "raise")
    wrapped("load", 2)
    first, second, third = spans
    assert first == second and first["gen_ai.request.id"] == "a"
    assert first["kvcrush.policy"] == "h2o" and third == {"name": "load"}
