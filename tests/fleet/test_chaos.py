"""A minute of `make chaos` on the shared fleet: fuzzed bodies, and a replica killed under load."""

from __future__ import annotations

import pytest

from deploy.fleet import Fleet
from tests.chaos.__main__ import table, tools
from tests.chaos.asks import Asks
from tests.chaos.fuzz import FEWEST
from tests.chaos.load import Load
from tests.chaos.run import Chaos
from tests.fleet.conftest import NAME, PLAIN

pytestmark = pytest.mark.server
SEED = 5
FAULTS = ("load", "fuzzed bodies", "a replica killed")


def test_a_minute_of_chaos(running: Fleet, ours: tuple[str, ...], text: str) -> None:
    policies = ("auto", "int8", "int4", "snapkv")
    load = Load(running.url("nginx"), Asks(SEED, text, NAME, policies))
    chaos = Chaos(
        fleet=running,
        load=load,
        seconds=45,
        seed=SEED,
        flags=ours,
        plain=PLAIN,
        tools=tools(),
    )
    report = chaos.run(FAULTS)
    print(table(report))
    assert not report["wrong"]
    assert len(load.sent) > 30
    assert {row["fault"] for row in report["rows"]} == {*FAULTS}
    assert not any(row["saw"].startswith("NOT DONE") for row in report["rows"])
    assert sum(row["compactions"] for row in report["rows"]) > 10
    assert sum(report["fuzzed"].values()) >= FEWEST
