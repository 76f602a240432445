"""`vllm-kvcrush doctor`: what a bug report needs, in Markdown that can be pasted into it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_kvcrush import __version__, gate, paths
from vllm_kvcrush.compat import check
from vllm_kvcrush.compat.source import Source

# Instruction sets that vLLM's CPU kernels choose between, narrow to wide.
_X86 = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
_ARM = ("asimd", "bf16", "i8mm", "sve", "sve2")


def report() -> tuple[str, bool]:
    """Returns the report, and whether this machine can run the plugin, as far as can be told
    without starting vLLM."""
    ok, sentence = gate.verdict()
    runs, kernels = gate.kernels()
    if ok and not runs:
        ok, sentence = False, f"{kernels}."
    rows = [
        ("vllm-kvcrush", __version__),
        ("vLLM", " ".join(gate.distribution() or ("not installed",))),
        ("torch", _torch()),
        ("transformers", _version("transformers")),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("OS", _system()),
        ("device", _device()),
        ("CPU", f"{_cpu_model()}, {_cpus()} CPUs usable"),
        ("instruction sets", _instruction_sets()),
        ("our kernels", kernels if runs else "none"),
        ("environment", _environment()),
        *(("transform tables", found) for found in _tables()),
    ]
    lines = ["| what | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    lines += ["", f"{'OK' if ok else 'Refused'}: {sentence}", ""]
    lines += [*(_kernels(kernels) if runs else []), ""]
    lines += [
        "With --kv-policy, start-up refuses:",
        "",
        "| feature | why | way out |",
        "|---|---|---|",
    ]
    lines += [f"| {_cell(r.feature)} | {_cell(r.why)} | {_cell(r.way_out)} |" for r in gate.REFUSED]
    return "\n".join(lines), ok


def hooks_report(source: Source) -> tuple[str, bool]:
    """Returns the table of vLLM's names that we rely on, by module, with what this vLLM has for
    each, and whether it has all of them."""
    findings = sorted(check.check(source), key=lambda finding: finding.hook.module)
    lines: list[str] = []
    module = ""
    for hook, found, problem in findings:
        if hook.module != module:
            module = hook.module
            lines += ["", f"`{module}`", "", "| hook | kind | found | |", "|---|---|---|---|"]
        kind = f"{hook.kind}, private" if hook.private else hook.kind
        state = "ok" if not problem else "missing" if problem == "is missing" else "changed"
        cells = (hook.name, kind, found, state)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    wrong = [finding for finding in findings if finding.problem]
    private = sum(finding.hook.private for finding in findings)
    name = f"vLLM {source.version or 'of an unknown version'}"
    count = f"{len(findings)} names ({private} private) that vllm-kvcrush relies on"
    if not wrong:
        return "\n".join([*lines[1:], "", f"OK: {name} has all {count}."]), True
    lines += ["", f"Changed: {name} lacks {len(wrong)} of the {count}:", ""]
    for hook, _, problem in wrong:
        lines.append(f"- {hook.module}.{hook.name} {problem}. What for: {hook.why}")
    return "\n".join(lines[1:]), False


def _kernels(used: str) -> list[str]:
    from vllm_kvcrush.ops.cpu import library
    from vllm_kvcrush.ops.cpu.verified import VERIFIED

    lines = ["| kernels | here | seen working |", "|---|---|---|"]
    for isa, seen in VERIFIED.items():
        here = "used" if isa == used else "runs" if library.runs(isa) else "not on this CPU"
        lines.append(f"| {isa} | {here} | {seen} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    try:
        import torch
    except Exception as error:  # a broken torch is a finding, not a crash
        return f"does not import: {error}"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    return f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"


def _device() -> str:
    # vLLM chooses its CPU platform if its own version contains this word.
    found = gate.distribution()
    if found is not None and "cpu" in " ".join(found):
        return "cpu (vLLM's CPU build)"
    try:
        import torch

        if torch.cuda.is_available():
            names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
            return f"cuda: {torch.cuda.device_count()} × {', '.join(sorted(names))}"
    except Exception as error:
        return f"unknown: {error}"
    return "no GPU found"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name}, {kernel}" if name else kernel


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(*fields: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for field in fields:
        found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def _cpu_model() -> str:
    return _cpuinfo("model name", "Model", "Hardware") or platform.processor() or "unknown"


def _instruction_sets() -> str:
    flags = set(_cpuinfo("flags", "Features").split())
    known = _ARM if platform.machine() in ("aarch64", "arm64") else _X86
    listed = ", ".join(name for name in known if name in flags) or "none of note"
    try:
        import torch

        return f"{listed} (torch uses {torch.backends.cpu.get_cpu_capability()})"
    except Exception:
        return listed


def _tables() -> list[str]:
    """Returns a line for each model whose tables are in the default place."""
    root = paths.cache_root()
    files = sorted((root / "tables").glob("*.safetensors")) if root is not None else []
    found = []
    for file in files:
        try:
            found.append(_expected(file))
        except Exception as error:  # a damaged file is a finding, not a crash
            found.append(f"{file.name}: {error}")
    return found


def _expected(file: Path) -> str:
    from vllm_kvcrush.codecs.transform.tables import summary
    from vllm_kvcrush.config import Settings
    from vllm_kvcrush.tools.plan import expectations

    block_size, itemsize = gate.CPU_BLOCK_SIZE, 2
    own = summary(file, block_size, itemsize)
    if own.losses is None:
        return f"{own.model.name}: what codecs lose was not measured, calibrate it anew"
    page = (own.model.size, own.model.size, itemsize)
    settings = Settings(
        "auto", page=page, fitted=own.packings, losses=own.losses.total, tables=str(file)
    )
    found = "; ".join(map(str, expectations(settings, block_size)))
    return f"{own.model.name}: expected loss of auto, nats a token, on {own.losses.text}: {found}"


def _environment() -> str:
    # Only variables that change what vLLM runs: values of others could be secrets.
    names = (
        "VLLM_PLUGINS",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "OMP_NUM_THREADS",
        "KVCRUSH_ISA",
        gate.UNVERIFIED_GPU,
    )
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return ", ".join(found) or "no setting of note"
