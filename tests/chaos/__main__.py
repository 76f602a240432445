"""Chaos: two replicas behind nginx, random clients, and one thing after the other that goes wrong.

    python -m tests.chaos [--minutes 5] [--seed 7] [--json build/chaos.json]

Clients with random lengths, budgets, policies and endpoints ask all the time; some leave in
mid-stream, some ask for what must be refused. Beside them bodies are fuzzed from the server's own
OpenAPI document (schemathesis), a replica or its engine is killed and started again, its clock
jumps, the file of budget rules becomes nonsense, it gets SIGTERM while it streams, and its caches
are on a full disk. After each: nothing broke but what was on the killed replica, pools are empty,
counters are what clients saw, and at the end memory has not grown by more than its noise. All of it
is on 127.0.0.1, and each loop is bounded. Status 1 and lines with WRONG if something is not so.

With --leak the replicas leak four megabytes with each compaction, which must be found: status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import random
import signal
import subprocess
import sys
from typing import Any

from deploy.fleet import ROOT, FleetError, fleet, missing
from tests.chaos.asks import Asks
from tests.chaos.faults import FAULTS, GOOD_RULES, LONG, RULES
from tests.chaos.judge import as_table
from tests.chaos.load import Load
from tests.chaos.run import REPLICAS, Chaos

NAME = "smollm2"
# A run of so many seconds has time for all faults.
LONG_SECONDS = 600
POLICIES = (
    *("auto", "int8", "int4", "tc4", "mikv", "snapkv", "h2o", "streaming", "kvcrush", "adakv"),
    *("keepkv", "fair"),
)
# What clients make of them.
WRAPPED = ("fair(snapkv)", "kvcrush(h2o)", "fair(kvcrush(snapkv))@int4", "adakv@int8")
# 60 blocks, less than the longest request takes raw: requests wait, and some are preempted.
SIZES = ("--max-model-len=2048", "--max-num-batched-tokens=512", "--max-num-seqs=16")
FLAGS = (
    *SIZES,
    "--kv-cache-memory-bytes=88473600",
    f"--kv-policy-allow={','.join(POLICIES)}",
    "--kv-policy-config.prefill_interval=256",
    "--kv-policy-config.decode_interval=32",
)
# oneDNN keeps the last 1,024 matrix products that it compiled, one for each shape and each number
# of tokens that a step had: in float32 hundreds of megabytes for the demo model, with this plugin
# and without. Without that cache, what goes on growing is a leak.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
# A policy that leaks, and does nothing else wrong, if a file says so.
LEAKY = ROOT / "tests" / "fleet" / "faulty"
# Plain vLLM wants room for the longest request.
PLAIN = (*SIZES, "--kv-cache-memory-bytes=134217728")


def tools() -> pathlib.Path:
    """Installs the fuzzer where it does not disturb vLLM, and returns where that is."""
    done = subprocess.run(
        [ROOT / "scripts" / "deploy_tools.sh", "tests/chaos/requirements.txt"],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return pathlib.Path(done.stdout.strip())


def prose() -> str:
    """Returns real English prose that every Python ships."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def leaky(folder: pathlib.Path) -> dict[str, str]:
    """Returns what makes the policy `faulty` known to replicas, and leak in them."""
    control = folder / "fault"
    control.write_text("leak", encoding="utf-8")
    places = filter(None, (str(LEAKY), os.environ.get("PYTHONPATH")))
    return {"PYTHONPATH": os.pathsep.join(places), "KVCRUSH_FLEET_FAULT": str(control)}


def table(report: dict[str, Any]) -> str:
    """Returns a report's tables."""
    rows = [{**row, "wrong": len(row["wrong"])} for row in report["rows"]]
    for row in rows:
        row["saw"] = row.pop("saw").replace("|", "/")
    memory = [
        {
            "replica": found["replica"],
            "seconds": round(found["seconds"]),
            "MiB at the end": found["last"] >> 20,
            "grown, MiB": round(found["grown"] / 2**20, 1),
            "noise, MiB": round(found["noise"] / 2**20, 1),
            "MiB an hour": round(found["slope"] / 2**20),
        }
        for found in report["memory"]
    ]
    return "\n\n".join(as_table(found) for found in (rows, memory) if found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="the fleet's start not counted")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("build/chaos.json"))
    parser.add_argument("--only", choices=[*FAULTS], action="append", help="may be repeated")
    parser.add_argument("--leak", action="store_true", help="shows that a leak is found")
    given = parser.parse_args()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    from vllm_kvcrush.tools import demo_model

    model = os.environ.get("MODEL") or str(demo_model.prepare(say=print))
    without = [package for package in missing() if package == "nginx-light"]
    if without:
        print("chaos: nginx is not here: apt-get install nginx-light", file=sys.stderr)
        return 1
    found = tools()
    print(f"chaos: seed {given.seed}", flush=True)
    with fleet(model, environment=ENVIRONMENT) as made:
        rules = made.folder / "rules.yaml"
        rules.write_text(GOOD_RULES, encoding="utf-8")
        flags, policies = (*FLAGS, f"{RULES}={rules}"), (*POLICIES, *WRAPPED)
        if given.leak:
            made.environment = {**ENVIRONMENT, **leaky(made.folder)}
            flags += (f"--kv-policy-allow={','.join((*POLICIES, 'faulty'))}",)
            policies = ("faulty",)
        try:
            for name in REPLICAS:
                made.vllm(name, *flags)
            for name in REPLICAS:
                made.wait(name, "/health")
            made.front("nginx")
        except FleetError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 1
        asks = Asks(given.seed, prose(), NAME, policies)
        chaos = Chaos(
            fleet=made,
            load=Load(made.url("nginx"), asks),
            seconds=60 * given.minutes,
            seed=given.seed,
            flags=flags,
            plain=PLAIN,
            tools=found,
            rules=rules,
            say=lambda line: print(line, flush=True),
        )
        long = 60 * given.minutes >= LONG_SECONDS
        names = [name for name in FAULTS if long or name not in LONG]
        report = chaos.run(given.only or names)
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    verdict = f"{len(report['wrong'])} things are wrong" if report["wrong"] else "all is well"
    print(f"chaos: {verdict}; the report is {given.json}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    # SIGTERM must end the fleet too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
