"""Rules of `--kv-budget-rules`: the limits of a request by its API key, model, adapter or headers.

docs/rules.md is the manual. A file is read as a whole or refused as a whole. What it allows is a
part of what the server's flags allow, so that the scheduler, which holds requests against the flags
alone, need not know any rule. Rules that a client can meet by what it writes into a request (no
key, no header that a proxy vouches for) allow a part of what the file's default does.

Imports no vLLM; pydantic and PyYAML come with it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvcrush.config import BUDGET_KEY, FLAGS, POLICY_KEY, ConfigError, Settings

DEFAULT = "default"
# Headers in place of fields of the body, by the parameter that they give.
REQUEST_HEADERS = {BUDGET_KEY: "x-kv-budget", POLICY_KEY: "x-kv-policy"}
KEY_HEADER = "authorization"
MOST_BYTES = 2**20
_HASH = "sha256:"


class RulesError(ValueError):
    """A file that cannot be used. `problems` has a sentence for each thing that is wrong, with the
    file, the line and the path in it."""

    def __init__(self, problems: list[str]):
        super().__init__(" ".join(problems))
        self.problems = problems


def key_hash(key: str) -> str:
    """Returns what a file says in place of an API key."""
    return _HASH + hashlib.sha256(key.encode()).hexdigest()


class Caller(Protocol):
    """Who sent a request, as far as rules ask."""

    @property
    def key(self) -> str | None:
        """The hash of the API key, or None without one."""

    def header(self, name: str) -> str | None:
        """Returns the value of a header, or None without it."""


# -- what a file may say ---------------------------------------------------------------------------


def _is_hash(text: str) -> str:
    if not re.fullmatch(f"{_HASH}[0-9a-f]{{64}}", text):
        # It may be a key: it must not get into a log.
        raise ValueError(
            "is not the hash of an API key, sha256: and 64 digits of 0-9 and a-f: "
            "`vllm-kvcrush rules hash` makes it from a key"
        )
    return text


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text) or text == DEFAULT:
        raise ValueError(
            f"{text[:64]!r} is not a name for a rule: give up to 64 letters, digits, '.', '_' and "
            f"'-', and not {DEFAULT!r}"
        )
    return text


def _is_header(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", text):
        raise ValueError(f"{text[:64]!r} is not a header's name in small letters, such as x-tenant")
    if text == KEY_HEADER or text in REQUEST_HEADERS.values():
        raise ValueError(f"{text} cannot be a condition: name API keys by their hashes, in keys")
    return text


_Hash = Annotated[str, AfterValidator(_is_hash)]
_Name = Annotated[str, AfterValidator(_is_name)]
_Header = Annotated[str, AfterValidator(_is_header)]
_Texts = Annotated[list[str], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _Limits(_Strict):
    # Their values are read by `Settings.from_dict`, as those of the flags are.
    policy: Any = None
    budget: Any = None
    budget_max: Any = None
    allow: Any = None
    clients: Any = None
    protect_system: Any = None

    def stated(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FLAGS if name in self.model_fields_set}

    def where(self, name: str) -> str:
        """Returns the key that has said what a setting is: a default policy is always allowed."""
        return name if name != "allow" or "allow" in self.model_fields_set else "policy"


class _When(_Strict):
    keys: Annotated[list[_Hash], Field(min_length=1)] | None = None
    models: _Texts | None = None
    loras: _Texts | None = None
    headers: Annotated[dict[_Header, _Texts], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> _When:
        if not self.model_fields_set:
            raise ValueError("has no condition: what everybody gets is said under `default`")
        return self


class _Rule(_Limits):
    name: _Name
    when: _When


class _File(_Strict):
    request_headers: bool = False
    trusted_headers: list[_Header] = []
    rule_in_usage: bool = False
    default: _Limits = _Limits()
    rules: Annotated[list[_Rule], Field(max_length=1000)] = []


# -- rules -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The limits of some requests.

    Attributes:
        name: what the operator calls it.
        settings: the server's, with this rule's limits.
        keys, models, loras: of which a request must have one; empty: whatever it has.
        headers: values of which each of these headers must have one.
    """

    name: str
    settings: Settings
    keys: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    loras: frozenset[str] = frozenset()
    headers: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def meets(self, caller: Caller | None, model: str, lora: str | None) -> bool:
        """Returns whether a request is one of those."""
        if self.models and model not in self.models:
            return False
        if self.loras and lora not in self.loras:
            return False
        if caller is None:  # not by HTTP
            return not self.keys and not self.headers
        if self.keys and caller.key not in self.keys:
            return False
        return all(caller.header(name) in values for name, values in self.headers.items())


@dataclass(frozen=True)
class Rules:
    """What a file says, or, without one, the server's settings.

    Attributes:
        default: the limits of requests that meet no rule.
        rules: in the file's order, of which the first that a request meets counts.
        request_headers: whether clients may give parameters as headers (`REQUEST_HEADERS`).
        trusted_headers: headers that the proxy in front sets or strips.
        rule_in_usage: whether clients are told which rule they met.
        from_file: whether there is a file.
        digest: SHA-256 of the file, in hex.
        warnings: sentences for the operator.
    """

    default: Rule
    rules: tuple[Rule, ...] = ()
    request_headers: bool = False
    trusted_headers: tuple[str, ...] = ()
    rule_in_usage: bool = False
    from_file: bool = False
    digest: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """Returns the rules of a server without a file."""
        return cls(Rule(DEFAULT, settings))

    def match(self, caller: Caller | None, model: str, lora: str | None) -> Rule:
        """Returns the rule that a request meets.

        Args:
            caller: who sent it, None if it did not come by HTTP.
            model: the name by which it asked for the model.
            lora: the name of its LoRA adapter, or None.
        """
        met = (rule for rule in self.rules if rule.meets(caller, model, lora))
        return next(met, self.default)

    def __iter__(self) -> Iterator[Rule]:
        yield from (*self.rules, self.default)

    @functools.cached_property
    def headers(self) -> frozenset[str]:
        """Returns the headers on which something depends: a request may have each only once."""
        found = {name for rule in self.rules for name in rule.headers}.union(self.trusted_headers)
        if any(rule.keys for rule in self.rules):
            found.add(KEY_HEADER)
        return frozenset(found.union(REQUEST_HEADERS.values()))


# -- reading ---------------------------------------------------------------------------------------


def load(
    path: str,
    settings: Settings,
    block_size: int | None = None,
    max_model_len: int | None = None,
) -> Rules:
    """Returns the rules of a file.

    Args:
        settings: the server's.
        block_size, max_model_len: the engine's. Without them, checks that need them are left out.

    Raises:
        RulesError: it cannot be read or used.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RulesError([f"{path}: {error.strerror or error}."]) from None
    return _Reader(path, content).rules(settings, block_size, max_model_len)


class _Reader:
    def __init__(self, path: str, content: bytes):
        self._path = path
        self._content = content
        # Lines of what the file says, by its path in it ("rules[0].when").
        self._lines: dict[str, int] = {}

    def rules(self, server: Settings, block_size: int | None, max_model_len: int | None) -> Rules:
        file = self._file()
        problems: list[str] = []

        def settings(base: Settings, limits: _Limits, place: str) -> Settings | None:
            try:
                made = _narrowed(base, limits, lambda key: f"{place}.{key}")
                if block_size is not None and max_model_len is not None:
                    made.check(block_size, max_model_len, lambda key: f"{place}.{key}")
            except ConfigError as error:
                problems.append(self._at(error.key, str(error)))
                return None
            if found := made.exceeds(server, max_model_len):
                key = limits.where(found[0])
                what = (
                    f"{place}.{key} allows more than the server does: {found[1]}. Raise "
                    f"{FLAGS[found[0]]}, or lower this."
                )
                problems.append(self._at(f"{place}.{key}", what))
            return made

        default = settings(server, file.default, "default")
        rules: list[Rule] = []
        for number, rule in enumerate(file.rules):
            if default is None:
                break
            place = f"rules[{number}]"
            if rule.name in {other.name for other in rules}:
                text = f"{place}.name: there is another rule {rule.name!r}."
                problems.append(self._at(f"{place}.name", text))
            if made := settings(default, rule, place):
                rules.append(_rule(rule, made))
                vouched = rule.when.keys or set(rule.when.headers or ()) & {*file.trusted_headers}
                if not vouched and (found := made.exceeds(default, max_model_len)):
                    key = rule.where(found[0])
                    problems.append(self._at(f"{place}.{key}", _not_vouched(place, key, found[1])))
        if problems:
            raise RulesError(problems)
        assert default is not None
        return Rules(
            Rule(DEFAULT, default),
            tuple(rules),
            file.request_headers,
            tuple(file.trusted_headers),
            file.rule_in_usage,
            from_file=True,
            digest=hashlib.sha256(self._content).hexdigest(),
            warnings=tuple(_warnings(default, rules, max_model_len)),
        )

    def _file(self) -> _File:
        try:
            return _File.model_validate(self._yaml())
        except ValidationError as error:
            raise RulesError([self._sentence(found) for found in error.errors()]) from None

    def _yaml(self) -> Any:
        if len(self._content) > MOST_BYTES:
            raise RulesError([f"{self._path}: the file is larger than {MOST_BYTES} bytes."])
        try:
            text = self._content.decode()
        except UnicodeDecodeError:
            raise RulesError([f"{self._path}: the file is not UTF-8."]) from None
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if node is None:
                # A file that is being written may be empty for a moment.
                raise RulesError([f"{self._path}: the file is empty: `rules: []` has no rules."])
            self._walk(node, "", set())
            return loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark is not None else ""
            raise RulesError([f"{self._path}{line}: {error.problem or error.context}."]) from None
        except (yaml.YAMLError, RecursionError) as error:
            text = " ".join(str(error).split())
            raise RulesError([f"{self._path}: the file is not YAML: {text}."]) from None

    def _walk(self, node: yaml.Node, place: str, seen: set[int]) -> None:
        """Notes the lines of a node and of all in it. Raises RulesError for what YAML allows and
        nobody means: a key twice, a key without a value, aliases."""
        self._lines.setdefault(place, node.start_mark.line + 1)
        if id(node) in seen:
            raise RulesError([self._at(place, f"{place} is an alias (*): write it out.")])
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for number, child in enumerate(node.value):
                self._walk(child, f"{place}[{number}]", seen)
        elif isinstance(node, yaml.MappingNode):
            known: set[str] = set()
            for key, child in node.value:
                name = f"{place}.{key.value}".lstrip(".")
                self._lines[name] = key.start_mark.line + 1
                if str(key.value) in known:
                    raise RulesError([self._at(name, f"{name} is there twice.")])
                known.add(str(key.value))
                self._walk(child, name, seen)
        elif node.tag == "tag:yaml.org,2002:null":
            text = f"{place or 'the file'} has no value: give it one, or leave it out."
            raise RulesError([self._at(place, text)])

    def _at(self, place: str, sentence: str) -> str:
        """Returns a sentence about a place in the file, with the file and the nearest line."""
        near = place
        while near not in self._lines and near:
            near = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", near)
        line = f", line {self._lines[near]}" if near in self._lines else ""
        return f"{self._path}{line}: {sentence}"

    def _sentence(self, error: Any) -> str:
        steps = [step for step in error["loc"] if step != "[key]"]
        place = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).lstrip(".")
        text = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            known = ", ".join(_keys(steps[:-1]))
            text = f"is not known here: there are {known}"
        elif error["type"] == "missing":
            text = "is missing"
        elif error["type"] in ("model_type", "dict_type"):
            text = "is not a mapping of keys to values"
        elif error["type"] != "value_error":
            text = f"is wrong: {text[:1].lower()}{text[1:]}"
        return self._at(place, f"{place or 'the file'} {text}.")


def _keys(steps: list[Any]) -> list[str]:
    """Returns the keys of the mapping at a place of a file."""
    model: Any = {"default": _Limits, "rules": _Rule}.get(steps[0], _File) if steps else _File
    model = _When if "when" in steps else model
    return list(model.model_fields)


def _narrowed(base: Settings, limits: _Limits, named: Callable[[str], str]) -> Settings:
    """Returns settings with other limits. Raises ConfigError."""
    stated, raw = limits.stated(), base.to_dict()
    if "clients" in stated:
        raw["config"]["clients"] = stated.pop("clients")
    return Settings.from_dict({**raw, **stated}, named)


def _rule(rule: _Rule, settings: Settings) -> Rule:
    when = rule.when
    return Rule(
        rule.name,
        settings,
        frozenset(when.keys or ()),
        frozenset(when.models or ()),
        frozenset(when.loras or ()),
        {name: frozenset(values) for name, values in (when.headers or {}).items()},
    )


def _not_vouched(place: str, key: str, text: str) -> str:
    return (
        f"{place}.{key} allows more than the default does: {text}. Any client can name a model or "
        "an adapter, or send a header: give the rule keys, or a header of trusted_headers, which "
        "the proxy in front must set or strip."
    )


def _warnings(default: Settings, rules: list[Rule], longest: int | None) -> Iterator[str]:
    for number, rule in enumerate(rules):
        before = next((other for other in rules[:number] if _includes(other, rule)), None)
        if before is not None:
            yield f"No request meets the rule {rule.name}: {before.name} before it takes them all."
        more = rule.keys and default.exceeds(rule.settings, longest)
        if more and more[0] == "budget_max":
            yield (
                f"The rule {rule.name} allows less than the default: whoever leaves the key out "
                "gets more, where requests without a key are let in."
            )


def _includes(first: Rule, second: Rule) -> bool:
    """Returns whether whatever meets the second rule meets the first."""
    for name in ("keys", "models", "loras"):
        mine, theirs = getattr(first, name), getattr(second, name)
        if mine and not (theirs and theirs <= mine):
            return False
    return all(
        name in second.headers and second.headers[name] <= values
        for name, values in first.headers.items()
    )
