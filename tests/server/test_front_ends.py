"""Other front ends of vLLM: several API servers before several engines, and batches."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.server.conftest import FLAGS, NAME, Server, details, environment, running
from vllm_kvcrush.server.rules import key_hash

pytestmark = pytest.mark.server
PREFIX = "vllm_kvcrush:"
POLICIES = ("kvcrush", "snapkv", "streaming", "int4")


# Those without a key have what the flags say.
RULES = f"""
request_headers: true
rules:
- name: gold
  when: {{keys: ["{key_hash("gold-key")}"]}}
  policy: int4
  budget: 0.5
- name: bronze
  when: {{keys: ["{key_hash("bronze-key")}"]}}
  budget_max: 0.5
  allow: [streaming]
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="module")
def servers(
    model_path: str, rules: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("servers") / "log.txt"
    flags = (
        *("--api-server-count=2", "--data-parallel-size=2", "--enable-log-requests"),
        *(f"--kv-budget-rules={rules}", "--kv-live-page"),
    )
    with running(model_path, log, *flags, "--kv-canary=1") as found:
        yield found


def test_several_api_servers_are_as_one(servers: Server, long: str) -> None:
    def ask(number: int) -> dict[str, Any]:
        # Each with a connection of its own: vLLM spreads connections over its servers.
        with servers.client() as client:
            response = client.completions.create(
                model=NAME,
                prompt=f"{number} {long}",
                max_tokens=8,
                extra_body={"kv_policy": POLICIES[number % 4], "kv_budget": 0.5},
            )
            return details(response)

    def refused(number: int) -> Any:
        with servers.client() as client, pytest.raises(openai.BadRequestError) as caught:
            extra = [{"kv_budget": 0.9}, {"kv_policy": "h2o"}][number % 2]
            client.completions.create(model=NAME, prompt="Hello", max_tokens=5, extra_body=extra)
        return caught.value.body

    with ThreadPoolExecutor(8) as threads:
        kept = list(threads.map(ask, range(16)))
        errors = list(threads.map(refused, range(16)))
    for number, found in enumerate(kept):
        assert found["policy"] == POLICIES[number % 4] and found["compactions"] >= 1
        assert 0 < found["kv_bytes_held"] <= 0.5 * found["kv_bytes_raw"] + found["kv_bytes_raw"] / 8
    for number, error in enumerate(errors):
        assert error["param"] == ("kv_budget", "kv_policy")[number % 2]
        assert ("limit of 0.75", "choose one of kvcrush, snapkv")[number % 2] in error["message"]
    # What each counted adds up.
    for index, policy in enumerate(POLICIES):
        assert servers.metric(PREFIX + "requests_total", policy=policy) == 4
        compactions = sum(found["compactions"] for found in kept[index::4])
        assert servers.metric(PREFIX + "compactions_total", policy=policy) == compactions
    assert servers.metric(PREFIX + "refusals_total", reason="cap") == 8
    assert servers.metric(PREFIX + "refusals_total", reason="policy") == 8
    for _ in range(8):  # of both servers, each on a connection of its own
        with urllib.request.urlopen(f"{servers.url}/kvcrush/state") as response:
            state = json.load(response)
        assert [engine["engine"] for engine in state["engines"]] == [0, 1]
        for engine in state["engines"]:
            counted = servers.metric(PREFIX + "compactions_total", engine=str(engine["engine"]))
            assert engine["compactions"]["total"] == {"budget": counted}
    log = servers.log.read_text()
    received = re.findall(r"\((ApiServer_\d) .* Received request .*max_tokens=(\d)", log)
    assert set(received) == {(f"ApiServer_{n}", tokens) for n in range(2) for tokens in "58"}
    for engine in "01":
        assert servers.metric(PREFIX + "compactions_total", engine=engine) > 0
    # Of each request a canary is sent, or said why not.
    for _ in range(120):
        compared = servers.metric(PREFIX + "canary_logprob_difference_count")
        skipped = servers.metric(PREFIX + "canary_skipped_total")
        if compared + skipped == 16:
            break
        time.sleep(1)
    assert compared + skipped == 16 and compared > 0
    assert log.count("is active: policy=kvcrush budget=0.25") == 1
    assert "Traceback" not in log


def by_key(servers: Server, key: str, count: int = 4, **extra: Any) -> list[Any]:
    """Returns what requests with an API key come to, over connections of their own: the details of
    what was kept, or the error."""

    def ask(number: int) -> Any:
        headers = extra.get("headers", {})
        body = {name: value for name, value in extra.items() if name != "headers"}
        with servers.client(key, **headers) as client:
            prompt = f"{key} {number} {extra} " + "word " * 250
            try:
                return details(
                    client.completions.create(
                        model=NAME, prompt=prompt, max_tokens=2, extra_body=body
                    )
                )
            except openai.BadRequestError as error:
                return error.body

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(ask, range(count)))


def reloads(servers: Server, result: str) -> float:
    return servers.metric(PREFIX + "rules_reloads_total", result=result)


def until(true: Callable[[], bool]) -> None:
    for _ in range(100):
        if true():
            return
        time.sleep(0.1)
    assert true()


def test_each_key_has_its_rule_in_every_api_server(servers: Server) -> None:
    for key, name, policy, budget in (
        ("-", "default", "kvcrush", 0.25),
        ("gold-key", "gold", "int4", 0.5),
        ("bronze-key", "bronze", "kvcrush", 0.25),
    ):
        before = servers.metric(PREFIX + "rule_requests_total", rule=name)
        for found in by_key(servers, key):
            assert found["policy"] == policy and found["compactions"] >= 1
            assert found["kv_bytes_held"] < (budget + 0.2) * found["kv_bytes_raw"]
            assert "rule" not in found
        assert servers.metric(PREFIX + "rule_requests_total", rule=name) == before + 4
    for found in by_key(servers, "bronze-key", headers={"X_KV_Policy": "streaming"}):
        assert found["policy"] == "streaming"
    for key, extra, parameter in (
        ("bronze-key", {"kv_budget": 0.6}, "kv_budget"),
        ("bronze-key", {"headers": {"x_kv_budget": "0.6"}}, "x-kv-budget"),
        ("bronze-key", {"kv_policy": "int4"}, "kv_policy"),
        ("gold-key", {"headers": {"x_kv_budget": "0.5"}, "kv_budget": 0.4}, "x-kv-budget"),
        ("bronze-key", {"vllm_xargs": {"kv_rule": "gold"}}, "vllm_xargs.kv_rule"),
    ):
        for error in by_key(servers, key, **extra):
            assert error["param"] == parameter


def test_rules_are_read_again_in_every_api_server(servers: Server, rules: pathlib.Path) -> None:
    """Of one process only its parent's number is known, and one page has the counters of all."""
    loaded, refused = reloads(servers, "loaded"), reloads(servers, "refused")
    changed = rules.with_suffix(".new")
    changed.write_text("rule_in_usage: true\n" + RULES.replace("policy: int4", "policy: snapkv"))
    changed.rename(rules)
    until(lambda: reloads(servers, "loaded") == loaded + 2)
    for found in by_key(servers, "gold-key"):
        assert found["policy"] == "snapkv" and found["rule"] == "gold"
    rules.write_text(RULES.replace("budget: 0.5", "budget: 0.9"))
    until(lambda: reloads(servers, "refused") == refused + 2)
    assert {found["policy"] for found in by_key(servers, "gold-key")} == {"snapkv"}
    # By hand, in all of them; the engines, which have no handler, live on.
    os.kill(servers.pid, signal.SIGHUP)
    until(lambda: reloads(servers, "refused") == refused + 4)
    rules.write_text(RULES)
    until(lambda: reloads(servers, "loaded") == loaded + 4)
    os.kill(servers.pid, signal.SIGHUP)
    until(lambda: reloads(servers, "loaded") == loaded + 6)
    assert {found["policy"] for found in by_key(servers, "gold-key")} == {"int4"}
    log = servers.log.read_text()
    says = "line 7: rules[0].budget=0.9 with rules[0].policy=int4 is above rules[0].budget_max=0.75"
    assert log.count(says) == 4 and "Traceback" not in log


def test_after_clients_left_nothing_is_held(servers: Server, long: str) -> None:
    clients = [servers.client() for _ in range(8)]
    streams = [
        client.completions.create(
            model=NAME,
            prompt=f"{number} left {long}",
            max_tokens=1000,
            stream=True,
            extra_body={"ignore_eos": True, "kv_policy": POLICIES[number % 4]},
        )
        for number, client in enumerate(clients)
    ]
    held = []
    for stream in streams:
        for _, _ in zip(range(3), stream, strict=False):
            pass
        held.append(servers.metric(PREFIX + "kv_bytes_held"))
    assert max(held) > 0
    for stream in streams:
        stream.close()
    for _ in range(60):
        found = {name: value for name, value in servers.metrics().items() if value}
        left = [
            name
            for name in found
            if name.startswith((PREFIX + "kv_bytes", "vllm:num_requests_running"))
        ]
        if not left:
            break
        time.sleep(1)
    assert not left
    names = servers.metrics()
    for policy in (*POLICIES, "none"):
        for engine in "01":
            series = [n for n in names if f'policy="{policy}"' in n and f'engine="{engine}"' in n]
            assert any(n.startswith(PREFIX + "kv_bytes_held{") for n in series), (policy, engine)


def test_a_batch_runner_takes_them_too(model_path: str, tmp_path: pathlib.Path, long: str) -> None:
    bodies = [
        {"kv_policy": "int4", "kv_budget": 0.5},
        {},
        {"kv_budget": 0.9},
        {"kv_budgte": 0.5},
        {"kv_policy": ["int8"]},
    ]
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as lines:
        for number, extra in enumerate(bodies):
            body = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": long}]}
            line = {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body | extra,
            }
            lines.write(json.dumps(line) + "\n")
    vllm = str(pathlib.Path(sys.executable).parent / "vllm")
    flags = [flag for flag in FLAGS if not flag.startswith("--host")]
    command = [vllm, "run-batch", "-i", source, "-o", results, "--model", model_path, *flags]
    # Its processes need not import vLLM anew, as those of the servers above do.
    forking = environment() | {"VLLM_WORKER_MULTIPROCESSING_METHOD": "fork"}
    done = subprocess.run(
        command, env=forking, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    answers = {a["custom_id"]: a for a in map(json.loads, results.read_text().splitlines())}
    for number, policy in ((0, "int4"), (1, "kvcrush")):
        found = answers[str(number)]["response"]["body"]["usage"]["kv_tokens_details"]
        assert found["policy"] == policy and found["compactions"] >= 1
        assert found["kv_bytes_held"] < 0.7 * found["kv_bytes_raw"]
    for number, says in ((2, "limit of 0.75"), (3, "kv_budgte"), (4, "kv_policy=")):
        answer = answers[str(number)]
        assert says in json.dumps(answer["response"] or {}) + json.dumps(answer["error"]), answer
        assert "usage" not in json.dumps(answer)
