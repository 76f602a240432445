"""Who sent a request, from the HTTP headers that rules ask for.

`CallerMiddleware`, an ASGI middleware that the plugin adds to vLLM's `--middleware`, keeps the
headers in a context variable. vLLM prepares some requests in threads, which do not see it, so the
caller is also kept with the request's `SamplingParams` from where these are made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from vllm_kvcrush.server.rules import KEY_HEADER, REQUEST_HEADERS, Rules, key_hash

MIDDLEWARE = f"{__name__}.CallerMiddleware"
_PREFIX = "x-kv-"
# Attribute of a SamplingParams: its Caller.
_ATTRIBUTE = "_kvcrush_caller"


class Caller:
    """The sender of one HTTP request.

    Args:
        headers: names in small letters and values, as ASGI has them.

    Attributes:
        rules: the rules that hold for this request, once they were looked at: a file that is
            replaced later does not change them.
    """

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]):
        self._headers: dict[str, list[str]] = {}
        for name, value in headers:
            self._headers.setdefault(name.decode("latin-1").lower(), []).append(
                value.decode("latin-1")
            )
        self.rules: Rules | None = None

    def header(self, name: str) -> str | None:
        """Returns the first value of a header, or None without it."""
        return self._headers.get(name, [None])[0]

    def repeated(self, names: Iterable[str]) -> str | None:
        """Returns one of these headers that is there more than once, or None: whoever is in front
        may have read another one of them than we would."""
        return next((n for n in sorted(names) if len(self._headers.get(n, ())) > 1), None)

    def others(self, known: Iterable[str]) -> str | None:
        """Returns a header that looks like one of ours and is none of the known ones, or None."""
        ours = (n for n in self._headers if n.startswith(_PREFIX) and n not in known)
        return next(ours, None)

    @cached_property
    def key(self) -> str | None:
        """The hash of the API key, found as vLLM finds it, or None without one."""
        scheme, _, key = (self.header(KEY_HEADER) or "").partition(" ")
        return key_hash(key) if scheme.lower() == "bearer" and key else None

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters that the headers give."""
        found = {key: self.header(name) for key, name in REQUEST_HEADERS.items()}
        return {key: value for key, value in found.items() if value is not None}


_current: ContextVar[Caller | None] = ContextVar("kvcrush_caller", default=None)


def current() -> Caller | None:
    """Returns the caller of the HTTP request that is being handled, or None outside of one."""
    return _current.get()


def of(params: Any) -> Caller | None:
    """Returns the caller of a request with these `SamplingParams`, or None if it did not come by
    HTTP."""
    caller: Caller | None = vars(params).get(_ATTRIBUTE) or current()
    if caller is not None:
        setattr(params, _ATTRIBUTE, caller)
    return caller


Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class CallerMiddleware:
    """Keeps the headers of each HTTP request where `current` finds them."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = _current.set(Caller(scope["headers"]))
        try:
            await self.app(scope, receive, send)
        finally:
            _current.reset(token)
