"""The entry point `vllm.general_plugins`: flags, checks, registration.

`register()` runs in every vLLM process, so it only wraps a few methods; each wrapper passes its
arguments through unchanged unless a policy was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from vllm_kvcrush import __version__, gate, server
from vllm_kvcrush.config import (
    DEFAULT_BUDGET,
    DEFAULT_MIN_TOKENS,
    DEFAULT_PROTECT_SYSTEM,
    NONE,
    AdditionalConfig,
    ConfigError,
    Settings,
)
from vllm_kvcrush.server import reload
from vllm_kvcrush.server.caller import MIDDLEWARE
from vllm_kvcrush.server.rules import Rules, RulesError, load

# A child of vLLM's logger, so that vLLM's logging configuration shows the lines.
logger = logging.getLogger("vllm.kvcrush")

# Our flags and the keys of their values in `additional_config["kvcrush"]`.
_FLAGS = {
    "kv_policy": "policy",
    "kv_budget": "budget",
    "kv_budget_max": "budget_max",
    "kv_policy_allow": "allow",
    "kv_min_tokens": "min_tokens",
    "kv_pressure": "pressure",
    "kv_budget_rules": "rules",
    "kv_live_page": "live_page",
    "kv_canary": "canary",
    "kv_protect_system": "protect_system",
    "kv_policy_config": "config",
}
_SCHEDULERS = {
    False: "vllm_kvcrush.engine.scheduler.KVCrushScheduler",
    True: "vllm_kvcrush.engine.scheduler.KVCrushAsyncScheduler",
}
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcrush.engine.worker.cpu_worker.KVCrushCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcrush.engine.worker.gpu_worker.KVCrushGPUWorker",
}
_registered = False
# Why `register` could not wrap this vLLM, or None; it is the answer to whoever asks for a policy.
_problem: str | None = None


def register() -> None:
    """Adds the plugin to vLLM, which calls this in every process; it is idempotent. It never
    raises: a vLLM that the plugin cannot extend must still serve whoever did not ask for it."""
    global _registered, _problem
    if _registered:
        return
    _registered = True
    try:
        from vllm.engine.arg_utils import EngineArgs

        _wrap(EngineArgs)
        if gate.verdict()[0]:
            server.register()
    except Exception as error:  # whatever an unknown vLLM may do
        _problem = _stays_out(error)
        logger.warning("%s", _problem)


def _stays_out(error: Exception) -> str:
    return (
        "vllm-kvcrush finds no place in this vLLM and stays out of it: no request is compressed "
        f"({type(error).__name__}: {error}); run vllm-kvcrush doctor."
    )


def _wrap(engine_args: Any) -> None:
    """Wraps the methods of vLLM's `EngineArgs`. If one is not what it should be, only the
    constructor is wrapped, to refuse settings that nothing would follow, and the error is
    raised."""
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        add_cli_args = engine_args.__dict__["add_cli_args"].__func__
        from_cli_args = engine_args.__dict__["from_cli_args"].__func__
        create = engine_args.__dict__["create_engine_config"]
        _takes(add_cli_args, 1)
        _takes(from_cli_args, 2)
        _takes(create, 2)
        server.wrap(FlexibleArgumentParser, "parse_args", _folding)
    except Exception as error:
        _wrap_refusal(engine_args, _stays_out(error))
        raise
    ours = _wrap_flags(engine_args, add_cli_args, from_cli_args)
    engine_args.add_cli_args = staticmethod(ours[0])
    engine_args.from_cli_args = classmethod(ours[1])
    engine_args.create_engine_config = _wrapped_config(create)


def _takes(function: Any, arguments: int) -> None:
    """Raises TypeError unless `function` can be called with so many positional arguments."""
    inspect.signature(function).bind(*range(arguments))


def _wrap_refusal(engine_args: Any, why: str) -> None:
    # Our flags were not added, so vLLM refuses those itself, but it would accept and ignore our
    # settings in additional_config.
    init = engine_args.__init__

    @functools.wraps(init)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        extra = getattr(self, "additional_config", None)
        if isinstance(extra, dict) and extra.get("kvcrush") is not None:
            raise Refused(f"additional_config['kvcrush'] cannot be followed: {why}")

    engine_args.__init__ = refusing


def _wrap_flags(engine_args: Any, add_cli_args: Any, from_cli_args: Any) -> tuple[Any, Any]:
    @functools.wraps(add_cli_args)
    def with_group(parser: Any) -> Any:
        parser = add_cli_args(parser)
        try:
            _add_flags(parser)
        except Exception as error:
            logger.warning("%s", _stays_out(error))
        return parser

    @functools.wraps(from_cli_args)
    def with_flags(cls: Any, args: argparse.Namespace) -> Any:
        _fold(args)
        if getattr(args, "launch_component", None) == "render" and gate.verdict()[0]:
            # `vllm launch render` prepares requests for other engines and starts none, so that no
            # engine's constructor installs the checks.
            server.install(active=False)
        result = from_cli_args(cls, args)
        extra = result.additional_config
        before = extra.get("kvcrush") if isinstance(extra, dict) else None
        if before is None:
            return result
        if isinstance(before, dict):
            before = FromCommandLine(before)
        result.additional_config = {**extra, "kvcrush": before}
        try:
            _settings(result.additional_config)
        except ConfigError as error:
            _exit(error)
        return result

    return with_group, with_flags


def _folding(original: Any) -> Any:
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        _fold(parsed)
        return parsed

    return parse_args


def _fold(args: argparse.Namespace) -> None:
    """Moves the values of our flags into `--additional-config`, with the same effect as if they had
    been given there.

    When vLLM starts several API servers, or a server for each data-parallel rank, these get the
    parsed arguments and read them before they load any plugin: they would not look at flags that
    only a plugin knows."""
    given = {
        key: getattr(args, name)
        for name, key in _FLAGS.items()
        if name not in _not_ours and getattr(args, name, None) is not None
    }
    if given:
        extra = getattr(args, "additional_config", None) or {}
        before = extra.get("kvcrush")
        before = before if isinstance(before, dict) else {}
        args.additional_config = {**extra, "kvcrush": {**before, **given}}
    ours = _raw(getattr(args, "additional_config", None))
    if isinstance(ours, dict) and ours.get("rules"):
        # Here, since a process that starts API servers does nothing else of ours.
        reload.on_hangup()
    if ours is not None and MIDDLEWARE not in getattr(args, "middleware", (MIDDLEWARE,)):
        args.middleware = [*args.middleware, MIDDLEWARE]


class FromCommandLine(dict[str, Any]):
    """Settings that an operator gave on the command line: an error in them ends the command with
    one sentence instead of a stack trace. The mark is on the settings themselves because vLLM's
    tools copy the fields of one `EngineArgs` to another."""


# Names of our flags that this vLLM has too, with a meaning of its own.
_not_ours: set[str] = set()


def _add_flags(parser: Any) -> None:
    from vllm_kvcrush import policies

    try:
        known = ", ".join(policies.names())
    except ValueError as error:  # raised again for whoever uses a flag
        known = str(error)
    _not_ours.update(
        name for name in _FLAGS if f"--{name.replace('_', '-')}" in parser._option_string_actions
    )
    if _not_ours:
        raise RuntimeError(f"this vLLM has flags of the same name: {', '.join(sorted(_not_ours))}")
    group = parser.add_argument_group(
        "KVPolicy", "KV-cache compression (vllm-kvcrush); inactive without --kv-policy."
    )
    # No defaults: a flag that was not given must not override --additional-config.
    add = functools.partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--kv-policy",
        dest="kv_policy",
        help=f"Policy of requests that name none: {known}, or none "
        "(active only for requests that ask).",
    )
    add(
        "--kv-budget",
        dest="kv_budget",
        help="KV a request may hold: a fraction of its raw size (0.25) or a number of tokens "
        f"(4096). Default {DEFAULT_BUDGET}.",
    )
    add(
        "--kv-budget-max",
        dest="kv_budget_max",
        help="Largest kv_budget that a client may ask for; opting out counts as 1.0.",
    )
    add(
        "--kv-policy-allow",
        dest="kv_policy_allow",
        nargs="+",
        metavar="POLICY",
        help="Policies that clients may ask for, separated by commas or spaces. Default: all but "
        "kvzip, which makes other requests wait.",
    )
    add(
        "--kv-min-tokens",
        dest="kv_min_tokens",
        metavar="N",
        help="Requests shorter than this, prompt and output together, are left alone; 0 compresses "
        "all. Budgets in tokens are kept to whatever the length. "
        f"Default {DEFAULT_MIN_TOKENS}.",
    )
    add(
        "--kv-pressure",
        dest="kv_pressure",
        metavar="SHARE",
        help="Requests that state no budget of their own stay whole until this share of the KV "
        "blocks is in use, such as 0.8; then they are compacted step by step, down to --kv-budget. "
        "Default: they keep to --kv-budget all the time.",
    )
    add(
        "--kv-budget-rules",
        dest="kv_budget_rules",
        metavar="FILE",
        help="YAML file of narrower limits by API key, model, LoRA adapter or header; it is read "
        "again when it changes and on SIGHUP (docs/rules.md; vllm-kvcrush rules check FILE).",
    )
    add(
        "--kv-live-page",
        dest="kv_live_page",
        action="store_true",
        help="Serve the live page, GET /kvcrush, and what it shows as JSON, GET /kvcrush/state. "
        "Where the server has an API key, both ask for it.",
    )
    add(
        "--kv-canary",
        dest="kv_canary",
        metavar="SHARE",
        help="Share of compressed requests, such as 0.001, whose last tokens are scored once more "
        "with exact KV while a server is idle; /metrics tells what compression cost them. "
        "Default: none.",
    )
    add(
        "--kv-protect-system",
        dest="kv_protect_system",
        metavar="SHARE",
        help="Keep a chat's system prompt whatever the policy says, up to this share of the "
        f"request's budget; on means {DEFAULT_PROTECT_SYSTEM}, off 0. Requests with kv_protect "
        "state themselves what is kept. Default: on.",
    )
    add(
        "--kv-policy-config",
        dest="kv_policy_config",
        type=_json_object,
        metavar="JSON",
        help="sinks, window, prefill_interval, decode_interval (in tokens), and options by "
        'policy, {"window": 32, "kvcrush": {"anchor": "mean"}}; or dotted, as all of vLLM\'s.',
    )


def _wrapped_config(create: Any) -> Any:
    @functools.wraps(create)
    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        by_flags = isinstance(_raw(self.additional_config), FromCommandLine)
        try:
            settings = _settings(self.additional_config)
            if settings is not None:
                # All settings, so that every process reads the same and bad input fails here.
                full = settings.to_dict()
                self.additional_config = {
                    **self.additional_config,
                    "kvcrush": FromCommandLine(full) if by_flags else full,
                }
            vllm_config = create(self, usage_context, *args, **kwargs)
            if settings is not None:
                configure(vllm_config, settings)
        except (ConfigError, Refused) as error:
            if by_flags:
                _exit(error)
            raise
        return vllm_config

    return create_engine_config


class Refused(ValueError):
    """The engine's configuration has something that was not verified with this plugin."""


def _raw(additional_config: Any) -> Any:
    return additional_config.get("kvcrush") if isinstance(additional_config, dict) else None


def _settings(additional_config: Any) -> Settings | None:
    raw = _raw(additional_config)
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("policy") is None:
        raise ConfigError(
            "KV compression was configured without a policy: add --kv-policy=kvcrush, or "
            "--kv-policy=none to activate it only for requests that ask.",
            "--kv-policy",
        )
    from vllm_kvcrush.compat import check

    ok, sentence = gate.verdict()
    problem = sentence if not ok else _problem or check.refusal()
    if problem:
        raise ConfigError(problem, "--kv-policy")
    return Settings.from_dict(raw)


def configure(vllm_config: Any, settings: Settings) -> None:
    """Activates the plugin on a finished `VllmConfig`.

    Raises:
        Refused: the configuration has something that was not verified; the message names all of it.
        ConfigError: a policy fails, or a setting does not fit the engine's sizes or tables.
    """
    settle_block_size(vllm_config)
    offenders = gate.refusals(vllm_config)
    runs, kernels = gate.kernels()
    if not runs:
        offenders.append(f"kernels that do not load ({kernels})")
    worker = vllm_config.parallel_config.worker_cls
    if worker not in _WORKERS and worker not in _WORKERS.values():
        offenders.append(f"worker class {worker}: start without --worker-cls")
    if vllm_config.scheduler_config.scheduler_cls not in (None, *_SCHEDULERS.values()):
        offenders.append(
            f"scheduler class {vllm_config.scheduler_config.scheduler_cls}: "
            "start without --scheduler-cls"
        )
    if settings.canary and vllm_config.model_config.logprobs_mode != "raw_logprobs":
        offenders.append(
            f"--kv-canary and --logprobs-mode={vllm_config.model_config.logprobs_mode}, which "
            "gives no log-probabilities of the model itself: leave out one of the two"
        )
    if offenders:
        raise Refused("--kv-policy cannot run with: " + "; ".join(offenders) + ".")
    from vllm_kvcrush.codecs.transform.rope import Rope

    model = vllm_config.model_config.hf_text_config.to_dict()
    settings, dropped = _tried(
        settings.with_heads(model),
        vllm_config.cache_config.block_size,
        _shape(model),
        with_rope=Rope.if_known(model) is not None,
        no_repeat=gate.no_repeat(vllm_config),
    )
    head_size = vllm_config.model_config.get_head_size()
    page = (head_size, head_size, vllm_config.model_config.dtype.itemsize)
    settings, unused = settings.with_tables(
        model,
        page,
        vllm_config.cache_config.block_size,
        vllm_config.parallel_config.tensor_parallel_size,
        # Statistics are taken with text, which needs a tokenizer.
        statistics=not vllm_config.model_config.skip_tokenizer_init,
    )
    others = {k: v for k, v in vllm_config.additional_config.items() if k != "kvcrush"}
    vllm_config.additional_config = AdditionalConfig(others, settings)
    sizes = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    settings.check(*sizes)
    rules = _rules(settings, *sizes)
    if NONE in settings.allow and not settings.serves_plain(sizes[1]):
        dropped.append(
            f"clients may not ask for the policy none, which keeps everything: it is above "
            f"--kv-budget-max={settings.budget_max}."
        )
    choose_scheduler(vllm_config)
    vllm_config.parallel_config.worker_cls = _WORKERS.get(worker, worker)
    for warning in (*gate.unverified(vllm_config), unused, *dropped):
        if warning:
            logger.warning("%s", warning)
    parallel = vllm_config.parallel_config
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return  # one of several API servers: the process that started them has logged it
    logger.info(
        "vllm-kvcrush %s is active: policy=%s budget=%s budget_max=%s pressure=%s canary=%s "
        "protect_system=%s clients may ask for %s; "
        "min_tokens=%d sinks=%d window=%d prefill_interval=%d decode_interval=%d, "
        "blocks of %d tokens, "
        "transform tables: %s, read by our own CPU kernels (%s).",
        __version__,
        settings.policy,
        settings.budget,
        settings.budget_max,
        settings.pressure,
        settings.canary,
        settings.protect_system,
        ",".join(settings.allow),
        settings.min_tokens,
        settings.sinks,
        settings.window,
        settings.prefill_interval,
        settings.decode_interval,
        vllm_config.cache_config.block_size,
        _tables(settings),
        kernels,
    )
    if rules is not None:
        reload.tell(str(settings.rules), rules)


def _rules(settings: Settings, block_size: int, max_model_len: int) -> Rules | None:
    """Returns the rules of the file, if there is one. Raises ConfigError."""
    if settings.rules is None:
        return None
    try:
        return load(settings.rules, settings, block_size, max_model_len)
    except RulesError as error:
        raise ConfigError(f"--kv-budget-rules: {error}", "--kv-budget-rules") from None


def _tables(settings: Settings) -> str:
    if not settings.fitted:
        return "none"
    if settings.tables is None:
        return (
            "none, statistics are taken at start-up instead (vllm-kvcrush calibrate makes better "
            "ones)"
        )
    known = {codec: loss for codec, loss in settings.losses.items() if loss is not None}
    if not known:
        return settings.tables
    losses = ", ".join(f"{codec} {loss:.4f}" for codec, loss in known.items())
    return f"{settings.tables} (with them codecs lose, in nats a token: {losses})"


def _shape(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the numbers of layers and of KV heads, or None where the configuration does not say
    them."""
    heads = model.get("num_key_value_heads") or model.get("num_attention_heads")
    layers = model.get("num_hidden_layers")
    return (layers, heads) if isinstance(layers, int) and isinstance(heads, int) else None


def _tried(
    settings: Settings,
    block_size: int,
    model: tuple[int, int] | None = None,
    with_rope: bool = True,
    no_repeat: str | None = None,
) -> tuple[Settings, list[str]]:
    """Builds and dry-runs every policy that may be asked for.

    Args:
        block_size: tokens in a block.
        model: numbers of layers and of KV heads of the model, if they are known.
        with_rope: whether the model's rotary embedding is known.
        no_repeat: why policies that need "repeat" cannot have it, or None.

    Returns:
        The settings without the policies that fail, where all policies are allowed by default, and
        a warning for each of them.

    Raises:
        ConfigError: a policy that the operator named fails.
    """
    from vllm_kvcrush import policies
    from vllm_kvcrush.policies.choice import dry_run

    every = set(settings.allow) >= {*policies.names(), NONE} - policies.OPT_IN
    failing: dict[str, str] = {}
    for name in settings.allow:
        try:
            if name != NONE:
                policy = settings.build(name)
                if no_repeat is not None and "repeat" in policy.needs:
                    raise ValueError(no_repeat)
                own = policy.made_for
                if model is not None and own is not None and own != model:
                    raise ValueError(
                        f"its file is of a model with {own[0]} layers of {own[1]} KV heads, and "
                        f"this one has {model[0]} of {model[1]}"
                    )
                dry_run(
                    policy,
                    sinks=settings.sinks,
                    window=settings.window,
                    page_size=block_size,
                    with_rope=with_rope,
                )
        except Exception as error:
            failing[name] = str(error)
            if name == settings.policy or not every:
                key = "--kv-policy" if name == settings.policy else "--kv-policy-allow"
                raise ConfigError(f"{key}: the policy {name} fails: {error}", key) from error
    warnings = [
        f"clients may not ask for the policy {name}, which fails: {why}"
        for name, why in failing.items()
    ]
    allow = tuple(name for name in settings.allow if name not in failing)
    return dataclasses.replace(settings, allow=allow), warnings


def settle_block_size(vllm_config: Any) -> None:
    """Makes the size of a block final. Where the user gave none, vLLM chooses it after the model
    is loaded (on GPUs, and from 0.33 on also on CPUs): too late for plans and page sizes, which
    every process derives from this configuration."""
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        if vllm_config.device_config.device_type == "cpu":
            cache.block_size = gate.CPU_BLOCK_SIZE
        cache.user_specified_block_size = True


def choose_scheduler(vllm_config: Any) -> None:
    """Sets our scheduler in place of the one that vLLM would take."""
    asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULERS[asynchronous]


def _json_object(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _exit(error: Exception) -> None:
    print(f"vllm: error: {error}", file=sys.stderr)
    raise SystemExit(2)
