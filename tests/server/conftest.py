"""One server, started the way a user starts it."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

NAME = "smollm2"


@dataclass
class Server:
    url: str
    log: pathlib.Path
    pid: int

    def client(self, key: str = "-", **headers: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            default_headers={name.replace("_", "-"): value for name, value in headers.items()},
            max_retries=0,
            timeout=300,
        )

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
    found = Server(f"http://127.0.0.1:{port}", log, process.pid)
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


class Collector:
    """Takes spans by OTLP over HTTP, as an operator's collector does."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        spans = self.spans

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(map(_attributes, scope.spans))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def span(self, request_id: str) -> dict[str, Any]:
        """Returns the attributes of a request's span, when it has come."""
        for _ in range(100):
            for span in list(self.spans):
                if str(span.get("gen_ai.request.id", "")).startswith(request_id):
                    return span
            time.sleep(0.2)
        raise AssertionError(f"no span of {request_id}")


def _attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    found = Collector()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "500")
        yield found
    found.server.shutdown()


@pytest.fixture(scope="package")
def server(
    model_path: str, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ("--enable-scale-out", "--kv-live-page", f"--otlp-traces-endpoint={collector.url}")
    # Canaries after every request: nothing else may change.
    with running(model_path, log, *flags, "--kv-canary=1") as found:
        yield found


@pytest.fixture(scope="session")
def long(text: str) -> str:
    """Returns some five hundred tokens of text."""
    return text[20000:22000]


def details(response: Any) -> dict[str, Any]:
    return response.usage.model_extra["kv_tokens_details"]
