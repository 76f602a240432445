"""Entry point `vllm.general_plugins`: flags, checks, registration.

The only file that touches vLLM's globals. `register()` runs in every vLLM process, so it only
wraps a few methods; each wrapper passes through untouched unless a policy was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from typing import Any

from vllm_kvcrush import __version__, gate, server
from vllm_kvcrush.config import ConfigError, Settings

_FLAGS = ("policy", "budget", "budget_max", "allow", "config")
_SCHEDULERS = {
    False: "vllm_kvcrush.engine.scheduler.KVCrushScheduler",
    True: "vllm_kvcrush.engine.scheduler.KVCrushAsyncScheduler",
}
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcrush.engine.worker.KVCrushCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcrush.engine.gpu_worker.KVCrushGPUWorker",
}
_registered = False


def register() -> None:
    """Called by vLLM in every process; idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.engine.arg_utils import EngineArgs

    _wrap_flags(EngineArgs)
    _wrap_config(EngineArgs)
    if gate.verdict()[0]:
        server.register()


def _wrap_flags(engine_args: Any) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    add_cli_args, from_cli_args = engine_args.add_cli_args, engine_args.from_cli_args

    @functools.wraps(add_cli_args)
    def with_group(parser: Any) -> Any:
        from vllm_kvcrush import policies

        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            "KVPolicy", "KV-cache compression (vllm-kvcrush); inactive without --kv-policy."
        )
        # No defaults: a flag that was not given must not override --additional-config.
        add = functools.partial(group.add_argument, default=argparse.SUPPRESS)
        add(
            "--kv-policy",
            dest="kv_policy",
            help=f"Policy of requests that name none: {', '.join(policies.names())}, or none "
            "(active only for requests that ask).",
        )
        add(
            "--kv-budget",
            dest="kv_budget",
            help="KV a request may hold: a fraction of its raw size (0.25) or a number of tokens "
            "(4096). Default 0.25.",
        )
        add(
            "--kv-budget-max",
            dest="kv_budget_max",
            help="Largest kv_budget that a client may ask for; opting out counts as 1.0.",
        )
        add(
            "--kv-policy-allow",
            dest="kv_policy_allow",
            help="Comma-separated policies that clients may ask for. Default: all.",
        )
        add(
            "--kv-policy-config",
            dest="kv_policy_config",
            type=_json_object,
            metavar="JSON",
            help="sinks, window, prefill_interval, decode_interval (in tokens), and options by "
            'policy, {"window": 32, "kvcrush": {"anchor": "mean"}}; or dotted, as all of vLLM\'s.',
        )
        return parser

    @functools.wraps(from_cli_args.__func__)
    def with_flags(cls: Any, args: argparse.Namespace) -> Any:
        _fold(args)
        if getattr(args, "launch_component", None) == "render" and gate.verdict()[0]:
            # `vllm launch render` makes requests for engines elsewhere, and none of its own.
            server.install(active=False)
        result = from_cli_args.__func__(cls, args)
        extra = result.additional_config
        if isinstance(extra, dict) and extra.get("kvcrush") is not None:
            result._kvcrush_from_cli = True
            try:
                _settings(result.additional_config)
            except ConfigError as error:
                _exit(error)
        return result

    server.wrap(FlexibleArgumentParser, "parse_args", _folding)
    engine_args.add_cli_args = staticmethod(with_group)
    engine_args.from_cli_args = classmethod(with_flags)


def _folding(original: Any) -> Any:
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        _fold(parsed)
        return parsed

    return parse_args


def _fold(args: argparse.Namespace) -> None:
    """Moves the flags into `--additional-config`, where they are as good as given there.

    When vLLM starts several API servers, or a server for each data-parallel rank, these get the
    parsed arguments and read them before they load any plugin: of flags that only a plugin knows
    they would hear nothing."""
    names = ("kv_policy", "kv_budget", "kv_budget_max", "kv_policy_allow", "kv_policy_config")
    given = {
        short: getattr(args, name)
        for short, name in zip(_FLAGS, names, strict=True)
        if getattr(args, name, None) is not None
    }
    if given:
        extra = getattr(args, "additional_config", None) or {}
        before = extra.get("kvcrush")
        before = before if isinstance(before, dict) else {}
        args.additional_config = {**extra, "kvcrush": {**before, **given}}


def _wrap_config(engine_args: Any) -> None:
    create = engine_args.create_engine_config

    @functools.wraps(create)
    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            settings = _settings(self.additional_config)
            if settings is not None:
                # In full, so that every process reads the same and bad input fails here.
                self.additional_config = {
                    **self.additional_config,
                    "kvcrush": settings.to_dict(),
                }
            vllm_config = create(self, usage_context, *args, **kwargs)
            if settings is not None:
                configure(vllm_config, settings)
        except (ConfigError, Refused) as error:
            if getattr(self, "_kvcrush_from_cli", False):
                _exit(error)
            raise
        return vllm_config

    engine_args.create_engine_config = create_engine_config


class Refused(ValueError):
    """The engine's configuration has something that was not verified with this plugin."""


def _settings(additional_config: Any) -> Settings | None:
    raw = additional_config.get("kvcrush") if isinstance(additional_config, dict) else None
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("policy") is None:
        raise ConfigError(
            "KV compression was configured without a policy: add --kv-policy=kvcrush, or "
            "--kv-policy=none to activate it only for requests that ask.",
            "--kv-policy",
        )
    ok, sentence = gate.verdict()
    if not ok:
        raise ConfigError(sentence, "--kv-policy")
    return Settings.from_dict(raw)


def configure(vllm_config: Any, settings: Settings) -> None:
    """Activates the plugin on a finished `VllmConfig`, or raises with everything against it."""
    from vllm.logger import init_logger

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
    if offenders:
        raise Refused("--kv-policy cannot run with: " + "; ".join(offenders) + ".")
    head_size = vllm_config.model_config.get_head_size()
    page = (head_size, head_size, vllm_config.model_config.dtype.itemsize)
    settings = _with_tables(dataclasses.replace(settings, page=page), vllm_config)
    vllm_config.additional_config["kvcrush"] = settings.to_dict()
    settings.check(vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len)
    choose_scheduler(vllm_config)
    vllm_config.parallel_config.worker_cls = _WORKERS.get(worker, worker)
    # Under vLLM's name, so that its logging configuration shows the line.
    logger = init_logger("vllm.kvcrush")
    if warning := gate.unverified(vllm_config):
        logger.warning(warning)
    parallel = vllm_config.parallel_config
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return  # one of several API servers: the process that started them has said it
    logger.info(
        "vllm-kvcrush %s is active: policy=%s budget=%s budget_max=%s clients may ask for %s; "
        "sinks=%d window=%d prefill_interval=%d decode_interval=%d, blocks of %d tokens, "
        "transform tables: %s, read by our own CPU kernels (%s).",
        __version__,
        settings.policy,
        settings.budget,
        settings.budget_max,
        ",".join(settings.allow),
        settings.sinks,
        settings.window,
        settings.prefill_interval,
        settings.decode_interval,
        vllm_config.cache_config.block_size,
        _tables(settings),
        kernels,
    )


def _with_tables(settings: Settings, vllm_config: Any) -> Settings:
    """Adds what the model's transform tables say about pages, if there are any."""
    from vllm_kvcrush import transform

    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    described = config.hf_text_config.to_dict()
    assert settings.page is not None
    k_size, v_size, itemsize = settings.page
    page_bytes = vllm_config.cache_config.block_size * (k_size + v_size) * itemsize
    ranks, path = parallel.tensor_parallel_size, settings.tables
    if path is None:
        try:
            path = str(transform.default_path(described))
            if not os.path.exists(path):
                # Workers take statistics when they start, with text that needs a tokenizer.
                if config.skip_tokenizer_init or not settings.needs_tables:
                    return settings
                fitted = transform.even_packings(described, page_bytes, v_size, ranks)
                return dataclasses.replace(settings, fitted=fitted)
        except transform.TablesError:  # a model that transform coding does not fit
            return settings
    try:
        fitted = transform.packings(path, described, page_bytes, v_size, ranks)
    except transform.TablesError as error:
        raise ConfigError(f"--kv-policy-config.tables: {error}", "--kv-policy-config") from None
    return dataclasses.replace(settings, tables=path, fitted=fitted)


def _tables(settings: Settings) -> str:
    if not settings.fitted:
        return "none"
    return settings.tables or (
        "none, statistics are taken at start-up instead (vllm-kvcrush calibrate makes better ones)"
    )


def choose_scheduler(vllm_config: Any) -> None:
    """Ours in place of the one that vLLM would take."""
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
