"""One drive: a server under one workload, with vLLM's own benchmark as the client.

What sends the requests and does the sums is `benchmark()` of `vllm.benchmarks.serve`, that is
`vllm bench serve` without its command line: real HTTP, streaming, a closed loop by
`max_concurrency`, Poisson arrivals by `request_rate`, TTFT, TPOT and output tokens/s as vLLM
defines them. It is called in this process rather than as a command because the command takes 15
seconds to start and has no data set whose requests each carry a budget of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from benchmarks.serving.metrics import RUNNING, WAITING, Pool, parse, summarise
from benchmarks.serving.servers import Server, ServerError, post
from benchmarks.serving.workloads import Prompt, Workload, text

_POLL_SECONDS = 0.2
_IDLE_SECONDS = 30
# Far above any drive of this benchmark, so that a server that hangs does not hang it too.
_DRIVE_SECONDS = 3600
_PIECE = 8192  # characters
# What a server that does not answer looks like from here.
_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError)


class Client:
    """Asks the servers of a pair; what it needs to know of their model it learns from one."""

    def __init__(self, server: Server) -> None:
        from vllm.tokenizers import get_tokenizer

        self.card = self.ask(server)
        self.model, root, self.max_model_len = self.card
        # vLLM's benchmark, too, takes the tokenizer from where the server has its model.
        self.tokenizer: Any = get_tokenizer(root)
        # Real text as token ids, in pieces that the tokenizer does not find too long.
        self.words: list[int] = []
        whole = text()
        for start in range(0, len(whole), _PIECE):
            piece = whole[start : start + _PIECE]
            self.words += self.tokenizer.encode(piece, add_special_tokens=False)

    @staticmethod
    def ask(server: Server) -> tuple[str, str, int]:
        """Returns the name, origin and longest context of the server's model."""
        card = json.loads(server.get("/v1/models"))["data"][0]
        return card["id"], card["root"], card["max_model_len"]

    def body(self, prompt: Prompt, output: int) -> dict[str, Any]:
        """Returns a request as vLLM's benchmark sends it, but not streamed."""
        return {
            "model": self.model,
            "prompt": prompt.tokens,
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            **prompt.fields,
        }

    def warm_up(self, server: Server, tokens: int) -> None:
        """Sends one request with a prompt of `tokens` tokens that does not count."""
        body = self.body(Prompt(self.words[:tokens], {}), 8)
        post(f"{server.url}/v1/completions", json.dumps(body).encode())

    def drive(
        self,
        server: Server,
        load: Workload,
        prompts: Sequence[Prompt],
        pool: Pool,
        rate: float | None,
        seed: int,
    ) -> dict[str, Any]:
        """Metrics of one drive by name, `requests_per_s`, `pool_bytes`, and in `per_budget` the
        medians of each budget's requests. `rate` is that of Poisson arrivals, in requests/s;
        `seed` fixes them. Raises ServerError if any request fails or ends early."""
        if load.tokens > self.max_model_len:
            raise ServerError(
                f"{load.name} takes {load.tokens} tokens, {server.url} only "
                f"{self.max_model_len}: give a larger --max-model-len or smaller --prompt-tokens"
            )
        reset_prefix_cache(server)
        driving = self._drive(server, load, prompts, rate, seed)
        try:
            result, before, samples, after = asyncio.run(
                asyncio.wait_for(driving, timeout=_DRIVE_SECONDS)
            )
        except _FAILURES as error:
            raise ServerError(
                f"{load.name} {load.mode}: {server.url} failed: {error!r}{server.tail()}"
            ) from error
        self._check(server, load, prompts, result)
        watched = summarise(before, samples, after, pool, result["duration"])
        ttft, tpot = _latencies(result)
        found = {
            **watched,
            "ttft_s": float(result["median_ttft_ms"]) / 1000,
            "tpot_s": float(result["median_tpot_ms"]) / 1000,
            "output_tokens_per_s": result["output_throughput"],
            "requests_per_s": result["request_throughput"],
            "samples": len(samples),
            "pool_bytes": pool.bytes,
            "per_budget": {},
        }
        for budget in dict.fromkeys(load.budgets):
            mine = [i for i in range(len(prompts)) if load.budget_of(i) == budget]
            if mine:
                found["per_budget"][str(1.0 if budget is None else budget)] = {
                    "ttft_s": float(np.median([ttft[i] for i in mine])),
                    "tpot_s": float(np.median([tpot[i] for i in mine])),
                }
        return found

    async def _drive(
        self,
        server: Server,
        load: Workload,
        prompts: Sequence[Prompt],
        rate: float | None,
        seed: int,
    ) -> tuple[dict[str, Any], dict[str, float], list[dict[str, float]], dict[str, float]]:
        from vllm.benchmarks.datasets import SampleRequest
        from vllm.benchmarks.serve import TaskType, benchmark

        requests = [
            SampleRequest(
                prompt=prompt.tokens,
                prompt_len=len(prompt.tokens),
                expected_output_len=load.output,
                request_overrides=prompt.fields or None,
            )
            for prompt in prompts
        ]
        # vLLM draws the arrivals from numpy's global generator.
        np.random.seed(seed)
        samples: list[dict[str, float]] = []
        async with aiohttp.ClientSession() as session:
            before = await _idle(server, session)
            watcher = asyncio.create_task(_watch(server, session, samples))
            try:
                # It prints its own report.
                with contextlib.redirect_stdout(io.StringIO()):
                    result = await benchmark(
                        task_type=TaskType.GENERATION,
                        endpoint_type="openai",
                        api_url=f"{server.url}/v1/completions",
                        base_url=server.url,
                        model_id=self.model,
                        model_name=self.model,
                        tokenizer=self.tokenizer,
                        input_requests=requests,
                        logprobs=None,
                        request_rate=math.inf if rate is None else rate,
                        burstiness=1.0,
                        disable_tqdm=True,
                        num_warmups=0,
                        profile=False,
                        selected_percentile_metrics=["ttft", "tpot"],
                        selected_percentiles=[],
                        ignore_eos=True,
                        goodput_config_dict={},
                        max_concurrency=load.concurrency,
                        lora_modules=None,
                        extra_headers=None,
                        extra_body={"temperature": 0},
                        ready_check_timeout_sec=0,
                    )
            finally:
                watcher.cancel()
                watched = (await asyncio.gather(watcher, return_exceptions=True))[0]
            if isinstance(watched, Exception):
                raise watched
            return result, before, samples, await _idle(server, session)

    def _check(
        self, server: Server, load: Workload, prompts: Sequence[Prompt], result: dict[str, Any]
    ) -> None:
        for prompt, error, got in zip(
            prompts, result["errors"], result["output_lens"], strict=True
        ):
            if not error and got == load.output:
                continue
            # vLLM's client keeps the reason phrase only, so the server is asked once more.
            said = error.strip().splitlines()[-1] if error else f"ended after {got} tokens"
            try:
                post(
                    f"{server.url}/v1/completions",
                    json.dumps(self.body(prompt, load.output)).encode(),
                )
            except ServerError as again:
                said += f"; asked again, {again}"
            raise ServerError(
                f"{load.name} {load.mode}: a request of {len(prompt.tokens)} tokens with "
                f"{prompt.fields or 'no fields of its own'} failed: {said}{server.tail()}"
            )


def _latencies(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Returns the TTFT and TPOT of each request in seconds, as vLLM's calculate_metrics has
    them."""
    ttft = result["ttfts"]
    tpot = [
        (latency - first) / (tokens - 1)
        for latency, first, tokens in zip(
            result["latencies"], ttft, result["output_lens"], strict=True
        )
    ]
    return ttft, tpot


async def _watch(
    server: Server, session: aiohttp.ClientSession, samples: list[dict[str, float]]
) -> None:
    while True:
        # A poll that fails is one sample less; a server that fails, fails its requests.
        with contextlib.suppress(*_FAILURES):
            samples.append(await _sample(server, session))
        await asyncio.sleep(_POLL_SECONDS)


async def _sample(server: Server, session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get(f"{server.url}/metrics") as response:
        response.raise_for_status()
        return parse(await response.text())


async def _idle(server: Server, session: aiohttp.ClientSession) -> dict[str, float]:
    """Returns a sample of the server once it has nothing to do; its counters are then up to
    date."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while time.monotonic() < deadline:
        sample = await _sample(server, session)
        if not sample[RUNNING] and not sample[WAITING]:
            return sample
        await asyncio.sleep(_POLL_SECONDS)
    raise ServerError(f"{server.url} is busy with requests that are not ours{server.tail()}")


def reset_prefix_cache(server: Server) -> None:
    """Empties the prefix cache, where the server offers it: one that the user started without
    VLLM_SERVER_DEV_MODE=1 does not, and is left to prompts that differ from round to round."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while time.monotonic() < deadline:
        try:
            answer = json.loads(post(f"{server.url}/reset_prefix_cache"))
        except ServerError as error:
            if server.log is None and error.status == 404:
                return
            raise
        if answer["success"]:
            return
        time.sleep(_POLL_SECONDS)
    raise ServerError(f"{server.url} did not reset its prefix cache: is it busy?")
