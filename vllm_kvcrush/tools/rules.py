"""`vllm-kvcrush rules`: checks a file of `--kv-budget-rules`, and hashes keys for it."""

from __future__ import annotations

import argparse
import getpass
import json
from collections.abc import Iterator
from typing import Any, TextIO

from vllm_kvcrush.config import ConfigError, Settings
from vllm_kvcrush.server.rules import Rule, Rules, load

# Characters below which a key is not random enough for its hash to be shown.
SHORT = 20


def check(args: argparse.Namespace) -> Rules:
    """Returns the rules of a file under the flags of a server. Raises RulesError, or ConfigError
    for the flags."""
    config = args.kv_policy_config
    if config is not None:
        try:
            config = json.loads(config)
        except ValueError as error:
            flag = "--kv-policy-config"
            raise ConfigError(f"{flag}={config!r} is not JSON: {error}.", flag) from None
    given: dict[str, Any] = {
        "budget": args.kv_budget,
        "budget_max": args.kv_budget_max,
        "allow": args.kv_policy_allow,
        "config": config,
    }
    raw = {key: value for key, value in given.items() if value is not None}
    settings = Settings.from_dict({"policy": args.kv_policy or "auto", **raw})
    if args.block_size is None or args.max_model_len is None:
        return load(args.file, settings)
    settings.check(args.block_size, args.max_model_len)
    return load(args.file, settings, args.block_size, args.max_model_len)


def table(rules: Rules) -> str:
    """Returns what each rule comes to, in the order in which they are tried, as Markdown."""
    lines = [
        "| rule | met by | policy | budget | at most | clients may ask for |",
        "|---|---|---|---|---|---|",
    ]
    for rule in rules:
        made = rule.settings
        most = "no limit" if made.budget_max is None else made.budget_max
        cells = (rule.name, _met_by(rule), made.policy, made.budget, most, ", ".join(made.allow))
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    taken = "taken" if rules.request_headers else "refused"
    return "\n".join([*lines, "", f"The headers x-kv-budget and x-kv-policy are {taken}."])


def _met_by(rule: Rule) -> str:
    def parts() -> Iterator[str]:
        if rule.keys:
            yield f"{len(rule.keys)} key{'s' if len(rule.keys) > 1 else ''}"
        for what, values in (
            ("model", rule.models),
            ("LoRA", rule.loras),
            *rule.headers.items(),
        ):
            if values:
                yield f"{what} {' or '.join(sorted(values))}"

    return ", and ".join(parts()) or "all others"


def read_key(source: TextIO) -> str:
    """Returns the API key that `source` has, without the end of its line; on a terminal it is not
    shown. Raises ValueError."""
    text = getpass.getpass("API key: ") if source.isatty() else source.read()
    key = text.removesuffix("\n").removesuffix("\r")
    if not key:
        raise ValueError(
            'there is no key on stdin: give it as in `printf %s "$KEY" | vllm-kvcrush rules hash`.'
        )
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ValueError(
            "this is no API key: one line of printable ASCII, without blanks at its ends, is what "
            "an Authorization header can carry."
        )
    return key
