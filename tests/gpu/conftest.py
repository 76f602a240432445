"""The GPU kernels' tests. They need a process of their own, because Triton decides at import time
whether kernels are interpreted: tests/unit/test_gpu.py starts it. On a machine with a GPU,
`KVCRUSH_GPU_TESTS=1 python -m pytest tests/gpu` runs the same tests on the device, and
`make bench-gpu` does so one crash or hang at a time.
"""

from __future__ import annotations

import functools
import os
import random
import types
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if os.environ.get("KVCRUSH_GPU_TESTS") else ["test_*.py"]
if INTERPRETED:
    # Of which the first compiles, and the second counts.
    collect_ignore_glob += ["test_launches.py", "test_asked.py"]


@pytest.fixture(autouse=True)
def draw() -> random.Random:
    seed = int(os.environ.get("KVCRUSH_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
    print(f"KVCRUSH_TEST_SEED={seed}")  # pytest shows it when the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


# One a process, and part of every test's name: whoever reads a result sees where it ran.
MODE = "interpreter" if INTERPRETED else "cuda"


@pytest.fixture(scope="session", params=[MODE])
def mode(request: pytest.FixtureRequest) -> str:
    """Returns how kernels run: "interpreter", or "cuda" (which is also torch's name for ROCm)."""
    return str(request.param)


@pytest.fixture(scope="session")
def device(mode: str) -> str:
    """Returns the device of tensors for kernels; interpreted ones read CPU memory."""
    return "cpu" if mode == "interpreter" else "cuda"


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """Mends Triton's interpreter for all tests."""
    if MODE == "interpreter":
        mend_interpreter()


@functools.cache
def mend_interpreter() -> None:
    """Corrects bfloat16 products in Triton's interpreter, and makes it faster at launches, types,
    and the search for overflows."""
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    # It holds bfloat16 as uint16 and would multiply those. Conversions from and to float32 are
    # right, and these kernels do nothing else with bfloat16.
    plain_dot = interpreter.InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot

    plain_type = functools.cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> np.dtype[Any]:
        kind = kind.scalar
        return np.dtype(np.uint64) if kind.is_ptr() else plain_type(kind)

    interpreter._get_np_dtype = numpy_type

    # The same assertion as its own, on the numbers themselves instead of in ten of its operations.
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            a, b = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
            result = operations[binary_op.__name__](a, b)
            least, most = kind.get_int_min_value(), kind.get_int_max_value()
            assert result.min() >= least and result.max() <= most, (
                f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"
            )

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

    # It wraps the whole language anew whenever a kernel calls a function: once a launch will do.
    plain_patch, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = plain_patch(modules)
        try:
            return plain_launch(self, *args, **kwargs)
        finally:
            scope.restore()

    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter.GridExecutor.__call__ = launch
