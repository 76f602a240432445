"""Compiles what an engine launches and sets it beside an earlier result; nothing is run.

    python -m benchmarks.gpu.contract --targets sm_90,gfx942 --before OLD.json --json NEW.json

A row is a kernel of a job (a decode or prefill step, a compaction, window scores), and has two
numbers for each fact where it is known before and after. Two Tritons are compared by running this
twice, with one and the other on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu import builds, child, disassembly, launches
from tests.gpu.cache import POSITIONS, tables_of
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

SHAPES = {"llama": (32, 8, 128), "smol": (9, 3, 64)}
FACTS = ("registers", "spills", "shared_bytes", "blocks", "instructions", "loop_instructions")
STEPS = ("", "int4", "int8", "int8+tc4", "int8+raw", "int8+int4+tc6")
PAGES = ("raw", "int8", "int4", "tc6")
FEW = ("", "int4", "int8", "int8+tc4")  # of the second shape


def jobs(shape: str, target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields what an engine does, by name."""
    heads, kv_heads, size = SHAPES[shape]
    tables = tables_of(size, kv_heads)
    angles = Angles(tables["tc4"].rope, POSITIONS)
    page_bytes = launches.BLOCK_SIZE * 2 * size * 2
    own = {c: LayerTable(tables[c], 1, range(kv_heads), page_bytes, size, angles) for c in FITTED}
    model = launches.Model(heads, kv_heads, size, tables=own)
    model.layer.wave = builds.TARGETS[target].warp_size
    model.layer.ptx = target.startswith("sm_")
    few = shape != "llama"
    for name in STEPS:
        codecs = tuple(name.split("+")) if name else ()
        if not few or name in FEW:
            yield f"decode {name or 'tail'}", lambda codecs=codecs: model.step([1, 1], codecs)
            yield f"prefill {name or 'tail'}", lambda codecs=codecs: model.step([512], codecs)
    for name in PAGES:
        if not few or name in FEW:
            yield f"compact {name}", lambda name=name: model.compact((name,), (name,), 64)
            yield f"score {name}", lambda name=name: model.score((name,), 64, 32)


def rows(target: str) -> dict[str, dict[str, int]]:
    """Facts by target, shape, job, kernel, and which of a job's launches of that kernel it is."""
    found: dict[str, dict[str, int]] = {}
    for shape in SHAPES:
        for name, job in jobs(shape, target):
            with launches.compiled(target) as made:
                job()
            # Several launches of one kernel come in no order that stays: sorted by size.
            facts = [(x.name, disassembly.facts(x.kernel, target)) for x in made]
            facts.sort(key=lambda x: (x[0], x[1].instructions))
            for i, (kernel, fact) in enumerate(facts):
                row = {field: getattr(fact, field) for field in FACTS}
                found[f"{target}: {shape} {name}: {kernel} {i}"] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="sm_90,gfx942")
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    after: dict[str, dict[str, int]] = {}
    for target in args.targets.split(","):
        # Triton keeps what it found out about the first target of a process.
        made, error = child.call(lambda target=target: rows(target))
        if error:
            raise SystemExit(f"{target}: {error}")
        after |= made
    result: dict[str, Any] = {"triton": builds.triton.__version__, "rows": after}
    if args.before:
        old = json.loads(args.before.read_text())
        before = old["rows"]
        both = sorted(after.keys() & before.keys())
        changed = {
            key: {f: [before[key][f], after[key][f]] for f in FACTS}
            for key in both
            if before[key] != after[key]
        }
        result |= {
            "before": {"triton": old["triton"]},
            "same": len(both) - len(changed),
            "changed": changed,
            "spills": {key: row["spills"] for key, row in after.items() if row["spills"]},
        }
        result["rows"] = {key: row for key, row in after.items() if key not in before}
        print(f"{result['same']} as before, {len(changed)} not, {len(result['rows'])} new")
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    for key, row in after.items():
        if row["spills"]:
            print(f"{key} spills {row['spills']} bytes")


if __name__ == "__main__":
    main()
