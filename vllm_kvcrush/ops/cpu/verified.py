"""Which kernels were seen working on which processors."""

from __future__ import annotations

# By instruction set, for `vllm-kvcrush doctor`: whoever sees more adds it, with the date.
VERIFIED = {
    "baseline": "every test, on x86-64 (2026-11)",
    "avx2": "every test and benchmark, on AMD EPYC of Zen 3 (2026-11)",
    "avx512": "every codec on an Intel server CPU with AMX, int4 on AMD EPYC (2026-11)",
    "avx512bf16": "never on a processor; its instructions in plain C++ pass the tests (2026-11)",
    "amx": "never on a processor; its instructions in plain C++ pass the tests (2026-11)",
    "neon": "under emulation only (qemu-user, 2026-11)",
}
