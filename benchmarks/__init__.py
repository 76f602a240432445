"""Benchmarks: each is a module with `--quick` and `--json FILE`."""
