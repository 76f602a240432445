"""Compares the table of vLLM's names that this package relies on with the source of a vLLM."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from vllm_kvcrush import hooks
from vllm_kvcrush.compat.source import Class, Entry, Signature, Source, SourceError
from vllm_kvcrush.hooks import Hook


class Finding(NamedTuple):
    """What a vLLM has where a hook is expected.

    Attributes:
        hook: the hook.
        found: the signature of a function; "" for anything else.
        problem: what is wrong with it, as the end of a sentence, or None.
    """

    hook: Hook
    found: str
    problem: str | None


def check(source: Source) -> list[Finding]:
    """Returns what a vLLM has for each hook that its release must have."""
    number = re.match(r"v?(\d+)\.(\d+)", source.version or "")
    release = (int(number[1]), int(number[2])) if number else None
    return [_find(source, hook) for hook in hooks.HOOKS if _applies(hook, release)]


def _applies(hook: Hook, release: tuple[int, int] | None) -> bool:
    if release is None:  # a checkout, taken to be newer than all known releases
        return hook.until is None
    return (hook.since or release) <= release <= (hook.until or release)


def record(source: Source) -> str:
    """Returns what the table asks of a vLLM as text for `Source.recorded`, so that it can be
    checked without that vLLM."""
    return source.record([(hook.module, hook.name.split(".")[0]) for hook in hooks.HOOKS])


@functools.cache
def refusal() -> str | None:
    """Returns one sentence that says why no policy can be used with the installed vLLM, whatever
    its version number, or None if it has all that is needed."""
    try:
        source = Source.installed()
        wrong = [finding for finding in check(source) if finding.problem]
    except SourceError as error:
        return str(error)
    if not wrong:
        return None
    hook, _, problem = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return (
        f"vLLM {source.version or ''} at {source.where} is not what vllm-kvcrush knows by that "
        f"version: {hook.module}.{hook.name} {problem}{more}: install a release of vLLM that it "
        "supports, or start without --kv-policy; `vllm-kvcrush doctor --hooks` lists all."
    )


def _find(source: Source, hook: Hook) -> Finding:
    try:
        found = _look_up(source, hook)
    except KeyError:
        return Finding(hook, "", "is missing")
    if hook.kind == "subclass" and not isinstance(found, Class):
        return Finding(hook, "", "is no class")
    if isinstance(found, Class):
        if hook.parameters is None:
            return Finding(hook, "", None)
        found = source.member(found, "__init__")
    if isinstance(found, Signature):
        text = f"({found})"
        problem = None if hook.parameters is None else _problem(hook, found)
        return Finding(hook, text, problem and f"takes {text}, where {problem}")
    # A value, or a function that some code made, whose parameters cannot be read in the source.
    if hook.parameters is not None and "." in hook.name:
        return Finding(hook, "", "is no method")
    return Finding(hook, "", None)


def _look_up(source: Source, hook: Hook) -> Entry | str:
    owner, _, member = hook.name.rpartition(".")
    if not owner:
        return source.find(hook.module, member)
    found = source.find(hook.module, owner)
    if not isinstance(found, Class):
        raise KeyError(owner)
    # A wrapper replaces a method in the class itself, so an inherited one does not count.
    return source.member(found, member, inherited=hook.kind != "wrap")


def _problem(hook: Hook, found: Signature) -> str | None:
    """Returns what is wrong with vLLM's parameters, or None."""
    assert hook.parameters is not None
    by_place, _, rest = hook.parameters.partition("*, ")
    names = [part.strip() for part in by_place.split(",") if part.strip()]
    named = [part.strip() for part in rest.split(",") if part.strip()]
    open_ended = "..." in (*names, *named)
    names, named = ([n for n in part if n != "..."] for part in (names, named))
    for index, given in enumerate(names):
        name = given.rstrip("=")
        if name in found.positional:
            if found.positional[index] != name:
                return f"{name} is expected at place {index + 1}"
        elif given == name and not (found.args and hook.kind != "override"):
            return f"{name} is expected"
    every = {*found.positional, *found.keyword}
    for given in named:
        name = given.rstrip("=")
        if given == name and name not in every and not found.kwargs:
            return f"{name} is expected"
    ours = {given.rstrip("=") for given in (*names, *named)}
    if hook.kind == "override" and not open_ended:
        strange = every - ours
        if strange or found.args or found.kwargs:
            return f"no more than ({hook.parameters}) is expected"
    if hook.kind == "call" and (missing := every - ours - found.optional):
        return f"({hook.parameters}) is given, without {', '.join(sorted(missing))}"
    return None
