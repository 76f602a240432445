"""Rules and dashboards: that they are what their generator makes, and ask for what there is."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from deploy.grafana import dashboards
from tests.deployment.conftest import DEPLOY, Program
from vllm_kvcrush.server import canary_metrics, metrics

RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
ALL_RULES = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]
# What Prometheus adds to each series.
SCRAPED = {"job", "instance"}
SUFFIXES = {Counter: ("_total",), Histogram: ("_bucket", "_sum", "_count"), Gauge: ("",)}


def exported() -> dict[str, set[str]]:
    """Labels of each series that a server offers, by name: this plugin's and vLLM's."""
    found: dict[str, set[str]] = {"up": set(SCRAPED)}

    def add(name: str, labels: Iterator[str] | tuple[str, ...], kind: type) -> None:
        for suffix in SUFFIXES[kind]:
            more = {"le"} if suffix == "_bucket" else set()
            found[name + suffix] = {*labels, *more, *SCRAPED}

    kinds = {"Counter", "Gauge", "Histogram"}
    for made in (*vars(metrics).values(), *vars(canary_metrics).values()):
        # Collectors are functions without parameters.
        returned = getattr(made, "__annotations__", {}).get("return")
        if returned in kinds and not inspect.signature(made).parameters:
            collector = made()
            assert isinstance(collector, MetricWrapperBase)
            add(collector._name, tuple(collector._labelnames), type(collector))
    for name, labels, kind in vllm_metrics():
        add(name, labels, kind)
    for rule in ALL_RULES:
        if "record" in rule:
            by = re.findall(r"by \(([^)]*)\)", rule["expr"])
            found[rule["record"]] = {x.strip() for x in ",".join(by).split(",")} - {"le"}
            # A ratio of recorded rates has their labels.
            for name in re.findall(r"instance:[\w:]+", rule["expr"]):
                found[rule["record"]] |= found[name]
    found[""] = set()
    return found


def vllm_metrics() -> Iterator[tuple[str, tuple[str, ...], type]]:
    """What the installed vLLM's logger of metrics makes; reading starts no engine."""
    from vllm.v1.metrics import loggers

    text = pathlib.Path(loggers.__file__).read_text(encoding="utf-8")
    made = re.compile(
        r'self\._(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"(.*?)\n {8,}\)\n', re.S
    )
    kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
    for kind, name, rest in made.findall(text):
        own = re.search(r'labelnames=labelnames \+ \["(\w+)"\]', rest)
        yield name, ("model_name", "engine", *((own[1],) if own else ())), kinds[kind]


@pytest.fixture(scope="module")
def offered() -> dict[str, set[str]]:
    found = exported()
    assert sum(name.startswith("vllm_kvcrush:") for name in found) > 10
    assert sum(name.startswith("vllm:") for name in found) > 30
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """All PromQL of deploy/ with where it stands."""
    for rule in ALL_RULES:
        yield rule.get("record", rule.get("alert")), rule["expr"]
    for name in dashboards.DASHBOARDS:
        found = json.loads((DEPLOY / "grafana" / f"{name}.json").read_text(encoding="utf-8"))
        for panel in found["panels"]:
            for target in panel.get("targets", ()):
                yield f"{name}: {panel['title']}", target["expr"]
    chart = (DEPLOY / "helm/vllm-kvcrush/templates/autoscaling.yaml").read_text(encoding="utf-8")
    (query,) = re.findall(r"query: >-\n(.*?)\n +threshold", chart, re.S)
    yield "KEDA", re.sub(r"{{[^}]*}}", "x", query)


def selectors(node: Any) -> Iterator[Any]:
    """The selectors of series in a parsed expression."""
    if type(node).__name__ == "VectorSelector":
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_dashboards_are_what_their_generator_makes(name: str) -> None:
    committed = (DEPLOY / "grafana" / f"{name}.json").read_text(encoding="utf-8")
    assert committed == dashboards.build(name), "run: python -m deploy.grafana.dashboards"
    found = json.loads(committed)
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    assert [v["name"] for v in found["templating"]["list"]] == [
        *("datasource", "model", "instance", "policy"),
    ]
    # No two panels in one place.
    taken = [
        (x, y)
        for at in (panel["gridPos"] for panel in found["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24


def test_all_that_is_asked_for_is_exported(
    tools: pathlib.Path, offered: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tools))
    import promql_parser

    places, asked = [], set()
    for place, expr in expressions():
        for variable, value in (("$__rate_interval", "5m"), ("${datasource}", "x")):
            expr = expr.replace(variable, value)
        for selector in selectors(promql_parser.parse(expr)):
            asked.add(selector.name)
            assert selector.name in offered, f"{place}: nobody exports {selector.name}"
            known = offered[selector.name] | ({"namespace"} if place == "KEDA" else set())
            for matcher in selector.matchers.matchers:
                assert matcher.name in known, f"{place}: {selector.name} has no {matcher.name}"
        places.append(place)
    assert len(places) > 60 and len(asked) > 30
    # The plugin's own are all shown somewhere.
    own = {re.sub("_(total|bucket|sum|count)$", "", n) for n in offered if "kvcrush:" in n}
    shown = {re.sub("_(total|bucket|sum|count)$", "", n) for n in asked}
    assert {n for n in own if n.startswith("vllm_kvcrush:")} <= shown


def test_a_metric_that_nobody_exports_is_found(offered: dict[str, set[str]]) -> None:
    assert "vllm_kvcrush:compactions_total" in offered
    assert "vllm_kvcrush:compactions" not in offered  # a counter without its ending
    assert "le" in offered["vllm:time_to_first_token_seconds_bucket"]
    assert "policy" not in offered["vllm_kvcrush:refusals_total"]
    assert offered["vllm_kvcrush:refusals_total"] == {"model_name", "reason", *SCRAPED}
    assert "finished_reason" in offered["vllm:request_success_total"]


def test_alerts_say_what_to_do_and_have_tests() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules.test.yml").read_text(encoding="utf-8"))
    cases = [case for test in tests["tests"] for case in test.get("alert_rule_test", ())]
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert len(rule["annotations"]["runbook"]) > 60 and rule["annotations"]["summary"]
        own = [bool(case.get("exp_alerts")) for case in cases if case["alertname"] == rule["alert"]]
        assert own == [False, True, False], f"{rule['alert']} must wait, fire and clear"
    tested = {case["alertname"] for case in cases}
    assert tested == {rule["alert"] for rule in ALERTS}


def test_promtool_and_amtool(debian: Program) -> None:
    for command in (
        ("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml"),
        ("promtool", "test", "rules", DEPLOY / "prometheus" / "rules.test.yml"),
    ):
        done = debian("prometheus", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    done = debian(
        *("prometheus-alertmanager", "amtool", "check-config"),
        DEPLOY / "alertmanager" / "alertmanager.yml",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "page"), ("warning", "ticket"), ("none", "ticket")]
)
def test_alerts_go_where_they_should(debian: Program, severity: str, receiver: str) -> None:
    done = debian(
        *("prometheus-alertmanager", "amtool", "config", "routes", "test"),
        f"--config.file={DEPLOY}/alertmanager/alertmanager.yml",
        f"severity={severity}",
    )
    assert done.stdout.strip() == receiver, done.stderr


def test_the_generator_writes_the_files(tmp_path: pathlib.Path) -> None:
    script = (
        "import pathlib, sys; from deploy.grafana import dashboards;"
        "dashboards.HERE = pathlib.Path(sys.argv[1]); dashboards.main()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=DEPLOY.parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.json", "server.json"]
