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

import pytest
from hypothesis import core

from tests.seconds import Seconds

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seconds(), "seconds")
    # A seed of its own for each run, named in the header; --hypothesis-seed repeats one.
    if core.global_force_seed is None:
        core.global_force_seed = random.randrange(2**31)


def pytest_report_header() -> str:
    return f"hypothesis: --hypothesis-seed={core.global_force_seed}"


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
