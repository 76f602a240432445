"""A fleet under load, with which one thing after the other goes wrong, and what must hold after."""

from __future__ import annotations

import contextlib
import pathlib
import random
import re
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import psutil

from deploy.fleet import ROOT, Fleet
from tests.chaos import fuzz, judge
from tests.chaos.faults import FAULTS, QUIET, Impossible
from tests.chaos.load import BROKEN, LEFT, REFUSED, WHOLE, Load, Sent
from tests.waiting import eventually

REPLICAS = ("replica-0", "replica-1")
CLOCK = ROOT / "tests" / "native" / "clock.c"
# Seconds in which a fleet without clients comes to rest.
REST = 60


@dataclass
class Row:
    """One line of the table: a fault, and what came of the requests of its time."""

    fault: str
    seconds: float = 0.0
    requests: int = 0
    whole: int = 0
    left: int = 0
    refused: int = 0
    lost: int = 0
    tokens: int = 0
    compactions: int = 0
    saw: str = ""
    wrong: list[str] = field(default_factory=list)

    def count(self, sent: Sequence[Sent]) -> None:
        """Counts the requests of its time."""
        self.requests = len(sent)
        self.whole = sum(s.outcome == WHOLE for s in sent)
        self.left = sum(s.outcome == LEFT for s in sent)
        self.refused = sum(s.outcome == REFUSED for s in sent)
        self.tokens = sum(s.tokens for s in sent)
        self.compactions = sum(s.compactions for s in sent)


@dataclass
class Chaos:
    """One run over a fleet whose replicas and nginx are up.

    Attributes:
        load: the clients, who ask nginx.
        seconds: how long it lasts.
        flags: of replicas, for those that are started again.
        plain: of a vLLM without this plugin.
        tools: where the fuzzer is.
        rules: the replicas' file of budget rules, if they have one.
        lives: of all replicas, from each start to its end.
        row: the line of what happens now.
        clocked: whether the victim's clock can be set.
        disks: file systems that are unmounted at the end.
    """

    fleet: Fleet
    load: Load
    seconds: float
    seed: int
    flags: tuple[str, ...]
    plain: tuple[str, ...]
    tools: pathlib.Path
    rules: pathlib.Path | None = None
    say: Callable[[str], object] = print
    lives: list[judge.Life] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    row: Row = field(default_factory=lambda: Row("start"))
    fuzzing: list[fuzz.Fuzzed] = field(default_factory=list)
    clocked: bool = False
    disks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        for name in REPLICAS:
            self.lives.append(self._born(name, time.time()))

    def _born(self, name: str, started: float) -> judge.Life:
        return judge.Life(name, self.fleet.port(name), started, self.metrics(name))

    # -- for faults --------------------------------------------------------------------------------

    def share(self, part: float) -> float:
        """Returns a part of the run's seconds, a minute at most."""
        return min(60.0, part * self.seconds)

    def wrong(self, what: str) -> None:
        """Notes that something is not as it must be."""
        self.row.wrong.append(what)
        self.say(f"chaos: WRONG: {what}")

    def life(self, name: str) -> judge.Life:
        """Returns the newest life of a replica."""
        return next(life for life in reversed(self.lives) if life.name == name)

    def metrics(self, name: str) -> dict[str, float]:
        """Returns a replica's samples by `name{labels}`; none if it does not answer."""
        try:
            with httpx.Client(trust_env=False, timeout=20) as http:
                lines = http.get(self.fleet.url(name) + "/metrics").text.splitlines()
        except httpx.HTTPError:
            return {}
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {key: float(value) for key, value in pairs}

    def metric(self, name: str, metric: str) -> float:
        """Returns the sum of a replica's samples of a metric."""
        return judge.total(self.metrics(name), metric)

    def log(self, name: str) -> str:
        """Returns what a process has logged."""
        path = self.fleet.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace")

    def had(self, name: str) -> list[Sent]:
        """Returns the requests that have ended in this life of a replica."""
        life, to = self.life(name), judge.upstreams(self.log("nginx"))
        return [sent for sent in [*self.load.sent] if life.had(sent, to)]

    def start(self, name: str, clock: bool = False, **environment: str) -> None:
        """Starts a replica, with a clock that can be set if so asked."""
        if clock:
            self.set_clock(0)
            environment |= {
                "LD_PRELOAD": str(self._clock_library()),
                "CLOCK_OFFSET": str(self.fleet.folder / "clock"),
            }
        # Its life begins here even if it is slow to answer, and then serves.
        self.lives.append(judge.Life(name, self.fleet.port(name), time.time()))
        before, self.clocked = self.fleet.environment, clock
        self.fleet.environment = {**before, **environment}
        try:
            self.fleet.replica(int(name.rpartition("-")[2]), *self.flags)
        finally:
            self.fleet.environment = before

    def end(self, name: str, clean: bool) -> None:
        """Ends what is left of a replica; a clean end has lost no request."""
        life = self.life(name)
        life.ended, life.clean = time.time(), clean
        self.fleet.stop(name, signal.SIGKILL)

    def set_clock(self, seconds: int) -> None:
        """Sets the date of a replica that was started with a clock, against the true one."""
        path = self.fleet.folder / "clock"
        # The replica has it in its memory: it must stay the same file, and change in one write.
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            file.write(struct.pack("<q", seconds))

    def _clock_library(self) -> pathlib.Path:
        library = self.fleet.folder / "clock.so"
        if not library.exists():
            command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(CLOCK)]
            subprocess.run(command, check=True)
        return library

    @contextlib.contextmanager
    def taken_out(self, name: str) -> Iterator[None]:
        """Takes a replica out of nginx, the way deploy/README.md says."""
        config = self.fleet.folder / "nginx.conf"
        text = config.read_text(encoding="utf-8")
        line = rf"(server 127.0.0.1:{self.fleet.port(name)}) [^;]*;"
        config.write_text(re.sub(line, r"\1 down;", text), encoding="utf-8")
        self.fleet.reload_nginx()
        try:
            yield
        finally:
            config.write_text(text, encoding="utf-8")
            self.fleet.reload_nginx()

    # -- the run -----------------------------------------------------------------------------------

    def run(self, faults: Sequence[str]) -> dict[str, Any]:
        """Lets one fault follow the other, then any again until the time is over, and returns the
        report."""
        deadline = time.monotonic() + self.seconds
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            names = [*faults]
            while names or time.monotonic() < deadline - 20:
                self._under(names.pop(0) if names else self.draw.choice(faults))
        finally:
            self._over.set()
            watch.join()
            self.disks.close()
        self._beside_plain()
        return self._report()

    def _under(self, fault: str) -> None:
        """Runs the load with a fault beside it, and looks at the fleet when it is at rest."""
        self.row = Row(fault)
        self.rows.append(self.row)
        started, first = time.monotonic(), len(self.load.sent)
        logged = {name: len(self.log(name)) for name in REPLICAS}
        self.load.start()
        try:
            time.sleep(1)
            self.row.saw = FAULTS[fault](self)
        except Impossible as error:
            self.row.saw = f"NOT DONE: {error}"
        except Exception as error:
            self.wrong(f"{type(error).__name__}: {error}")
        try:
            self.load.stop()
        except RuntimeError as error:
            self.wrong(str(error))
        sent = self.load.sent[first:]
        self.row.count(sent)
        self._nothing_broke(sent)
        for name in REPLICAS:
            self._rests(name)
            if fault in QUIET and "Traceback" in self.log(name)[logged[name] :]:
                self.wrong(f"{name} logged a traceback")
        self.row.seconds = round(time.monotonic() - started, 1)
        told = f"{self.row.seconds:.0f} s, {self.row.requests} requests"
        self.say(f"chaos: {fault}: {told}; {self.row.saw}")

    def _nothing_broke(self, sent: Sequence[Sent]) -> None:
        """Holds that no request broke, but those that a replica had when it was killed."""
        to = judge.upstreams(self.log("nginx"))
        killed = [life for life in self.lives if life.ended is not None and not life.clean]
        for one in sent:
            if one.outcome != BROKEN:
                continue
            if any(life.had(one, to) for life in killed):
                self.row.lost += 1
                continue
            long = ("prompt", "input", "messages")
            fields = {k: v for k, v in one.ask.body.items() if k not in long}
            self.wrong(f"{one.ask.path} {fields} at {to.get(one.ask.number)}: {one.why}")

    def _rests(self, name: str) -> None:
        """Holds that a replica without clients holds nothing and has counted what they saw."""
        left: list[str] = []

        def at_rest() -> bool:
            metrics = self.metrics(name)
            left[:] = judge.held(metrics) if metrics else ["it does not answer"]
            return not left

        if not eventually(at_rest, REST):
            self.wrong(f"{name} at rest: {', '.join(left)}")
        life = self.life(name)
        grown = judge.since(self.metrics(name), life.before)
        for found in judge.accounts(grown, self.had(name), life.foreign):
            self.wrong(f"{name}: {found}")

    def _watch(self) -> None:
        """Writes down the replicas' memory, once a second."""
        while not self._over.wait(1):
            for name in REPLICAS:
                process = self.fleet.running.get(name)
                if process is None or process.poll() is not None:
                    continue
                with contextlib.suppress(psutil.Error):
                    whole = psutil.Process(process.pid)
                    parts = [whole, *whole.children(recursive=True)]
                    size = sum(part.memory_info().rss for part in parts)
                    life = self.life(name)
                    if life.ended is None:
                        life.memory.append((time.time(), size))

    def _beside_plain(self) -> None:
        """Asks a vLLM without this plugin what the fuzzer got a 5xx for: what that answers with one
        too is not ours."""
        errors = [error for fuzzed in self.fuzzing for error in fuzzed.errors]
        if not errors:
            return
        if "replica-2" not in self.fleet.running:
            self.fleet.replica(2, *self.plain, plain=True)
        self.row = next(row for row in self.rows if row.fault == "fuzzed bodies")
        ours = fuzz.again(self.fleet.url("replica-2"), errors)
        self.row.saw += (
            f"; plain vLLM answers {len(errors) - len(ours)} of {len(errors)} with 5xx too"
        )
        for error in ours:
            self.wrong(f"5xx where plain vLLM has none: {error}")

    def _report(self) -> dict[str, Any]:
        memory = []
        self.row = self.rows[-1]
        for life in self.lives:
            grown = judge.growth(life.memory)
            if grown is None:
                continue
            # One sample in ten seconds, as a curve says more than its end.
            curve = [(round(at - life.started), size >> 20) for at, size in life.memory[::10]]
            memory.append({"replica": life.name, **asdict(grown), "mib_by_second": curve})
            if not grown.within_noise:
                self.wrong(f"{life.name}'s memory grew by more than noise: {grown}")
        answers = sum((fuzzed.answers for fuzzed in self.fuzzing), Counter[int]())
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
            "memory": memory,
            "fuzzed": {str(status): count for status, count in sorted(answers.items())},
            "wrong": [found for row in self.rows for found in row.wrong],
        }
