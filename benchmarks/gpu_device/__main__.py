"""Measures correctness, speed and serving on a GPU, into one file to send back.

Under 20 minutes: the environment, tests/gpu on the device, the kernels against a measured copy and
against vLLM's FlashAttention, and plain vLLM against the plugin where its gate allows GPUs. Each
part has a share of --minutes. A run that was killed resumes. A call computes one layer; `graph` is
the replay of a CUDA graph, `eager` launches from Python; `low` and `high` are quartiles.

    python -m benchmarks.gpu_device [--minutes N] [--json FILE] [--dry-run]
"""

from __future__ import annotations

from benchmarks.gpu_device import machine


def main() -> None:
    # Before anything is imported that may be missing.
    if sentence := machine.missing_package():
        raise SystemExit(f"gpu_device: {sentence}")
    from benchmarks.gpu_device import parts
    from benchmarks.report import interruptible

    with interruptible("gpu_device"):
        parts.run(__doc__ or "")


if __name__ == "__main__":
    main()
