"""The benchmarks: each is a module that takes `--quick` and `--json FILE`."""
