"""A model, not a measurement: the least time that attention over a cache can take on a device.

A step of decoding must read every page once. It can be no faster than the memory's bandwidth, and
no faster than the processors can issue the instructions of the compiled loop, counted by
disassembly. Nothing else is in it: no latency, no launch, no merge, no imbalance.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcrush.ops.triton.layout import Geometry

BLOCK_SIZE = 128  # tokens of a raw page


@dataclass(frozen=True)
class Device:
    """Figures of a datasheet.

    Attributes:
        bandwidth: bytes a second.
        flops: dense bfloat16 operations of the tensor cores a second.
        processors: SMs or CUs.
        clock: Hz at which `flops` is stated.
        issue: instructions of a warp (wave) that a processor can start in a cycle.
        target: whose compiled code it runs.
    """

    bandwidth: float
    flops: float
    processors: int
    clock: float
    issue: float
    target: str


DEVICES = {
    "A100 80GB SXM": Device(2.039e12, 312e12, 108, 1.41e9, 4, "sm_80"),
    "H100 SXM": Device(3.35e12, 989e12, 132, 1.83e9, 4, "sm_90"),
    "H200 SXM": Device(4.8e12, 989e12, 132, 1.83e9, 4, "sm_90"),
    # Four SIMDs that take four cycles for a wave of 64.
    "MI300X": Device(5.3e12, 1307e12, 304, 2.1e9, 1, "gfx942"),
}


def token_bytes(codec: str, geometry: Geometry) -> float:
    """Bytes that attention reads for a token of one KV head: K and V with their scales."""
    at = geometry.section(codec)
    if codec in ("raw", "exact"):
        return at.k_row
    return at.positions / at.capacity


def decode_bytes(codec: str, geometry: Geometry, tokens: int, layers: int, kv_heads: int) -> float:
    """Bytes of one sequence's context in one step."""
    return tokens * layers * kv_heads * token_bytes(codec, geometry)


def issue_seconds(
    device: Device, loop: int, warps: int, tile: int, tokens: int, layers: int, kv_heads: int
) -> float:
    """Returns the least time to issue the loop's instructions for every tile, all processors
    busy."""
    tiles = tokens / tile * layers * kv_heads
    return tiles * loop * warps / (device.issue * device.processors * device.clock)


def prefill_seconds(
    device: Device, rows: int, context: int, layers: int, heads: int, size: int
) -> float:
    """Returns the least time of the products of `rows` queries with `context` tokens each."""
    return 4.0 * rows * context * layers * heads * size / device.flops
