"""The fleet of deploy/fleet.py, with a small pool that is easily exhausted."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from deploy.fleet import Fleet, fleet, install_line, missing
from tests.chaos.__main__ import ENVIRONMENT
from tests.server.conftest import Server, long

__all__ = ["long"]

NAME = "smollm2"
FACTOR = 15
# 60 blocks: less than the longest request takes raw.
FLAGS = (
    "--max-model-len=2048",
    "--kv-cache-memory-bytes=88473600",
    "--max-num-batched-tokens=512",
    "--max-num-seqs=16",
)
# Plain vLLM wants room for the longest request.
PLAIN = (*FLAGS, "--kv-cache-memory-bytes=134217728")
OURS = (
    "--kv-policy-allow=auto,int8,int4,snapkv,faulty",
    "--kv-policy-config.prefill_interval=256",
    "--kv-policy-config.decode_interval=32",
    "--kv-canary=1",
)
FAULTY = pathlib.Path(__file__).parent / "faulty"
RULES = "rules: [{name: small, when: {headers: {x-size: [small]}}, budget_max: 0.5}]\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips these tests, which hold two servers for minutes, unless they were asked for."""
    if os.environ.get("KVCRUSH_FLEET"):
        why = f"needs programs of Debian's: {install_line(missing())}" if missing() else ""
    else:
        why = "runs a fleet for minutes: make fleet-check"
    here = pathlib.Path(__file__).parent
    for item in items:
        if why and item.path.is_relative_to(here):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The file that tells the policy `faulty` what to do."""
    return tmp_path_factory.mktemp("fault") / "fault"


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The file of budget rules of both replicas."""
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(RULES, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ours(rules: pathlib.Path) -> tuple[str, ...]:
    """The flags of replicas with this plugin."""
    return (*FLAGS, *OURS, f"--kv-budget-rules={rules}")


@pytest.fixture(scope="session")
def running(model_path: str, control: pathlib.Path, ours: tuple[str, ...]) -> Iterator[Fleet]:
    """Two replicas, both fronts, Prometheus and Alertmanager."""
    path = os.pathsep.join(filter(None, (str(FAULTY), os.environ.get("PYTHONPATH", ""))))
    environment = {**ENVIRONMENT, "PYTHONPATH": path, "KVCRUSH_FLEET_FAULT": str(control)}
    with fleet(model_path, faster=FACTOR, environment=environment) as made:
        made.start(("nginx", "haproxy"), *ours)
        start_router(made)
        yield made


def start_router(made: Fleet, name: str = "router", policy: str = "round_robin") -> None:
    """Starts vLLM's own router before the replicas, as a third front."""
    script = pathlib.Path(__file__).parent.parent.parent / "scripts" / "deploy_tools.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    tools = subprocess.run([script], env=environment, check=True, capture_output=True, text=True)
    made.run(
        name,
        *(sys.executable, "-m", "vllm_router.launch_router", f"--policy={policy}"),
        *("--host=127.0.0.1", f"--port={made.port(name)}"),
        f"--prometheus-port={made.port(f'{name}-metrics')}",
        *("--worker-urls", made.url("replica-0"), made.url("replica-1")),
        environment={"PYTHONPATH": tools.stdout.strip()},
    )
    made.wait(name, "/health", 60)


def server(made: Fleet, name: str) -> Server:
    """One process of the fleet, or another port of it (NAME-PORT), as server tests see theirs."""
    process = made.running[name if name in made.running else name.rpartition("-")[0]]
    return Server(made.url(name), made.folder / f"{name}.log", process.pid)


def client(made: Fleet, name: str) -> openai.OpenAI:
    """A client that tries nothing twice, so that each answer is a replica's first."""
    return server(made, name).client()
