"""The kernels of two checkouts against each other: nothing may get slower by accident.

Each checkout, built in place, has a process of its own with one thread, and the two take turns
burst by burst, the first to go drawn anew each time; a ratio is that of two neighbouring bursts, by
the CPU's clock. Where the data lie in memory makes some percent of difference, another one in each
process: so everything is done again with fresh ones. Attention of every codec is measured as
`python -m benchmarks.kernels` does it, and beside it what compactions do with pages: scoring with a
window of queries, and moving a quarter of the tokens into pages of each codec.

    python -m benchmarks.kernels.pair --old DIRECTORY [--new DIRECTORY] [--json FILE]

Prints medians of new / old with their quartiles: below 1 the new one is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import sys
from collections.abc import Callable
from typing import Any

WORKING_SET = 128 << 20
KEEP = 4  # one token of so many stays
BURST = 0.03  # seconds
JOBS: list[tuple[str, str, dict[str, Any]]] = [
    job
    for shape, lengths in (("smol", [8192] * 4), ("llama", [8192]))
    for job in (
        ("decode", shape, {"shape": shape, "lengths": lengths, "query_len": 1}),
        ("prefill", shape, {"shape": shape, "lengths": [4096], "query_len": 512}),
        ("pages", shape, {"shape": shape}),
    )
]


# -- the measured process, which imports the checkout that PYTHONPATH names ---------------------


def attention(shape: str, lengths: list[int], query_len: int) -> dict[str, Callable[[], Any]]:
    """Bursts of the attention of every codec."""
    import functools

    from benchmarks.kernels.cases import SHAPES, Case
    from benchmarks.kernels.ours import OURS
    from benchmarks.kernels.timing import Burst

    def run(candidate: Any, out: Any, index: int) -> None:
        candidate.run(index, out)

    case, bursts = Case(SHAPES[shape], lengths, query_len, 0), {}
    for kind in OURS:
        if kind.keep == 1:
            own = kind(case, WORKING_SET)
            call = functools.partial(run, own, own.empty())
            bursts[kind.name.removeprefix("kvcrush-")] = Burst(call, own.sets, BURST)
    return bursts


def pages(shape: str) -> dict[str, Callable[[], Any]]:
    """Bursts of window scores and of moving tokens into pages of each codec."""
    import math

    import torch

    from benchmarks.kernels.cases import PAGE, SHAPES, Case
    from benchmarks.kernels.ours import OURS
    from benchmarks.kernels.timing import Burst
    from vllm_kvcrush.ops import cpu

    heads, held = SHAPES[shape], 4096
    case = Case(heads, [held], 64, 0)
    queries = case.queries[-32:].transpose(0, 1).contiguous()
    slots = torch.arange(0, held, KEEP)
    begin = torch.zeros(1, heads.kv_heads, dtype=torch.int32)
    source_of = getattr(cpu, "Source", None) or cpu.Request  # its name in older checkouts
    bursts: dict[str, Callable[[], Any]] = {}
    for kind in OURS:
        if kind.keep != 1 or kind.dtype != torch.bfloat16:
            continue
        own = kind(case, 1)
        layer = own._layer
        table = torch.arange(layer.num_blocks)[-held // PAGE :].to(torch.int32)
        raw = case.tokens(case.keys, case.contents(1)[0, 0], held).transpose(0, 1)
        rows = raw.to(kind.dtype).contiguous()
        places = table.long().repeat_interleave(PAGE) * PAGE + torch.arange(held) % PAGE
        cpu.store(layer, rows, rows, places)
        source = source_of(None, table, held, 0, PAGE)
        if kind.codec == "raw":

            def score(_: int, layer: Any = layer, source: Any = source) -> None:
                cpu.window_scores(layer, source, queries, held - 32, pool=7)

            bursts["window scores"] = Burst(score, 1, BURST)
            continue
        room = layer.capacity(kind.codec)
        own_pages = math.ceil(len(slots) / room)
        counts = [min(room, len(slots) - i * room) for i in range(own_pages)]
        to = [layer.page(b, h) for h in range(heads.kv_heads) for b in range(own_pages)]
        starts = begin + torch.arange(heads.kv_heads, dtype=torch.int32) * own_pages
        number = number_of(kind.codec)
        target = cpu.Directory(
            starts,
            starts + own_pages,
            torch.tensor(to, dtype=torch.int32),
            torch.tensor(counts * heads.kv_heads).to(torch.uint16),
            torch.full((len(to),), number, dtype=torch.uint8),
        )
        chosen = slots.expand(heads.kv_heads, -1).contiguous()

        def move(_: int, layer: Any = layer, source: Any = source, target: Any = target,
                 chosen: Any = chosen) -> None:  # fmt: skip
            cpu.compact(layer, source, chosen, target)

        bursts[f"compact to {kind.codec}"] = Burst(move, 1, BURST)
    return bursts


def number_of(codec: str) -> int:
    """Returns the number of a codec in either checkout."""
    try:
        from vllm_kvcrush.codecs import CODECS
    except ImportError:
        from vllm_kvcrush.codecs.layout import CODECS  # type: ignore[attr-defined,no-redef]
    found: Any = CODECS[codec]
    return int(getattr(found, "number", found))


def child() -> None:
    """Answers {"prepare": arguments} with names of bursts and {"burst": name} with seconds."""
    import torch

    from benchmarks.overhead.child import serve

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bursts: dict[str, Callable[[], Any]] = {}

    def handle(job: dict[str, Any]) -> Any:
        if "burst" in job:
            return bursts[job["burst"]]()["call"][1]
        bursts.clear()
        bursts.update(pages(job["shape"]) if "lengths" not in job else attention(**job))
        return list(bursts)

    serve(handle)


# -- the measuring process ------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:] == ["child"]:
        return child()
    from benchmarks.kernels.timing import quartiles
    from benchmarks.overhead.child import ROOT, Child

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=pathlib.Path, required=True)
    parser.add_argument("--new", type=pathlib.Path, default=ROOT)
    parser.add_argument("--starts", type=int, default=5, help="fresh processes for everything")
    parser.add_argument("--rounds", type=int, default=5, help="bursts of each in a process")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    draw, ratio_of, seconds_of = random.Random(0), {}, {}

    def start(name: str, where: pathlib.Path) -> Child:
        environment = {**os.environ, "PYTHONPATH": str(where.resolve()), "OMP_NUM_THREADS": "1"}
        return Child(name, [sys.executable, __file__, "child"], environment)

    for number in range(args.starts):
        with start("the old checkout", args.old) as old, start("the new checkout", args.new) as new:
            for task, shape, job in JOBS:
                names = old.ask(**job)
                assert new.ask(**job) == names
                for name in names * args.rounds:
                    first, second = draw.sample([old, new], 2)
                    seconds = {id(c): c.ask(burst=name) for c in (first, second)}
                    key = (task, shape, name)
                    seconds_of.setdefault(key, []).append(seconds[id(old)])
                    ratio_of.setdefault(key, []).append(seconds[id(new)] / seconds[id(old)])
        print(f"start {number + 1} of {args.starts} is done", file=sys.stderr)
    rows = []
    for (task, shape, name), ratios in ratio_of.items():
        middle, low, high = quartiles(ratios)
        before = quartiles(seconds_of[task, shape, name])[0]
        where = {"task": task, "shape": shape, "kernel": name, "n": len(ratios)}
        rows.append(where | {"ratio": middle, "low": low, "high": high, "old_seconds": before})
        print(f"{task:8} {shape:6} {name:18} {middle:.3f} ({low:.3f}-{high:.3f})")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
