"""The API server's side: request parameters, usage and metrics.

`register` wraps one method of each of vLLM's two front-ends; everything else is wrapped when an
engine is constructed.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

KEY = "kvcrush"
Method = Callable[..., Any]
logger = logging.getLogger("vllm.kvcrush")


def register() -> None:
    """Wraps the constructors of the two classes through which every request enters vLLM, in an API
    server, a batch runner, `LLM`, or other code that has a finished `VllmConfig`."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(AsyncLLM, "__init__", functools.partial(_constructed, http=True))
    # `LLM` serves no HTTP, so it need not import the endpoints.
    wrap(LLMEngine, "__init__", functools.partial(_constructed, http=False))


def _constructed(original: Method, http: bool) -> Method:
    signature = inspect.signature(original)
    if "vllm_config" not in signature.parameters:
        raise RuntimeError(f"this vLLM's {original.__qualname__} takes no vllm_config")

    def __init__(*args: Any, **kwargs: Any) -> None:
        vllm_config = signature.bind(*args, **kwargs).arguments["vllm_config"]
        raw = configured(vllm_config)
        active = raw is not None
        scheduler = vllm_config.scheduler_config.scheduler_cls
        if active and not str(scheduler).startswith("vllm_kvcrush."):
            raise ValueError(
                "additional_config['kvcrush'] was put into a VllmConfig that was made without it, "
                "so nothing would be compressed: give it to EngineArgs, and call its "
                "create_engine_config()."
            )
        install(active, http)
        if active and http:
            from vllm_kvcrush.server import live

            live.install(vllm_config)
        original(*args, **kwargs)
        processor = getattr(args[0], "input_processor", None)
        if active and processor is not None:
            from vllm_kvcrush.server import params

            params.start(processor, http)
        if http and raw is not None and raw.get("canary"):
            from vllm_kvcrush.server import canary

            canary.attach(args[0], vllm_config)

    return __init__


def configured(vllm_config: Any) -> Any:
    """Returns the plugin's part of a `VllmConfig`: a dict, or None where it is not active."""
    extra = vllm_config.additional_config
    return extra.get(KEY) if isinstance(extra, Mapping) else None


def install(active: bool, http: bool = True) -> None:
    """Wraps all methods of vLLM that must be wrapped in a process that takes requests. It may be
    called again.

    Args:
        active: whether the plugin is configured for this engine. If not, requests that ask for
            compression are refused and nothing else changes.
        http: whether the process may serve the OpenAI API; if not, its endpoints are not imported.
    """
    from vllm_kvcrush.server import params

    try:
        params.install(http)
    except Exception as error:  # whatever an unknown vLLM may do
        if active:
            raise
        # A server that compresses nothing must not fail because of this plugin.
        logger.warning("vllm-kvcrush is inactive and cannot refuse kv_* parameters: %r", error)
    if active:
        from vllm_kvcrush.server import metrics, tracing, usage

        usage.install(http)
        metrics.install()
        tracing.install()


def wrap(cls: Any, name: str, make: Callable[[Method], Method]) -> None:
    """Replaces a method of a class, or a function of a module, by `make(method)`, once.

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
