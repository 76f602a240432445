"""GPU kernels in Triton, for CUDA and ROCm; under TRITON_INTERPRET=1 they run on a CPU.

`layout` has the picture of a page and imports no Triton. What was and was not tried on a device is
in docs/gpu.md.
"""
