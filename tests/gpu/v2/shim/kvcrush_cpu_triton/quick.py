"""Makes the interpreter right and quick, in every process of vLLM."""

import functools


@functools.cache
def install() -> None:
    from triton.runtime.interpreter import GridExecutor

    from tests.gpu.conftest import mend_interpreter

    mend_interpreter()
    # After a launch it would copy every argument's whole storage back to the device, which is the
    # same memory here.
    GridExecutor._restore_args_dev = lambda *_: None
