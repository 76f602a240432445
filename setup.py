"""Builds csrc/ into vllm_kvcrush/_kernels.so: plain C++ and a C interface, no torch, no Python, so
that one wheel serves every version of both. Everything else about the package is in
pyproject.toml."""

from __future__ import annotations

import os
import pathlib
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = pathlib.Path("csrc")
KERNELS = SOURCE / "kernels.cpp"
# Kernels that leave to those of the instruction set below what they do not do better.
MATRIX = SOURCE / "matrix.cpp"
FLAGS = [
    *("-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", f"-I{SOURCE}"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-tree-reassoc", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# The kernels are compiled once for each instruction set; the library chooses when it is loaded.
AVX2 = "-mavx2 -mfma -mf16c"
# GCC warns about its own AVX-512 headers.
AVX512 = (
    f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)

BF16 = f"{AVX512} -mavx512bf16 -DKVC_BELOW=kAvx512"
EMULATE = f"{AVX2} -DKVC_EMULATED"


class Unit(NamedTuple):
    """What an instruction set is compiled from, the table that it fills, and with which flags."""

    source: pathlib.Path
    table: str
    flags: str


ISAS = {
    "x86_64": {
        "avx2": Unit(KERNELS, "kAvx2", AVX2),
        "avx512": Unit(KERNELS, "kAvx512", AVX512),
        "avx512bf16": Unit(MATRIX, "kAvx512Bf16", BF16),
        "amx": Unit(MATRIX, "kAmx", f"{BF16} -DKVC_TILES"),
    },
    "aarch64": {"neon": Unit(KERNELS, "kNeon", "-DKVC_NEON")},
}
ISAS["arm64"] = ISAS["aarch64"]
# Sets that do in plain C++ what most CPUs lack: for tests, and only built where they are named.
EMULATED = {
    "x86_64": {
        "avx512_emulated": Unit(KERNELS, "kAvx512Emulated", EMULATE),
        "avx512bf16_emulated": Unit(MATRIX, "kAvx512Bf16Emulated", f"{EMULATE} -DKVC_BELOW=kAvx2"),
        "amx_emulated": Unit(MATRIX, "kAmxEmulated", f"{EMULATE} -DKVC_BELOW=kAvx2 -DKVC_TILES"),
    }
}
# Names in this variable leave the other instruction sets out: sanitizers make them slow to compile,
# and what this CPU lacks would not be run.
ONLY = "KVCRUSH_BUILD_ISAS"


def target() -> str:
    """Returns the machine that the compiler makes code for, which need not be the one that it runs
    on."""
    asked = subprocess.run([*compiler(), "-dumpmachine"], capture_output=True, text=True)
    return asked.stdout.partition("-")[0] or platform.machine()


def knows_tiles(flags: str) -> bool:
    """Returns whether compiler and assembler know the instructions of AMX, and says so if not."""
    command = [*compiler(), *flags.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    source = b'void f() { asm("tilerelease"); }'
    known = subprocess.run(command, input=source, stderr=subprocess.DEVNULL).returncode == 0
    if not known:
        print(f"{compiler()[0]} does not know AMX and AVX-512 BF16: their kernels are left out")
    return known


def units() -> list[tuple[pathlib.Path, str, list[str]]]:
    """Returns the translation units: source, name of the object file, and further flags."""
    known = ISAS.get(target(), {})
    wanted = os.environ.get(ONLY, " ".join(known)).split()
    everything = {**known, **EMULATED.get(target(), {})}
    isas = {
        name: unit
        for name, unit in everything.items()
        if name in wanted and (unit.source != MATRIX or knows_tiles(unit.flags))
    }
    without = [f"-DKVC_WITHOUT_{isa.upper()}" for isa in everything if isa not in isas]
    plain = set(SOURCE.glob("*.cpp")) - {KERNELS, MATRIX}
    return [(path, path.stem, without) for path in sorted(plain)] + [
        (
            unit.source,
            f"kernels-{isa}",
            [f"-DKVC_NAMESPACE={isa}", f"-DKVC_TABLE={unit.table}", *unit.flags.split()],
        )
        for isa, unit in {"baseline": Unit(KERNELS, "kBaseline", ""), **isas}.items()
    ]


def compiler() -> list[str]:
    """Returns the command CXX, or the first ordinary C++ compiler on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [c for c in ("g++", "clang++", "c++") if shutil.which(c)][:1]
    if not found or not shutil.which(found[0]):
        raise CompileError(
            "vllm-kvcrush's CPU kernels need a C++17 compiler: install g++ (Debian and Ubuntu: "
            "apt install g++) or clang++, or name one with CXX=..."
        )
    return found


class BuildKernels(build_ext):
    """Runs the C++ compiler directly: setuptools knows no flags for single files."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        temporary = pathlib.Path(self.build_temp)
        for directory in (target.parent, temporary):
            directory.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_one(unit: tuple[pathlib.Path, str, list[str]]) -> str:
            source, name, flags = unit
            made = str(temporary / f"{name}.o")
            self.run_compiler([*cxx, *FLAGS, *flags, *extra, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units()))
        # Linked under another name and renamed: a process that has the old library open keeps it.
        fresh = target.with_suffix(".so.new")
        self.run_compiler([*cxx, *extra, "-shared", *objects, "-ldl", "-o", str(fresh)])
        fresh.replace(target)

    @staticmethod
    def run_compiler(command: list[str]) -> None:
        if subprocess.run(command).returncode:
            raise CompileError(f"this command failed: {shlex.join(command)}")


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = [str(path) for path in sorted(SOURCE.glob("*.cpp"))]
headers = [str(path) for path in sorted(SOURCE.rglob("*.h"))]
setup(
    ext_modules=[Extension("vllm_kvcrush._kernels", sources, depends=headers)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
