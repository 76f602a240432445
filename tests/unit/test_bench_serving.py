"""The serving benchmark without its servers: prompts, /metrics, ratios, rows, processes."""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving import metrics, results, servers, workloads
from benchmarks.serving.drive import Client, reset_prefix_cache
from benchmarks.serving.metrics import MetricsError, Pool
from benchmarks.serving.servers import Server, ServerError
from benchmarks.serving.workloads import MIXED, Prompt, Workload

WORDS = [(i * i + i // 7) % 1009 for i in range(20_000)]


# -- workloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_every_workload_outgrows_or_loads_the_pool(quick: bool) -> None:
    loads = workloads.workloads(quick)
    assert len({(load.name, load.mode) for load in loads}) == len(loads)
    loops = [load for load in loads if load.name == "long_prompt" and load.concurrency]
    # The sweep goes on until plain vLLM cannot hold what is under way.
    assert loops[-1].concurrency * loops[-1].context > workloads.pool_blocks(quick) * 32
    assert loops[0].concurrency * loops[0].tokens <= workloads.pool_blocks(quick) * 32
    # Poisson arrivals take their rate from a closed loop before them.
    assert loads.index(loops[-1]) < next(i for i, x in enumerate(loads) if x.mode == "poisson")


def test_prompts_share_nothing_but_the_prefix() -> None:
    load = Workload("shared_prefix", 64, 8, requests=50, concurrency=4, prefix=96)
    drawn = workloads.prompts(load, WORDS, 0, block=32)
    assert len(drawn) == 50
    assert {len(p.tokens) for p in drawn} == {160} and load.context == 160
    assert len({tuple(p.tokens[:96]) for p in drawn}) == 1
    assert len({tuple(p.tokens[96:128]) for p in drawn}) == 50
    alone = Workload("long_prompt", 64, 8, requests=50, concurrency=4)
    assert len({tuple(p.tokens[:32]) for p in workloads.prompts(alone, WORDS, 0, 32)}) == 50


def test_prompts_are_the_same_in_a_round_and_others_in_the_next() -> None:
    load = Workload("long_prompt", 64, 8, requests=5, concurrency=4)
    assert workloads.prompts(load, WORDS, 1, 32) == workloads.prompts(load, WORDS, 1, 32)
    first, second = (workloads.prompts(load, WORDS, r, 32) for r in (0, 1))
    assert not {tuple(p.tokens) for p in first} & {tuple(p.tokens) for p in second}


def test_mixed_budgets_alternate() -> None:
    load = Workload("mixed_budgets", 64, 8, requests=6, concurrency=4, budgets=MIXED)
    fields = [p.fields for p in workloads.prompts(load, WORDS, 0, 32)]
    a, b, c = ({"kv_budget": x} for x in (0.125, 0.25, 0.5))
    assert fields == [a, b, c, {"kv_policy": "none"}, a, b]


def test_text_without_enough_prompts_is_refused() -> None:
    load = Workload("long_prompt", 64, 8, requests=5, concurrency=4)
    with pytest.raises(ValueError, match="the text has 64 tokens"):
        workloads.prompts(load, WORDS[:64], 0, 32)
    with pytest.raises(ValueError, match="no 5 prompts that begin apart"):
        workloads.prompts(load, [7] * 1000, 0, 32)


def test_resize() -> None:
    loads = workloads.workloads(quick=True)
    sized = workloads.resize(loads, prompt=100, output=9, requests=3, concurrency=[5, 2])
    assert {x.prompt for x in sized} == {100} and {x.output for x in sized} == {9}
    assert [x.mode for x in sized if x.name == "long_prompt"] == ["closed-2", "closed-5", "poisson"]
    assert next(x for x in sized if x.name == "shared_prefix").context == 200
    assert {x.concurrency for x in sized if x.name != "long_prompt"} <= {4, 5}
    assert workloads.resize(loads) == loads


def test_choose() -> None:
    loads = workloads.workloads(quick=True)
    assert {x.name for x in workloads.choose(loads, ["long_decode"])} == {"long_decode"}
    assert workloads.choose(loads, None) == loads
    with pytest.raises(ValueError, match="no such workload: 'long'"):
        workloads.choose(loads, ["long"])
    with pytest.raises(ValueError, match="two output tokens"):
        Workload("long_prompt", 64, 1, requests=5, concurrency=4)


# -- /metrics ------------------------------------------------------------------------------------

ENGINE = 'engine="0",model_name="model"'
PLAIN_METRICS = f"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{ENGINE}}} 3.0
vllm:num_requests_waiting{{{ENGINE}}} 2.0
vllm:num_requests_waiting_by_reason{{{ENGINE},reason="capacity"}} 2.0
vllm:kv_cache_usage_perc{{{ENGINE}}} 0.75
vllm:num_preemptions_total{{{ENGINE}}} 5.0
vllm:num_preemptions_created{{{ENGINE}}} 1.7953777817561e+09
vllm:prefix_cache_queries_total{{{ENGINE}}} 1000.0
vllm:prefix_cache_hits_total{{{ENGINE}}} 250.0
vllm:cache_config_info{{block_size="32",enable_prefix_caching="True",engine="0",\
kv_cache_memory_bytes="4100",num_gpu_blocks="41"}} 1.0
"""
PLUGIN_METRICS = f"""\
vllm_kvcrush:kv_bytes_held{{{ENGINE},policy="kvcrush"}} 40.0
vllm_kvcrush:kv_bytes_held{{{ENGINE},policy="none"}} 60.0
vllm_kvcrush:kv_bytes_raw_equivalent{{{ENGINE},policy="kvcrush"}} 160.0
vllm_kvcrush:kv_bytes_raw_equivalent{{{ENGINE},policy="none"}} 60.0
vllm_kvcrush:compaction_seconds_bucket{{{ENGINE},le="+Inf",policy="kvcrush"}} 9.0
vllm_kvcrush:compaction_seconds_sum{{{ENGINE},policy="kvcrush"}} 0.5
"""


def test_parse_takes_exactly_what_is_used() -> None:
    assert metrics.parse(PLAIN_METRICS) == {
        metrics.RUNNING: 3.0,
        metrics.WAITING: 2.0,
        metrics.USAGE: 0.75,
        metrics.PREEMPTIONS: 5.0,
        metrics.QUERIES: 1000.0,
        metrics.HITS: 250.0,
    }
    found = metrics.parse(PLAIN_METRICS + PLUGIN_METRICS)
    assert (found[metrics.HELD], found[metrics.RAW], found[metrics.COMPACTING]) == (100, 220, 0.5)
    assert metrics.policies(PLAIN_METRICS) == set()
    assert metrics.policies(PLUGIN_METRICS) == {"kvcrush", "none"}


def test_metrics_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(MetricsError, match=r"lacks vllm:num_requests_running.*disable-log-stats"):
        metrics.parse("python_info 1.0\n")
    second = PLAIN_METRICS.replace('engine="0"', 'engine="1"')
    with pytest.raises(MetricsError, match="several engines"):
        metrics.parse(PLAIN_METRICS + second)
    with pytest.raises(MetricsError, match="kv-cache-memory-bytes"):
        Pool.parse(PLAIN_METRICS.replace('bytes="4100"', 'bytes="None"'))
    with pytest.raises(MetricsError, match="without prefix caching"):
        Pool.parse(PLAIN_METRICS.replace('caching="True"', 'caching="False"'))


def test_pool_leaves_the_null_block_out() -> None:
    pool = Pool.parse(PLAIN_METRICS)
    assert pool == Pool(blocks=41, block_size=32, bytes=4100)
    assert pool.held(1.0) == 4000 and pool.held(0.5) == 2000


def sample(running: float, waiting: float, usage: float, **more: float) -> dict[str, float]:
    base = {metrics.RUNNING: running, metrics.WAITING: waiting, metrics.USAGE: usage}
    counters = {metrics.PREEMPTIONS: 0.0, metrics.QUERIES: 0.0, metrics.HITS: 0.0}
    return {**base, **counters, **more}


POOL = Pool(blocks=41, block_size=32, bytes=4100)


def test_peaks_and_differences() -> None:
    counted = {metrics.PREEMPTIONS: 7.0, metrics.QUERIES: 400.0, metrics.HITS: 100.0}
    before = sample(0, 0, 0, **{metrics.PREEMPTIONS: 4.0, metrics.QUERIES: 200.0})
    samples = [
        sample(0, 9, 0),  # asked, not yet running
        sample(4, 6, 0.2),
        sample(8, 2, 0.96),
        sample(10, 1, 1.0),
        sample(1, 0, 0.5),
    ]
    found = metrics.summarise(before, samples, sample(0, 0, 0, **counted), POOL, seconds=10)
    assert found == {
        "peak_running": 10,
        "waiting": 9,
        "preemptions": 3,
        "kv_bytes_per_request": pytest.approx(4000 * 2.66 / 23),
        "prefix_hit_rate": 0.5,
    }


def test_what_the_plugin_says() -> None:
    held = {metrics.HELD: 100.0, metrics.RAW: 300.0}
    before = sample(0, 0, 0, **{metrics.HELD: 0.0, metrics.RAW: 0.0})
    after = {**before, metrics.COMPACTING: 0.5}
    found = metrics.summarise(before, [sample(2, 0, 0.5, **held)], after, POOL, seconds=10)
    assert (found["bytes_ratio"], found["compaction_share"]) == (3.0, 0.05)
    # A prefix cache that was not asked has no rate, rather than a rate of 0.
    assert "prefix_hit_rate" not in found


def test_a_drive_that_no_sample_caught_is_refused() -> None:
    with pytest.raises(MetricsError, match="no sample"):
        metrics.summarise(sample(0, 0, 0), [sample(0, 3, 0)], sample(0, 0, 0), POOL, seconds=1)


# -- rows ----------------------------------------------------------------------------------------


def drive(**values: Any) -> dict[str, Any]:
    return {"per_budget": {}, **values}


def by_metric(rows: list[dict[str, Any]], **where: Any) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in rows if all(r[k] == v for k, v in where.items())}


def test_ratios_are_paired_and_never_faked() -> None:
    assert results.ratios([2, 4], [4, 2]) == [2.0, 0.5]
    assert results.ratios([2, 0], [4, 2]) is None


def test_rows_of_three_rounds() -> None:
    load = Workload("long_prompt", 768, 32, requests=8, concurrency=16)
    rounds = [
        {
            "plain": drive(peak_running=4, ttft_s=a, preemptions=p, compaction_share=0.0),
            "policy": drive(peak_running=12, ttft_s=b, preemptions=0, bytes_ratio=3.5),
        }
        for a, b, p in ((2.0, 1.0, 3), (4.0, 8.0, 0), (3.0, 1.0, 2))
    ]
    rows = results.rows(load, rounds, "kvcrush", 0.25)
    plain = by_metric(rows, policy="none", budget=1.0)
    kept = by_metric(rows, policy="kvcrush", budget=0.25)
    assert plain.keys() == {"peak_running", "ttft_s", "preemptions", "compaction_share"}
    # The median of the ratios, which is not the ratio of the medians.
    ratio = kept["ratio_ttft_s"]
    assert (ratio["value"], ratio["low"], ratio["high"]) == (0.5, pytest.approx(1 / 3), 2.0)
    assert kept["ttft_s"]["value"] / plain["ttft_s"]["value"] == pytest.approx(1 / 3)
    assert kept["ratio_peak_running"]["value"] == 3
    # A round in which plain vLLM preempted nobody leaves no ratio; the counts stay.
    assert "ratio_preemptions" not in kept and kept["preemptions"]["value"] == 0
    assert "ratio_bytes_ratio" not in kept
    where = {"task": "long_prompt", "mode": "closed-16", "context": 768, "codec": "raw", "n": 3}
    assert all(r[k] == v for r in rows for k, v in where.items())
    packed = results.rows(load, rounds, "int4", 0.25)
    assert {(r["policy"], r["codec"]) for r in packed} == {("none", "raw"), ("int4", "int4")}
    table = results.markdown(rows)
    assert "| long_prompt, closed-16 | ttft_s | 3 s | 1 s | 0.50 (0.33–2.00) |" in table
    assert "| long_prompt, closed-16 | preemptions | 2 | 0 | – |" in table


def test_one_round_has_no_range() -> None:
    load = Workload("long_prompt", 768, 32, requests=8, concurrency=None)
    rounds = [{"plain": drive(tpot_s=0.5), "policy": drive(tpot_s=1.0)}]
    rows = results.rows(load, rounds, "kvcrush", 0.25)
    assert {(r["low"], r["high"], r["mode"]) for r in rows} == {(None, None, "poisson")}
    assert "| long_prompt, poisson | tpot_s | 0.5 s | 1 s | 2.00 |" in results.markdown(rows)


def test_rows_of_mixed_budgets() -> None:
    load = Workload("mixed_budgets", 512, 32, requests=8, concurrency=8, budgets=MIXED)
    plain = drive(ttft_s=1.0, per_budget={"0.125": {"ttft_s": 2.0}, "1.0": {"ttft_s": 4.0}})
    kept = drive(ttft_s=3.0, per_budget={"0.125": {"ttft_s": 1.0}, "1.0": {"ttft_s": 6.0}})
    rows = results.rows(load, [{"plain": plain, "policy": kept}], "kvcrush", 0.25)
    keys = [(r["policy"], r["budget"], r["metric"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert by_metric(rows, policy="kvcrush", budget=None)["ratio_ttft_s"]["value"] == 3
    assert by_metric(rows, policy="kvcrush", budget=0.125)["ratio_ttft_s"]["value"] == 0.5
    assert by_metric(rows, policy="kvcrush", budget=1.0)["ratio_ttft_s"]["value"] == 1.5
    assert "| mixed_budgets, closed-8, budget 0.125 | ttft_s | – | 1 s | 0.50 |" in (
        results.markdown(rows)
    )


# -- the run -------------------------------------------------------------------------------------


def settings(folder: pathlib.Path, *flags: str) -> argparse.Namespace:
    args = command.parser().parse_args(["--quick", f"--json={folder / 'r.json'}", *flags])
    args.repeats = args.repeats or 1
    return args


def test_servers_alternate_and_share_the_arrival_rate(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []
    speed = iter(range(1, 100))

    def measured(self: Any, server: str, load: Workload, round_: int, rate: Any) -> dict[str, Any]:
        asked.append((round_, load.mode, server, rate))
        if len(asked) == 8:
            raise ServerError("killed")
        return drive(requests_per_s=next(speed), pool_bytes=1, ttft_s=1.0)

    monkeypatch.setattr(command.Bench, "drive", measured)
    loads = workloads.choose(workloads.workloads(quick=True), ["long_prompt"])
    args = settings(tmp_path, "--repeats=2")
    with pytest.raises(ServerError, match="killed"):
        command.measure(args, loads)
    command.measure(args, loads)
    expected = [
        (round_, mode, server, rate)
        for round_, servers_ in ((0, ("plain", "policy")), (1, ("policy", "plain")))
        # The rate is plain vLLM's requests per second in the larger closed loop, the third drive.
        for mode, rate in (("closed-4", None), ("closed-16", None), ("poisson", 3))
        for server in servers_
    ]
    # The drive that failed is repeated, what finished is not.
    assert asked == [*expected[:8], *expected[7:]]
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["poisson_rate"] == 3
    assert {r["n"] for r in body["rows"]} == {2}
    assert "| long_prompt, poisson | ttft_s |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plain-url=http://x"], "give both --plain-url and --policy-url"),
        (["--plain-url=http://x", "--policy-url=http://y", "--pool-blocks=9"], "--pool-blocks is"),
        (["--workloads", "nonsense"], "no such workload"),
        (["--output-tokens=1"], "two output tokens"),
        (["--rate=0"], "above 0"),
        (["--requests=0"], "at least 1"),
        (["--budget=-1"], "is not a KV budget"),
    ],
)
def test_bad_flags(
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", *flags])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and says in capsys.readouterr().err


# -- servers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answers: dict[str, list[tuple[int, str]]]) -> Iterator[str]:
    """Starts a server that gives these answers by path, one after the other, and yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers[self.path].pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def pair(plain: str, policy: str) -> Any:
    """Returns what `check` says about servers with these metrics."""
    with (
        answering({"/metrics": [(200, plain)]}) as a,
        answering({"/metrics": [(200, policy)]}) as b,
    ):
        return servers.check({"plain": Server(a), "policy": Server(b)}, "kvcrush")


def test_a_pair_that_cannot_be_compared_is_refused() -> None:
    both = PLAIN_METRICS + PLUGIN_METRICS
    assert pair(PLAIN_METRICS, both) == POOL
    with pytest.raises(ServerError, match="is not plain vLLM"):
        pair(both, both)
    with pytest.raises(ServerError, match="does not run policy 'kvcrush', but none"):
        pair(PLAIN_METRICS, PLAIN_METRICS)
    with pytest.raises(ServerError, match="differ in their pools"):
        pair(PLAIN_METRICS, both.replace('blocks="41"', 'blocks="42"'))


def test_a_failed_request_is_told_in_the_servers_own_words() -> None:
    client = object.__new__(Client)
    client.model = "model"
    load = Workload("long_prompt", 2, 8, requests=2, concurrency=2)
    asked = [Prompt([1, 2], {}), Prompt([3, 4], {"kv_budget": 2.5})]
    refusal = '{"error": {"message": "kv_budget=2.5 is not a KV budget"}}'
    url = "/v1/completions"
    with answering({url: [(400, refusal)]}) as base:
        client._check(Server(base), load, asked, {"errors": ["", ""], "output_lens": [8, 8]})
        with pytest.raises(ServerError, match=r"'kv_budget': 2.5.*Bad Request.*is not a KV budget"):
            bad = {"errors": ["", "Bad Request"], "output_lens": [8, 0]}
            client._check(Server(base), load, asked, bad)
    with answering({url: [(200, "{}")]}) as base:
        with pytest.raises(ServerError, match="ended after 7 tokens"):
            short = {"errors": ["", ""], "output_lens": [7, 8]}
            client._check(Server(base), load, asked, short)


def test_reset_of_the_prefix_cache(tmp_path: pathlib.Path) -> None:
    path = "/reset_prefix_cache"
    busy, done = (200, '{"success": false}'), (200, '{"success": true}')
    answers = {path: [busy, done, (404, ""), (404, "")]}
    with answering(answers) as base:
        reset_prefix_cache(Server(base))
        assert len(answers[path]) == 2, "a server that is still busy is asked again"
        reset_prefix_cache(Server(base))  # the user's own server need not offer it
        log = tmp_path / "log"
        log.write_text("")
        with pytest.raises(ServerError, match="404"):
            reset_prefix_cache(Server(base, log))


def alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def dead_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# A server stand-in with a child, as vLLM has its engine.
STAND_IN = ["bash", "-c", "sleep 600 & echo $!; wait"]
OWNER = """
import pathlib, sys, time
from benchmarks.serving.servers import running
log = pathlib.Path(sys.argv[1])
with running(["bash", "-c", "sleep 600 & echo $!; wait"], {"PATH": sys.argv[2]}, log) as process:
    print(process.pid, flush=True)
    time.sleep(600)
"""


def child_in(log: pathlib.Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if log.exists() and (text := log.read_text().strip()):
            return int(text)
        time.sleep(0.05)
    raise AssertionError("the stand-in did not start")


def test_servers_end_with_their_context(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ZeroDivisionError):
        with servers.running(STAND_IN, dict(os.environ), log) as process:
            pids = [process.pid, child_in(log)]
            assert all(map(alive, pids))
            raise ZeroDivisionError
    assert dead_within(pids, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_servers_end_with_a_benchmark_that_is_killed(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(log), os.environ["PATH"]],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(command.__file__).parents[2],
    )
    try:
        assert owner.stdout is not None
        pids = [int(owner.stdout.readline()), child_in(log)]
        assert all(map(alive, pids))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert dead_within(pids, 10)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
