"""The V2 model runner, interpreted. Its tests need a process of their own, with Triton and the
folder `shim` on PYTHONPATH: tests/engine/test_v2.py starts it. By hand:

    PYTHONPATH=$(scripts/triton.sh):tests/gpu/v2/shim:. TRITON_INTERPRET=1 KVCRUSH_V2_TESTS=1 \
        python -m pytest tests/gpu/v2
"""

from __future__ import annotations

import os

import pytest

from tests import tiny
from tests.gpu.v2.engine import SHAPE, Engine

collect_ignore_glob = ["test_*.py"]
if os.environ.get("KVCRUSH_V2_TESTS"):
    collect_ignore_glob = []
    # On this condition only, because a session that ignores these tests still reads this file.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )


@pytest.fixture(autouse=True, scope="session")
def quick_launches(interpreter: None) -> None:
    """Does what the folder `shim` does in other processes of vLLM, and keeps vLLM's buffers from
    asking for pinned memory."""
    import vllm.v1.worker.cpu.shm  # noqa: F401
    from kvcrush_cpu_triton import quick

    quick.install()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tiny"))
    tiny.save_model(path, SHAPE)
    return path


@pytest.fixture(scope="session")
def v1(model: str) -> Engine:
    return Engine(model, v2=False)


@pytest.fixture(scope="session")
def v2(model: str, v1: Engine) -> Engine:
    return Engine(model, v2=True)


@pytest.fixture(scope="session")
def tables(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tables") / "tables.safetensors")
    tiny.save_tables(model, path, SHAPE)
    return path


@pytest.fixture(scope="session")
def v1_fitted(model: str, tables: str) -> Engine:
    return Engine(model, v2=False, tables=tables)


@pytest.fixture(scope="session")
def v2_fitted(model: str, tables: str, v1_fitted: Engine) -> Engine:
    return Engine(model, v2=True, tables=tables)
