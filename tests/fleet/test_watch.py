"""Prometheus watches two replicas under load: panels have data, alerts fire and clear."""

from __future__ import annotations

import http.server
import itertools
import json
import math
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from deploy.fleet import HERE, Fleet
from tests.fleet.conftest import FACTOR, NAME, PLAIN, RULES, client, server
from tests.fleet.test_fronts import REPLICAS
from tests.waiting import eventually

pytestmark = pytest.mark.server
PREFIX = "vllm_kvcrush:"
# What $__rate_interval is here: Grafana takes at least four scrapes.
WINDOW = 20
# What the rules call five minutes.
FIVE_MINUTES = 300 / FACTOR
DASHBOARDS = ("fleet", "server")


def panels(name: str) -> list[dict[str, Any]]:
    """The panels of a dashboard as Grafana reads them."""
    found = json.loads((HERE / "grafana" / f"{name}.json").read_text(encoding="utf-8"))
    return [panel for panel in found["panels"] if panel["type"] != "row"]


def query(running: Fleet, expr: str) -> list[tuple[dict[str, str], float]]:
    """What Prometheus answers now: labels and value of each series."""
    with httpx.Client(trust_env=False) as http:
        got = http.get(running.url("prometheus") + "/api/v1/query", params={"query": expr}).json()
    assert got["status"] == "success", (expr, got)
    return [(found["metric"], float(found["value"][1])) for found in got["data"]["result"]]


def number(running: Fleet, expr: str) -> float:
    """What a query of one series answers."""
    ((_, value),) = query(running, expr)
    return value


def firing(running: Fleet) -> dict[str, list[dict[str, str]]]:
    """Labels of all firing alerts by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for labels, _ in query(running, 'ALERTS{alertstate="firing"}'):
        found.setdefault(labels["alertname"], []).append(labels)
    return found


class Load:
    """Threads that keep asking through nginx until they are told to stop."""

    def __init__(self, running: Fleet, asks: list[dict[str, Any]]):
        self.stopped = threading.Event()
        self.errors: list[Exception] = []
        self.answers: list[Any] = []
        self.threads = [
            threading.Thread(target=self._ask, args=(running, ask, number))
            for number, ask in enumerate(asks)
        ]
        for thread in self.threads:
            thread.start()

    def _ask(self, running: Fleet, ask: dict[str, Any], number: int) -> None:
        api, count = client(running, "nginx"), 0
        while not self.stopped.is_set():
            count += 1
            own = {**ask, "prompt": f"{number} {count} {ask['prompt']}"}
            try:
                self.answers.append(api.completions.create(model=NAME, **own))
            except openai.BadRequestError:
                time.sleep(0.2)
            except Exception as error:
                self.errors.append(error)
                return

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(120)
        assert not self.errors


def asking(text: str, **more: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True, **{k: v for k, v in more.items() if k.startswith("kv_")}}
    rest = {k: v for k, v in more.items() if not k.startswith("kv_")}
    return {"prompt": text, "max_tokens": 64, **rest, "extra_body": extra}


@pytest.fixture(scope="module")
def received(running: Fleet) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What Alertmanager sends: the receiver's path and the message."""
    got: list[tuple[str, dict[str, Any]]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    found = http.server.ThreadingHTTPServer(("127.0.0.1", running.port("alert-receiver")), Receiver)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield got
    found.shutdown()


@pytest.fixture(scope="class")
def loaded(running: Fleet, text: str, received: Any) -> Iterator[dict[str, float]]:
    """A steady load of several policies, and what the replicas themselves say of it: tokens
    generated in each second."""
    prompt = text[30000:34000]
    asks = [
        asking(prompt),
        asking(prompt, kv_policy="int4", kv_budget=0.5),
        asking(prompt, kv_policy="snapkv", kv_budget=0.5),
        asking(text[30000:30800], kv_budget=0.9),  # refused
    ]

    def generated() -> float:
        return sum(server(running, r).metric("vllm:generation_tokens_total") for r in REPLICAS)

    # A moment of rest in which each replica compares something: under load none does.
    for replica in REPLICAS:
        api = server(running, replica)
        api.client().completions.create(model=NAME, **asking(prompt))
        assert eventually(lambda api=api: api.metric(PREFIX + "canary_tokens_total") > 0, 60)
    load = Load(running, asks)
    time.sleep(WINDOW / 2)
    tokens, started = generated(), time.monotonic()
    time.sleep(WINDOW + 5)
    told = {"tokens": (generated() - tokens) / (time.monotonic() - started)}
    yield told
    load.stop()


def shown(running: Fleet, name: str, expr: str) -> str:
    """A panel's expression with the variables that Grafana would fill in."""
    instance = ".*" if name == "fleet" else re.escape(f"127.0.0.1:{running.port('replica-0')}")
    values = {
        "$__rate_interval": f"{WINDOW}s",
        "$model": NAME,
        "$instance": instance.replace("\\", "\\\\"),
        "$policy": ".*",
    }
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


class TestUnderLoad:
    @pytest.mark.parametrize(
        ("name", "index"),
        [(name, index) for name in DASHBOARDS for index in range(len(panels(name)))],
        ids=[f"{name}: {panel['title']}" for name in DASHBOARDS for panel in panels(name)],
    )
    def test_every_panel_shows_data(
        self, running: Fleet, loaded: dict[str, float], name: str, index: int
    ) -> None:
        panel = panels(name)[index]
        for target in panel["targets"]:
            expr = shown(running, name, target["expr"])
            # Between two requests a ratio has no value for a moment.
            assert eventually(lambda expr=expr: bool(query(running, expr)), 10), expr
            series = query(running, expr)
            for labels, value in series:
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert set(labels) == legend, expr
                # A policy that nobody asks for has compactions of no length.
                assert value >= 0 or (math.isnan(value) and "histogram_quantile" in expr)
                if panel["fieldConfig"]["defaults"]["unit"] == "percentunit":
                    assert value <= 1
            assert any(not math.isnan(value) for _, value in series), expr

    def test_panels_show_what_is_so(self, running: Fleet, loaded: dict[str, float]) -> None:
        """The magnitudes of a load that we know."""
        found: dict[str, Any] = {}
        for panel in panels("fleet"):
            for target in panel["targets"]:
                expr = shown(running, "fleet", target["expr"])
                found[f"{panel['title']}: {target['legendFormat']}"] = dict(
                    (next(iter(labels.values()), ""), value)
                    for labels, value in query(running, expr)
                )
        print(json.dumps(found, indent=1))
        assert found["Replicas up: up"][""] == 2
        tokens = found["Tokens a second: generated"][""]
        assert tokens == pytest.approx(loaded["tokens"], rel=0.35)
        # Three clients, who wait for their answers.
        running_now = found["Requests running and waiting: running {{instance}}"]
        assert set(running_now) == {f"127.0.0.1:{running.port(r)}" for r in REPLICAS}
        assert 1 <= sum(running_now.values()) <= 3
        assert 1.3 < found["Times less KV: compression"][""] < 8
        held = found["KV held, and what it would be raw: held"][""]
        raw = found["KV held, and what it would be raw: raw equivalent"][""]
        assert 1e6 < held < raw < 2 * 88473600
        # Tails are raw, and what `auto` and int4 pack is not.
        codecs = found["KV held, by codec: {{codec}}"]
        assert codecs["raw"] > 0 and sum(map(bool, codecs.values())) > 1
        assert sum(codecs.values()) == pytest.approx(held, rel=0.35)
        agreed = found["Same most likely token, last 6 hours: {{policy}}"]
        assert 0 < agreed["auto"] <= 1
        taken = found["Requests a second, by policy: {{policy}}"]
        assert (
            all(taken[policy] > 0 for policy in ("auto", "int4", "snapkv")) and taken["none"] == 0
        )
        evicted = found["Tokens evicted a second: {{policy}}"]
        assert evicted["snapkv"] > 0 and evicted["int4"] == 0
        refused = found["Refusals a second, by reason: {{reason}}"]
        assert refused["cap"] > 0 and refused["policy"] == 0
        assert set(found["Compactions put off a second: {{reason}}"]) == {"shared", "no_room"}
        times = [found[f"Time to first token: p{p}"][""] for p in (50, 95, 99)]
        assert 0.01 < times[0] <= times[1] <= times[2] < 60
        costs = found["Time of a compaction: p95 {{policy}}"]
        assert 0 < costs["auto"] < 1


# -- alerts ----------------------------------------------------------------------------------------


def fires(running: Fleet, alert: str, seconds: float = 6 * FIVE_MINUTES) -> None:
    assert eventually(lambda: alert in firing(running), seconds), (alert, firing(running))


def clears(running: Fleet, alert: str, seconds: float = 6 * FIVE_MINUTES) -> None:
    assert eventually(lambda: alert not in firing(running), seconds), (alert, firing(running))


def said(received: list[tuple[str, dict[str, Any]]], alert: str, path: str) -> set[str]:
    """What Alertmanager has said of an alert to one receiver: "firing", "resolved"."""
    return {
        told["status"]
        for where, message in list(received)
        if where == path
        for told in message["alerts"]
        if told["labels"]["alertname"] == alert
    }


def tells(received: Any, alert: str, path: str, what: set[str]) -> None:
    assert eventually(lambda: said(received, alert, path) == what, 4 * FIVE_MINUTES), received


BOTH = {"firing", "resolved"}


def test_nothing_fires_at_rest(running: Fleet) -> None:
    assert eventually(lambda: not firing(running), 6 * FIVE_MINUTES)


def test_refusals(running: Fleet, text: str, received: Any) -> None:
    load = Load(running, [asking(text[:200], kv_budget=0.9), asking(text[:200], kv_polcy="int4")])
    fires(running, "KVCrushRefusals")
    load.stop()
    (labels, *_) = firing(running)["KVCrushRefusals"]
    assert labels["model_name"] == NAME and labels["severity"] == "warning"
    reasons = query(running, f"sum by (reason) ({PREFIX}refusals_total)")
    counts = {labels["reason"]: count for labels, count in reasons}
    assert counts["cap"] > 5 and counts["unknown_key"] > 5
    clears(running, "KVCrushRefusals")
    tells(received, "KVCrushRefusals", "/ticket", BOTH)


def test_policies_that_fail_and_that_dawdle(
    running: Fleet, text: str, control: pathlib.Path, received: Any
) -> None:
    prompt = text[30000:34000]
    control.write_text("raise", encoding="utf-8")
    load = Load(running, [asking(prompt, kv_policy="faulty")] * 2)
    fires(running, "KVCrushPolicyFailures")
    assert {x["policy"] for x in firing(running)["KVCrushPolicyFailures"]} == {"faulty"}
    control.write_text("sleep", encoding="utf-8")
    fires(running, "KVCrushCompactionShare")
    control.unlink()
    load.stop()
    assert all(a.choices[0].text for a in load.answers)
    clears(running, "KVCrushCompactionShare")
    clears(running, "KVCrushPolicyFailures")
    tells(received, "KVCrushPolicyFailures", "/page", BOTH)
    tells(received, "KVCrushCompactionShare", "/ticket", BOTH)


def test_a_pool_that_is_exhausted(running: Fleet, text: str, received: Any) -> None:
    load = Load(
        running,
        [asking(text[30000:34000], kv_policy="snapkv", kv_budget=0.75, max_tokens=200)] * 12,
    )
    fires(running, "KVCrushPoolExhausted")
    load.stop()
    clears(running, "KVCrushPoolExhausted")
    tells(received, "KVCrushPoolExhausted", "/ticket", BOTH)


def test_a_rules_file_with_an_error(running: Fleet, rules: pathlib.Path, received: Any) -> None:
    rules.write_text("rules: [", encoding="utf-8")
    both = {f"127.0.0.1:{running.port(r)}" for r in REPLICAS}

    def refused() -> set[str]:
        return {found["instance"] for found in firing(running).get("KVCrushRulesRefused", ())}

    assert eventually(lambda: refused() == both, 6 * FIVE_MINUTES), firing(running)
    rules.write_text(RULES, encoding="utf-8")
    clears(running, "KVCrushRulesRefused")
    tells(received, "KVCrushRulesRefused", "/ticket", BOTH)


def test_canaries_below_their_floor(
    running: Fleet, text: str, control: pathlib.Path, received: Any
) -> None:
    """A client waits for its request's canary, which takes idle moments only."""
    recorded = 'model_policy:kvcrush_canary_agreement:ratio6h{policy="faulty"}'
    ended = ("canary_logprob_difference_count", "canary_skipped_total")

    def ask(replica: str, number: int, budget: float) -> None:
        watched = server(running, replica)

        def canaries() -> float:
            return sum(watched.metric(PREFIX + name) for name in ended)

        before = canaries()
        own = asking(
            f"{budget} {number} {text[30000:31500]}",
            max_tokens=40,
            kv_policy="faulty",
            kv_budget=budget,
        )
        watched.client().completions.create(model=NAME, temperature=1, **own)
        assert eventually(lambda: canaries() > before, 150), replica

    def compared(budget: float, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 480
        for number in itertools.count():
            if until():
                return
            assert time.monotonic() < deadline, query(running, recorded)
            with ThreadPoolExecutor() as threads:
                list(threads.map(ask, REPLICAS, [number] * 2, [budget] * 2))

    control.write_text("forget", encoding="utf-8")
    compared(96, lambda: "KVCrushCanaryBelowFloor" in firing(running))
    control.unlink()
    (labels, *_) = firing(running)["KVCrushCanaryBelowFloor"]
    assert labels["policy"] == "faulty" and labels["model_name"] == NAME
    assert number(running, recorded) < 0.8
    compared(0.75, lambda: "KVCrushCanaryBelowFloor" not in firing(running))
    assert number(running, recorded) >= 0.8
    tells(received, "KVCrushCanaryBelowFloor", "/ticket", BOTH)


def test_replicas_that_are_down_or_have_no_plugin(
    running: Fleet, ours: tuple[str, ...], received: Any
) -> None:
    instance = f"127.0.0.1:{running.port('replica-1')}"
    running.stop("replica-1", signal.SIGKILL)
    fires(running, "KVCrushReplicaDown")
    assert [x["instance"] for x in firing(running)["KVCrushReplicaDown"]] == [instance]
    running.replica(1, *PLAIN, plain=True)
    clears(running, "KVCrushReplicaDown")
    assert number(running, 'sum(up{job="vllm"})') == 2
    fires(running, "KVCrushInactive")
    assert [x["instance"] for x in firing(running)["KVCrushInactive"]] == [instance]
    # Told before it is down again, which would hush it up.
    tells(received, "KVCrushInactive", "/ticket", {"firing"})
    running.stop("replica-1", signal.SIGKILL)
    running.replica(1, *ours)
    clears(running, "KVCrushInactive")
    clears(running, "KVCrushReplicaDown")
    tells(received, "KVCrushReplicaDown", "/page", BOTH)
    tells(received, "KVCrushInactive", "/ticket", BOTH)
