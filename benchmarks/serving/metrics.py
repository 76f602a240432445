"""Reads a server's /metrics: samples, peaks and differences. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"
PLAIN = (RUNNING, WAITING, USAGE, PREEMPTIONS, QUERIES, HITS)

HELD = "vllm_kvcrush:kv_bytes_held"
RAW = "vllm_kvcrush:kv_bytes_raw_equivalent"
COMPACTING = "vllm_kvcrush:compaction_seconds_sum"
PLUGIN = (HELD, RAW, COMPACTING)

_CONFIG = "vllm:cache_config_info"

Sample = Mapping[str, float]


class MetricsError(ValueError):
    """/metrics lacks what is to be measured; the message says what and why that may be."""


def parse(text: str) -> dict[str, float]:
    """Returns the samples used here by name, each summed over its labels (the plugin's: over
    policies)."""
    # The parser takes its time; /metrics are hundreds of lines, polled while the server works.
    lines = [line for line in text.splitlines() if line.startswith((*PLAIN, *PLUGIN))]
    values: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name not in (*PLAIN, *PLUGIN):
                continue
            if sample.name == USAGE and USAGE in values:
                raise MetricsError("the server has several engines; measure one with one engine")
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    if missing := [name for name in PLAIN if name not in values]:
        raise MetricsError(
            f"/metrics lacks {', '.join(missing)}: is it vLLM 0.32 without --disable-log-stats?"
        )
    return values


def policies(text: str) -> set[str]:
    """Policies that the plugin on this server has bytes of; empty for plain vLLM."""
    lines = [line for line in text.splitlines() if line.startswith(HELD)]
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return {s.labels["policy"] for family in families for s in family.samples}


@dataclass(frozen=True)
class Pool:
    """A server's KV pool. `blocks` counts vLLM's null block too."""

    blocks: int
    block_size: int
    bytes: int

    @classmethod
    def parse(cls, text: str) -> Pool:
        """Returns the pool as vLLM's cache configuration has it, in /metrics."""
        lines = [line for line in text.splitlines() if line.startswith(_CONFIG)]
        families = text_string_to_metric_families("\n".join(lines) + "\n")
        found = [s.labels for family in families for s in family.samples]
        if len(found) != 1:
            raise MetricsError(f"/metrics has {len(found)} samples of {_CONFIG}, not one")
        labels = found[0]
        if not labels.get("kv_cache_memory_bytes", "").isdigit():
            raise MetricsError(
                "the server's pool is of unknown size: start both servers with the same "
                "--kv-cache-memory-bytes"
            )
        if labels["enable_prefix_caching"] != "True":
            raise MetricsError("the server runs without prefix caching: both must have it")
        return cls(
            int(labels["num_gpu_blocks"]),
            int(labels["block_size"]),
            int(labels["kv_cache_memory_bytes"]),
        )

    def held(self, usage: float) -> float:
        """Bytes that requests hold at this usage, which vLLM counts without the null block."""
        return usage * (self.blocks - 1) * self.bytes / self.blocks


def summarise(
    before: Sample, samples: Sequence[Sample], after: Sample, pool: Pool, seconds: float
) -> dict[str, float]:
    """Peaks of the gauges in `samples`, differences of the counters, over a drive of `seconds`.

    Bytes per request are a mean over the time that requests ran: a peak would depend on whether a
    sample caught the moment between the end of a prompt and its compaction. `bytes_ratio` (bytes
    without compression over bytes held, as the plugin counts them) and `compaction_share` only
    where the plugin is active, `prefix_hit_rate` only where the prefix cache was asked. Raises
    MetricsError if no sample caught a request.
    """
    busy = [s for s in samples if s[RUNNING] and s[USAGE]]
    if not busy:
        raise MetricsError("no sample of /metrics caught a request: take longer prompts or more")
    found = {
        "peak_running": max(s[RUNNING] for s in busy),
        "waiting": max(s[WAITING] for s in samples),
        "preemptions": after[PREEMPTIONS] - before[PREEMPTIONS],
        "kv_bytes_per_request": pool.held(sum(s[USAGE] for s in busy))
        / sum(s[RUNNING] for s in busy),
    }
    if queries := after[QUERIES] - before[QUERIES]:
        found["prefix_hit_rate"] = (after[HITS] - before[HITS]) / queries
    if HELD in after:
        found["bytes_ratio"] = sum(s[RAW] for s in busy) / sum(s[HELD] for s in busy)
        # The series starts with the first compaction.
        found["compaction_share"] = (
            after.get(COMPACTING, 0.0) - before.get(COMPACTING, 0.0)
        ) / seconds
    return found
