"""How many requests run at once in one fixed KV pool, plain vLLM against a budget.

Two offline engines with the same pool, one after the other, each in a process of its own; the
plain one loads no plugin. Every request has `--prompt-tokens` tokens of real text and its own
prefix. Reports the peak number of running requests, blocks of one request before and after its
compaction, the share of the run spent in compactions, and wall time.

    python -m benchmarks.admission [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import subprocess
import sys
import time
from typing import Any

from benchmarks.report import row, table, write


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child process."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        block_size=job["block_size"],
        max_model_len=2048,
        kv_cache_memory_bytes=job["pool_bytes"],
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        additional_config=job["additional_config"],
        disable_log_stats=False,
    )
    started = time.perf_counter() - began
    words = llm.get_tokenizer().encode(
        "\n\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    )
    size, step = job["prompt_tokens"], 97
    prompts = [
        words[(i * step * 16) % (len(words) - size) :][:size] for i in range(job["requests"])
    ]
    core = llm.llm_engine.engine_core.engine_core
    scheduler, pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
    coordinator = scheduler.kv_cache_manager.coordinator
    seen = {"running": 0, "blocks": 0, "preemptions": 0, "after": None, "seconds": 0.0}
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen["running"] = max(seen["running"], len(scheduler.running))
        seen["preemptions"] += len(output.preempted_req_ids or ())
        held = coordinator.single_type_managers[0].req_to_blocks
        seen["blocks"] = max(seen["blocks"], max(map(len, held.values()), default=0))
        for command in getattr(getattr(output, "kvcrush", None), "compactions", ()):
            seen["before"] = len(command.source) + len(command.tail)
            seen["after"] = len(command.target) + len(command.tail)
        return output

    def updated(output: Any, result: Any) -> Any:
        seen["seconds"] += sum(s for _, s in getattr(result, "kvcrush_seconds", ()))
        return update(output, result)

    scheduler.schedule, scheduler.update_from_output = watched, updated
    params = SamplingParams(temperature=0, max_tokens=job["output_tokens"], ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    wall = time.perf_counter() - began
    assert len(outputs) == len(prompts)
    return {
        "start_s": started,
        "wall_s": wall,
        "pool_blocks": pool.num_gpu_blocks - 1,
        "tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
        **seen,
    }


def measure(job: dict[str, Any], plain: bool) -> dict[str, Any]:
    """Runs one engine in a fresh process."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        **({"VLLM_PLUGINS": ""} if plain else {}),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.admission", "--child"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"the engine failed:\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="half the requests, half the pool")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--pool-blocks", type=int, help="blocks of 32 tokens; default 480")
    parser.add_argument("--policy", default="kvcrush")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT", json.dumps(run_engine(json.load(sys.stdin))), flush=True)
        return

    from vllm_kvcrush import demo_model

    # More requests than can run, or the peak would only count them.
    requests = 24 if args.quick else 48
    args.pool_blocks = args.pool_blocks or 10 * requests
    block_size = 32
    job = {
        "model": str(demo_model.prepare(say=lambda line: print(line, file=sys.stderr))),
        "block_size": block_size,
        # 30 layers, 3 KV heads of 64 in float32; one block is vLLM's null block.
        "pool_bytes": (args.pool_blocks + 1) * block_size * 30 * 3 * 2 * 64 * 4,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "requests": requests,
        "additional_config": {},
    }
    rows, lines, results = [], [], {}
    for policy in ("none", args.policy):
        active = policy != "none"
        if active:
            job["additional_config"] = {"kvcrush": {"policy": policy, "budget": args.budget}}
        print(f"running {job['requests']} requests, policy {policy} …", file=sys.stderr)
        result = results[policy] = measure(job, plain=not active)
        where = {
            "policy": policy,
            "codec": "raw",
            "budget": args.budget if active else 1.0,
            "context": args.prompt_tokens,
            "task": "admission",
        }
        share = result["seconds"] / result["wall_s"]
        for metric, value, unit in (
            ("peak_running", result["running"], "requests"),
            ("preemptions", result["preemptions"], "requests"),
            ("blocks_before", result.get("before") or result["blocks"], "blocks"),
            ("blocks_after", result["after"] or result["blocks"], "blocks"),
            ("compaction_share", share, "ratio"),
            ("output_tokens_per_s", result["tokens"] / result["wall_s"], "tokens/s"),
            ("start_s", result["start_s"], "s"),
        ):
            rows.append(row(metric, value, unit, n=job["requests"], **where))
        lines.append(
            [
                policy if active else "plain vLLM",
                str(result["running"]),
                f"{result.get('before') or result['blocks']} → {result['after'] or '–'}",
                str(result["preemptions"]),
                f"{share:.2%}" if active else "–",
                f"{result['wall_s']:.0f} s",
            ]
        )
    ratio = results[args.policy]["running"] / results["none"]["running"]
    speed = results["none"]["wall_s"] / results[args.policy]["wall_s"]
    for metric, value in (("ratio_peak_running", ratio), ("ratio_output_tokens_per_s", speed)):
        rows.append(
            row(
                metric,
                value,
                "ratio",
                n=job["requests"],
                policy=args.policy,
                codec="raw",
                budget=args.budget,
                context=args.prompt_tokens,
                task="admission",
            )
        )
    print(
        f"\n{job['requests']} requests of {args.prompt_tokens} prompt and {args.output_tokens} "
        f"output tokens, {args.pool_blocks} blocks of {block_size} tokens, "
        f"budget {args.budget}\n"
    )
    header = ["", "peak running", "blocks of a request", "preempted", "compaction", "wall time"]
    print(table(header, lines))
    print(f"\npeak running × {ratio:.2f}, output tokens/s × {speed:.2f}")
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
