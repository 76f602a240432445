"""A pair of servers on the same model and the same pool: plain vLLM, and vLLM with a policy."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import say
from benchmarks.serving.metrics import MetricsError, Pool, policies
from benchmarks.serving.results import PLAIN, POLICY

BLOCK_SIZE = 32
NAME = "model"
_START_SECONDS = 600
_STOP_SECONDS = 30

# Ends the server's process group when this process is gone, even by SIGKILL: its standard input
# is a pipe whose other end closes with us.
_GUARD = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.stdin.buffer.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGTERM)
    time.sleep({_STOP_SECONDS})
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""


class ServerError(RuntimeError):
    """A server cannot be started or measured; the message says why. `status` is that of the HTTP
    answer, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Server:
    """A server that answers. `log` is None for one that the user started."""

    url: str
    log: pathlib.Path | None = None

    def get(self, path: str) -> str:
        """Returns the body of a GET request."""
        return _open(self.url + path).decode()

    def tail(self) -> str:
        """Returns the last lines of its log, for an error message."""
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-30:]
        return "\nThe last lines of the server's log:\n" + "\n".join(lines)


def _open(url: str, data: bytes | None = None, timeout: float = 30) -> bytes:
    # Never through a proxy: the servers are here, or named by their address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with opener.open(request, timeout=timeout) as response:
        body: bytes = response.read()
    return body


def post(url: str, body: bytes = b"", timeout: float = 300) -> bytes:
    """Returns the body of the answer to a POST request. Raises ServerError with the server's own
    words if it refuses."""
    try:
        return _open(url, body, timeout)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise ServerError(f"{url} answered {error.code}: {said}", error.code) from error
    except OSError as error:
        raise ServerError(f"{url} does not answer: {error}") from error


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: pathlib.Path) -> Iterator[Any]:
    """Starts a process with a group of its own, which ends with the context or with this process,
    whichever is first. Its output goes to `log`."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    guard = None
    try:
        guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, str(process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also what of the group outlived its leader.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if guard is not None:
                guard.kill()
                guard.wait()


def _environment(plain: bool) -> dict[str, str]:
    """As in scripts/serve.sh."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # For POST /reset_prefix_cache.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    for name in ("VLLM_KVCRUSH_CACHE", "VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        environment.pop(name, None)
    if plain:
        environment["VLLM_PLUGINS"] = ""
    openmp = pathlib.Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = ":".join(
            filter(None, (str(openmp), os.environ.get("LD_PRELOAD")))
        )
    return environment


@contextlib.contextmanager
def started(
    model: str,
    pool_bytes: int,
    max_model_len: int,
    policy: str,
    budget: float | int,
    dtype: str = "float32",
    policy_flags: Sequence[str] = (),
) -> Iterator[dict[str, Server]]:
    """Starts both servers and yields them by name, each with a pool of `pool_bytes`; `model` is a
    directory, and `policy_flags` are more flags of the one with a policy."""
    vllm = pathlib.Path(sys.executable).parent / "vllm"
    flags = (
        f"--served-model-name={NAME} --host=127.0.0.1 --dtype={dtype} --enforce-eager "
        f"--block-size={BLOCK_SIZE} --max-model-len={max_model_len} --max-num-seqs=128 "
        f"--kv-cache-memory-bytes={pool_bytes} --max-num-batched-tokens=2048 "
        "--enable-prefix-caching"
    ).split()
    ours = [f"--kv-policy={policy}", f"--kv-budget={budget}", "--kv-min-tokens=0"]
    own = {PLAIN: [], POLICY: [*ours, *policy_flags]}
    say("starting plain vLLM and vLLM with the policy …")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pair: dict[str, Server] = {}
        processes = {}
        for role, more in own.items():
            port = free_port()
            command = [str(vllm), "serve", model, f"--port={port}", *flags, *more]
            log = folder / f"{role}.log"
            processes[role] = stack.enter_context(
                running(command, _environment(role == PLAIN), log)
            )
            pair[role] = Server(f"http://127.0.0.1:{port}", log)
        for role, server in pair.items():
            _wait(role, server, processes[role], began + _START_SECONDS)
        say(f"both servers are up after {time.monotonic() - began:.0f} s")
        yield pair


def _wait(role: str, server: Server, process: Any, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the {role} server did not start{server.tail()}")
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise ServerError(f"the {role} server did not start in {_START_SECONDS} s{server.tail()}")


def check(pair: dict[str, Server], policy: str) -> Pool:
    """Returns the pool that both servers have. Raises ServerError unless one is plain, the other
    runs `policy`, and they are alike in pool and block size."""
    pools = {}
    for role, server in pair.items():
        try:
            text = server.get("/metrics")
            pools[role] = Pool.parse(text)
        except (OSError, MetricsError) as error:
            raise ServerError(f"{role} server, {server.url}/metrics: {error}") from error
        found = policies(text)
        if role == PLAIN and found:
            raise ServerError(f'{server.url} is not plain vLLM: start it with VLLM_PLUGINS=""')
        if role == POLICY and policy not in found:
            raise ServerError(
                f"{server.url} does not run policy {policy!r}, but {', '.join(found) or 'none'}: "
                "name the one it runs with --policy, and its budget with --budget"
            )
    if pools[PLAIN] != pools[POLICY]:
        raise ServerError(
            f"the servers differ in their pools, {pools[PLAIN]} and {pools[POLICY]}: start "
            "both with the same --block-size and --kv-cache-memory-bytes"
        )
    return pools[PLAIN]
