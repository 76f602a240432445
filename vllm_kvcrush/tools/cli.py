"""The command `vllm-kvcrush`. Modules are imported only when a subcommand that needs them runs, so
that it starts fast: neither `plan` nor `model` imports vLLM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vllm_kvcrush import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-kvcrush", description="Tools around KV-cache compression for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="what is installed and whether it can run, for a bug report"
    )
    doctor.add_argument(
        "--hooks",
        nargs="?",
        const="",
        metavar="SOURCE",
        help="instead, what this package relies on in vLLM, and whether it is there: in the one "
        "that is installed, or in a source tree or wheel of another release",
    )
    doctor.add_argument(
        "--record", metavar="FILE", help="with --hooks: keep what was found, to be checked again"
    )
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser(
        "plan", help="how much KV a request takes, raw and compressed, and how many fit"
    )
    plan.add_argument("model", metavar="MODEL", help="model directory, its config.json, or name")
    plan.add_argument(
        "--context",
        default="4096,16384,32768",
        help="tokens of prompt and output together, comma-separated (default %(default)s)",
    )
    plan.add_argument(
        "--output-tokens",
        type=int,
        default=256,
        help="how many of them are generated (default %(default)s)",
    )
    plan.add_argument("--kv-policy", default=None, help="default kvcrush; none for plain vLLM")
    plan.add_argument("--kv-budget", default=None, help="0.25 (a fraction) or 4096 (tokens)")
    plan.add_argument("--kv-min-tokens", default=None, help="as vllm serve takes it")
    plan.add_argument("--kv-policy-config", default=None, help="JSON, as vllm serve takes it")
    plan.add_argument(
        "--block-size",
        type=int,
        default=None,
        help="tokens in a block (default: 128, vLLM's on a CPU)",
    )
    plan.add_argument(
        "--dtype", default="auto", help="the KV cache's type (default: the model's, in 16 bits)"
    )
    plan.add_argument("--pool-bytes", default=None, help="size of vLLM's KV cache, such as 8GiB")
    plan.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    plan.set_defaults(run=_plan)

    calibrate = commands.add_parser(
        "calibrate", help="makes the transform tables of a model, which tc4, tc6, tc8 and auto use"
    )
    calibrate.add_argument("model", metavar="MODEL", help="model directory, or name")
    calibrate.add_argument(
        "--text",
        default=None,
        help="UTF-8 text to calibrate on, like what will be served; else the model's own samples",
    )
    calibrate.add_argument(
        "--out", default=None, help="file to write (default: where vllm serve looks)"
    )
    instead = calibrate.add_mutually_exclusive_group()
    instead.add_argument(
        "--heads",
        action="store_true",
        help="instead, scores of the model's heads, by which duo and surfacelogic divide memory",
    )
    instead.add_argument(
        "--queries",
        action="store_true",
        help="instead, statistics of the model's queries, which expected_attention can take",
    )
    calibrate.set_defaults(run=_calibrate)

    policies = commands.add_parser(
        "policies", help="what each policy does, needs and costs, and its parameters, as Markdown"
    )
    policies.add_argument("names", nargs="*", metavar="POLICY", help="which ones (default: all)")
    policies.set_defaults(run=_policies)
    rules = commands.add_parser("rules", help="files of vllm serve --kv-budget-rules")
    kinds = rules.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    check = kinds.add_parser(
        "check", help="whether a file can be used and what it says, under the server's flags"
    )
    check.add_argument("file", metavar="FILE")
    for flag in ("--kv-policy", "--kv-budget", "--kv-budget-max", "--kv-policy-config"):
        check.add_argument(flag, default=None, help="as vllm serve takes it")
    check.add_argument("--kv-policy-allow", nargs="+", default=None, help="as vllm serve takes it")
    for flag in ("--block-size", "--max-model-len"):
        text = "as vllm serve takes it; without both, checks that need sizes are left out"
        check.add_argument(flag, type=int, default=None, help=text)
    check.set_defaults(run=_rules_check)
    hashed = kinds.add_parser("hash", help="reads an API key from stdin and prints its hash")
    hashed.set_defaults(run=_rules_hash)

    model = commands.add_parser("model", help="makes the demo model and prints its path")
    model.add_argument("--cache-dir", default=None, help="where to keep it")
    model.set_defaults(run=_model)

    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except BrokenPipeError:  # a pager that was closed
        sys.stderr.close()
        status = 1
    return status


def _fail(message: object) -> int:
    print(f"vllm-kvcrush: error: {message}", file=sys.stderr)
    return 2


def _doctor(args: argparse.Namespace) -> int:
    from vllm_kvcrush.compat.source import Source, SourceError
    from vllm_kvcrush.tools.doctor import hooks_report, report

    if args.hooks is None:
        if args.record is not None:
            return _fail("--record keeps what --hooks finds: give both.")
        text, ok = report()
    else:
        from pathlib import Path

        from vllm_kvcrush.compat import check

        try:
            source = Source.at(args.hooks) if args.hooks else Source.installed()
            text, ok = hooks_report(source)
            if args.record is not None:
                Path(args.record).write_text(check.record(source), encoding="utf-8")
        except (SourceError, OSError) as error:
            return _fail(error)
    print(text)
    return 0 if ok else 1


def _policies(args: argparse.Namespace) -> int:
    from vllm_kvcrush.tools import policies

    try:
        print(policies.page(args.names or policies.documented()), end="")
    except ValueError as error:
        return _fail(f"{error}.")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from vllm_kvcrush import gate
    from vllm_kvcrush.config import ConfigError
    from vllm_kvcrush.tools import plan

    try:
        config = plan.read_config(args.model)
        contexts = _contexts(args.context)
        block_size = gate.CPU_BLOCK_SIZE if args.block_size is None else args.block_size
        for flag, value, least in (
            ("--block-size", block_size, 1),
            ("--output-tokens", args.output_tokens, 0),
        ):
            if value < least:
                raise plan.PlanError(f"{flag} {value} is too small: give at least {least}.")
        pool = None if args.pool_bytes is None else plan.parse_bytes(args.pool_bytes)
        settings = _settings(args)
        plan.check(args.model, config, args.dtype, block_size, max(contexts))
        model = plan.KVShape.from_config(config, args.dtype)
        settings = plan.with_page(settings, args.model, model, block_size)
        settings.check(block_size, max(contexts))
        rows = [
            plan.row(model, settings, context, args.output_tokens, block_size, pool)
            for context in contexts
        ]
    except (plan.PlanError, ConfigError) as error:
        return _fail(error)

    if args.json:
        from dataclasses import asdict

        content = {
            "policy": settings.policy,
            "budget": settings.budget,
            "min_tokens": settings.min_tokens,
            "block_size": block_size,
            "dtype": model.dtype,
            "token_bytes": model.token_bytes,
            "pool_bytes": pool,
            "losses": settings.losses,
            "losses_of": plan.losses_of(settings),
            "expected": [asdict(own) for own in plan.expectations(settings, block_size)],
            "rows": [row.to_dict() for row in rows],
        }
        print(json.dumps(content, indent=2))
    else:
        print(_table(model, settings, block_size, pool, rows))
    return 0


def _contexts(text: str) -> list[int]:
    from vllm_kvcrush.tools.plan import PlanError

    try:
        contexts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        contexts = []
    if not contexts or min(contexts) < 1 or max(contexts) > 2**31:
        raise PlanError(
            f"--context {text} is not a list of lengths: give whole numbers such as 4096,32768."
        )
    return contexts


def _settings(args: argparse.Namespace) -> Any:
    from vllm_kvcrush.config import (
        DEFAULT_BUDGET,
        DEFAULT_MIN_TOKENS,
        ConfigError,
        Settings,
        parse_budget,
        parse_min_tokens,
    )

    given = {
        "budget": args.kv_budget,
        "min_tokens": args.kv_min_tokens,
        "config": args.kv_policy_config,
    }
    raw = {key: value for key, value in given.items() if value is not None}
    if args.kv_policy is None and "config" not in raw:
        # Counts do not depend on which tokens stay, and `Settings.from_dict` would import torch.
        floor = parse_min_tokens(raw.get("min_tokens", DEFAULT_MIN_TOKENS))
        budget = parse_budget(raw.get("budget", DEFAULT_BUDGET), "--kv-budget")
        return Settings(policy="kvcrush", budget=budget, min_tokens=floor)
    if "config" in raw:
        try:
            raw["config"] = json.loads(raw["config"])
        except ValueError as error:
            raise ConfigError(
                f"--kv-policy-config={args.kv_policy_config!r} is not JSON: {error}.",
                "--kv-policy-config",
            ) from None
    return Settings.from_dict({"policy": args.kv_policy or "kvcrush", **raw})


def _table(
    model: Any, settings: Any, block_size: int, pool: int | None, rows: Sequence[Any]
) -> str:
    from vllm_kvcrush.tools.plan import expectations, losses_of, show_bytes

    block_bytes = model.token_bytes * block_size
    how = f"Policy {settings.policy}, budget {settings.budget}"
    lines = [
        f"{'Plain vLLM' if settings.policy == 'none' else how}; {model.layers} layers × "
        f"{model.kv_heads} KV heads × {model.head_size} channels in {model.dtype}: "
        f"{show_bytes(model.token_bytes)} a token, {show_bytes(block_bytes)} a block of "
        f"{block_size}.",
        "",
    ]
    head = [
        "context",
        "KV raw",
        "KV compressed",
        "share",
        "blocks raw",
        "blocks compressed",
        "at most, in prefill",
        "at most",
    ]
    if pool is not None:
        head += ["requests raw", "requests compressed", "all in prefill at once"]
    lines += [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    for row in rows:
        cells = [
            row.context,
            show_bytes(row.raw_bytes),
            show_bytes(row.bytes),
            f"{row.bytes / row.raw_bytes:.1%}",
            row.raw_blocks,
            row.blocks,
            row.prompt_bound,
            row.bound,
        ]
        if pool is not None:
            cells += [row.fits_raw, row.fits_decoding, row.fits]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    if settings.policy != "none" and settings.min_tokens and isinstance(settings.budget, float):
        lines += ["", f"Requests of less than {settings.min_tokens} tokens are left alone."]
    lines += ["", 'KV is counted at a request\'s end; "at most" is in blocks, at any time.']
    if pool is not None:
        lines.append(
            f"Requests: how many have room in {show_bytes(pool)} at once, at their largest: one "
            "in prefill and the others decoding, or all in prefill."
        )
    if found := expectations(settings, block_size):
        lines += [
            "",
            "Expected loss of long contexts, KL divergence in nats a token, measured on "
            f"{losses_of(settings)}: {'; '.join(map(str, found))}.",
        ]
    elif any(loss is None for loss in settings.losses.values()):
        lines += [
            "",
            "What each codec loses on this model is measured when the server starts: "
            "`vllm-kvcrush calibrate` measures it once, and shows it here.",
        ]
    return "\n".join(lines)


def _rules_check(args: argparse.Namespace) -> int:
    from vllm_kvcrush.config import ConfigError
    from vllm_kvcrush.server.rules import RulesError
    from vllm_kvcrush.tools import rules

    try:
        found = rules.check(args)
    except RulesError as error:
        for problem in error.problems:
            _fail(problem)
        return 2
    except ConfigError as error:
        return _fail(error)
    print(rules.table(found))
    for warning in found.warnings:
        print(f"vllm-kvcrush: warning: {warning}", file=sys.stderr)
    return 0


def _rules_hash(args: argparse.Namespace) -> int:
    from vllm_kvcrush.server.rules import key_hash
    from vllm_kvcrush.tools import rules

    try:
        key = rules.read_key(sys.stdin)
    except ValueError as error:
        return _fail(error)
    if len(key) < rules.SHORT:
        print(
            f"vllm-kvcrush: warning: a key of {len(key)} characters can be guessed from its hash: "
            f"take a random one, such as of `openssl rand -hex 32`.",
            file=sys.stderr,
        )
    print(key_hash(key))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from pathlib import Path

    from vllm_kvcrush.codecs.transform import calibrate
    from vllm_kvcrush.codecs.transform.points import TablesError
    from vllm_kvcrush.tools import heads, queries

    make: Any = heads if args.heads else queries if args.queries else calibrate
    try:
        out = Path(args.out) if args.out else make.output_path(args.model)
        out.parent.mkdir(parents=True, exist_ok=True)
        model = make.calibrate(args.model, out, args.text, progress=calibrate.bar)
    except (TablesError, OSError) as error:
        return _fail(error)
    kind = {heads: "Head scores of", queries: "Query statistics of"}
    made = kind.get(make, "Tables for tc4, tc6 and tc8 of")
    what = args.text or "samples of its own"
    print(f"{made} {model.name}, calibrated on {what}:", file=sys.stderr)
    print(out)
    return 0


def _model(args: argparse.Namespace) -> int:
    from vllm_kvcrush.tools import demo_model

    def say(text: object) -> None:
        print(text, file=sys.stderr)

    try:
        path = demo_model.prepare(args.cache_dir, say=say)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        return _fail(error)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
