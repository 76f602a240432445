"""Compiles every GPU kernel for every target and says what the machine code shows; needs no GPU.

Writes the tables beside FILE as Markdown, unless --quick. Triton must be importable; nothing runs.

    python -m benchmarks.gpu --json benchmarks/results/gpu_compile.json
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from benchmarks import report
from benchmarks.gpu import builds, child, disassembly
from benchmarks.gpu.tables import compile_table, floors, model_table, page


def compiled(build: builds.Build, target: str) -> dict[str, Any]:
    """Returns one row: a kernel for a target. Where it does not compile, `error` says why."""
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
    """Returns what a row must not say."""
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
        args.json.with_suffix(".md").write_text(page(report.read(args.json)))
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
