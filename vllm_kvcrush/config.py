"""What an operator and a client may ask for: policy, budget and their limits.

Pure: no vLLM, no torch at import. The same `Settings` is built in the API server (to validate),
in the scheduler and in the workers (to act), from the dict that travels in
`VllmConfig.additional_config["kvcrush"]`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from vllm_kvcrush import __version__
from vllm_kvcrush.codecs import CODECS, PACKED
from vllm_kvcrush.plan import Packing, Plan, cdiv, min_blocks
from vllm_kvcrush.spans import MOST_SPANS, Spans, first_tokens
from vllm_kvcrush.spec import SpecError, Storage, parse, resolved, storage

if TYPE_CHECKING:
    from vllm_kvcrush.policies.base import Policy

NONE = "none"
DEFAULT_BUDGET = 0.25
# Shorter requests are left alone (benchmarks/results/floor.json).
DEFAULT_MIN_TOKENS = 256
# Most that a system prompt is protected of a request's budget.
DEFAULT_PROTECT_SYSTEM = 0.5

# Request parameters; every other kv_* key in a request is refused (typos must not pass).
BUDGET_KEY = "kv_budget"
POLICY_KEY = "kv_policy"
SPANS_KEY = "kv_spans"
PROTECT_KEY = "kv_protect"
KEYS = (POLICY_KEY, BUDGET_KEY, SPANS_KEY, PROTECT_KEY)
# What a front end adds to the parameters of a request that it resolved; no client may send them.
ELASTIC_KEY = "kv_elastic"
RULE_KEY = "kv_rule"
# Marks a canary (server/canary.py) for the scheduler: how many of its last tokens are scored. It is
# none of the above, so clients who send it are refused.
CANARY_KEY = "kv_canary"
# kv_* keys that belong to vLLM itself.
FOREIGN_KEYS = frozenset({"kv_transfer_params", "kv_cache_report_mode"})


# The flags of those settings that rules (`server.rules`) may narrow, by their keys.
FLAGS = {
    "policy": "--kv-policy",
    "budget": "--kv-budget",
    "budget_max": "--kv-budget-max",
    "allow": "--kv-policy-allow",
    "clients": "--kv-policy-config.clients",
    "protect_system": "--kv-protect-system",
}


class ConfigError(ValueError):
    """A bad flag or request parameter; `key` names it, the message is one sentence for a user."""

    def __init__(self, message: str, key: str):
        super().__init__(message)
        self.key = key


def parse_budget(value: Any, key: str) -> float | int:
    """Returns a budget: a fraction `0 < x <= 1` (given as a float or its string) or a whole number
    of tokens (given as an int > 1 or its string). `1` and `1.0` are the fraction 1.0. Raises
    ConfigError, with `key` as the name of the parameter."""
    allowed = "a fraction in (0, 1] such as 0.25, or a whole number of tokens such as 4096"
    bad = ConfigError(f"{key}={_quoted(value)} is not a KV budget: give {allowed}.", key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise bad
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            raise bad from None
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, float) and value > 1 and value.is_integer() and value < 2**31:
        value = int(value)  # JSON clients often write every number as a float
    if isinstance(value, int) and 1 <= value < 2**31:
        return 1.0 if value == 1 else value
    raise bad


def _whole(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{key}={_quoted(value)} is not allowed: give a whole number from {low} to {high}.", key
        )
    return value


def _number(value: Any) -> Any:
    """Returns the number that a string is, and anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def parse_pressure(value: Any) -> float | None:
    """A share of the pool in (0, 1], or its string; None: budgets are kept to all the time."""
    if value is None:
        return None
    share = _number(value)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(
            f"--kv-pressure={_quoted(value)} is not a share of the pool: give a number in (0, 1] "
            "such as 0.8.",
            "--kv-pressure",
        )
    return float(share)


def parse_live_page(value: Any) -> bool:
    """Returns whether the live page is served, given true or false. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"--kv-live-page={_quoted(value)} is neither true nor false.", "--kv-live-page"
        )
    return value


def parse_canary(value: Any) -> float:
    """Returns the share of compressed requests that are compared with exact KV, given a number in
    [0, 1] or its string; None means 0. Raises ConfigError."""
    share = 0.0 if value is None else _number(value)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(
            f"--kv-canary={_quoted(value)} is not a share of requests: give a number in [0, 1] "
            "such as 0.001.",
            "--kv-canary",
        )
    return float(share)


def parse_protect_system(value: Any, key: str) -> float:
    """Returns the share of a request's budget up to which its system prompt is protected, given a
    number in [0, 1], its string, or "on" or "off". None means the default. Raises ConfigError, with
    `key` as the name of the setting."""
    if isinstance(value, bool):  # what YAML makes of the words
        value = "on" if value else "off"
    words = {None: DEFAULT_PROTECT_SYSTEM, "on": DEFAULT_PROTECT_SYSTEM, "off": 0.0}
    share = words[value] if isinstance(value, str | None) and value in words else _number(value)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(
            f"{key}={_quoted(value)} is not a share of the budget: give on, off, or a number in "
            "[0, 1] such as 0.5.",
            key,
        )
    return float(share)


def parse_min_tokens(value: Any) -> int:
    """Returns the number of tokens below which requests are left alone, given the number or its
    string. Raises ConfigError."""
    return _whole("--kv-min-tokens", value, 0, 2**24)


_MOST_POLICIES = 256


@dataclass(frozen=True)
class RequestParams:
    """What one request runs with.

    Attributes:
        policy: the policy with its parameters, in the grammar of `spec`; "none" means plain vLLM.
        budget: as in `plan.Plan`; 1.0 means plain vLLM too.
        spans: (first, end) token positions that a policy may treat each on its own, ascending.
        protect: (first, end) token positions that stay whatever a policy says.
        system: whether those are the system prompt's, which the server protects of its own accord.
        elastic: whether the budget is kept to only when the pool runs short.
        rule: name of the rule of --kv-budget-rules that the request met, or None. In the engine it
            is known only if clients are to be told.
    """

    policy: str
    budget: float | int
    spans: Spans = ()
    protect: Spans = ()
    system: bool = False
    elastic: bool = False
    rule: str | None = None

    def to_args(self, tell_rule: bool = False) -> dict[str, Any]:
        """Returns them as part of `extra_args`, of which `Settings.resolved` makes the same."""
        args: dict[str, Any] = {POLICY_KEY: self.policy, ELASTIC_KEY: self.elastic}
        if self.policy != NONE:
            args[BUDGET_KEY] = self.budget
            for key, spans in ((SPANS_KEY, self.spans), (PROTECT_KEY, self.protect)):
                if spans:
                    args[key] = [list(pair) for pair in spans]
        if tell_rule and self.rule is not None:
            args[RULE_KEY] = self.rule
        return args

    @property
    def active(self) -> bool:
        """Returns whether the request may be compressed."""
        return self.policy != NONE and self.budget != 1.0

    @property
    def label(self) -> str:
        """Returns the outermost name of the policy, as a label for counters: there are few of
        these."""
        return parse(self.policy).name if self.active else NONE

    @property
    def reason(self) -> str:
        """Why it is compacted, if it is: "pressure" on the pool, or its "budget"."""
        return "pressure" if self.elastic else "budget"

    @property
    def protected(self) -> int:
        """Returns the number of tokens in `protect`."""
        return sum(end - first for first, end in self.protect)


PLAIN = RequestParams(NONE, 1.0)


@dataclass(frozen=True)
class Demands:
    """What a policy asks the engine for.

    Attributes:
        needs: see `Policy.needs`.
        always: whether every compaction asks the policy, even one that drops nothing.
        pages: whether heads own other pages than the block table says.
        positions: whether the true positions of tokens are kept.
        merges: whether the policy merges tokens, so that slots may have a log bias.
        tiled: see `Policy.tiled`.
    """

    needs: frozenset[str] = frozenset()
    always: bool = False
    pages: bool = False
    positions: bool = False
    merges: bool = False
    tiled: bool = False


def parse_spans(value: Any, key: str, max_model_len: int) -> Spans:
    """Returns the token ranges of a request, given a list of [first, end) pairs, a flat list of
    their numbers, or text such as "0:64,128:256". Raises ConfigError unless they are ascending and
    disjoint."""
    allowed = (
        f'up to {MOST_SPANS} ascending token ranges such as [[0, 64], [128, 256]] or "0:64,128:256"'
    )
    bad = ConfigError(f"{key}={_quoted(value)} is not a list of token ranges: give {allowed}.", key)
    given = value
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        raise ConfigError(
            f"{key} names text, which is known where a server gets a chat or the text of a "
            "completion: give token ranges such as [[0, 64]].",
            key,
        )
    if isinstance(value, str):
        given = [part.split(":") for part in value.split(",")] if value.strip() else []
    if not isinstance(given, list | tuple) or len(given) > 2 * MOST_SPANS:
        raise bad
    if given and not isinstance(given[0], list | tuple):
        given = list(zip(given[::2], given[1::2], strict=False)) if len(given) % 2 == 0 else None
    found: list[tuple[int, int]] = []
    last = 0
    for pair in given if given is not None else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise bad
        numbers = []
        for number in pair:
            if isinstance(number, str) and number.strip().isdecimal() and len(number) < 12:
                number = int(number)
            if isinstance(number, bool) or not isinstance(number, int):
                raise bad
            numbers.append(number)
        first, end = numbers
        if not last <= first < end <= max_model_len:
            raise bad
        found.append((first, end))
        last = end
    if len(found) > MOST_SPANS:
        raise bad
    return tuple(found)


@dataclass(frozen=True)
class Settings:
    """Server-wide settings.

    Args:
        policy: default policy of requests that name none, in the grammar of `spec`.
        budget: their default budget.
        budget_max: largest budget that a client may ask for, None for no cap.
        allow: policies that clients may ask for, names and whole expressions; the default policy is
            always allowed. Clients may wrap allowed names in each other.
        min_tokens: requests shorter than this are left alone if their budget is a fraction.
        pressure: share of the pool beyond which requests that state no budget of their own are
            compacted; None: they keep to the default budget all the time.
        rules: path of the file whose rules narrow these settings by API key, model, adapter or
            header (`server.rules`), or None.
        live_page: whether API servers serve the live page, `/kvcrush`.
        canary: share of compressed requests whose last tokens are scored again with exact KV.
        protect_system: share of a request's budget up to which its system prompt is protected.
        options: per-policy hyperparameters, `{"kvcrush": {"anchor": "mean"}, ...}`.
        clients: hyperparameters that clients may set, and to what: `{"kvcrush": {"ratio": [0, 0.5],
            "anchor": ["mean", "random"]}}`, two numbers for a range, words for a choice.
        sinks, window, prefill_interval, decode_interval: see `plan.Plan`.
        tables: file of the model's transform tables, None for the default place.
        page: what the model's pages are made of, (K head size, V head size, bytes of a channel);
            None until it is known. Policies whose pages are not raw need it for their plans.
        fitted: `plan.Packing.pages` of the codecs for which the model has tables; what the plugin
            found in `tables`. Without `tables`, workers take statistics when they start.
        losses: the codecs that policies with `Storage.least_loss` choose from, each with its
            `plan.Packing.loss`, or with None where workers measure it when they start. Empty where
            nobody does: then the codecs that such a policy names are used in their order.
    """

    policy: str
    budget: float | int = DEFAULT_BUDGET
    budget_max: float | int | None = None
    allow: tuple[str, ...] = ()
    min_tokens: int = DEFAULT_MIN_TOKENS
    pressure: float | None = None
    rules: str | None = None
    live_page: bool = False
    canary: float = 0.0
    protect_system: float = DEFAULT_PROTECT_SYSTEM
    sinks: int = 4
    window: int = 16
    prefill_interval: int = 2048
    decode_interval: int = 128
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: str | None = None
    page: tuple[int, int, int] | None = None
    fitted: Mapping[str, tuple[tuple[tuple[int, int], ...], ...]] = field(default_factory=dict)
    losses: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], named: Callable[[str], str] = FLAGS.__getitem__
    ) -> Settings:
        """Builds and validates settings from `additional_config["kvcrush"]`: keys `policy`,
        `budget`, `budget_max`, `allow`, `min_tokens`, `pressure`, `rules`, `live_page`, `canary`,
        `protect_system`, `config`, and `page`, `fitted` and `losses`, which the plugin fills in.
        Raises ConfigError, in which `named` says what `policy`, `budget`, `budget_max`, `allow`,
        `clients` and `protect_system` are called."""
        from vllm_kvcrush import policies

        keys = (
            *("policy", "budget", "budget_max", "allow", "min_tokens", "pressure"),
            *("rules", "live_page", "canary", "protect_system", "config"),
        )
        known = {*keys, "page", "fitted", "losses"}
        for key in raw:
            if key not in known:
                raise ConfigError(
                    f"additional_config['kvcrush'] has no key {key!r}: it takes {', '.join(keys)}.",
                    key,
                )
        try:
            names = (*policies.names(), NONE)
        except ValueError as error:  # packages whose policies have one name
            raise ConfigError(f"--kv-policy cannot be used: {error}.", "--kv-policy") from error
        policy = _policy(raw.get("policy", NONE), named("policy"), names)
        budget = parse_budget(raw.get("budget", DEFAULT_BUDGET), named("budget"))
        cap = raw.get("budget_max")
        if cap is not None:
            cap = parse_budget(cap, named("budget_max"))
        usual = tuple(name for name in names if name not in policies.OPT_IN)
        allow = _policy_names(raw.get("allow"), named("allow"), names, usual)
        if policy not in allow:
            allow = (policy, *allow)

        config = raw.get("config") or {}
        if not isinstance(config, Mapping):
            raise ConfigError(
                f"--kv-policy-config={config!r} is not a JSON object: give for example "
                '{"window": 16, "kvcrush": {"anchor": "mean"}}.',
                "--kv-policy-config",
            )
        common = ("sinks", "window", "prefill_interval", "decode_interval", "tables", "clients")
        options: dict[str, Mapping[str, Any]] = {}
        for key, value in config.items():
            if key in common:
                continue
            if key not in names or key == NONE:
                raise ConfigError(
                    f"--kv-policy-config has no key {key!r}: it takes "
                    f"{', '.join((*common, *policies.names()))}.",
                    "--kv-policy-config",
                )
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"--kv-policy-config.{key}={value!r} is not a JSON object of {key}'s options.",
                    f"--kv-policy-config.{key}",
                )
            options[key] = dict(value)
        rules = raw.get("rules")
        if rules is not None and (not isinstance(rules, str) or not rules):
            raise ConfigError(
                f"--kv-budget-rules={rules!r} is not a path: give a file such as rules.yaml.",
                "--kv-budget-rules",
            )
        tables = config.get("tables")
        if tables is not None and not isinstance(tables, str):
            raise ConfigError(
                f"--kv-policy-config.tables={tables!r} is not a path: give the file that "
                "`vllm-kvcrush calibrate` wrote.",
                "--kv-policy-config.tables",
            )
        for name in dict.fromkeys((*options, policy)):
            try:
                if name != NONE:
                    policies.get(name, options)
            except ValueError as error:
                key = named("policy") if name == policy else f"--kv-policy-config.{name}"
                key = f"--kv-policy-config.{name}" if name in options else key
                raise ConfigError(str(error), key) from error

        def whole(name: str, default: int, low: int, high: int) -> int:
            value = config.get(name, default)
            return _whole(f"--kv-policy-config.{name}", value, low, high)

        return cls(
            policy=policy,
            budget=budget,
            budget_max=cap,
            allow=allow,
            min_tokens=parse_min_tokens(raw.get("min_tokens", DEFAULT_MIN_TOKENS)),
            pressure=parse_pressure(raw.get("pressure")),
            rules=rules,
            live_page=parse_live_page(raw.get("live_page", False)),
            canary=parse_canary(raw.get("canary")),
            protect_system=parse_protect_system(raw.get("protect_system"), named("protect_system")),
            sinks=whole("sinks", 4, 0, 4096),
            window=whole("window", 16, 1, 1024),
            prefill_interval=whole("prefill_interval", 2048, 16, 2**24),
            decode_interval=whole("decode_interval", 128, 1, 2**24),
            options=options,
            clients=_client_options(config.get("clients"), named("clients"), names),
            tables=tables,
            page=None if raw.get("page") is None else tuple(raw["page"]),
            fitted={
                codec: tuple(tuple((room, heads) for room, heads in rank) for rank in ranks)
                for codec, ranks in (raw.get("fitted") or {}).items()
            },
            losses=dict(raw.get("losses") or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON-serialisable values, of which `from_dict` makes the same
        settings."""
        config: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in ("sinks", "window", "prefill_interval", "decode_interval", "tables")
        }
        config.update({name: dict(value) for name, value in self.options.items()})
        config["clients"] = {name: dict(value) for name, value in self.clients.items()}
        return {
            "policy": self.policy,
            "budget": self.budget,
            "budget_max": self.budget_max,
            "allow": list(self.allow),
            "min_tokens": self.min_tokens,
            "pressure": self.pressure,
            "rules": self.rules,
            "live_page": self.live_page,
            "canary": self.canary,
            "protect_system": self.protect_system,
            "config": config,
            "page": None if self.page is None else list(self.page),
            "fitted": {
                codec: [[list(pair) for pair in rank] for rank in ranks]
                for codec, ranks in self.fitted.items()
            },
            "losses": dict(self.losses),
        }

    def compiled(self) -> dict[str, Any]:
        """Returns what compiled code depends on: vLLM caches it under a key that this is part
        of."""
        return {"version": __version__, "attention": "pages" if self.owns_pages else "raw"}

    @property
    def owns_pages(self) -> bool:
        """Returns whether the regions of some allowed policy have other pages than block tables
        say."""
        kinds = [self.storage(name) for name in self.allow if name != NONE]
        return any(kind.codecs or kind.pages for kind in kinds)

    def smallest_budget(self, block_size: int, protected: int = 0) -> int:
        """Returns the smallest absolute budget, in tokens, of a request that protects `protected`
        tokens."""
        return min_blocks(block_size, self.window, self.sinks + protected) * block_size

    def check(
        self,
        block_size: int,
        max_model_len: int,
        named: Callable[[str], str] = FLAGS.__getitem__,
    ) -> None:
        """Makes the start-up checks that need the engine's sizes. Raises ConfigError, with names as
        in `from_dict`."""
        smallest = self.smallest_budget(block_size)
        for name, budget in (("budget", self.budget), ("budget_max", self.budget_max)):
            if isinstance(budget, int) and budget < smallest:
                key = named(name)
                raise ConfigError(self._too_small(key, budget, block_size), key)
        if problem := self._unpackable(self.policy, block_size):
            raise ConfigError(f"{named('policy')}={problem}", named("policy"))
        own = RequestParams(self.policy, self.budget)
        if not self._within_cap(own, max_model_len):
            raise ConfigError(
                f"{named('budget')}={self.budget} with {named('policy')}={self.policy} is above "
                f"{named('budget_max')}={self.budget_max}: lower the one or raise the other.",
                named("budget"),
            )

    def serves_plain(self, max_model_len: int) -> bool:
        """Returns whether clients may opt out with the policy "none", which keeps everything."""
        return NONE in self.allow and self._within_cap(PLAIN, max_model_len)

    def exceeds(self, other: Settings, max_model_len: int | None) -> tuple[str, str] | None:
        """Returns what clients may ask for here and not under `other`: the key of the setting
        (`budget_max`, `allow` or `clients`) and the end of a sentence, or None if nothing. Without
        `max_model_len` a fraction is not compared with a number of tokens."""
        most, least = self.budget_max, other.budget_max
        if least is not None and (most is None or max_model_len or type(most) is type(least)):
            asked = RequestParams("", 1.0 if most is None else most)
            if not other._within_cap(asked, max_model_len or 0):
                return "budget_max", f"{'no limit' if most is None else most} is above {least}"
        for policy in self.allow:
            try:
                other._served(policy)
            except ConfigError:
                return "allow", f"{policy} is none of {', '.join(other.allow)}"
        for name, options in self.clients.items():
            for option, allowed in options.items():
                given = (other.clients.get(name) or {}).get(option)
                if given is None or not _covers(given, allowed):
                    what = "not for clients to set" if given is None else _described(given)
                    return "clients", f"{name}.{option} is {what}"
        return None

    def validate_request(
        self,
        extra_args: Mapping[str, Any] | None,
        block_size: int,
        max_model_len: int,
    ) -> RequestParams:
        """Validates a client's `extra_args`, before the engine sees the request, and returns what
        the request runs with. Raises ConfigError, whose `key` is the offending parameter."""
        args = extra_args or {}
        for key in args:
            if not isinstance(key, str):
                raise ConfigError(f"extra_args has the key {_quoted(key)}, which is no name.", "")
            if key.startswith("kv_") and key not in FOREIGN_KEYS.union(KEYS):
                raise ConfigError(
                    f"{_shortened(key)} is not a parameter: {', '.join(KEYS[:-1])} and "
                    f"{KEYS[-1]} are.",
                    key,
                )
        policy = self._served(args.get(POLICY_KEY, self.policy))
        if problem := self._unpackable(policy, block_size):
            raise ConfigError(f"kv_policy={problem}", POLICY_KEY)
        budget = args.get(BUDGET_KEY)
        params = RequestParams(
            policy,
            self.budget if budget is None else parse_budget(budget, BUDGET_KEY),
            parse_spans(args.get(SPANS_KEY, ()), SPANS_KEY, max_model_len),
            parse_spans(args.get(PROTECT_KEY, ()), PROTECT_KEY, max_model_len),
            elastic=budget is None and self.pressure is not None,
        )
        asked = {
            BUDGET_KEY: BUDGET_KEY in args and params.budget != 1.0,
            SPANS_KEY: params.spans,
            PROTECT_KEY: params.protect,
        }
        for key in asked:
            if policy == NONE and asked[key]:
                raise ConfigError(
                    f"{key}={_quoted(args[key])} has no effect with kv_policy='none': name a "
                    f"kv_policy, one of {', '.join(a for a in self.allow if a != NONE)}.",
                    key,
                )
        if params.spans and not self._built(policy).uses_spans:
            raise ConfigError(
                f"{SPANS_KEY} has no effect with kv_policy={_quoted(policy)}: name a policy that "
                f"treats spans each on its own, such as fair({policy.partition('@')[0]}).",
                SPANS_KEY,
            )
        self._check_budget(params, block_size, max_model_len)
        return params

    def resolved(
        self, extra_args: Mapping[str, Any] | None, block_size: int, max_model_len: int
    ) -> RequestParams:
        """Returns what a request runs with that a front end has resolved (`RequestParams.to_args`).
        It is validated again, against these settings alone: limits of the whole server, of which
        rules allow a part. A request that came past every front end is validated as a client's.
        Raises ConfigError."""
        args = dict(extra_args or {})
        elastic, rule = args.pop(ELASTIC_KEY, None), args.pop(RULE_KEY, None)
        params = self.validate_request(args, block_size, max_model_len)
        if elastic is None:
            return params
        return replace(params, elastic=bool(elastic) and self.pressure is not None, rule=rule)

    def with_system(
        self,
        params: RequestParams,
        system: Spans,
        prompt: int,
        length: int,
        block_size: int,
        max_model_len: int,
    ) -> RequestParams:
        """Returns the parameters of a request with its system prompt protected: as many of its
        first tokens as are `protect_system` of the budget and leave the blocks as they are. A
        request that never drops a token has nothing to protect.

        Args:
            system: (first, end) token positions of the system prompt.
            prompt: tokens of the prompt.
            length: the most tokens that the request comes to.
        """
        plan = self.plan(params, prompt, block_size)
        if not self.protect_system or plan.first_scoring(length) is None:
            return params
        n = plan.first_compaction(length)
        assert n is not None
        blocks = plan.blocks(n) - cdiv(self.window + block_size - 1, block_size)
        most = min(int(self.protect_system * plan.tokens(n)), blocks * block_size - self.sinks)
        protected = replace(params, protect=first_tokens(system, most), system=True)
        try:
            self._check_budget(protected, block_size, max_model_len)
        except ConfigError:
            return params
        return protected if protected.protect else params

    def _check_budget(self, params: RequestParams, block_size: int, max_model_len: int) -> None:
        smallest = self.smallest_budget(block_size, params.protected)
        if isinstance(params.budget, int) and params.budget < smallest:
            text = self._too_small(BUDGET_KEY, params.budget, block_size, params.protected)
            raise ConfigError(text, BUDGET_KEY)
        if not self._within_cap(params, max_model_len):
            what = f"kv_budget={params.budget}" if params.policy != NONE else "kv_policy='none'"
            raise ConfigError(
                f"{what} is above this server's limit of {self.budget_max}: "
                "ask for a smaller kv_budget.",
                BUDGET_KEY if params.policy != NONE else POLICY_KEY,
            )
        if params.protect and not self._within_cap(replace(params, budget=smallest), max_model_len):
            raise ConfigError(
                f"{PROTECT_KEY} keeps {params.protected} tokens, which is above this server's "
                f"limit of {self.budget_max}: protect fewer.",
                PROTECT_KEY,
            )

    def _served(self, value: Any) -> str:
        """Returns the policy that a client asked for, in canonical form. Raises ConfigError unless
        clients may ask for it."""
        if value == NONE and NONE in self.allow:
            return NONE

        def refuse(why: str) -> ConfigError:
            return ConfigError(f"kv_policy={_quoted(value)} is not served here: {why}.", POLICY_KEY)

        choices = f"choose one of {', '.join(self.allow)}"
        try:
            spec = parse(value)
        except SpecError as error:
            raise refuse(f"it {error}; {choices}") from None
        text = str(spec)
        if text in self.allow:
            return text
        for own in spec.chain:
            if own.name not in self.allow or own.name == NONE:
                raise refuse(choices)
            for option, given in own.options:
                allowed = (self.clients.get(own.name) or {}).get(option)
                if allowed is None:
                    named = _shortened(f"{own.name}.{option}")
                    raise refuse(f"{named} is not for clients to set")
                if not _is_among(given, allowed):
                    said = _shortened(f"{own.name}.{option}={given!r}")
                    raise refuse(f"{said} is not {_described(allowed)}")
        stored = {c for name in self.allow if name != NONE for c in self.storage(name).codecs}
        for codec in spec.codecs or ():
            if codec not in stored:
                raise refuse(f"no policy that is stores tokens in {codec}")
        try:
            self._built(text)
        except ValueError as error:
            problem = getattr(error, "problem", None)
            path = getattr(error, "path", "")
            raise refuse(f"{path}{problem}" if problem else str(error)) from None
        return text

    def _built(self, name: str) -> Policy:
        """Returns what `build` does, from a cache of the policies that were built before."""
        if name not in self._policies:
            if len(self._policies) >= _MOST_POLICIES:  # clients may vary parameters
                del self._policies[next(iter(self._policies))]
            self._policies[name] = self.build(name)
        return self._policies[name]

    @functools.cached_property
    def _policies(self) -> dict[str, Policy]:
        return {}

    def build(self, name: str) -> Policy:
        """Returns the policy `name` with this server's hyperparameters. Raises ValueError."""
        from vllm_kvcrush import policies

        return policies.get(name, self.options)

    def demands(self, name: str) -> Demands:
        """Returns what a policy asks the engine for. Raises what `build` raises."""
        policy = self._built(name)
        merges, allocates = policy.merges, policy.allocates
        return Demands(
            needs=policy.needs,
            always="state" in policy.needs or allocates,
            pages=merges or allocates,
            positions="positions" in policy.needs or merges or allocates,
            merges=merges,
            tiled=policy.tiled,
        )

    def plan(self, params: RequestParams, num_prompt_tokens: int, block_size: int) -> Plan:
        """Returns the plan of a request with these parameters."""
        return Plan(
            budget=params.budget if params.active else 1.0,
            num_prompt_tokens=num_prompt_tokens,
            block_size=block_size,
            window=self.window,
            sinks=self.sinks,
            prefill_interval=self.prefill_interval,
            decode_interval=self.decode_interval,
            min_tokens=self.min_tokens,
            packings=self.packings(params.policy, block_size) if params.active else (),
            tiers=params.active and self.storage(params.policy).tiers,
            least_loss=params.active and self.storage(params.policy).least_loss,
            protected=params.protected,
        )

    def most_blocks(self, length: int, block_size: int) -> int:
        """Returns the most blocks that a request under the default policy and budget holds at any
        time, if prompt and output together are up to `length` tokens."""
        params = RequestParams(self.policy, self.budget)
        # A request holds most when it is all prompt, when it is nearly all output, or when its
        # prompt is the longest that is too short to be compacted.
        prompts = {length, 1, min(length, max(1, self.min_tokens - 1))}
        return max(self.plan(params, p, block_size).bound(length) for p in prompts)

    @functools.cached_property
    def _packings(self) -> dict[tuple[Storage, int], tuple[Packing, ...]]:
        return {}

    @functools.cached_property
    def _problems(self) -> dict[tuple[Storage, int], bool]:
        return {}

    def storage(self, policy: str) -> Storage:
        """Returns how the compressed regions of a policy may be stored. Raises ValueError, as
        `spec.storage` does."""
        return storage(resolved(parse(policy), self.options))

    def packings(self, policy: str, block_size: int) -> tuple[Packing, ...]:
        """Returns how the compressed regions of `policy` may be packed, as `plan.Plan` takes it;
        empty for raw tokens. Every request asks for it, so it is cached."""
        key = self.storage(policy), block_size
        if key not in self._packings:
            self._packings[key] = self._pack(policy, key[0], block_size)
        return self._packings[key]

    def codecs_of(self, stored: Storage) -> tuple[str, ...]:
        """Returns the codecs that regions may have pages of, those that lose least first where
        nothing was measured."""
        codecs = tuple(self.losses) if stored.least_loss and self.losses else stored.codecs
        if len(codecs) > 1:
            # Without tables, stand-ins take the place of the codecs that need them.
            if self.fitted:
                codecs = tuple(c for c in codecs if self._known(c))
            codecs = tuple(
                dict.fromkeys(c if self._known(c) else CODECS[c].stand_in or c for c in codecs)
            )
        return codecs

    def _pack(self, policy: str, stored: Storage, block_size: int) -> tuple[Packing, ...]:
        codecs = self.codecs_of(stored)
        if not codecs:
            return ()
        if self.page is None:
            raise ValueError(f"the plan of {policy} needs the model's head sizes and dtype")
        k_size, v_size, itemsize = self.page
        page_bytes = block_size * (k_size + v_size) * itemsize
        # Pairs of layer and KV head of each rank: pages of two codecs may share blocks.
        pairs = [sum(n for _, n in rank) for rank in next(iter(self.fitted.values()), (((0, 1),),))]
        found = []
        for codec in codecs:
            if CODECS[codec].needs_tables:
                found.append(Packing(codec, self.fitted[codec]))
            else:
                room = CODECS[codec].capacity(page_bytes, k_size, v_size, itemsize)
                found.append(Packing(codec, tuple(((room, n),) for n in pairs)))
        # What packs no closer than raw pages is of no use.
        close = [p for p in found if _packs(p, block_size)] or found[-1:]
        if stored.least_loss and self.losses:
            close = [replace(p, loss=self.losses.get(p.codec)) for p in close]
            close.sort(key=lambda packing: packing.tokens(_MANY_BLOCKS))
        return tuple(close)

    def with_tables(
        self,
        model: Mapping[str, Any],
        page: tuple[int, int, int],
        block_size: int,
        ranks: int = 1,
        statistics: bool = True,
    ) -> tuple[Settings, str | None]:
        """Adds `page`, and `fitted` and `losses` from the model's transform tables: from the file
        `tables`, or the one in the default place, or, for a policy that needs tables where there is
        no file, the sizes of the tables that workers will make when they start.

        Args:
            model: content of the model's config.json, as `transform.tables.model_config` reads it.
            page: see Settings.
            ranks: number of tensor-parallel ranks, over which the KV heads are divided.
            statistics: whether workers can take statistics.

        Returns:
            The settings, and a warning if there are tables in the default place that cannot be
            used.

        Raises:
            ConfigError: tables that the operator named, or that the policy needs, cannot be used.
        """
        from vllm_kvcrush.codecs.transform import tables as transform_tables
        from vllm_kvcrush.codecs.transform.points import TablesError

        settings = replace(self, page=page)
        page_bytes = block_size * (page[0] + page[1]) * page[2]
        try:
            path = settings.tables
            if path is None:
                place = transform_tables.default_path(model)
                path = str(place) if place is not None and place.exists() else None
            if path is not None:
                fitted = transform_tables.packings(path, model, page_bytes, page[1], ranks)
                known = transform_tables.load_losses(path)
                losses = known.total if known else settings._to_measure(statistics)
                return replace(settings, tables=path, fitted=fitted, losses=losses), None
            if not (statistics and self.needs_tables):
                return settings, None
            fitted = transform_tables.even_packings(model, page_bytes, page[1], ranks)
            losses = settings._to_measure(statistics)
            return replace(settings, fitted=fitted, losses=losses), None
        except TablesError as error:
            if self.tables is not None:
                key = "--kv-policy-config.tables"
                raise ConfigError(f"{key}: {error}", key) from None
            # A policy with several codecs can do without those that need tables.
            alone = self.needs_tables and len(self.storage(self.policy).codecs) == 1
            if alone or (path is not None and self.needs_tables):
                raise ConfigError(f"--kv-policy={self.policy}: {error}", "--kv-policy") from None
            return settings, None if path is None else f"Transform tables are not used: {error}"

    def with_heads(self, model: Mapping[str, Any]) -> Settings:
        """Names the model's head scores in the default place as the `pattern` of the policies that
        take one and have none, if there are any.

        Args:
            model: as in `with_tables`.
        """
        from vllm_kvcrush.codecs.transform.points import TablesError
        from vllm_kvcrush.policies import heads

        try:
            place = heads.default_path(model)
        except TablesError:  # the default place is for models with plain attention
            return self
        if place is None or not place.exists():
            return self
        own = {
            name: {"pattern": str(place), **self.options.get(name, {})} for name in heads.POLICIES
        }
        return replace(self, options={**self.options, **own})

    @property
    def needs_tables(self) -> bool:
        """Returns whether the default policy has codecs that are fitted to a model."""
        if self.policy == NONE:
            return False
        return any(CODECS[c].needs_tables for c in self.storage(self.policy).codecs)

    def _to_measure(self, statistics: bool) -> dict[str, float | None]:
        """Returns `losses` where there is no file that has them. Workers measure for the default
        policy only, as it takes time."""
        if not statistics or self.policy == NONE or not self.storage(self.policy).least_loss:
            return {}
        return dict.fromkeys(PACKED)

    def _known(self, codec: str) -> bool:
        return not CODECS[codec].needs_tables or codec in self.fitted

    def _unpackable(self, policy: str, block_size: int) -> str | None:
        """Returns what is wrong with the pages of `policy` in blocks of this size, as a sentence,
        or None."""
        if policy == NONE or self.page is None:
            return None
        stored = self.storage(policy)
        missing = [c for c in stored.codecs if not self._known(c)]
        if missing and len(stored.codecs) == 1:
            return (
                f"{policy} needs transform tables of the model, which are not there: make them "
                "with `vllm-kvcrush calibrate MODEL`, start the server with --kv-policy=auto, or "
                "use int8 or int4."
            )
        key = stored, block_size
        if key not in self._problems:
            packings = self.packings(policy, block_size)
            self._problems[key] = not all(_packs(packing, block_size) for packing in packings)
        if not self._problems[key]:
            return None
        return (
            f"{policy} does not pack more than {block_size} tokens into a block of "
            f"{block_size}: use a larger --block-size, or another policy."
        )

    def _too_small(self, key: str, budget: int, block_size: int, protected: int = 0) -> str:
        kept = f"{self.sinks} sinks"
        if protected:
            kept += f", {protected} protected tokens"
        return (
            f"{key}={budget} tokens is too small: with blocks of {block_size} tokens, "
            f"{kept} and a window of {self.window} the smallest budget is "
            f"{self.smallest_budget(block_size, protected)}."
        )

    def _within_cap(self, params: RequestParams, max_model_len: int) -> bool:
        # Fractions and token counts are compared at the longest request that the server takes.
        if self.budget_max is None:
            return True

        def in_tokens(budget: float | int) -> float:
            return budget * max_model_len if isinstance(budget, float) else budget

        asked = params.budget if params.policy != NONE else 1.0
        if type(asked) is type(self.budget_max):
            return asked <= self.budget_max
        return in_tokens(asked) <= in_tokens(self.budget_max)


class AdditionalConfig(Mapping[str, Any]):
    """vLLM's `additional_config` of a server with this plugin.

    vLLM makes the content of a dict part of the key under which it caches compiled models, and
    would compile anew for every other budget. It asks anything but a dict for its hash instead; the
    hash of this class covers only those of our settings that change compiled code.
    """

    def __init__(self, others: Mapping[str, Any], settings: Settings) -> None:
        self._content = {**others, "kvcrush": settings.to_dict()}
        self._key = {**others, "kvcrush": settings.compiled()}

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return repr(self._content)

    def compute_hash(self) -> str:
        """Returns the hash that vLLM asks for."""
        text = json.dumps(self._key, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


_MANY_BLOCKS = 1024


def _packs(packing: Packing, block_size: int) -> bool:
    """Returns whether a codec holds more tokens in many blocks than raw pages do."""
    return packing.tokens(_MANY_BLOCKS) > _MANY_BLOCKS * block_size


def _policy_names(
    value: Any, key: str, names: tuple[str, ...], usual: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the policies that `value` names in canonical form: a list, a string with commas, or a
    list of such strings. None means `usual`. Raises ConfigError."""
    if value is None:
        return usual
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError(
            f"{key}={value!r} is not a list of policies: choose some of {', '.join(names)}.", key
        )
    found: list[Any] = []
    for part in given:
        found += _outer_parts(part) if isinstance(part, str) else [part]
    return tuple(dict.fromkeys(_policy(name, key, names) for name in found))


def _outer_parts(text: str) -> list[str]:
    """Returns the parts of a text between the commas that are in no brackets or quotes."""
    parts, depth, quoted = [""], 0, False
    for at, letter in enumerate(text):
        if letter == '"' and text[max(0, at - 1)] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _policy(value: Any, key: str, names: tuple[str, ...]) -> str:
    """Returns a policy that an operator named, in canonical form. Raises ConfigError."""
    if value == NONE:
        return NONE
    try:
        spec = parse(value)
    except SpecError as error:
        raise ConfigError(
            f"{key}={value!r} {error}: choose one of {', '.join(names)}.", key
        ) from None
    for own in spec.chain:
        if own.name not in names or own.name == NONE:
            raise ConfigError(
                f"{key}={own.name!r} is not a policy: choose one of {', '.join(names)}.", key
            )
    return str(spec)


def _client_options(value: Any, key: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    from vllm_kvcrush import policies

    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise ConfigError(
            f'{key}={value!r} is not an object: give for example {{"kvcrush": {{"ratio": [0, '
            "0.5]}}.",
            key,
        )
    for name, options in value.items():
        if name not in names or name == NONE:
            raise ConfigError(
                f"{key} has no policy {name!r}: choose one of {', '.join(names)}.", key
            )
        known = policies.options_of(name)
        for option, allowed in options.items():
            if option not in known or option == "base":
                settable = ", ".join(o for o in known if o != "base") or "none"
                raise ConfigError(
                    f"{key}.{name}.{option} is not an option for clients: {name} has {settable}.",
                    key,
                )
            if not isinstance(allowed, list | tuple) or not allowed:
                raise ConfigError(
                    f"{key}.{name}.{option}={allowed!r} is neither a range [least, most] nor a "
                    "list of choices.",
                    key,
                )
    return {name: {o: list(a) for o, a in options.items()} for name, options in value.items()}


def _is_range(allowed: Any) -> bool:
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in allowed]
    return len(allowed) == 2 and all(numbers)


def _is_among(value: Any, allowed: Any) -> bool:
    if _is_range(allowed):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and bool(allowed[0] <= value <= allowed[1])
    return any(type(value) is type(choice) and value == choice for choice in allowed)


def _covers(allowed: Any, others: Any) -> bool:
    """Returns whether clients that may set an option to `others` may set it to nothing else than
    those that may set it to `allowed`."""
    if _is_range(others) and not _is_range(allowed):
        return False
    return all(_is_among(value, allowed) for value in others)


def _described(allowed: Any) -> str:
    if _is_range(allowed):
        return f"from {allowed[0]} to {allowed[1]}"
    return f"one of {', '.join(map(str, allowed))}"


def _quoted(value: Any) -> str:
    """Returns a value as it is shown to whoever gave it, in bounded length."""
    try:
        return _shortened(repr(value))
    except ValueError:  # numbers of thousands of digits
        return f"a {type(value).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
