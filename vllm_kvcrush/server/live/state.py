"""What `GET /kvcrush/state` answers, and each event of `GET /kvcrush/events`.

The server's OpenAPI document has the JSON schema of these models; docs/live.md tells the same in
short. `VERSION` grows when a field goes or changes its meaning; new fields may come without that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

VERSION: Literal[1] = 1


class Pool(BaseModel):
    """The KV blocks of one engine, without vLLM's null block."""

    blocks: int = Field(description="Blocks of the pool.")
    block_size: int = Field(description="Raw tokens that a block holds.")
    block_bytes: int = Field(description="Bytes of a block, over all layers and ranks.")
    counts: dict[str, int] = Field(
        description="Blocks by state; they add up to `blocks`. `free`; `cached`: free, but still a "
        "hit of the prefix cache; `whole`: of requests that were not compacted; `tail`: newest, "
        "raw blocks of requests that were; else the codec of a compressed region (`raw`: kept "
        "tokens in full precision). Of a region in two codecs blocks are divided as its pages are."
    )
    cell_blocks: int = Field(description="Blocks that one cell of the map stands for.")
    map: list[tuple[str, int]] = Field(
        description="The pool in the order of its blocks, as runs (state, cells). The last cell "
        "may stand for fewer blocks; one that stands for several has the state of most of them."
    )


class Pressure(BaseModel):
    """Blocks in use and those that the next step asks for, as a share of the pool."""

    now: float = Field(description="Pressure at the last step; above 1: more is wanted than is.")
    limit: float | None = Field(description="`--kv-pressure`, or null where it is not set.")
    history: list[tuple[float, float]] = Field(
        description="(Unix time, pressure), about once a second. `/kvcrush/state`: of the last "
        "five minutes with steps; an event: since the one before."
    )


class Running(BaseModel):
    """A running request."""

    number: int = Field(description="Its place in the order in which requests came to the engine.")
    seconds: float = Field(description="Time since it came.")
    phase: Literal["prefill", "decode"] = Field(description="Whether its prompt is still read.")
    prompt_tokens: int = Field(description="Tokens of its prompt.")
    tokens_held: int = Field(description="Tokens whose KV it holds, in each layer and head.")
    tokens_raw: int = Field(description="Tokens whose KV was computed.")
    bytes_held: int = Field(description="Bytes of its blocks, and of what belongs to them.")
    bytes_raw: int = Field(description="Bytes that it would hold without compression.")
    blocks: dict[str, int] = Field(description="Its blocks by state, as in `Pool.counts`.")
    policy: str = Field(description="Policy that it runs with, or none.")
    budget: float = Field(description="A share of its raw size, up to 1, or a number of tokens.")
    reason: Literal["budget", "pressure"] | None = Field(
        description="What it is compacted for, if it is; null: it never is."
    )
    level: int | None = Field(
        description="How far it was compacted for pressure: 0 is whole, `levels` its budget."
    )
    levels: int | None = Field(description="Steps to its budget; null where `reason` is not so.")
    compactions: int = Field(description="How often it was compacted.")
    policy_failures: int = Field(description="Of these, those in which the policy failed.")
    put_off: Literal["shared", "no_room"] | None = Field(
        description="Why its compaction is overdue, if it is: blocks that others hold too, or no "
        "room for new ones."
    )


class Compaction(BaseModel):
    """One compaction of one request."""

    seq: int = Field(description="Number of compactions of the engine up to this one.")
    time: float = Field(description="Unix time at which it was decided.")
    request: int = Field(description="`Running.number` of the request.")
    policy: str = Field(description="The request's policy.")
    reason: Literal["budget", "pressure"] = Field(description="Why.")
    tokens: int = Field(description="Tokens whose KV had been computed.")
    blocks_before: int = Field(description="Blocks that the request held.")
    blocks_after: int = Field(description="Blocks that it held afterwards.")
    blocks_freed: int = Field(
        description="Blocks that returned to the pool: fewer where others hold them too, none for "
        "a request that shares another one's result."
    )
    tokens_evicted: int | None = Field(
        description="Tokens that were dropped; null until the workers report, and in events for "
        "those that have not yet."
    )
    seconds: float | None = Field(description="Time that it took; null likewise.")


class Compactions(BaseModel):
    """Compactions of one engine since it started."""

    total: dict[str, int] = Field(description="How many there were, by reason.")
    recent: list[Compaction] = Field(
        description="The last ones, oldest first. `/kvcrush/state`: up to 64; an event: those "
        "since the one before, and those whose report came since."
    )


class Engine(BaseModel):
    """One engine: with data parallelism there are several."""

    engine: int = Field(description="Its data-parallel rank, as in the label of /metrics.")
    time: float = Field(description="Unix time of what follows.")
    stale: bool = Field(description="Whether the engine did not answer now: this is of `time`.")
    pool: Pool
    pressure: Pressure
    running: int = Field(description="Running requests.")
    waiting: int = Field(description="Requests that wait for blocks or for a place in the batch.")
    requests: list[Running] = Field(
        description="Running requests by number; of more than 100, those with most tokens."
    )
    compactions: Compactions
    seconds: float = Field(description="What it took the engine to tell this.")


class State(BaseModel):
    """Everything that the live page shows."""

    version: Literal[1] = Field(default=VERSION, description="Version of this schema.")
    time: float = Field(description="Unix time of the API server.")
    model: str = Field(description="Name of the model, as /metrics has it.")
    policy: str = Field(description="Policy of requests that name none.")
    budget: float = Field(description="Their budget: a share of the raw size, or tokens.")
    engines: list[Engine] = Field(description="The engines that this API server sends requests to.")
    silent: list[int] = Field(description="Ranks of engines that have not answered now.")
