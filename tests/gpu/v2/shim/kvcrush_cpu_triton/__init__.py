"""A Triton backend called "cpu" that can compile nothing.

vLLM's CPU build uses its Triton kernels, and with them the V2 model runner, only if Triton has a
backend of that name: the fork triton-cpu. With TRITON_INTERPRET=1 nothing is compiled, so that a
name is enough. In a folder of its own, and on PYTHONPATH only for these tests, because without
TRITON_INTERPRET vLLM would believe it, choose V2 and die at the first launch.
"""
