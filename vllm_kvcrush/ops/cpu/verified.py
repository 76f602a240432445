"""Which kernels were seen working on which processors."""

from __future__ import annotations

# By instruction set, for `vllm-kvcrush doctor`: whoever sees more adds it, with the date.
VERIFIED = {
    "baseline": "every test, on x86-64 (2026-11)",
    "avx2": "every test and benchmark, on AMD EPYC of Zen 3; kernels on Zen 4 (2026-11)",
    "avx512": "every test, on AMD EPYC of Zen 4; every codec on an Intel CPU with AMX (2026-11)",
    "avx512bf16": "every test and the kernels' benchmark, on AMD EPYC of Zen 4 (2026-11)",
    "amx": "never on a processor; its instructions in plain C++ pass the tests (2026-11)",
    "neon": "under emulation only (qemu-user, 2026-11)",
}
