"""Compiles every GPU kernel for every target and says what the machine code shows; needs no GPU.

Writes the tables of docs/gpu.md, unless --quick. Triton must be importable; nothing is run.

    python -m benchmarks.gpu --json benchmarks/results/gpu_compile.json
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from benchmarks import report
from benchmarks.gpu import builds, child, disassembly, model
from vllm_kvcrush.ops.triton.codecs import geometry

DOCS = report.ROOT / "docs" / "gpu.md"
# The model whose decode step the cost model prices: 8 KV heads and 32 query heads of 128.
LAYERS, KV_HEADS, GROUP, SIZE = 32, 8, 4, 128
CONTEXTS = (8192, 32768, 131072)
CODECS = ("raw", "int8", "int4")


def compiled(build: builds.Build, target: str) -> dict[str, Any]:
    """One row: a kernel for a target. Where it does not compile, `error` says why."""
    facts, error = child.call(lambda: disassembly.facts(build.compile(target), target))
    names = [field.name for field in dataclasses.fields(disassembly.Facts)]
    return {
        "kernel": build.kernel,
        "codec": build.codec,
        "head_size": build.size,
        "group": build.group,
        "dtype": build.dtype,
        "target": target,
        **(dict.fromkeys(names) if error else dataclasses.asdict(facts)),
        "warps": build.warps,
        "stages": build.stages,
        "tile": build.tile or None,
        "error": error,
    }


def problems(row: dict[str, Any]) -> list[str]:
    """What a row must not say."""
    if row["error"]:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes")
    if row["blocks"] < 1:
        found.append("does not fit a processor")
    if row["kernel"] in builds.PRODUCTS:
        if not row["tensor_core_instructions"]:
            found.append("has no tensor core instruction")
        # On AMD a lane's share of a tile of codes may be 8 bytes.
        if row["target"].startswith("sm_") and not row["wide_loads"]:
            found.append("has no 128-bit load in its loops")
    return found


def compile_table(rows: list[dict[str, Any]]) -> str:
    """All rows, as docs/gpu.md shows them."""
    header = ["kernel", "codec", "head/group", "dtype", "target", "registers", "spills", "shared B"]
    header += ["blocks", "occupancy", "tensor", "128-bit loads", "async", "loop", "tile"]
    lines = []
    for r in rows:
        name = [r["kernel"], r["codec"], f"{r['head_size']}/{r['group']}", r["dtype"], r["target"]]
        if r["error"]:
            lines.append([*name, "does not compile", *["-"] * (len(header) - len(name) - 1)])
            continue
        lines.append(
            name
            + [str(r[k]) for k in ("registers", "spills", "shared_bytes", "blocks")]
            + [f"{r['occupancy']:.0%}"]
            + [str(r[k]) for k in ("tensor_core_instructions", "wide_loads", "async_loads")]
            + [str(r["loop_instructions"] or "-"), str(r["tile"] or "-")]
        )
    return report.table(header, lines)


def floors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cost model of a decode step of one sequence, for every device, context and codec."""
    page = geometry(builds.BLOCK_SIZE, SIZE, SIZE, 2)
    shape = (LAYERS, KV_HEADS)
    found = []
    for name, device in model.DEVICES.items():
        for codec in CODECS:
            wanted = ("decode", codec, SIZE, GROUP, "bf16", device.target)
            keys = ("kernel", "codec", "head_size", "group", "dtype", "target")
            row = next((r for r in rows if tuple(r[k] for k in keys) == wanted), None)
            if row is None or row["error"]:
                continue
            for context in CONTEXTS:
                read = model.decode_bytes(codec, page, context, *shape)
                full = model.decode_bytes("raw", page, context, *shape)
                memory = read / device.bandwidth
                loop = (row["loop_instructions"], row["warps"], row["tile"])
                issue = model.issue_seconds(device, *loop, context, *shape)
                floor = max(memory, issue)
                found.append(
                    {
                        "device": name, "codec": codec, "context": context,
                        "memory_us": memory * 1e6, "issue_us": issue * 1e6,
                        "floor_us": floor * 1e6, "times_bytes": full / read,
                        "times_floor": full / device.bandwidth / floor,
                    }
                )  # fmt: skip
    return found


def model_table(found: list[dict[str, Any]]) -> str:
    """The cost model, as docs/gpu.md shows it."""
    header = ["device", "codec", "context", "bytes: µs", "instructions: µs", "floor: µs"]
    header += ["bf16 bytes / bytes", "bf16 floor / floor"]
    return report.table(
        header,
        [
            [f["device"], f["codec"], str(f["context"])]
            + [f"{f[k]:.0f}" for k in ("memory_us", "issue_us", "floor_us")]
            + [f"{f['times_bytes']:.2f}", f"{f['times_floor']:.2f}"]
            for f in found
        ],
    )


def prefill_table() -> str:
    """Operations against bytes of a prefill chunk of 2,048 rows."""
    lines = []
    page = geometry(builds.BLOCK_SIZE, SIZE, SIZE, 2)
    for name, device in model.DEVICES.items():
        for context in CONTEXTS:
            ops = model.prefill_seconds(device, 2048, context, LAYERS, GROUP * KV_HEADS, SIZE)
            read = model.decode_bytes("raw", page, context, LAYERS, KV_HEADS)
            lines.append([name, str(context), f"{ops * 1e3:.2f}"])
            lines[-1].append(f"{read / device.bandwidth * 1e3:.2f}")
    return report.table(["device", "context", "products: ms", "reading bf16 once: ms"], lines)


def update(text: str, name: str, content: str) -> str:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert pattern.search(text), f"docs/gpu.md has no place for {name}"
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--targets", default=",".join(builds.TARGETS), help="which to compile for")
    parser.add_argument(
        "--only",
        type=re.compile,
        help="regular expression: compile only builds whose name it finds, such as 'scores tc4'; "
        "the other rows stay as FILE has them, or lacks them",
    )
    args: argparse.Namespace = parser.parse_args()
    kept: dict[str, dict[str, Any]] = {}
    if args.only:
        if not (args.json and args.json.exists()):
            parser.error("--only needs --json with a file that has the other rows")
        for row in report.read(args.json)["rows"]:
            name = "{kernel} {codec} {head_size}/{group} {dtype}".format(**row)
            if not args.only.search(name):
                kept[f"{name} {row['target']}"] = row
    run = report.Run("gpu_compile", args)
    pairs = [(b, t) for t in args.targets.split(",") for b in builds.builds(args.quick, t)]
    rows, bad = [], []
    for build, target in report.progress(pairs, "compiling"):
        step = f"{build.name} {target}"
        if args.only and step not in kept and not args.only.search(build.name):
            continue
        row = kept.get(step) or run.step(step, lambda b=build, t=target: compiled(b, t))
        rows.append(row)
        bad += [f"{build.name} for {target} {problem}" for problem in problems(row)]
    run.rows = rows
    print(compile_table(rows))
    found = floors(rows)
    print(f"\nModel, not measured:\n\n{model_table(found)}")
    run.finish(triton=builds.triton.__version__, model=found)
    if not args.quick and args.json:
        text = update(DOCS.read_text(), "compiled", compile_table(rows))
        text = update(text, "decode model", model_table(found))
        DOCS.write_text(update(text, "prefill model", prefill_table()))
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
