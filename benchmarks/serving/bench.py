"""The pair of servers under measurement, and one drive of either by its place in the run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import shlex
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.report import say
from benchmarks.serving import servers, workloads
from benchmarks.serving.metrics import Pool
from benchmarks.serving.results import PLAIN, POLICY
from benchmarks.serving.servers import BLOCK_SIZE, Server, ServerError
from benchmarks.serving.workloads import Workload

if TYPE_CHECKING:
    from benchmarks.serving.drive import Client

WARM_UP = 256  # tokens


ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def block_bytes(model: str, dtype: str = "float32") -> int:
    """Bytes of one block over all layers."""
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    per_token = config["num_hidden_layers"] * config["num_key_value_heads"] * 2 * size
    return BLOCK_SIZE * per_token * ITEMSIZE[dtype]


class Bench:
    """Servers, pool and client. Each comes into being when it is first needed: a run that goes on
    after a kill and has nothing left to measure starts no server."""

    def __init__(
        self, args: argparse.Namespace, loads: Sequence[Workload], stack: contextlib.ExitStack
    ) -> None:
        self.args, self.loads, self.stack = args, loads, stack

    @functools.cached_property
    def pair(self) -> dict[str, Server]:
        """Starts both servers: the user's, or ones on a model of this machine."""
        args = self.args
        if args.plain_url:
            return {
                PLAIN: Server(args.plain_url.rstrip("/")),
                POLICY: Server(args.policy_url.rstrip("/")),
            }
        if args.model is None:
            from vllm_kvcrush.tools import demo_model

            model = str(demo_model.prepare(say=say))
        else:
            model = str(args.model)
        # No longer than needed: the pool must be able to hold one such request raw.
        longest = max(WARM_UP + 8, *(load.tokens for load in self.loads))
        return self.stack.enter_context(
            servers.started(
                model,
                # One more: vLLM keeps a null block.
                pool_bytes=(args.pool_blocks + 1) * block_bytes(model, args.dtype),
                max_model_len=longest,
                policy=args.policy,
                budget=args.budget,
                dtype=args.dtype,
                policy_flags=shlex.split(args.policy_flags),
            )
        )

    @functools.cached_property
    def pool(self) -> Pool:
        """Returns the pool that both servers have."""
        return servers.check(self.pair, self.args.policy)

    @functools.cached_property
    def client(self) -> Client:
        """Returns the client, after one request to each server that does not count."""
        # vLLM's benchmark takes seconds to import.
        from benchmarks.serving.drive import Client

        _, client = self.pool, Client(self.pair[PLAIN])
        if client.card != (other := Client.ask(self.pair[POLICY])):
            raise ServerError(f"the servers differ in their models: {client.card} and {other}")
        for server in self.pair.values():
            client.warm_up(server, WARM_UP)
        return client

    def drive(self, server: str, load: Workload, round_: int, rate: float | None) -> dict[str, Any]:
        """Returns what `Client.drive` measured. A round's prompts and arrivals are the same for
        both."""
        client = self.client
        prompts = workloads.prompts(load, client.words, round_, self.pool.block_size)
        if server == PLAIN:
            prompts = [workloads.Prompt(prompt.tokens, {}) for prompt in prompts]
        seed = zlib.crc32(f"{load.name} {load.mode} {round_}".encode())
        return client.drive(self.pair[server], load, prompts, self.pool, rate, seed)
