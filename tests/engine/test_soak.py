"""A short form of `make soak`."""

from __future__ import annotations

import random

import pytest

from tests import soak
from tests.pairwise import FULL

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("configuration", ["16-bfloat16", "32-float32"])
def test_random_requests_end_no_engine(
    configuration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One engine schedules synchronously, the other asynchronously."""
    seed = random.randrange(2**31)
    with capsys.disabled():
        print(f"\nsoak of {configuration}: seed {seed}")
    (figures,) = soak.run(minutes=2 if FULL else 0.2, seed=seed, only=configuration)
    assert figures["finished"] + figures["aborted"] + figures["refused"] == figures["requests"]
    assert figures["compactions"] > 100 and figures["preemptions"] > 0
