"""What every test may use: the demo model and long real text."""

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

import pytest
from hypothesis import core

from tests.seconds import Seconds

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seconds(), "seconds")
    if getattr(config.option, "dist", "no") == "load":  # of `-n 2` alone
        config.option.dist, config.option.loadscopereorder = "loadgroup", False
    # A seed of its own for each run, named in the header; --hypothesis-seed repeats one. Workers
    # of pytest-xdist take their controller's.
    if core.global_force_seed is None:
        seed = os.environ.setdefault("KVCRUSH_HYPOTHESIS_SEED", str(random.randrange(2**31)))
        core.global_force_seed = int(seed)


def pytest_report_header() -> str:
    return f"hypothesis: --hypothesis-seed={core.global_force_seed}"


# What pytest-xdist hands to its workers, longest first, so that they end at about the same time.
# Engines and servers that several tests share are started once, so these tests stay together, and
# so do those of a file; only those that run in processes of their own need not.
SHARED = ("demo_engine", "tiny_engine", "plain", "servers", "server")
APART = ("tests/unit/test_gpu.py", "tests/engine/test_soak.py")
LONGEST = (
    "tests/unit/test_gpu.py::test_kernels_under_the_interpreter",
    "demo_engine",
    "tests/engine/test_v2.py",
    "servers",
    "tests/engine/test_modes.py",
    "server",
    "tests/unit/test_gpu.py",
    "tests/engine/test_benchmarks.py",
    "tiny_engine",
    "tests/server/test_front_ends.py",
    "tests/engine/test_soak.py",
    "tests/blocks",
)


def group(item: pytest.Item) -> str:
    """Returns the name that a test shares with those that one worker must run with it."""
    names: list[str] = getattr(item, "fixturenames", [])
    if "engine" in names:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        names = [chosen.get("engine", "demo_engine")]
    path = item.nodeid.split("::")[0]
    alone = item.nodeid if path in APART else path
    return next((name for name in SHARED if name in names), alone)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return

    def rank(item: pytest.Item) -> int:
        of = group(item)
        return next((i for i, start in enumerate(LONGEST) if of.startswith(start)), len(LONGEST))

    items.sort(key=rank)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.fixture(scope="session")
def model_path() -> str:
    from vllm_kvcrush.tools import demo_model

    return str(demo_model.prepare(say=lambda line: print(line, file=sys.stderr)))


@pytest.fixture(scope="session")
def text() -> str:
    """Real English prose that every Python ships."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(scope="session")
def tables(model_path: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Transform tables of the demo model by codec, where the plugin looks for them. Made once."""
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
