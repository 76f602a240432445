"""What /metrics tells of canaries (`--kv-canary`): what compression cost real requests."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from prometheus_client import Counter, Histogram

# Upper bounds, in nats: rounding of float32 lies below the first, nonsense beyond the last.
BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Why a request that was drawn was not compared; docs/usage.md describes each.
SKIPPED = (
    *("choices", "structured", "logprobs", "input", "lora"),
    *("aborted", "uncompacted", "short", "pool", "busy", "slow", "error"),
)
DIRECTIONS = ("lost", "gained")
_POLICY = ("model_name", "policy")


@functools.cache
def difference() -> Histogram:
    """Observes each canary's mean absolute difference of log-probabilities, by policy."""
    return Histogram(
        "vllm_kvcrush:canary_logprob_difference",
        "Mean absolute difference between the log-probabilities of a request's last tokens under "
        "its compressed KV and under exact KV, in nats per token.",
        _POLICY,
        buckets=BUCKETS,
    )


@functools.cache
def nats() -> Counter:
    """Counts nats by which exact KV finds tokens less ("lost") or more ("gained") likely."""
    return Counter(
        "vllm_kvcrush:canary_nats",
        "Nats by which tokens are less (lost) or more (gained) likely under exact KV than under "
        "the compressed KV that they were sampled with.",
        (*_POLICY, "direction"),
    )


@functools.cache
def tokens() -> Counter:
    """Counts tokens that were compared, by policy."""
    return Counter("vllm_kvcrush:canary_tokens", "Tokens compared with exact KV.", _POLICY)


@functools.cache
def agreements() -> Counter:
    """Counts those of them whose most likely token is the same, by policy."""
    help_text = "Tokens compared whose most likely token is the same under exact KV."
    return Counter("vllm_kvcrush:canary_agreements", help_text, _POLICY)


@functools.cache
def skipped() -> Counter:
    """Counts requests that were drawn and not compared, by reason."""
    help_text = "Requests drawn for a canary and not compared, by reason."
    return Counter("vllm_kvcrush:canary_skipped", help_text, ("model_name", "reason"))


@functools.cache
def seconds() -> Counter:
    """Counts the seconds for which canaries had an engine to themselves."""
    help_text = "Seconds from sending canaries to an idle engine to its answers."
    return Counter("vllm_kvcrush:canary_seconds", help_text, ("model_name",))


def prepare(model_name: str, policies: Iterable[str]) -> None:
    """Makes all series at the start, so that rate() sees their first increments."""
    for policy in policies:
        for collector in (difference(), tokens(), agreements()):
            collector.labels(model_name, policy)
        for direction in DIRECTIONS:
            nats().labels(model_name, policy, direction)
    for reason in SKIPPED:
        skipped().labels(model_name, reason)
    seconds().labels(model_name)
