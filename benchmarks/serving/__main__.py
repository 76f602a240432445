"""Measures the requests and tokens that a fixed KV pool serves under a policy and in plain vLLM.

Two servers with the same pool run side by side and are driven in turn, never at once; which of
them goes first alternates from round to round. Figures are medians over the rounds, ratios
(policy over plain) medians of each round's own, with the smallest and the largest. TTFT and TPOT
of a drive are the medians over its requests; running, waiting and KV bytes per running request
come from /metrics, polled all the while. A mode "closed-16" is a closed loop of 16 requests. The
full run takes about an hour on two cores, the quick one four minutes.

    python -m benchmarks.serving [--quick] [--json FILE]

With --plain-url and --policy-url it measures two servers that run already; start both with the
same --block-size and --kv-cache-memory-bytes, with VLLM_SERVER_DEV_MODE=1 (so that the prefix
cache can be emptied between drives), the plain one with VLLM_PLUGINS="".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import signal
from typing import Any

from benchmarks.report import Run, arguments, progress
from benchmarks.serving import results, workloads
from benchmarks.serving.bench import ITEMSIZE, Bench
from benchmarks.serving.metrics import MetricsError
from benchmarks.serving.results import PLAIN, POLICY
from benchmarks.serving.servers import ServerError
from benchmarks.serving.workloads import Workload
from vllm_kvcrush.config import parse_budget


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("give a whole number of at least 1")
    return number


def _rate(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("give a number of requests per second above 0")
    return number


def _budget(value: str) -> float | int:
    try:
        return parse_budget(value, "--budget")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    """Returns the parsed command line."""
    p = arguments(__doc__ or "")
    p.add_argument("--policy", default="auto", help="policy of the other server")
    p.add_argument("--budget", type=_budget, default=0.25, help="its KV budget")
    p.add_argument("--repeats", type=_count, help="rounds; by default 3, with --quick 1")
    p.add_argument("--workloads", nargs="+", metavar="NAME", help="these only; by default all")
    p.add_argument("--model", type=pathlib.Path, help="its directory; by default the demo model")
    p.add_argument("--dtype", choices=list(ITEMSIZE), default="float32", help="of both servers")
    p.add_argument(
        "--policy-flags", default="", help="more flags of vLLM for the server with a policy"
    )
    p.add_argument("--plain-url", help="a running server of plain vLLM, to measure it")
    p.add_argument("--policy-url", help="a running server with the policy, to measure it")
    p.add_argument(
        "--rate",
        type=_rate,
        help="Poisson arrivals per second; by default what the plain server got through in its "
        "largest closed loop of long_prompt",
    )
    sizes = p.add_argument_group("sizes, for all workloads")
    sizes.add_argument("--pool-blocks", type=_count, help="blocks of the servers that it starts")
    sizes.add_argument("--prompt-tokens", type=_count, help="of a prompt, and of a shared prefix")
    sizes.add_argument("--output-tokens", type=_count, help="of each request")
    sizes.add_argument("--requests", type=_count, help="of each drive")
    sizes.add_argument(
        "--concurrency",
        type=_count,
        nargs="+",
        help="closed loops of long_prompt; the largest bounds those of the other workloads",
    )
    return p


def main() -> None:
    p = parser()
    args = p.parse_args()
    if bool(args.plain_url) != bool(args.policy_url):
        p.error("give both --plain-url and --policy-url, or neither")
    if args.plain_url and args.pool_blocks:
        p.error("--pool-blocks is for servers that this benchmark starts, not for running ones")
    args.repeats = args.repeats or (1 if args.quick else 3)
    if not args.plain_url:
        args.pool_blocks = args.pool_blocks or workloads.pool_blocks(args.quick)
    try:
        loads = workloads.resize(
            workloads.choose(workloads.workloads(args.quick), args.workloads),
            prompt=args.prompt_tokens,
            output=args.output_tokens,
            requests=args.requests,
            concurrency=args.concurrency,
        )
    except ValueError as error:
        p.error(str(error))
    # A run that is terminated stops like one that is interrupted, also in the background, where
    # shells have interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        measure(args, loads)
    except (ServerError, MetricsError) as error:
        raise SystemExit(f"serving: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("serving: stopped; the next run goes on from here") from None


def measure(args: argparse.Namespace, loads: list[Workload]) -> None:
    """Runs what is left to run, prints the table and writes the result file."""
    run = Run("serving", args)
    rounds: dict[Workload, list[dict[str, Any]]] = {load: [] for load in loads}
    order = [
        (round_, load, server)
        for round_ in range(args.repeats)
        for load in loads
        # Whatever drifts while a round lasts meets each of them first in turn.
        for server in ((PLAIN, POLICY) if round_ % 2 == 0 else (POLICY, PLAIN))
    ]
    rate = args.rate
    with contextlib.ExitStack() as stack:
        bench = Bench(args, loads, stack)
        for round_, load, server in progress(order, "serving"):
            arrivals = rate if load.concurrency is None else None
            found = run.step(
                f"round {round_}, {load.name} {load.mode}, {server}",
                functools.partial(bench.drive, server, load, round_, arrivals),
            )
            if len(rounds[load]) == round_:
                rounds[load].append({})
            rounds[load][round_][server] = found
            closed = load.name == "long_prompt" and load.concurrency is not None
            if args.rate is None and closed and server == PLAIN and round_ == 0:
                rate = found["requests_per_s"]
    for load, drives in rounds.items():
        run.rows += results.rows(load, drives, args.policy, args.budget)
    pool = rounds[loads[0]][0][PLAIN]["pool_bytes"]
    print(
        f"Policy {args.policy}, budget {args.budget}; a pool of {pool / 2**20:.0f} MiB for each "
        f"server; rounds: {args.repeats}; {_arrivals(loads, rate)}ratios are policy over plain.\n"
    )
    print(results.markdown(run.rows))
    run.finish(
        workloads=[dataclasses.asdict(load) for load in loads], pool_bytes=pool, poisson_rate=rate
    )


def _arrivals(loads: list[Workload], rate: float | None) -> str:
    if all(load.concurrency for load in loads):
        return ""
    return f"Poisson arrivals at {rate:.2g} requests/s; "


if __name__ == "__main__":
    main()
