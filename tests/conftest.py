"""Fixtures for all tests, such as the demo model and long real text, and how tests are shared out
over processes."""

from __future__ import annotations

import json
import os
import pathlib
import pydoc_data.topics
import random
import sys
from typing import Any

# Two engines share two cores: OpenMP threads that wait for a preempted one would spin. Must be
# set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor may vLLM pin the threads of both to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# vLLM keeps the stream that is standard output when it is first imported: inside a test that
# captures output, that one is closed when the test ends, and each line logged later is a traceback.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.__stdout__")

import pytest
from hypothesis import core

from tests.seconds import Seconds

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seconds(), "seconds")
    # Each run has another seed, which the header names; --hypothesis-seed repeats it. Workers of
    # pytest-xdist take their controller's.
    if core.global_force_seed is None:
        seed = os.environ.setdefault("KVCRUSH_HYPOTHESIS_SEED", str(random.randrange(2**31)))
        core.global_force_seed = int(seed)


def pytest_report_header() -> str:
    return f"hypothesis: --hypothesis-seed={core.global_force_seed}"


# What workers of pytest-xdist (`make test`) run as one piece: tests of one file, and all that share
# an engine or a server, so that each is started once. Tests that run in processes of their own need
# not wait for each other.
SHARING = {
    "tests/engine/test_canary.py": "demo engine",
    "tests/engine/test_containment.py": "demo engine",
    "tests/engine/test_contract.py": "demo engine",
    "tests/engine/test_engine.py": "demo engine",
    "tests/engine/test_pressure.py": "demo engine",
    "tests/server/test_canary.py": "server",
    "tests/server/test_endpoints.py": "server",
    "tests/server/test_live.py": "server",
    "tests/server/test_server.py": "server",
}
APART = ("tests/unit/test_gpu.py", "tests/engine/test_soak.py")
# Longest first, so that the workers end at about the same time.
LONGEST = (
    "tests/engine/test_v2.py",
    "demo engine",
    "tests/unit/test_gpu.py",
    "tests/engine/test_modes.py",
    "tests/server/test_front_ends.py",
    "tests/engine/test_benchmarks.py",
    "server",
    "tiny engine",
    "tests/engine/test_soak.py",
    "tests/blocks",
)


def group(nodeid: str) -> str:
    """Returns the name of the piece that a test belongs to."""
    path, _, name = nodeid.partition("::")
    if "tiny_engine" in name:  # the parameter of `on_tiny_model`
        return "tiny engine"
    return nodeid if path in APART else SHARING.get(path, path)


def rank(item: pytest.Item) -> int:
    """Returns the place of a test's piece in the order in which pieces are handed out."""
    piece = group(item.nodeid)
    return next((i for i, start in enumerate(LONGEST) if piece.startswith(start)), len(LONGEST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return Pieces(config, log)


@pytest.fixture(scope="session")
def model_path() -> str:
    from vllm_kvcrush.tools import demo_model

    return str(demo_model.prepare(say=lambda line: print(line, file=sys.stderr)))


@pytest.fixture(scope="session")
def text() -> str:
    """Returns real English prose that every Python ships."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(scope="session")
def tables(model_path: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the transform tables of the demo model, by codec. They are made once, where the
    plugin looks for them."""
    from vllm_kvcrush.codecs import FITTED
    from vllm_kvcrush.codecs.transform import calibrate
    from vllm_kvcrush.codecs.transform import tables as transform_tables
    from vllm_kvcrush.codecs.transform.points import TablesError

    config = json.loads(pathlib.Path(model_path, "config.json").read_text())
    path = transform_tables.default_path(config)
    try:
        return {codec: transform_tables.load(path, config, codec) for codec in FITTED}
    except TablesError:
        prose = tmp_path_factory.mktemp("prose") / "text.txt"
        prose.write_text(text[:20000], encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate.calibrate(model_path, path, prose)
    return {codec: transform_tables.load(path, config, codec) for codec in FITTED}
