"""The Grafana dashboards, as code: writes fleet.json and server.json beside this file.

    python -m deploy.grafana.dashboards

A new panel is one `panel(...)` in `FLEET` or `SERVER`. tests/deployment holds the JSON against this
file, and every metric against what vLLM and the plugin export; `make fleet-check` asks a real
Prometheus for each panel's data. Needs grafana-foundation-sdk, which `make setup` installs.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent

ENGINE = 'model_name=~"$model",instance=~"$instance"'
POLICY = f'{ENGINE},policy=~"$policy"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One line of PromQL and how its series are named in the legend."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        title: its heading.
        unit: Grafana's name of the unit.
        queries: its series.
        about: the sentence behind the "i".
        kind: "timeseries", or "stat" for one number.
        stacked: whether series add up to a whole.
        most: the upper end of the axis, where there is a natural one.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str
    kind: str = "timeseries"
    stacked: bool = False
    most: float | None = None


Rows = dict[str, Sequence[Panel]]


def panel(title: str, unit: str, about: str, *queries: tuple[str, str], **options: Any) -> Panel:
    """Returns a panel of queries given as pairs of expression and legend."""
    return Panel(title, unit, tuple(Query(*query) for query in queries), about, **options)


def quantile(q: float, metric: str, selector: str, labels: str = "le") -> str:
    """Returns the expression of a histogram's quantile."""
    rate = f"sum by ({labels}) (rate({metric}_bucket{{{selector}}}{RATE}))"
    return f"histogram_quantile({q}, {rate})"


def percentiles(metric: str, selector: str, *quantiles: float) -> Iterator[tuple[str, str]]:
    """Yields a query for each quantile of a histogram."""
    for q in quantiles:
        yield quantile(q, metric, selector), f"p{100 * q:g}"


def per_second(metric: str, selector: str, by: str) -> tuple[str, str]:
    """Returns the query of a counter's rate by one label."""
    return f"sum by ({by}) (rate({metric}{{{selector}}}{RATE}))", f"{{{{{by}}}}}"


HELD = f"vllm_kvcrush:kv_bytes_held{{{POLICY}}}"
RAW = f"vllm_kvcrush:kv_bytes_raw_equivalent{{{POLICY}}}"
RATIO = f"sum({RAW}) / (sum({HELD}) > 0)"
HITS = f"sum(rate(vllm:prefix_cache_hits_total{{{ENGINE}}}{RATE}))"
ASKED = f"sum(rate(vllm:prefix_cache_queries_total{{{ENGINE}}}{RATE}))"

BYTES = panel(
    "KV held, and what it would be raw",
    "bytes",
    "What the KV cache of running requests takes, and what it would take without compression.",
    (f"sum({HELD})", "held"),
    (f"sum({RAW})", "raw equivalent"),
)
MIX = panel(
    "KV held, by policy",
    "bytes",
    "Which policies the held bytes belong to; none is raw.",
    (f"sum by (policy) ({HELD})", "{{policy}}"),
    stacked=True,
)
CODECS = panel(
    "KV held, by codec",
    "bytes",
    "Bytes of the blocks that requests hold, by the codec of their pages; tails are raw.",
    (f"sum by (codec) (vllm_kvcrush:kv_codec_bytes{{{ENGINE}}})", "{{codec}}"),
    stacked=True,
)
RATIOS = panel(
    "Times less KV, by policy",
    "none",
    "Raw bytes over held ones, of running requests; nothing is drawn while none runs.",
    (f"sum by (policy) ({RAW}) / (sum by (policy) ({HELD}) > 0)", "{{policy}}"),
)
TTFT = panel(
    "Time to first token",
    "s",
    "From a request's arrival to its first token.",
    *percentiles("vllm:time_to_first_token_seconds", ENGINE, 0.5, 0.95, 0.99),
)
TPOT = panel(
    "Time per output token",
    "s",
    "Mean of each request after its first token.",
    *percentiles("vllm:request_time_per_output_token_seconds", ENGINE, 0.5, 0.95, 0.99),
)
TOKENS = panel(
    "Tokens a second",
    "none",
    "Prompt tokens that were computed or found in the prefix cache, and generated ones.",
    (f"sum(rate(vllm:prompt_tokens_total{{{ENGINE}}}{RATE}))", "prompt"),
    (f"sum(rate(vllm:generation_tokens_total{{{ENGINE}}}{RATE}))", "generated"),
)
PREFIX = panel(
    "Prefix cache hits",
    "percentunit",
    "Share of the tokens looked up that the prefix cache had.",
    (f"{HITS} / ({ASKED} > 0)", "hit rate"),
    most=1,
)
COMPACTIONS = panel(
    "Compactions a second",
    "none",
    "How often requests were brought back to their budgets, or gave blocks back under pressure.",
    (
        f"sum by (policy, reason) (rate(vllm_kvcrush:compactions_total{{{POLICY}}}{RATE}))",
        "{{policy}}, {{reason}}",
    ),
)
COST = panel(
    "Time of a compaction",
    "s",
    "How long one stops its engine.",
    *(
        (
            quantile(q, "vllm_kvcrush:compaction_seconds", POLICY, "le, policy"),
            f"p{100 * q:g} {{{{policy}}}}",
        )
        for q in (0.5, 0.95)
    ),
)
EVICTED = panel(
    "Tokens evicted a second",
    "none",
    "Tokens whose KV is gone; policies that only store fewer bits evict few or none.",
    per_second("vllm_kvcrush:tokens_evicted_total", POLICY, "policy"),
)
FREED = panel(
    "Blocks freed a second",
    "none",
    "Blocks that compactions returned to the pool.",
    per_second("vllm_kvcrush:blocks_freed_total", POLICY, "policy"),
)
REFUSALS = panel(
    "Refusals a second, by reason",
    "none",
    "Requests answered with HTTP 400 because of their kv_* fields.",
    per_second("vllm_kvcrush:refusals_total", ENGINE, "reason"),
)
BY_RULE = panel(
    "Requests a second, by rule",
    "none",
    "Requests taken, by the rule of --kv-budget-rules that they met.",
    per_second("vllm_kvcrush:rule_requests_total", ENGINE, "rule"),
)
RELOADS = panel(
    "Rules read again, last hour",
    "none",
    "refused: the file has an error, and the rules before it still hold.",
    (
        f"sum by (result) (increase(vllm_kvcrush:rules_reloads_total{{{ENGINE}}}[1h]))",
        "{{result}}",
    ),
)
IN_FORCE = panel(
    "Rules in force are the file's",
    "none",
    "0: the file has an error, and the rules before it still hold.",
    (
        f"min by (instance) (vllm_kvcrush:rules_last_reload_successful{{{ENGINE}}})",
        "{{instance}}",
    ),
)
FAILURES = panel(
    "Policy failures, last hour",
    "none",
    "Compactions in which the policy failed, so that sinks and newest tokens were kept.",
    (
        f"sum by (policy) (increase(vllm_kvcrush:policy_failures_total{{{POLICY}}}[1h]))",
        "{{policy}}",
    ),
)
DEFERRALS = panel(
    "Compactions put off a second",
    "none",
    "shared: the blocks are another request's too. no_room: no free blocks to write to.",
    per_second("vllm_kvcrush:deferrals_total", ENGINE, "reason"),
)
UNCOMPRESSED = panel(
    "Requests run uncompressed, last hour",
    "none",
    "Requests that came past every front end and asked for what is not served.",
    (
        f"sum by (instance) (increase(vllm_kvcrush:requests_uncompressed_total{{{ENGINE}}}[1h]))",
        "{{instance}}",
    ),
)
TAKEN = panel(
    "Requests a second, by policy",
    "none",
    "Requests taken, by the policy that they run with.",
    per_second("vllm_kvcrush:requests_total", POLICY, "policy"),
    stacked=True,
)
# Canaries are rare, so hours of them are looked at.
AGREED = f"sum by (policy) (increase(vllm_kvcrush:canary_agreements_total{{{POLICY}}}[6h]))"
SCORED = f"(sum by (policy) (increase(vllm_kvcrush:canary_tokens_total{{{POLICY}}}[6h])) > 0)"
AGREEMENT = panel(
    "Same most likely token, last 6 hours",
    "percentunit",
    "Of the tokens that canaries scored with exact KV (--kv-canary): for how many the most likely "
    "token was the same under compressed KV.",
    (f"{AGREED} / {SCORED}", "{{policy}}"),
    most=1,
)
DIFFERENCE = panel(
    "Difference of log-probabilities, last 6 hours",
    "none",
    "Mean absolute difference, in nats per token, of each request that a canary compared.",
    *(
        (
            f"histogram_quantile({q}, sum by (le, policy) (increase("
            f"vllm_kvcrush:canary_logprob_difference_bucket{{{POLICY}}}[6h])))",
            f"p{100 * q:g} {{{{policy}}}}",
        )
        for q in (0.5, 0.95)
    ),
)
LOSS = panel(
    "Nats lost and gained per token, last 6 hours",
    "none",
    "How much less, or more, likely exact KV finds the tokens that were sampled under compressed "
    "KV. Rounding does both alike; what is lost beyond what is gained is what compression costs.",
    *(
        (
            "sum by (policy) (increase(vllm_kvcrush:canary_nats_total"
            f'{{{POLICY},direction="{direction}"}}[6h])) / {SCORED}',
            f"{direction} {{{{policy}}}}",
        )
        for direction in ("lost", "gained")
    ),
)


def usage(by: str) -> Panel:
    """Returns the panel of how full the pools are."""
    return panel(
        "KV pool in use",
        "percentunit",
        "Share of the blocks that running requests hold: the pressure to scale on.",
        (f"max by ({by}) (vllm:kv_cache_usage_perc{{{ENGINE}}})", f"{{{{{by}}}}}"),
        most=1,
    )


def pressure(by: str) -> Panel:
    """Returns the panel of what requests hold and ask for, beside the limit."""
    return panel(
        "Pressure",
        "percentunit",
        "Blocks in use and asked for by the next step; beyond the limit (--kv-pressure) "
        "requests that state no budget of their own give blocks back.",
        (f"max by ({by}) (vllm_kvcrush:pressure{{{ENGINE}}})", f"{{{{{by}}}}}"),
        (f"max(vllm_kvcrush:pressure_limit{{{ENGINE}}})", "limit"),
    )


def queues(by: str) -> Panel:
    """Returns the panel of running and waiting requests."""
    return panel(
        "Requests running and waiting",
        "none",
        "Waiting ones are those that no engine has taken up yet.",
        (f"sum by ({by}) (vllm:num_requests_running{{{ENGINE}}})", f"running {{{{{by}}}}}"),
        (f"sum by ({by}) (vllm:num_requests_waiting{{{ENGINE}}})", f"waiting {{{{{by}}}}}"),
    )


def preemptions(by: str) -> Panel:
    """Returns the panel of preemptions."""
    return panel(
        "Preemptions a second",
        "none",
        "Requests whose KV was dropped to make room, and which are computed again.",
        per_second("vllm:num_preemptions_total", ENGINE, by),
    )


def share(by: str) -> Panel:
    """Returns the panel of the time that goes into compactions."""
    return panel(
        "Time spent in compactions",
        "percentunit",
        "Share of an engine's time in which nothing else runs.",
        (
            f"max by ({by}) (sum by (instance, engine) "
            f"(rate(vllm_kvcrush:compaction_seconds_sum{{{POLICY}}}{RATE})))",
            f"{{{{{by}}}}}",
        ),
    )


FLEET: Rows = {
    "Now": (
        panel(
            "Replicas up",
            "none",
            "Servers that answer Prometheus.",
            ('sum(up{job="vllm",instance=~"$instance"})', "up"),
            kind="stat",
        ),
        panel(
            "Times less KV",
            "none",
            "Raw bytes over held ones, of running requests.",
            (RATIO, "compression"),
            kind="stat",
        ),
        panel(
            "Running",
            "none",
            "Requests that engines work on.",
            (f"sum(vllm:num_requests_running{{{ENGINE}}})", "running"),
            kind="stat",
        ),
        panel(
            "Waiting",
            "none",
            "Requests that no engine has taken up yet.",
            (f"sum(vllm:num_requests_waiting{{{ENGINE}}})", "waiting"),
            kind="stat",
        ),
        panel(
            "Generated tokens a second",
            "none",
            "Of all replicas together.",
            (f"sum(rate(vllm:generation_tokens_total{{{ENGINE}}}{RATE}))", "tokens/s"),
            kind="stat",
        ),
        panel(
            "Refused",
            "percentunit",
            "Share of the requests refused because of their kv_* fields, over five minutes.",
            (
                f"sum(instance:kvcrush_refused:rate5m{{{ENGINE}}}) / "
                f"(sum(instance:kvcrush_refused:rate5m{{{ENGINE}}}) + "
                f"sum(instance:kvcrush_taken:rate5m{{{ENGINE}}}) > 0)",
                "refused",
            ),
            kind="stat",
        ),
    ),
    "Memory": (BYTES, usage("instance"), MIX, CODECS),
    "Speed": (TTFT, TPOT, TOKENS),
    "Load": (queues("instance"), PREFIX, preemptions("instance")),
    "Compression": (
        RATIOS,
        COMPACTIONS,
        COST,
        share("instance"),
        EVICTED,
        TAKEN,
        pressure("instance"),
    ),
    "Quality": (AGREEMENT, DIFFERENCE, LOSS),
    "Trouble": (REFUSALS, FAILURES, DEFERRALS),
}

SERVER: Rows = {
    "Memory": (
        BYTES,
        usage("engine"),
        MIX,
        CODECS,
        RATIOS,
        FREED,
        panel(
            "Most bytes held beside the cache",
            "bytes",
            "gathered: keys and values that a policy read; queries: observation windows; "
            "running: policies' state; scratch: kernels.",
            (f"max by (kind) (vllm_kvcrush:worker_peak_bytes{{{ENGINE}}})", "{{kind}}"),
        ),
    ),
    "Speed": (
        TTFT,
        TPOT,
        TOKENS,
        panel(
            "Where a request's time goes, 95th percentile",
            "s",
            "Waiting, reading the prompt, writing the answer.",
            *(
                (quantile(0.95, f"vllm:request_{what}_time_seconds", ENGINE), what)
                for what in ("queue", "prefill", "decode")
            ),
        ),
        panel(
            "Time of a request",
            "s",
            "From its arrival to its last token.",
            *percentiles("vllm:e2e_request_latency_seconds", ENGINE, 0.5, 0.95, 0.99),
        ),
        panel(
            "Requests finished a second",
            "none",
            "By why they ended.",
            per_second("vllm:request_success_total", ENGINE, "finished_reason"),
        ),
    ),
    "Load": (
        queues("engine"),
        PREFIX,
        preemptions("engine"),
    ),
    "Compression": (
        COMPACTIONS,
        COST,
        share("engine"),
        EVICTED,
        TAKEN,
        DEFERRALS,
        pressure("engine"),
    ),
    "Quality": (
        AGREEMENT,
        DIFFERENCE,
        LOSS,
        panel(
            "Requests drawn and not compared, last 6 hours",
            "none",
            "busy: no idle moment for the canary. Others: docs/usage.md.",
            (
                f"sum by (reason) (increase(vllm_kvcrush:canary_skipped_total{{{ENGINE}}}[6h]))",
                "{{reason}}",
            ),
        ),
        panel(
            "Idle time that canaries took",
            "percentunit",
            "Share of the time for which a canary had an engine to itself.",
            per_second("vllm_kvcrush:canary_seconds_total", ENGINE, "instance"),
        ),
    ),
    "Rules": (BY_RULE, RELOADS, IN_FORCE),
    "Trouble": (REFUSALS, FAILURES, UNCOMPRESSED),
}

DASHBOARDS = {
    "fleet": ("vLLM KV compression: fleet", FLEET, True),
    "server": ("vLLM KV compression: one server", SERVER, False),
}


def build(uid: str) -> str:
    """Returns the JSON of one of `DASHBOARDS`."""
    from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as models
    from grafana_foundation_sdk.models import dashboard as dashboards

    source = dashboards.DataSourceRef(type_val="prometheus", uid="${datasource}")

    def variable(name: str, query: str, several: bool) -> Any:
        made = (
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(source)
            .query(query)
            .refresh(dashboards.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboards.VariableSort.ALPHABETICAL_ASC)
            .multi(several)
            .include_all(several)
        )
        return made.all_value(".*") if several else made

    def drawn(number: int, shown: Panel) -> Any:
        if shown.kind == "stat":
            made = stat.Panel().height(4)
        else:
            made = (
                timeseries.Panel()
                .height(8)
                .min(0)
                .fill_opacity(30 if shown.stacked else 5)
                .legend(
                    common.VizLegendOptions()
                    .show_legend(True)
                    .display_mode(models.LegendDisplayMode.LIST)
                    .placement(models.LegendPlacement.BOTTOM)
                )
                .tooltip(common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI))
            )
            if shown.stacked:
                made = made.stacking(common.StackingConfig().mode(models.StackingMode.NORMAL))
            if shown.most is not None:
                made = made.max(shown.most)
        made = made.title(shown.title).description(shown.about).unit(shown.unit)
        made = made.id(number).datasource(source).span(4 if shown.kind == "stat" else 8)
        for letter, query in zip("ABC", shown.queries, strict=False):
            made = made.with_target(
                prometheus.Dataquery()
                .datasource(source)
                .expr(query.expr)
                .legend_format(query.legend)
                .ref_id(letter)
            )
        return made

    title, rows, several = DASHBOARDS[uid]
    found = (
        dashboard.Dashboard(title)
        .uid(f"kvcrush-{uid}")
        .description("Made by deploy/grafana/dashboards.py; edit that.")
        .tags(["vllm", "kvcrush"])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(dashboards.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("KV compression")
            .type(dashboards.DashboardLinkType.DASHBOARDS)
            .tags(["kvcrush"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            variable("model", "label_values(vllm:num_requests_running, model_name)", True)
        )
        .with_variable(
            variable(
                "instance",
                'label_values(vllm:num_requests_running{model_name=~"$model"}, instance)',
                several,
            )
        )
        .with_variable(
            variable(
                "policy", f"label_values(vllm_kvcrush:kv_bytes_held{{{ENGINE}}}, policy)", True
            )
        )
    )
    number = itertools.count(1)
    for name, panels in rows.items():
        found = found.with_row(dashboard.Row(name).id(next(number)))
        for shown in panels:
            found = found.with_panel(drawn(next(number), shown))
    return json.dumps(found.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Writes the dashboards."""
    for uid in DASHBOARDS:
        (HERE / f"{uid}.json").write_text(build(uid), encoding="utf-8")


if __name__ == "__main__":
    main()
