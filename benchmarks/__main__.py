"""Runs every benchmark in its quick form and writes one report: what `make bench` calls.

A run that was killed resumes: finished benchmarks are kept as long as the code is the same.

    python -m benchmarks [--restart]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from benchmarks import figures
from benchmarks.report import RESULTS, ROOT, environment, interruptible, say, sources

NAMES = ("quality", "serving", "overhead", "kernels")
FOLDER = RESULTS / "quick"


def measured(name: str, restart: bool) -> str:
    """Returns the benchmark's own tables, measured now unless that was done with this code
    before."""
    result, tables = FOLDER / f"{name}.json", FOLDER / f"{name}.md"
    known = not restart and result.exists() and tables.exists()
    if known and json.loads(result.read_text()).get("sources") == sources():
        say(f"{name}: measured before with this code (--restart measures it anew)")
        return tables.read_text()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(result)]
    say(f"{name}: {' '.join(command[1:])}")
    began = time.perf_counter()
    done = subprocess.run(
        [*command, *["--restart"] * restart], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(
            f"{name} ended with {done.returncode}: what it finished is kept, run this again."
        )
    say(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes")
    tables.write_text(done.stdout)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--restart", action="store_true", help="measure all anew")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = []
    for name in NAMES:
        parts.append(f"\n## {name}\n\n{measured(name, args.restart).strip()}\n")
        if picture := figures.draw(name, FOLDER / f"{name}.json", FOLDER / f"{name}.svg"):
            parts.append(f"\n![{name}]({picture.name})\n")
    facts = ", ".join(f"{k} {v}" for k, v in environment().items() if v)
    report = FOLDER / "report.md"
    report.write_text(f"# vllm-kvcrush benchmarks, quick run\n\n{facts}\n" + "".join(parts))
    print(report.relative_to(ROOT))


if __name__ == "__main__":
    with interruptible("benchmarks"):
        main()
