"""Two ranks, by vLLM's own processes and by Ray: what one rank says, and a rank that dies."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest

from deploy.fleet import ROOT, Fleet, FleetError, answers, fleet, free_port
from tests.engine.conftest import ids, tiny_model
from tests.fleet.conftest import NAME, client, server
from tests.server.conftest import details

__all__ = ["ids", "tiny_model"]
pytestmark = pytest.mark.server
PREFIX = "vllm_kvcrush:"
HERE = pathlib.Path(__file__).parent
EXACT = ("int8", "int4", "streaming", "snapkv", "h2o", "kvcrush")
# Sums in another order may round a key to another code, and turn a near tie of the random model: of
# these the tokens may differ from where both are nearly as likely, by so many nats.
FITTED = ("tc6", "auto")
TIE = 0.02
MOST = 40
FLAGS = (
    *("--max-model-len=2048", "--max-num-batched-tokens=512", "--max-num-seqs=16"),
    *("--kv-cache-memory-bytes=268435456", "--disable-access-log-for-endpoints=/health"),
)
OURS = (
    f"--kv-policy-allow={','.join((*EXACT, *FITTED))}",
    *("--kv-min-tokens=0", "--kv-policy-config.prefill_interval=256"),
)
TENSOR, DATA = "--tensor-parallel-size=2", "--data-parallel-size=2"
# Ray's node: on 127.0.0.1 it takes the address of another interface, which vLLM then does not find.
NODE = "127.0.0.2"
REFUSAL = "current platform cpu does not support ray."


@dataclass
class Ray:
    """A Ray of one node, and what processes need that are to find it."""

    environment: dict[str, str]
    process: psutil.Process


@pytest.fixture(scope="module")
def tools() -> str:
    """Where Ray is: not in .venv, where vLLM would find it in every other test."""
    command = [ROOT / "scripts" / "deploy_tools.sh", HERE / "ray_on_cpu" / "requirements.txt"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


@contextlib.contextmanager
def started_ray(*places: str) -> Iterator[Ray]:
    """Starts a Ray of this machine alone, with two GPUs that are none."""
    port = free_port()
    path = os.pathsep.join(filter(None, (*places, os.environ.get("PYTHONPATH", ""))))
    environment = {
        "PYTHONPATH": path,
        "RAY_ADDRESS": f"{NODE}:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": NODE,
        # Ray keeps its sockets there, whose names may not be long.
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),
    }
    words = ("start", "--head", "--block", f"--port={port}", f"--node-ip-address={NODE}")
    words += ("--num-cpus=4", "--num-gpus=2", "--include-dashboard=false")
    words += ("--disable-usage-stats", f"--temp-dir={environment['RAY_TMPDIR']}")
    log = pathlib.Path(environment["RAY_TMPDIR"], "start.txt")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(120):
            assert process.poll() is None, log.read_text()
            if "Ray runtime started" in log.read_text():
                break
            time.sleep(0.5)
        yield Ray(environment, psutil.Process(process.pid))
    finally:
        parts = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for part in (*parts, psutil.Process(process.pid) if process.poll() is None else None):
            with contextlib.suppress(psutil.Error, AttributeError):
                part.kill()


@pytest.fixture(scope="module")
def ray(tools: str) -> Iterator[Ray]:
    with started_ray(tools, str(HERE / "ray_on_cpu")) as found:
        yield found


@contextlib.contextmanager
def serving(
    model: str, *flags: str, ray: Ray | None = None, plain: bool = False
) -> Iterator[Fleet]:
    """One server, as replica-0."""
    environment = dict(ray.environment) if ray else {}
    if plain and ray:
        # Of all plug-ins the platform alone.
        environment["VLLM_PLUGINS"] = "kvcrush_ray_on_cpu"
    with fleet(model, environment=environment) as made:
        made.replica(0, *FLAGS, *flags, plain=plain)
        yield made


def prompts(ids: list[int]) -> list[list[int]]:
    return [ids[900 + 50 * i : 1300 + 50 * i] for i in range(len((*EXACT, *FITTED)))]


@dataclass
class Said:
    """An answer: its tokens, the log-probabilities of the most likely ones, and what was kept."""

    tokens: list[str]
    likely: list[dict[str, float]]
    kept: Any

    def tie(self, other: Said) -> float:
        """Returns by how many nats the token that one says and the token that the other says differ
        where they first do, at most; 0 where they say the same."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        at = next((i for i, (one, two) in enumerate(pairs) if one != two), None)
        if at is None:
            return 0.0
        one, two = self.tokens[at], other.tokens[at]
        return max(
            abs(likely.get(one, -math.inf) - likely.get(two, -math.inf))
            for likely in (self.likely[at], other.likely[at])
        )


def said(made: Fleet, ids: list[int]) -> dict[str, Said]:
    """What each policy says."""
    api = client(made, "replica-0")
    found = {}
    for policy, prompt in zip((*EXACT, *FITTED), prompts(ids), strict=True):
        answer = api.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=MOST,
            temperature=0,
            logprobs=5,
            extra_body={"kv_policy": policy, "ignore_eos": True},
        )
        told = answer.choices[0].logprobs
        found[policy] = Said(told.tokens, told.top_logprobs, details(answer))
    return found


@pytest.fixture(scope="module")
def alone(tiny_model: str, ids: list[int]) -> dict[str, Said]:
    """What one rank says."""
    with serving(tiny_model, *OURS) as made:
        found = said(made, ids)
    assert all(answer.kept["compactions"] >= 1 for answer in found.values())
    return found


def holds(made: Fleet, ids: list[int], alone: dict[str, Said]) -> None:
    """Holds that a server says what one rank says, has the same limits, and counts once."""
    found = said(made, ids)
    ties = {policy: found[policy].tie(alone[policy]) for policy in found}
    print(ties)
    assert all(tie <= (TIE if policy in FITTED else 0) for policy, tie in ties.items()), ties
    for policy in found:
        assert found[policy].kept == alone[policy].kept, policy
    api = client(made, "replica-0")
    for extra, reason in (({"kv_budget": 0.9}, "cap"), ({"kv_policy": "mikv"}, "policy")):
        with pytest.raises(openai.BadRequestError):
            api.completions.create(model=NAME, prompt="Hello", extra_body=extra)
        assert server(made, "replica-0").metric(PREFIX + "refusals_total", reason=reason) == 1
    watched = server(made, "replica-0")
    for policy, answer in found.items():
        assert watched.metric(PREFIX + "requests_total", policy=policy) == 1
        compactions = watched.metric(PREFIX + "compactions_total", policy=policy)
        assert compactions == answer.kept["compactions"], policy
    assert watched.metric(PREFIX + "policy_failures_total") == 0
    assert watched.metric(PREFIX + "kv_bytes_held") == 0


def dies(made: Fleet, rank: psutil.Process) -> dict[str, Any]:
    """Kills a rank in mid-request, and returns what its client and its operator see of it."""
    body = {"model": NAME, "prompt": "Hello " * 200, "max_tokens": 1500, "ignore_eos": True}
    found: dict[str, Any] = {}
    with (
        httpx.Client(trust_env=False, timeout=120, base_url=made.url("replica-0")) as http,
        http.stream("POST", "/v1/completions", json={**body, "stream": True}) as got,
    ):
        found["status"] = got.status_code
        last, count = "", 0
        try:
            for line in got.iter_lines():
                last, count = line or last, count + bool(line)
                if count == 3:
                    rank.kill()
        except httpx.HTTPError as error:
            last = type(error).__name__
    # Of a chunk with an error, which kind it is.
    found["end"] = [word for word in ("error", "EngineDead", "InternalServerError") if word in last]
    found["answers"] = answers(made.url("replica-0") + "/health")
    try:
        found["code"] = made.running["replica-0"].wait(60)
    except subprocess.TimeoutExpired:
        found["code"] = "runs on"
    return found


def ranks(process: psutil.Process, name: str) -> list[psutil.Process]:
    """The processes of ranks under a process, the last one first."""
    parts = process.children(recursive=True)
    named = [part for part in parts if name in " ".join(part.cmdline())]
    assert named, [part.cmdline() for part in parts]
    return sorted(named, key=lambda part: " ".join(part.cmdline()), reverse=True)


@dataclass
class Flying:
    """A request that streams, over a connection of its own."""

    http: httpx.Client
    lines: Iterator[str]
    port: int

    def end(self) -> str:
        """Reads to the end, and returns what kind of end it is."""
        last = ""
        try:
            for line in self.lines:
                last = line or last
        except httpx.HTTPError as error:
            return type(error).__name__
        return "error" if '"error"' in last else last

    @staticmethod
    @contextlib.contextmanager
    def take_off(made: Fleet, number: int) -> Iterator[Flying]:
        """Sends a request, and reads its first token."""
        body = {"model": NAME, "prompt": f"{number} " + "Hello " * 200, "max_tokens": 1500}
        with (
            httpx.Client(trust_env=False, timeout=120, base_url=made.url("replica-0")) as http,
            http.stream(
                "POST", "/v1/completions", json={**body, "ignore_eos": True, "stream": True}
            ) as got,
        ):
            assert got.status_code == 200
            lines = got.iter_lines()
            assert next(lines).startswith("data: {")
            stream = got.extensions["network_stream"]
            yield Flying(http, lines, stream.get_extra_info("client_addr")[1])


def loses_an_api_server(made: Fleet, counter: str) -> dict[str, Any]:
    """Kills one of two API servers under load, and returns what clients and operators see.

    `counter` counts requests that are taken, over both servers."""
    first = psutil.Process(made.running["replica-0"].pid)
    parts = first.children(recursive=True)
    victim, other = ranks(first, "APIServer")[:2]
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        flying = [stack.enter_context(Flying.take_off(made, n)) for n in range(6)]
        found["taken"] = server(made, "replica-0").metric(counter)
        found["running"] = server(made, "replica-0").metric("vllm:num_requests_running")
        ports = {
            process: {c.raddr.port for c in process.net_connections() if c.raddr}
            for process in (victim, other)
        }
        victim.kill()
        with ThreadPoolExecutor(len(flying)) as threads:
            ends = list(threads.map(Flying.end, flying))
        for name, process in (("its own", victim), ("the other's", other)):
            own = [end for f, end in zip(flying, ends, strict=True) if f.port in ports[process]]
            found[name] = set(own)
            assert own, (name, ports, ends)
    found["code"] = made.running["replica-0"].wait(60)
    _, alive = psutil.wait_procs(parts, timeout=60)
    found["alive"] = [" ".join(part.cmdline()) for part in alive]
    return found


def test_an_api_server_that_is_killed(tiny_model: str) -> None:
    """vLLM ends all of a replica then, and so it does with this plugin; what is started again
    counts from nothing."""
    flags = ("--api-server-count=2",)
    seen = []
    for plain, counter in ((False, PREFIX + "requests_total"), (True, "vllm:num_requests_running")):
        with serving(tiny_model, *flags, *(() if plain else OURS), plain=plain) as made:
            seen.append(loses_an_api_server(made, counter))
            if not plain:
                made.stop("replica-0")
                made.replica(0, *FLAGS, *flags, *OURS)
                assert server(made, "replica-0").metric(PREFIX + "requests_total") == 0
                assert server(made, "replica-0").metric(PREFIX + "kv_bytes_held") == 0
                client(made, "replica-0").completions.create(
                    model=NAME, prompt="Hello", max_tokens=2
                )
                assert server(made, "replica-0").metric(PREFIX + "requests_total") == 1
    print(seen)
    assert seen[0] == seen[1]
    assert seen[0]["taken"] == seen[0]["running"] == 6 and not seen[0]["alive"]


def test_tensor_parallel_processes(tiny_model: str, ids: list[int], alone: dict[str, Said]) -> None:
    seen = []
    for plain in (False, True):
        with serving(tiny_model, TENSOR, *(() if plain else OURS), plain=plain) as made:
            if not plain:
                holds(made, ids, alone)
            process = psutil.Process(made.running["replica-0"].pid)
            seen.append(dies(made, ranks(process, "Worker_TP1")[0]))
    assert seen[0] == seen[1]


def test_data_parallel_processes(tiny_model: str, ids: list[int], alone: dict[str, Said]) -> None:
    with serving(tiny_model, DATA, *OURS) as made:
        holds(made, ids, alone)


def test_tensor_parallel_ray(
    ray: Ray, tiny_model: str, ids: list[int], alone: dict[str, Said]
) -> None:
    flags = (TENSOR, "--distributed-executor-backend=ray")
    seen = []
    for plain in (False, True):
        own = () if plain else OURS
        with serving(tiny_model, *flags, *own, ray=ray, plain=plain) as made:
            if not plain:
                holds(made, ids, alone)
            seen.append(dies(made, ranks(ray.process, "RayWorkerProc")[0]))
    assert seen[0] == seen[1]


def test_data_parallel_ray(
    ray: Ray, tiny_model: str, ids: list[int], alone: dict[str, Said]
) -> None:
    flags = (DATA, "--data-parallel-backend=ray", "--data-parallel-size-local=2")
    flags += (f"--data-parallel-address={NODE}",)
    with serving(tiny_model, *flags, *OURS, ray=ray) as made:
        holds(made, ids, alone)


@pytest.mark.parametrize("flag", [DATA, TENSOR])
def test_two_nodes(tiny_model: str, ids: list[int], alone: dict[str, Said], flag: str) -> None:
    """The launch of deploy/README.md, with both nodes on this machine."""
    port = free_port()
    if flag == DATA:
        both = (flag, "--data-parallel-size-local=1", f"--data-parallel-rpc-port={port}")
        both += ("--data-parallel-address=127.0.0.1",)
        nodes: tuple[tuple[str, ...], ...] = ((), ("--headless", "--data-parallel-start-rank=1"))
    else:
        both = (flag, "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}")
        nodes = (("--node-rank=0",), ("--node-rank=1", "--headless"))
    with fleet(tiny_model, environment={"VLLM_HOST_IP": "127.0.0.1"}) as made:
        made.vllm("node-1", *FLAGS, *OURS, *both, *nodes[1])
        made.replica(0, *FLAGS, *OURS, *both, *nodes[0])
        holds(made, ids, alone)


def test_vllm_itself_refuses_ray_on_cpus(tools: str, tiny_model: str) -> None:
    """Without the platform of these tests, and without this plugin."""
    flags = (TENSOR, "--distributed-executor-backend=ray")
    with (
        started_ray(tools) as plain_ray,
        fleet(tiny_model, environment=plain_ray.environment) as made,
    ):
        with pytest.raises(FleetError):
            made.replica(0, *FLAGS, *flags, plain=True)
        assert REFUSAL in (made.folder / "replica-0.log").read_text(encoding="utf-8")
