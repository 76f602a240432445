"""The page as one document that loads nothing, and a policy that lets it load nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
import pathlib

_FOLDER = pathlib.Path(__file__).parent / "page"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def html() -> str:
    """Returns the document, with its style and its script inside."""
    text = _read("page.html")
    for mark, name in (("/*style*/", "page.css"), ("/*script*/", "page.js")):
        before, found, after = text.partition(mark)
        assert found, mark
        text = f"{before}{_read(name)}{after}"
    return text


def _digest(name: str) -> str:
    digest = hashlib.sha256(_read(name).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@functools.cache
def headers() -> dict[str, str]:
    """Returns the headers of the document: it runs its own script and style and no other, talks to
    its own server only, and is shown in no other page."""
    policy = (
        "default-src 'none'",
        f"script-src {_digest('page.js')}",
        f"style-src {_digest('page.css')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
