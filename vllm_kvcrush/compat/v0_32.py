"""What is particular to vLLM 0.32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The method of `OpenAIServingChat` that all streamed chats come from: it yields server-sent events.
CHAT_STREAM = "chat_completion_stream_generator"


def prefix_hit(
    find: Callable[..., tuple[Any, int, int, bool]],
    kv_cache_manager: Any,
    request: Any,
    bound: int | None,
    cap: int | None,
) -> tuple[Any, int, int, bool]:
    """Looks a request up in the prefix cache, for no more tokens than it may take from there.

    vLLM 0.32 looks up the whole prompt and takes no bound, so the excess is cut off afterwards.

    Args:
        find: `Scheduler._get_local_prefix_cache_hit` of vLLM's own scheduler.
        kv_cache_manager: the scheduler's KV cache manager.
        request: vLLM's request.
        bound: the most tokens by vLLM; None means all but the last.
        cap: the most tokens by the request's policy, in whole blocks; None means all.

    Returns:
        What `find` returns: blocks, the number of their tokens, the boundary of a shared prefix,
        and whether the hits of several groups of layers differ.
    """
    assert bound is None, "vLLM 0.32 gives none"
    blocks, hit, boundary, diverged = find(request)
    if cap is not None and hit > cap:
        blocks, hit = kv_cache_manager.truncate_computed_blocks(blocks, cap), cap
    return blocks, hit, boundary, diverged
