"""What every test may use: the demo model and long real text."""

from __future__ import annotations

import os
import pathlib
import pydoc_data.topics
import sys

# Two engines share two cores: OpenMP threads that wait for a preempted one would spin. Must be
# set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="session")
def model_path() -> str:
    from vllm_kvcrush import demo_model

    return str(demo_model.prepare(say=lambda line: print(line, file=sys.stderr)))


@pytest.fixture(scope="session")
def text() -> str:
    """Real English prose that every Python ships."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
