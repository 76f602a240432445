"""The fronts of deploy/ as they run: which headers of a client's reach a replica."""

from __future__ import annotations

import http.client
import http.server
import json
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy import fleet
from tests.deployment.conftest import DEPLOY
from vllm_kvcrush.config import Settings
from vllm_kvcrush.server import rules


class Replica(http.server.BaseHTTPRequestHandler):
    """Answers with the headers that it got."""

    def do_GET(self) -> None:
        body = json.dumps([(name.lower(), value) for name, value in self.headers.items()])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(params=["nginx", "haproxy"])
def front(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[int]:
    """Returns the port of a front before two such replicas."""
    name = request.param
    if shutil.which(name, path=fleet.PATH) is None:
        pytest.skip(f"SKIPPED, as {name} is not here: {fleet.install_line()}")
    made = fleet.Fleet("/somewhere/model", tmp_path)
    replicas = [
        http.server.ThreadingHTTPServer(("127.0.0.1", made.port(f"replica-{n}")), Replica)
        for n in range(2)
    ]
    for replica in replicas:
        threading.Thread(target=replica.serve_forever, daemon=True).start()
    try:
        made.front(name)
        made.wait(name, "/health", 20)
        yield made.port(name)
    finally:
        made.close()
        for replica in replicas:
            replica.shutdown()
            replica.server_close()


def arriving(port: int, *headers: tuple[str, str]) -> dict[str, list[str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET", "/v1/models")
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    found: dict[str, list[str]] = {}
    for name, value in json.loads(connection.getresponse().read()):
        found.setdefault(name, []).append(value)
    connection.close()
    return found


def test_no_client_sets_a_trusted_header(front: int) -> None:
    text = (DEPLOY / "vllm" / "rules.yaml").read_text(encoding="utf-8")
    (trusted,) = yaml.safe_load(text)["trusted_headers"]
    for headers in (
        [(trusted, "acme")],
        [(trusted.upper(), "acme"), ("X-Tenant", "acme")],
        [("X_Tenant", "acme"), (trusted, "")],
        [("Connection", "close, X-Tenant"), (trusted, "acme")],
        [("Connection", "X-Other"), (trusted, " acme")],
    ):
        found = arriving(front, *headers)
        assert trusted not in found, headers
    # What a client may send arrives, once.
    sent = [("Authorization", "Bearer key"), ("X-KV-Budget", "0.25"), ("X-KV-Policy", "int8")]
    found = arriving(front, *sent)
    assert {name.lower(): [value] for name, value in sent}.items() <= found.items()


def test_the_example_fits_serve_yaml() -> None:
    serve = yaml.safe_load((DEPLOY / "vllm" / "serve.yaml").read_text(encoding="utf-8"))
    given = {
        "policy": "policy",
        "budget": "budget",
        "budget_max": "budget-max",
        "allow": "policy-allow",
    }
    settings = Settings.from_dict({key: serve[f"kv-{flag}"] for key, flag in given.items()})
    sizes = serve["block-size"], serve["max-model-len"]
    found = rules.load(str(DEPLOY / "vllm" / "rules.yaml"), settings, *sizes)
    assert not found.warnings and len(found.rules) == 3
