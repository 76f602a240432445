"""A Triton backend called "cpu" that can compile nothing.

vLLM's CPU build uses its Triton kernels, and with them the V2 model runner, only if Triton has a
backend of that name, which the fork triton-cpu has. With TRITON_INTERPRET=1 nothing is compiled, so
that a name is enough. This folder is on PYTHONPATH only for these tests, because without
TRITON_INTERPRET vLLM would choose V2 and die at the first launch.
"""
