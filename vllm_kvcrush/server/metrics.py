"""The `vllm_kvcrush:` metrics on /metrics.

The engine's numbers come with vLLM's own stats, in `SchedulerStats.kv_connector_stats`, the one
free-form field that reaches the API server; requests and refusals are counted in the API server.
Collectors are made once per process, since each engine has a logger and a second one must not
register them again.

Several API servers share one page (prometheus_client's multiprocess mode): counters add up, and
the newest value of a gauge counts. As each snapshot reaches only one of the servers, the one that
gets it sets the gauges of every policy that a client may ask for, not only of those it has seen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, Literal

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.server import KEY, Method, configured, wrap
from vllm_kvcrush.server.reload import LOADED, REFUSED
from vllm_kvcrush.spec import parse
from vllm_kvcrush.stats import COMPACTION_BUCKETS, REASONS

_PREFIX = "vllm_kvcrush:"
_ENGINE = ("model_name", "engine")
RELOADS = (LOADED, REFUSED)
# Reasons of an active server; one where the plugin is not active has "inactive" alone.
REFUSALS = (
    *("budget", "policy", "cap", "pool", "unknown_key", "conflict", "endpoint", "spans"),
    "header",
)


def install() -> None:
    """Hides the plugin's numbers from vLLM's loggers of KV connectors, which would take them for
    a connector's, and adds our logger where an engine logs stats.

    It does not use vLLM's entry point for stat loggers: an installed one turns stats on in every
    server, even in one that asked neither for stats nor for this plugin."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorLogging,
        KVConnectorProm,
    )
    from vllm.v1.metrics.loggers import StatLoggerManager

    for cls in (KVConnectorLogging, KVConnectorProm):
        wrap(cls, "observe", _strip_kvcrush_stats)
    wrap(StatLoggerManager, "__init__", _with_our_logger)


def _with_our_logger(original: Method) -> Method:
    signature = inspect.signature(original)

    def __init__(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        if configured(bound.arguments["vllm_config"]) is not None:
            given = bound.arguments.get("custom_stat_loggers")
            bound.arguments["custom_stat_loggers"] = [*(given or ()), KVCrushStatLogger]
        original(*bound.args, **bound.kwargs)

    return __init__


def _strip_kvcrush_stats(original: Method) -> Method:
    def observe(self: Any, transfer_stats_data: Any, *args: Any, **kwargs: Any) -> None:
        if KEY in transfer_stats_data:
            transfer_stats_data = {k: v for k, v in transfer_stats_data.items() if k != KEY}
            if not transfer_stats_data:
                return
        original(self, transfer_stats_data, *args, **kwargs)

    return observe


@functools.cache
def _counter(name: str, help_text: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, help_text, labels)


@functools.cache
def _gauge(
    name: str,
    help_text: str,
    *labels: str,
    mode: Literal["mostrecent", "max", "min"] = "mostrecent",
) -> Gauge:
    # With several API servers, the one that heard from the engine last counts.
    return Gauge(_PREFIX + name, help_text, labels, multiprocess_mode=mode)


@functools.cache
def _histogram(name: str, help_text: str, *labels: str) -> Histogram:
    return Histogram(_PREFIX + name, help_text, labels, buckets=COMPACTION_BUCKETS)


def requests() -> Counter:
    """Counts requests by the policy that they run with."""
    help_text = "Requests taken, by the policy that they run with."
    return _counter("requests", help_text, "model_name", "policy")


def refusals() -> Counter:
    """Counts requests refused with HTTP 400, by reason."""
    help_text = "Requests refused because of their KV parameters, by reason."
    return _counter("refusals", help_text, "model_name", "reason")


def compactions() -> Counter:
    """Counts compactions by policy and by reason."""
    help_text = "Compactions, for a request's budget or for pressure on the pool."
    return _counter("compactions", help_text, *_ENGINE, "policy", "reason")


def tokens_evicted() -> Counter:
    """Counts evicted tokens by policy."""
    return _counter("tokens_evicted", "Tokens whose KV was evicted.", *_ENGINE, "policy")


def blocks_freed() -> Counter:
    """Counts freed blocks by policy."""
    help_text = "KV blocks that compactions returned to the pool."
    return _counter("blocks_freed", help_text, *_ENGINE, "policy")


def compaction_seconds() -> Histogram:
    """Observes the seconds of each compaction, by policy."""
    return _histogram("compaction_seconds", "Time per compaction.", *_ENGINE, "policy")


def deferrals() -> Counter:
    """Counts compactions put off, by reason."""
    help_text = (
        "Compactions put off: blocks still shared with another request, or no room for new ones."
    )
    return _counter("deferrals", help_text, *_ENGINE, "reason")


def kv_bytes_held() -> Gauge:
    """Shows the bytes of KV that running requests hold, by policy."""
    return _gauge("kv_bytes_held", "Bytes of KV that running requests hold.", *_ENGINE, "policy")


def kv_bytes_raw_equivalent() -> Gauge:
    """Shows the bytes that running requests would hold uncompressed, by policy."""
    help_text = "Bytes of KV that running requests would hold without compression."
    return _gauge("kv_bytes_raw_equivalent", help_text, *_ENGINE, "policy")


def kv_codec_bytes() -> Gauge:
    """Shows the bytes of the blocks that running requests hold, by the codec of their pages."""
    help_text = "Bytes of the KV blocks that running requests hold, by the codec of their pages."
    return _gauge("kv_codec_bytes", help_text, *_ENGINE, "codec")


def pressure() -> Gauge:
    """Shows the blocks in use and wanted, as a share of the pool."""
    help_text = "KV blocks in use and those that the next step asks for, as a share of the pool."
    return _gauge("pressure", help_text, *_ENGINE)


def pressure_limit() -> Gauge:
    """Shows the pressure beyond which requests are compacted: 0 where that is not set."""
    help_text = "Pressure beyond which requests are compacted (--kv-pressure); 0: not set."
    return _gauge("pressure_limit", help_text, *_ENGINE)


def policy_failures() -> Counter:
    """Counts compactions in which the policy failed, by policy."""
    help_text = "Compactions that kept sinks and newest tokens because the policy failed."
    return _counter("policy_failures", help_text, *_ENGINE, "policy")


def uncompressed() -> Counter:
    """Counts requests that passed every front end and asked for what is not served here."""
    help_text = "Requests whose parameters could not be used, and which ran uncompressed."
    return _counter("requests_uncompressed", help_text, *_ENGINE)


def worker_peak_bytes() -> Gauge:
    """Shows the most bytes that a worker has held beside its KV cache, by their use."""
    help_text = "Most bytes that a worker has held beside its KV cache, by what for."
    return _gauge("worker_peak_bytes", help_text, *_ENGINE, "kind", mode="max")


def rule_requests() -> Counter:
    """Counts requests by the rule of --kv-budget-rules that they met."""
    help_text = "Requests taken, by the rule of --kv-budget-rules that they met."
    return _counter("rule_requests", help_text, "model_name", "rule")


def rules_reloads() -> Counter:
    """Counts attempts to read the rules again, by their result."""
    help_text = "Attempts of API servers to read --kv-budget-rules again, by result."
    return _counter("rules_reloads", help_text, "model_name", "result")


def rules_last_reload_successful() -> Gauge:
    """Shows whether the rules in force are those of the file as it is."""
    help_text = (
        "1 if the last attempt to read --kv-budget-rules succeeded; 0 if an API server refused the "
        "file and goes on with the rules before it."
    )
    return _gauge("rules_last_reload_successful", help_text, "model_name", mode="min")


def count_rule(model_name: str, rule: str) -> None:
    """Counts a request that was taken under a rule."""
    rule_requests().labels(model_name, rule).inc()


def count_reload(model_name: str, result: str) -> None:
    """Counts an attempt to read the rules again."""
    rules_reloads().labels(model_name, result).inc()


def show_rules(model_name: str, rules: Iterable[str], result: str = LOADED) -> None:
    """Shows the result of the last reading, and makes the series of these rules and of reloads, so
    that rate() sees their first increment."""
    rules_last_reload_successful().labels(model_name).set(result == LOADED)
    for rule in rules:
        rule_requests().labels(model_name, rule)
    for result in RELOADS:
        rules_reloads().labels(model_name, result)


def count_request(model_name: str, policy: str) -> None:
    """Counts a request that was taken."""
    requests().labels(model_name, policy).inc()


def count_refusal(model_name: str, reason: str) -> None:
    """Counts a request that was refused."""
    refusals().labels(model_name, reason).inc()


def _label(policy: Any) -> str:
    """Returns the outermost name of a policy, of which there are few."""
    return parse(policy).name


class KVCrushStatLogger(StatLoggerBase):
    """Puts one engine's numbers on /metrics; does nothing where the plugin is not active."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        raw = configured(vllm_config)
        self.active = raw is not None
        if raw is None:
            return
        model_name = str(vllm_config.model_config.served_model_name)
        self.labels = (model_name, str(engine_index))
        # Series are made at the start, so that rate() sees their first increment.
        policy = _label(raw.get("policy"))
        self.policies = {policy, "none", *map(_label, raw.get("allow") or ())}
        for allowed in self.policies:
            requests().labels(model_name, allowed)
            kv_bytes_held().labels(*self.labels, allowed)
            kv_bytes_raw_equivalent().labels(*self.labels, allowed)
            if allowed != "none":
                for reason in REASONS if raw.get("pressure") else REASONS[:1]:
                    compactions().labels(*self.labels, allowed, reason)
                for counter in (tokens_evicted(), blocks_freed(), policy_failures()):
                    counter.labels(*self.labels, allowed)
                compaction_seconds().labels(*self.labels, allowed)
        for codec in CODECS:
            kv_codec_bytes().labels(*self.labels, codec)
        pressure().labels(*self.labels)
        pressure_limit().labels(*self.labels).set(raw.get("pressure") or 0)
        for reason in REFUSALS:
            refusals().labels(model_name, reason)
        for reason in ("shared", "no_room"):
            deferrals().labels(*self.labels, reason)
        uncompressed().labels(*self.labels)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Adds what `stats.Stats.take` returned in the engine."""
        if not self.active or scheduler_stats is None:
            return
        stats = (scheduler_stats.kv_connector_stats or {}).get(KEY)
        if stats is None:
            return
        for policy, counts in stats["policies"].items():
            labels = (*self.labels, policy)
            for reason, count in counts["compactions"].items():
                compactions().labels(*labels, reason).inc(count)
            tokens_evicted().labels(*labels).inc(counts["tokens_evicted"])
            blocks_freed().labels(*labels).inc(counts["blocks_freed"])
            for seconds in counts["seconds"]:
                compaction_seconds().labels(*labels).observe(seconds)
        for reason, count in stats["deferrals"].items():
            deferrals().labels(*self.labels, reason).inc(count)
        for policy, count in stats["policy_failures"].items():
            policy_failures().labels(*self.labels, policy).inc(count)
        uncompressed().labels(*self.labels).inc(stats["uncompressed"])
        pressure().labels(*self.labels).set(stats["pressure"])
        for kind, size in stats["worker_bytes"].items():
            worker_peak_bytes().labels(*self.labels, kind).set(size)
        for codec in CODECS:
            kv_codec_bytes().labels(*self.labels, codec).set(stats["kv_codec_bytes"].get(codec, 0))
        held, raw = stats["kv_bytes_held"], stats["kv_bytes_raw_equivalent"]
        self.policies.update(held, raw)
        # A policy that the engine no longer names has no running requests.
        for policy in self.policies:
            labels = (*self.labels, policy)
            kv_bytes_held().labels(*labels).set(held.get(policy, 0))
            kv_bytes_raw_equivalent().labels(*labels).set(raw.get(policy, 0))

    def log_engine_initialized(self) -> None:
        """Logs nothing: the plugin has logged what is active at start-up."""
