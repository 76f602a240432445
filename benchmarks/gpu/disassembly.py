"""What a compiled kernel's machine code says: registers, spills, loops and what is in them."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton import knobs

NVIDIA_TENSOR = re.compile(r"(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA)")
NVIDIA_WIDE = re.compile(r"(LDG|LDGSTS)\.\S*128")
NVIDIA_LOCAL = re.compile(r"(LDL|STL)")
AMD_TENSOR = re.compile(r"v_(s?mfmac?|wmma)")
AMD_WIDE = re.compile(r"(global|buffer)_load_(dwordx4|b128|lds_dwordx4)")


@dataclass(frozen=True)
class Facts:
    """Of one compiled kernel.

    Attributes:
        registers: of a thread (NVIDIA), or vector registers with accumulators (AMD).
        spills: bytes of local memory of a thread, or loads and stores there, whichever is more.
        shared_bytes: shared memory (LDS) of a block.
        instructions: in all.
        tensor_core_instructions: in all.
        wide_loads: global loads of 128 bits, in loops if the kernel has loops that multiply.
        async_loads: of these, those that go to shared memory without waiting.
        loop_instructions: of the longest loop that multiplies; 0: there is none.
        blocks: that fit a processor (SM or CU) at once.
        occupancy: its warps by the most it can hold.
    """

    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    tensor_core_instructions: int
    wide_loads: int
    async_loads: int
    loop_instructions: int
    blocks: int
    occupancy: float


def _loops(lines: list[tuple[str, str]], labels: dict[str, int]) -> list[range]:
    """Returns the outermost loops: ranges of instructions that end in a branch back."""
    found: list[range] = []
    for i, (name, rest) in enumerate(lines):
        if name.startswith(("BRA", "s_cbranch", "s_branch")):
            target = next((w for w in re.findall(r"[.\w$]+", rest) if w in labels), None)
            if target is not None and labels[target] < i:
                found.append(range(labels[target], i + 1))
    merged: list[range] = []
    for loop in sorted(found, key=lambda r: r.start):
        if merged and loop.start < merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, loop.stop))
        else:
            merged.append(loop)
    return merged


def _parse(text: str, instruction: re.Pattern[str], label: re.Pattern[str]) -> Any:
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(lines)
        elif found := instruction.match(line):
            lines.append((found[1], found[2]))
    return lines, labels


def _sass(kernel: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    # As triton.tools.disasm prints it: control bits, a tab, an optional predicate, the instruction.
    instruction = re.compile(r"[^\t]*\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*(?:\.\S+)?)(.*)")
    return _parse(kernel.asm["sass"], instruction, re.compile(r"\s*([.\w]+):\s*$"))


def _amdgcn(kernel: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    instruction = re.compile(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)(.*)")
    text = kernel.asm["amdgcn"].split(".section", 1)[0]
    return _parse(text, instruction, re.compile(r"(\.L\w+):"))


def _resources(kernel: Any) -> dict[str, int]:
    """Returns what cuobjdump says of a cubin: REG, STACK, SHARED, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def facts(kernel: Any, target: str) -> Facts:
    """Reads a kernel that `Build.compile` made for a target."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    amd = target.startswith("gfx")
    lines, labels = _amdgcn(kernel) if amd else _sass(kernel)
    assert lines, "no instruction was recognised"
    tensor, wide = (AMD_TENSOR, AMD_WIDE) if amd else (NVIDIA_TENSOR, NVIDIA_WIDE)
    if amd:
        text = kernel.asm["amdgcn"]
        number = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count",
                        "private_segment_fixed_size")
        }  # fmt: skip
        registers = number["vgpr_count"]
        spills = max(number["vgpr_spill_count"], number["private_segment_fixed_size"])
        blocks, most = _amd_blocks(registers, shared, warps), 32
    else:
        used = _resources(kernel)
        registers = used["REG"]
        local = sum(bool(NVIDIA_LOCAL.match(name)) for name, _ in lines)
        spills = max(used["STACK"], used["LOCAL"], local)
        blocks, most = _nvidia_blocks(registers, shared, warps, target), 64
    loops = [r for r in _loops(lines, labels) if any(tensor.match(lines[i][0]) for i in r)]
    inside = [i for r in loops for i in r] or range(len(lines))
    loads = [lines[i] for i in inside if wide.match(lines[i][0])]
    return Facts(
        registers,
        spills,
        shared,
        len(lines),
        sum(bool(tensor.match(name)) for name, _ in lines),
        len(loads),
        sum(name.startswith("LDGSTS") or "lds" in name for name, _ in loads),
        max(map(len, loops), default=0),
        blocks,
        min(1.0, blocks * warps / most),
    )


SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}


def _nvidia_blocks(registers: int, shared: int, warps: int, target: str) -> int:
    # Registers are handed out to warps in units of 256, and 1 KiB of shared memory is reserved.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, SHARED[target] // (shared + 1024), 64 // warps, 32)


def _amd_blocks(registers: int, shared: int, warps: int) -> int:
    # Four SIMDs of 512 registers and at most 8 waves each.
    waves = min(8, 512 // (-(-registers // 8) * 8))
    return min(4 * waves // warps, SHARED["gfx942"] // max(shared, 1), 32)


def loop_counts(kernel: Any, target: str) -> Iterator[dict[str, int]]:
    """Yields, for each loop that multiplies, how often it has each instruction."""
    amd = target.startswith("gfx")
    lines, labels = _amdgcn(kernel) if amd else _sass(kernel)
    tensor = AMD_TENSOR if amd else NVIDIA_TENSOR
    for loop in _loops(lines, labels):
        names = [lines[i][0] for i in loop]
        if any(tensor.match(name) for name in names):
            yield {name: names.count(name) for name in sorted(set(names))}
