"""Compiles the GPU kernels ahead of time and says what can be known about them without a GPU."""
