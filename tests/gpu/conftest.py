"""The GPU kernels' tests. They need a process of their own, because Triton decides at import time
whether kernels are interpreted: tests/unit/test_gpu.py starts it. On a machine with a GPU,
`KVCRUSH_GPU_TESTS=1 python -m pytest tests/gpu` runs the same tests on the device.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("KVCRUSH_GPU_TESTS") else ["test_*.py"]


@pytest.fixture(autouse=True)
def draw() -> random.Random:
    seed = int(os.environ.get("KVCRUSH_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
    print(f"KVCRUSH_TEST_SEED={seed}")  # pytest shows it when the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def device() -> str:
    """Interpreted kernels read CPU memory."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
