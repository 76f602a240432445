"""What is done to a fleet while its clients go on asking. Each returns a line on what it saw."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import psutil

from tests.chaos import fuzz
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.chaos.run import Chaos

VICTIM = "replica-1"
RULES = "--kv-budget-rules"
GOOD_RULES = "rules: [{name: small, when: {headers: {x-chaos: [small]}}, budget_max: 0.5}]\n"
CHAOS_HEADER = {"x-chaos": "small"}
NONSENSE = b"rules: [\x00\xff {{ not YAML"


Fault = Callable[["Chaos"], str]


class Impossible(Exception):
    """This cannot be done on this machine; the message says why and what would help."""


def load_alone(chaos: Chaos) -> str:
    """Nothing but clients, of which some leave and some ask for what is not to be had."""
    time.sleep(chaos.share(0.15))
    return "clients leave, and ask for what is refused"


def fuzzed(chaos: Chaos) -> str:
    """schemathesis asks one replica, beside the load."""
    chaos.life(VICTIM).foreign = True
    found = fuzz.run(
        chaos.fleet.url(VICTIM),
        chaos.load.asks.model,
        chaos.fleet.folder,
        chaos.tools,
        # It takes a while to read the document.
        max(20, chaos.share(0.15)),
        chaos.draw.randrange(2**31),
    )
    chaos.fuzzing.append(found)
    return ", ".join(f"{count} x {status}" for status, count in sorted(found.answers.items()))


def kills(choose: Callable[[psutil.Process, list[psutil.Process]], list[psutil.Process]]) -> Fault:
    """Returns a fault: SIGKILL for those of a replica's first process and all others that `choose`
    returns. All of the replica must be gone then, and it must come back."""

    def fault(chaos: Chaos) -> str:
        first = psutil.Process(chaos.fleet.running[VICTIM].pid)
        others = first.children(recursive=True)
        flying, since = len(chaos.load.flying), time.monotonic()
        victims = choose(first, others)
        names = sorted({part.name() for part in victims})
        for part in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        chaos.fleet.running[VICTIM].poll()
        _, alive = psutil.wait_procs([first, *others], timeout=60)
        took = time.monotonic() - since
        if alive:
            named = [part.name() for part in alive]
            chaos.wrong(f"a minute after SIGKILL for {names} of {VICTIM}, these live: {named}")
        chaos.end(VICTIM, clean=False)
        # The next one's clock can be set.
        chaos.start(VICTIM, clock=True)
        came_back(chaos)
        return (
            f"SIGKILL for {', '.join(names)}, with {flying} requests in the fleet; all gone after "
            f"{took:.1f} s; back after the restart"
        )

    return fault


def _engines(_: psutil.Process, others: list[psutil.Process]) -> list[psutil.Process]:
    found = [part for part in others if "EngineCore" in " ".join(part.cmdline())]
    if not found:
        raise RuntimeError(f"no engine among {[part.cmdline() for part in others]}")
    return found


def came_back(chaos: Chaos) -> None:
    """Holds that the victim has requests again."""
    if not eventually(lambda: chaos.metric(VICTIM, "vllm_kvcrush:requests_total") > 0, 60):
        chaos.wrong(f"{VICTIM} got no request within a minute of its restart")


def clock_jumps(chaos: Chaos) -> str:
    """The clock of one replica jumps an hour ahead and an hour back."""
    if not chaos.clocked:
        raise Impossible(f"{VICTIM} has not been killed since, and has the machine's clock")
    for jump in (3600, -3600, 0):
        chaos.set_clock(jump)
        since = time.time()

        def jumped(jump: int = jump, since: float = since) -> bool:
            told = (s for s in chaos.had(VICTIM) if s.created and s.started > since)
            return any(abs(s.created - s.started - jump) < 60 for s in told)

        if not eventually(jumped, 60):
            chaos.wrong(f"no answer of {VICTIM} has a clock that is {jump} s off")
        time.sleep(chaos.share(0.02))
    return "+1 h, -1 h and back, as its answers say"


@contextlib.contextmanager
def full_disk(folder: pathlib.Path) -> Iterator[None]:
    """Mounts a file system of a megabyte there, and fills it."""
    folder.mkdir(exist_ok=True)
    command = ("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise Impossible(f"needs a small file system, and mount says {mounted.stderr.strip()}")
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"\0" * 4096)
        try:
            (folder / "more").write_bytes(b"\0")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            raise RuntimeError(f"{folder} is not full")
        yield
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=False)


def ended_while_streaming(chaos: Chaos) -> str:
    """A replica is taken out of the front and gets SIGTERM: what streams on it runs to its end. It
    starts again with a cache folder on a disk that is full."""
    process = chaos.fleet.running[VICTIM]
    with chaos.taken_out(VICTIM):
        # nginx's old workers pass on what they have; new requests go elsewhere. vLLM ends with no
        # token what has not reached its engine at SIGTERM, which on a busy machine takes seconds.
        time.sleep(5)
        streams = chaos.metric(VICTIM, "vllm:num_requests_running")
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(150)
        except subprocess.TimeoutExpired:
            chaos.wrong(f"{VICTIM} still runs 150 s after SIGTERM")
            code = None
        if code not in (0, None):
            chaos.wrong(f"{VICTIM} ended with status {code} after SIGTERM")
        chaos.end(VICTIM, clean=True)
        with contextlib.ExitStack() as stack:
            disk = chaos.fleet.folder / "full"
            try:
                stack.enter_context(full_disk(disk))
                where = {"VLLM_KVCRUSH_CACHE": str(disk / "cache"), "XDG_CACHE_HOME": str(disk)}
                told = "started again with a full disk for its caches"
            except Impossible as error:
                where, told = {}, f"no full disk: {error}"
            chaos.start(VICTIM, **where)
            # It runs on with that disk.
            chaos.disks.enter_context(stack.pop_all())
    came_back(chaos)
    return f"{streams:g} requests ran on it; {told}"


def nonsense_rules(chaos: Chaos) -> str:
    """The file of budget rules is replaced by nonsense: the rules of before stay."""
    if chaos.rules is None:
        raise Impossible(f"these replicas have no {RULES}")
    in_force = "vllm_kvcrush:rules_last_reload_successful"
    good, logged = chaos.rules.read_bytes(), len(chaos.log(VICTIM))
    chaos.rules.write_bytes(NONSENSE)
    if not eventually(lambda: chaos.metric(VICTIM, in_force) == 0, 20):
        chaos.wrong(f"{VICTIM} counts a rules file that is nonsense as loaded")
    if f"{RULES}: the file is refused" not in chaos.log(VICTIM)[logged:]:
        chaos.wrong(f"{VICTIM} says nothing of a rules file that is nonsense")
    # Of the rule alone: the server allows this.
    chaos.life(VICTIM).foreign = True
    body = {"model": chaos.load.asks.model, "prompt": "Hello", "max_tokens": 1, "kv_budget": 0.7}
    with httpx.Client(trust_env=False, timeout=60, base_url=chaos.fleet.url(VICTIM)) as http:
        for header, wanted in ((CHAOS_HEADER, 400), ({}, 200)):
            status = http.post("/v1/completions", json=body, headers=header).status_code
            if status != wanted:
                chaos.wrong(f"while the rules are nonsense: {status} instead of {wanted}")
    time.sleep(chaos.share(0.02))
    chaos.rules.write_bytes(good)
    if not eventually(lambda: chaos.metric(VICTIM, in_force) == 1, 20):
        chaos.wrong(f"{VICTIM} does not take the rules file that was put right")
    return "the rules of before hold, until the file is right again"


FAULTS: dict[str, Fault] = {
    "load": load_alone,
    "fuzzed bodies": fuzzed,
    "a replica killed": kills(lambda first, others: [first, *others]),
    "clock jumps": clock_jumps,
    "nonsense rules": nonsense_rules,
    "its engine killed": kills(_engines),
    "SIGTERM, full disk": ended_while_streaming,
    "its API server killed": kills(lambda first, others: [first]),
    "load again": load_alone,
}
# Those of runs that have the time.
LONG = ("its API server killed",)
# Those under which no server has a reason to log a traceback.
QUIET = ("load", "clock jumps", "nonsense rules", "load again")
