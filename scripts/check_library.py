"""Says whether the kernels of an installed wheel load, and which instruction sets of this CPU they
have: for whoever builds wheels, without torch or vLLM."""

import ctypes
import importlib.util
import pathlib
import platform
import sys

KNOWN = {
    "x86_64": ("baseline", "avx2", "avx512", "avx512bf16", "amx"),
    "aarch64": ("baseline", "neon"),
}
# What the kernel calls the newest instructions that each set needs.
NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512bw", "avx512vl", "avx512_vnni"},
    "avx512bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
}


def main() -> int:
    spec = importlib.util.find_spec("vllm_kvcrush")
    if spec is None or spec.origin is None:
        print("vllm-kvcrush is not installed here.")
        return 1
    path = pathlib.Path(spec.origin).with_name("_kernels.so")
    library = ctypes.CDLL(str(path))
    library.kvc_isa.restype = ctypes.c_char_p
    flags = set(pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    problems = []
    for name in KNOWN[platform.machine()]:
        needed = name not in NEEDS or flags >= NEEDS[name]
        taken = library.kvc_use_isa(name.encode()) == 0
        print(f"{name}: {'used' if taken else 'not on this CPU' if not needed else 'MISSING'}")
        if needed and not taken:
            problems.append(name)
    print(f"{path}: version {library.kvc_version()} of the interface")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
