"""Names of policies with their parameters: one grammar for flags, JSON and requests.

    policy     := selection [ "@" codec { "+" codec } ]
    selection  := name [ "(" [ argument { "," argument } ] ")" ]
    argument   := [ "base" "=" ] selection | option "=" value
    value      := number | "true" | "false" | "null" | word | quoted string

A selection says which tokens stay, and the names after "@" say in which codecs these may be stored:
`fair(kvcrush(snapkv, ratio=0.25))@int8`. The one argument without "=", the first, is the policy
that a wrapper wraps. In JSON the same is `{"policy": "fair", "base": {"policy": "kvcrush",
"base": "snapkv", "ratio": 0.25}, "codecs": ["int8"]}`. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_kvcrush.codecs import CODECS

MAX_LENGTH = 256
MAX_DEPTH = 4

_TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z_][\w.-]*)|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<string>\"(?:[^\"\\]|\\.)*\")|(?P<mark>[(),=@+]))"
)
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_WORDS = {"true": True, "false": False, "null": None}


_TOO_LONG = f"is longer than {MAX_LENGTH} characters"
_TOO_DEEP = f"wraps policies more than {MAX_DEPTH} deep"


class SpecError(ValueError):
    """A policy that cannot be read; the message ends a sentence that begins with its text."""


@dataclass(frozen=True)
class Spec:
    """A policy by name.

    Attributes:
        name: the name in the registry.
        base: the policy that it wraps, or None.
        options: (option, value) pairs, sorted by option.
        codecs: codecs after "@", those that lose least first; empty for raw pages; None for those
            that the name stands for.
    """

    name: str
    base: Spec | None = None
    options: tuple[tuple[str, Any], ...] = ()
    codecs: tuple[str, ...] | None = None

    def __str__(self) -> str:
        arguments = [] if self.base is None else [str(self.base)]
        arguments += [f"{option}={_shown(value)}" for option, value in self.options]
        text = self.name + (f"({', '.join(arguments)})" if arguments else "")
        return text if self.codecs is None else f"{text}@{'+'.join(self.codecs) or 'raw'}"

    @property
    def chain(self) -> Iterator[Spec]:
        """Yields the policy and those that it wraps, from the outside in."""
        yield self
        if self.base is not None:
            yield from self.base.chain


def parse(value: Any) -> Spec:
    """Returns the policy that a string, a JSON object, or a string of a JSON object names.

    Raises:
        SpecError: it is neither, or is longer than MAX_LENGTH or deeper than MAX_DEPTH.
    """
    if isinstance(value, Spec):
        return value
    return _parsed(value) if isinstance(value, str) else _bounded(value)


def _bounded(value: Any) -> Spec:
    found = _of(value, 1)
    if len(str(found)) > MAX_LENGTH:
        raise SpecError(_TOO_LONG)
    return found


@functools.lru_cache(512)  # called in every step
def _parsed(text: str) -> Spec:
    return _bounded(text)


def _of(value: Any, depth: int) -> Spec:
    """Returns a policy that is written in any form, with `depth` - 1 others around it."""
    if isinstance(value, str):
        if len(value) > MAX_LENGTH:
            raise SpecError(_TOO_LONG)
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise SpecError(f"is not JSON ({error})") from None
    if isinstance(value, str):
        found = _Reader(value).read(depth)
    elif isinstance(value, Mapping):
        found = _from_json(value, depth)
    else:
        raise SpecError("is not a policy's name")
    if depth > 1 and found.codecs is not None:
        raise SpecError("names codecs of a policy inside another: only the outermost has some")
    return found


def _from_json(value: Mapping[Any, Any], depth: int) -> Spec:
    if depth > MAX_DEPTH:
        raise SpecError(_TOO_DEEP)
    if not isinstance(value.get("policy"), str):
        raise SpecError('has no "policy" with a name')
    if len(value["policy"]) > MAX_LENGTH:
        raise SpecError(_TOO_LONG)
    found = _Reader(value["policy"]).read(depth)
    options = dict(found.options)
    for option, given in value.items():
        if option in ("policy", "base", "codecs"):
            continue
        if not isinstance(option, str) or not _WORD.fullmatch(option):
            raise SpecError("has an option that is not a word")
        if option in options:
            raise SpecError(f"has the option {option} twice")
        options[option] = _checked_value(option, given)
    if value.get("base") is not None:
        if found.base is not None:
            raise SpecError("wraps two policies")
        found = replace(found, base=_of(value["base"], depth + 1))
    if (codecs := value.get("codecs")) is not None:
        if found.codecs is not None:
            raise SpecError("names its codecs twice")
        if not isinstance(codecs, list | tuple) or not codecs:
            raise SpecError('has "codecs" that are not a list of names')
        found = replace(found, codecs=_checked_codecs(codecs))
    return replace(found, options=tuple(sorted(options.items())))


def _checked_codecs(codecs: Any) -> tuple[str, ...]:
    for codec in codecs:
        if not isinstance(codec, str) or codec not in CODECS or codec == "exact":
            known = ", ".join(name for name in CODECS if name != "exact")
            named = f" {codec[:20]!r}" if isinstance(codec, str) else ""
            raise SpecError(f"names the codec{named}, which is not one of {known}")
    if len(set(codecs)) != len(codecs):
        raise SpecError("names a codec twice")
    if "raw" in codecs and len(codecs) > 1:
        raise SpecError("names raw pages beside another codec")
    return () if tuple(codecs) == ("raw",) else tuple(codecs)


def _checked_value(option: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise SpecError(f"has a value of {option} that is neither a number nor a word")


def _shown(value: Any) -> str:
    if isinstance(value, str) and _WORD.fullmatch(value) and value not in _WORDS:
        return value
    return json.dumps(value)


class _Reader:
    """Reads the grammar above from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        at = 0
        stripped = text.rstrip()
        while at < len(stripped):
            found = _TOKEN.match(stripped, at)
            if found is None:
                raise SpecError(f"cannot be read from {stripped[at:].strip()[:20]!r} on")
            kind = found.lastgroup or ""
            self._tokens.append((kind, found.group(kind)))
            at = found.end()
        self._at = 0

    def read(self, depth: int = 1) -> Spec:
        """Returns the policy that the whole text names."""
        found = self._selection(depth)
        if self._take("@"):
            codecs = [self._expect("word", "a codec")]
            while self._take("+"):
                codecs.append(self._expect("word", "a codec"))
            found = replace(found, codecs=_checked_codecs(codecs))
        if self._at < len(self._tokens):
            raise SpecError(f"cannot be read from {self._tokens[self._at][1]!r} on")
        return found

    def _selection(self, depth: int) -> Spec:
        if depth > MAX_DEPTH:
            raise SpecError(_TOO_DEEP)
        name = self._expect("word", "a policy's name")
        base: Spec | None = None
        options: dict[str, Any] = {}
        if self._take("("):
            while not self._take(")"):
                if base is not None or options:
                    self._expect_mark(",")
                if self._at + 1 < len(self._tokens) and self._tokens[self._at + 1][1] == "=":
                    option = self._expect("word", "an option")
                    self._expect_mark("=")
                    if option == "base" and base is None:
                        base = self._selection(depth + 1)
                    elif option == "base":
                        raise SpecError("wraps two policies")
                    elif option in options:
                        raise SpecError(f"has the option {option} twice")
                    else:
                        options[option] = _checked_value(option, self._value(option))
                elif base is None and not options:
                    base = self._selection(depth + 1)
                else:
                    self._expect("word", "an argument")
                    raise SpecError("wraps two policies, or has one after an option")
        return Spec(name, base, tuple(sorted(options.items())))

    def _value(self, option: str) -> Any:
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        self._at += 1
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if kind == "word":
            return _WORDS.get(text, text)
        if kind == "string":
            try:
                return json.loads(text)
            except ValueError:
                raise SpecError(f"has a value of {option} that is not a JSON string") from None
        raise SpecError(f"has the option {option} without a value")

    def _take(self, mark: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at] == ("mark", mark):
            self._at += 1
            return True
        return False

    def _expect_mark(self, mark: str) -> None:
        if not self._take(mark):
            raise SpecError(f"lacks {mark!r}")

    def _expect(self, kind: str, what: str) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == kind:
            self._at += 1
            return self._tokens[self._at - 1][1]
        raise SpecError(f"lacks {what}")


# -- what the built-in names stand for ---------------------------------------------------------

# Names that stand for the policy ALIASED with these codecs.
ALIASES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("int8", "int4", "tc4", "tc6", "tc8", "tada", "gear")},
    "auto": ("int8", "tc4", "tc6", "tc8"),
}
ALIASED = "kvcrush"
# The one of them whose codecs follow from what each was measured to lose.
MEASURED = "auto"


@dataclass(frozen=True)
class Storage:
    """How a policy's compressed regions may be stored.

    Attributes:
        codecs: codecs that their pages may have, those that lose least first; empty for raw pages.
        tiers: whether the most important tokens get the finer codec where a region has pages of two
            codecs; otherwise the newest do.
        pages: whether heads may own other pages than the block table says, which needs our
            attention kernels even where all pages are raw.
        least_loss: whether it is measured, on the model, which codecs lose least, and any of
            `codecs.CODECS` may be among them; `codecs` are those where nothing was measured.
    """

    codecs: tuple[str, ...] = ()
    tiers: bool = False
    pages: bool = False
    least_loss: bool = False


# What the classes of the built-in policies say, so that a plan can be made without loading torch.
_BUILT_IN: dict[str, Storage] = {
    **dict.fromkeys(("streaming", "lacache", "knorm", "keydiff", "lagkv", "infinipot"), Storage()),
    **dict.fromkeys(("snapkv", "tova", "h2o", "expected_attention", "gkv", "rkv"), Storage()),
    **dict.fromkeys(("critic", "gui_kv", "kvzip", "kvcrush", "fair"), Storage()),
    **{name: Storage(codecs, least_loss=name == MEASURED) for name, codecs in ALIASES.items()},
    "mikv": Storage(("int8", "tc8"), tiers=True),
    "composed": Storage(),
    **dict.fromkeys(
        ("adakv", "keepkv", "rerotate", "pyramidkv", "cake", "duo", "surfacelogic", "d2o", "cam"),
        Storage(pages=True),
    ),
}


def storage(spec: Spec) -> Storage:
    """Returns how the compressed regions of a policy may be stored, by the policy itself or else by
    the one that it wraps. Raises ValueError for a policy of another package that cannot be
    loaded."""
    own = _BUILT_IN.get(spec.name)
    if own is None:
        from vllm_kvcrush import policies

        own = policies.storage_of(spec.name)
    if spec.base is not None:
        base = storage(spec.base)
        own = Storage(
            own.codecs or base.codecs,
            own.tiers or base.tiers,
            own.pages or base.pages,
            own.least_loss or (base.least_loss and not own.codecs),
        )
    if spec.codecs is not None:
        own = replace(own, codecs=spec.codecs, least_loss=False)
    return own


def resolved(spec: Spec, defaults: Mapping[str, Mapping[str, Any]] | None, depth: int = 1) -> Spec:
    """Returns the policy with the bases that the server's options (`defaults`, by policy) name
    where the policy names none itself.

    Raises:
        SpecError: such a base cannot be read, or policies would wrap each other without end.
    """
    if depth > MAX_DEPTH:
        raise SpecError(_TOO_DEEP)
    base = spec.base
    if base is None:
        given = ((defaults or {}).get(spec.name) or {}).get("base")
        base = None if given is None else _of(given, 2)
    return spec if base is None else replace(spec, base=resolved(base, defaults, depth + 1))
