"""The API server's side: request parameters, usage and metrics.

Nothing here is imported, and nothing of vLLM is wrapped, before `install`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]
logger = logging.getLogger("vllm.kvcrush")


def install(active: bool, http: bool = True, stats: bool = True) -> None:
    """Wraps what a process that takes requests needs; safe to call again.

    Args:
        active: whether this engine has the plugin configured. If not, requests that ask for
            compression are refused and nothing else changes.
        http: whether the process may serve the OpenAI API; False spares `LLM` its imports.
        stats: whether the engine logs stats, without which there are no metrics.
    """
    from vllm_kvcrush.server import params

    try:
        params.install(http)
    except (ImportError, RuntimeError) as error:
        if active:
            raise
        # A server that compresses nothing must not fail because of this plugin.
        logger.warning("vllm-kvcrush is inactive and cannot refuse kv_* parameters: %s", error)
    if active:
        from vllm_kvcrush.server import metrics, usage

        usage.install(http)
        metrics.install(stats)


def wrap(cls: type, name: str, make: Callable[[Method], Method]) -> None:
    """Replaces a method by `make(method)`, once.

    Raises:
        RuntimeError: this vLLM's class has no such method of its own.
    """
    method = vars(cls).get(name)
    if method is None:
        raise RuntimeError(
            f"this vLLM's {cls.__name__} has no method {name}, which vllm-kvcrush extends: "
            "run vllm-kvcrush doctor"
        )
    if getattr(method, "_kvcrush", False):
        return
    wrapper = functools.wraps(method)(make(method))
    wrapper._kvcrush = True  # type: ignore[attr-defined]
    setattr(cls, name, wrapper)
