"""One server, started the way a user starts it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

NAME = "smollm2"


@dataclass
class Server:
    url: str
    log: pathlib.Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=300)

    def metrics(self) -> dict[str, float]:
        """Returns the samples of /metrics by `name{labels}`."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples of `name` that have all of these labels."""
        return sum(
            value
            for key, value in self.metrics().items()
            if key.split("{")[0] == name
            and all(f'{label}="{wanted}"' in key for label, wanted in labels.items())
        )


def environment() -> dict[str, str]:
    """Returns the environment that a user's shell would have."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    found.pop("VLLM_LOGGING_LEVEL", None)
    found.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return found


def serve(model: str, log: pathlib.Path, *flags: str) -> subprocess.Popen[bytes]:
    vllm = pathlib.Path(sys.executable).parent / "vllm"
    with log.open("wb") as out:
        return subprocess.Popen(
            [str(vllm), "serve", model, *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
        )


FLAGS = (
    f"--served-model-name={NAME} --host=127.0.0.1 --dtype=float32 "
    "--enforce-eager --block-size=32 --max-model-len=2048 --kv-cache-memory-bytes=88473600 "
    "--max-num-batched-tokens=512 --max-num-seqs=16 "
    "--kv-policy=kvcrush --kv-budget=0.25 --kv-budget-max=0.75 "
    "--kv-policy-allow=kvcrush,snapkv,streaming,int4 --kv-min-tokens=0 "
    "--kv-policy-config.prefill_interval=256 --kv-policy-config.decode_interval=32"
).split()


@contextlib.contextmanager
def running(model: str, log: pathlib.Path, *flags: str) -> Iterator[Server]:
    """Starts a server, yields it when it answers, and stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = serve(model, log, *FLAGS, f"--port={port}", *flags)
    found = Server(f"http://127.0.0.1:{port}", log)
    try:
        for _ in range(300):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{found.url}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            process.kill()
        if process.poll() is not None:
            pytest.fail("the server did not start:\n" + log.read_text()[-4000:])
        yield found
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="package")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running(model_path, log, "--enable-scale-out") as found:
        yield found


@pytest.fixture(scope="session")
def long(text: str) -> str:
    """Returns some five hundred tokens of text."""
    return text[20000:22000]


def details(response: Any) -> dict[str, Any]:
    return response.usage.model_extra["kv_tokens_details"]
