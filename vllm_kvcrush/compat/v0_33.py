"""What is particular to vLLM 0.33, of which only the Python files were seen running
(docs/vllm.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# See `v0_32`. Here it yields chunks, of which vLLM makes OpenAI's events, and Anthropic's.
CHAT_STREAM = "chat_completion_stream_generator_raw"


def prefix_hit(
    find: Callable[..., tuple[Any, int, int, bool]],
    kv_cache_manager: Any,
    request: Any,
    bound: int | None,
    cap: int | None,
) -> tuple[Any, int, int, bool]:
    """Looks a request up in the prefix cache, for no more tokens than it may take from there; see
    `v0_32.prefix_hit`. vLLM 0.33 takes the bound itself."""
    if cap is not None:
        bound = min(cap, request.num_tokens - 1 if bound is None else bound)
    return find(request, bound)
