"""The child process, one for each number of threads: prepares, checks and times.

python -m benchmarks.kernels.worker THREADS    (driven by `benchmarks.overhead.child.Child`)
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.overhead.child import Child, serve


def start(threads: int) -> Child:
    """Starts the process. OpenMP's settings of the environment stay, save the number of
    threads; where it says nothing of places, two and more threads get a core each, as vLLM
    gives them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if threads > 1 and not environment.keys() & {"OMP_PLACES", "GOMP_CPU_AFFINITY"}:
        environment.setdefault("OMP_PROC_BIND", "true")
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    environment.pop("VLLM_KVCRUSH_CACHE", None)  # vLLM warns about names that it does not know
    command = [sys.executable, "-m", "benchmarks.kernels.worker", str(threads)]
    return Child(f"the measurement with {threads} threads", command, environment)


@functools.lru_cache(maxsize=1)
def reader(size: int) -> Any:
    """Returns the read benchmark; which way is fastest is found out once."""
    from benchmarks.kernels.bandwidth import Reader

    return Reader(size)


def attention(
    shape: str,
    lengths: list[int],
    query_len: int,
    names: list[str],
    rounds: int,
    seconds: float,
    sizes: dict[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Checks and times the candidates in `names` on one case, beside reading memory.

    Returns:
        {"candidates": {name: {"calls": [[wall, CPU] a round], "bytes", "error"}},
        "read": {"calls", "bytes", "way"}}; seconds of one call.
    """
    from benchmarks.kernels.cases import SHAPES, Case, Sizes
    from benchmarks.kernels.check import check
    from benchmarks.kernels.registry import CANDIDATES
    from benchmarks.kernels.timing import Burst, take_turns

    size = Sizes(**sizes)
    case, read = Case(SHAPES[shape], lengths, query_len, seed), reader(size.read)
    flush = functools.partial(read, 0) if size.flush else None
    bursts = {"read": Burst(read, 1, seconds)}
    found: dict[str, Any] = {}
    for kind in CANDIDATES:
        if kind.name in names:
            candidate = kind(case, size.copies)
            found[kind.name] = {"bytes": candidate.bytes_read, "error": check(candidate, seed)}
            run = functools.partial(_run, candidate, candidate.empty())
            bursts[kind.name] = Burst(run, candidate.sets, seconds, flush)
    times = take_turns(bursts, rounds, seed)
    for name, result in found.items():
        result["calls"] = [parts["call"] for parts in times[name]]
    calls = [parts["call"] for parts in times["read"]]
    return {"candidates": found, "read": {"calls": calls, "bytes": read.bytes, "way": read.way}}


def _run(candidate: Any, out: Any, index: int) -> None:
    candidate.run(index, out)


def compaction(
    shape: str, context: int, rounds: int, seconds: float, sizes: dict[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Times the compaction of one layer: {policy: {stage: [[wall, CPU] a round]}}."""
    from benchmarks.kernels.cases import SHAPES, Case, Sizes
    from benchmarks.kernels.compaction import POLICIES, STAGES, CompactionBurst, Layers
    from benchmarks.kernels.timing import take_turns

    size = Sizes(**sizes)
    layers = Layers(Case(SHAPES[shape], [context], min(context, 64), seed), size.copies)
    flush = functools.partial(reader(size.read), 0) if size.flush else None
    bursts = {name: CompactionBurst(layers, name, seconds, flush) for name in POLICIES}
    times = take_turns(bursts, rounds, seed)
    return {name: {s: [p[s] for p in parts] for s in STAGES} for name, parts in times.items()}


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the function that `job["kind"]` names with its other entries."""
    kinds: dict[str, Callable[..., dict[str, Any]]]
    kinds = {"attention": attention, "compaction": compaction}
    return kinds[job.pop("kind")](**job)


def main() -> None:
    import torch

    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    torch.set_grad_enabled(False)
    serve(handle)


if __name__ == "__main__":
    main()
