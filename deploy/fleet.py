"""A fleet as processes of this machine, from the configuration files of deploy/: two replicas,
nginx, HAProxy, Prometheus and Alertmanager.

    make fleet          until Ctrl-C; FLEET_ARGS="--replicas 1" and so on
    make fleet-check    the tests of tests/fleet against it

Each file is used as it is, but for the addresses, of which all become ports of 127.0.0.1, for the
model's path, and for where files are put. `--faster 15` divides every duration of Prometheus and
Alertmanager by fifteen, so that an alert that waits five minutes waits twenty seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
# Debian's packages by the program that they bring. Its daemons lie outside a user's PATH.
PROGRAMS = {
    "nginx": "nginx-light",
    "haproxy": "haproxy",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
MODEL = re.compile(r"^model: .*$", re.MULTILINE)
DURATION = re.compile(r"(?<![\w.])(\d+)(s|m|h)\b")
# What a vLLM without this plugin does not know in serve.yaml.
OURS = ("kv-policy", "kv-budget")
SECONDS = {"s": 1, "m": 60, "h": 3600}
# Every address in the configuration files looks like one of these.
ADDRESS = re.compile(
    r"\b(?:replica-\d|prometheus|alertmanager|alert-receiver):\d+|\b0\.0\.0\.0:\d+"
)


class FleetError(RuntimeError):
    """The fleet cannot run; the message says why."""


def missing() -> list[str]:
    """Returns Debian's packages of the programs that are not here."""
    return [package for name, package in PROGRAMS.items() if not shutil.which(name, path=PATH)]


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def faster(text: str, factor: int) -> str:
    """Returns a configuration whose durations are a factor shorter, in whole milliseconds."""

    def scaled(match: re.Match[str]) -> str:
        return f"{int(match[1]) * SECONDS[match[2]] * 1000 // factor}ms"

    return DURATION.sub(scaled, text) if factor != 1 else text


def answers(url: str) -> bool:
    """Whether a GET of this URL is answered with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@dataclass
class Fleet:
    """The processes and where they listen.

    Attributes:
        model: the model's directory.
        folder: what the processes write and read; theirs alone.
        faster: by how much the clocks of Prometheus and Alertmanager are sped up.
        environment: what replicas get beside this process's own environment.
        replicas: how many of the configured replicas are started by `start`.
    """

    model: str
    folder: pathlib.Path
    faster: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 2
    ports: dict[str, int] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def url(self, name: str) -> str:
        """Returns the base URL of a process, by the name that configuration files give it."""
        return f"http://127.0.0.1:{self.port(name)}"

    def port(self, name: str) -> int:
        """Returns a process's port."""
        if name not in self.ports:
            self.ports[name] = free_port()
        return self.ports[name]

    def local(self, path: str, own: str) -> pathlib.Path:
        """Writes a configuration file of deploy/ with this machine's addresses into the folder.

        `own` is the name of the process that reads it; what it listens on is its port."""
        text = (HERE / path).read_text(encoding="utf-8")

        def address(match: re.Match[str]) -> str:
            name, _, port = match[0].partition(":")
            if name == "0.0.0.0":
                name = own if port == "8080" else f"{own}-{port}"
            return f"127.0.0.1:{self.port(name)}"

        text = ADDRESS.sub(address, text)
        if path.startswith(("prometheus", "alertmanager")):
            text = faster(text, self.faster)
        # The model last: it may lie under /tmp too.
        text = MODEL.sub(f"model: {self.model}", text.replace("/tmp/", f"{self.folder}/"))
        target = self.folder / pathlib.Path(path).name
        target.write_text(text, encoding="utf-8")
        return target

    def run(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts a process that logs into the folder."""
        program = shutil.which(command[0], path=PATH)
        if program is None:
            raise FleetError(f"There is no {command[0]} here: {install_line()}")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [program, *command[1:]],
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, name: str, path: str, seconds: float = 600) -> None:
        """Waits until a process answers. Raises FleetError with its log's end if it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if answers(self.url(name) + path):
                return
            if self.running[name].poll() is not None:
                break
            time.sleep(0.2)
        log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        raise FleetError(f"{name} did not start:\n{log[-3000:]}")

    def replica(self, number: int, *flags: str, plain: bool = False) -> None:
        """Starts a replica and waits for it; a plain one is vLLM without this plugin."""
        self.vllm(f"replica-{number}", *flags, plain=plain)
        self.wait(f"replica-{number}", "/health")

    def vllm(self, name: str, *flags: str, plain: bool = False) -> None:
        """Starts a vLLM with serve.yaml."""
        config = self.local("vllm/serve.yaml", name)
        lines = config.read_text(encoding="utf-8").splitlines(keepends=True)
        own = self.folder / f"{name}.yaml"
        own.write_text("".join(x for x in lines if not (plain and x.startswith(OURS))))
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **({"VLLM_PLUGINS": ""} if plain else {}),
            **self.environment,
        }
        vllm = str(pathlib.Path(sys.executable).with_name("vllm"))
        where = ("--host=127.0.0.1", f"--port={self.port(name)}")
        # vLLM knows its own --config only as two words.
        command = (vllm, "serve", "--config", str(own), *where, *flags)
        self.run(name, *command, environment=environment)

    def front(self, name: str) -> None:
        """Starts "nginx" or "haproxy" and waits for it."""
        if name == "nginx":
            config = self.local("nginx/nginx.conf", name)
            user = f"daemon off; user {getpass.getuser()};"
            self.run(name, name, "-p", str(self.folder), "-c", str(config), "-g", user)
        else:
            self.run(name, name, "-db", "-f", str(self.local("haproxy/haproxy.cfg", name)))
        self.wait(name, "/healthz", 20)

    def reload_nginx(self) -> None:
        """Makes nginx read its configuration again; what runs goes on."""
        self.running["nginx"].send_signal(signal.SIGHUP)

    def watchers(self) -> None:
        """Starts Alertmanager and Prometheus, and waits for them."""
        config = self.local("alertmanager/alertmanager.yml", "alertmanager")
        self.run(
            "alertmanager",
            "prometheus-alertmanager",
            f"--config.file={config}",
            f"--storage.path={self.folder}/alertmanager",
            f"--web.listen-address=127.0.0.1:{self.port('alertmanager')}",
            "--cluster.listen-address=",
        )
        self.local("prometheus/rules.yml", "prometheus")
        config = self.local("prometheus/prometheus.yml", "prometheus")
        self.run(
            "prometheus",
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={self.folder}/prometheus",
            f"--web.listen-address=127.0.0.1:{self.port('prometheus')}",
        )
        self.wait("alertmanager", "/-/ready", 60)
        self.wait("prometheus", "/-/ready", 60)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM, seconds: float = 60) -> None:
        """Ends a process and all that it started."""
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def start(self, fronts: Iterable[str] = ("nginx", "haproxy"), *flags: str) -> None:
        """Starts everything, one replica after the other: each takes a core while it loads."""
        if packages := missing():
            raise FleetError(f"Some programs are not here: {install_line(packages)}")
        for number in range(self.replicas):
            self.replica(number, *flags)
        for name in fronts:
            self.front(name)
        self.watchers()

    def close(self) -> None:
        """Ends everything."""
        for name in reversed(list(self.running)):
            self.stop(name)


def install_line(packages: Iterable[str] | None = None) -> str:
    """Returns what to type to have the programs on Debian."""
    return f"apt-get install {' '.join(packages or PROGRAMS.values())}"


@contextlib.contextmanager
def fleet(model: str, **options: Any) -> Iterator[Fleet]:
    """A fleet that is not started yet, and all of which is ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvcrush-fleet-") as folder:
        made = Fleet(model, pathlib.Path(folder), **options)
        try:
            yield made
        finally:
            made.close()


def main() -> int:
    """Runs a fleet until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2, choices=(1, 2))
    parser.add_argument("--faster", type=int, default=1, help="divides every duration")
    given, flags = parser.parse_known_args()
    from vllm_kvcrush.tools import demo_model

    model = os.environ.get("MODEL") or str(demo_model.prepare(say=lambda line: print(line)))
    with fleet(model, faster=given.faster, replicas=given.replicas) as made:
        try:
            print("fleet: Starting; each replica takes about half a minute.", flush=True)
            made.start(("nginx", "haproxy"), *flags)
        except FleetError as error:
            print(f"fleet: {error}", file=sys.stderr)
            return 1
        for name in ("nginx", "haproxy"):
            print(f"fleet: OpenAI API through {name}: {made.url(name)}/v1")
        for name in ("prometheus", "alertmanager", *(f"replica-{n}" for n in range(made.replicas))):
            print(f"fleet: {name}: {made.url(name)}")
        print(f"fleet: Logs and configuration: {made.folder}. Stop with Ctrl-C.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    # SIGTERM must end the processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
