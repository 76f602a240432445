"""The tables of benchmarks/results/gpu_compile.md, from the rows of gpu_compile.json. Needs neither
Triton nor a GPU.
"""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.gpu import model
from vllm_kvcrush.ops.triton.layout import Geometry

# The model whose decode step the cost model prices: 8 KV heads and 32 query heads of 128.
LAYERS, KV_HEADS, GROUP, SIZE = 32, 8, 4, 128
CONTEXTS = (8192, 32768, 131072)
CODECS = ("raw", "int8", "int4")

PAGE = """# What the GPU kernels compile to, and a cost model

`{command}`, Triton {triton}; [docs/gpu.md](../../docs/gpu.md) says what follows from it. `--only
REGEX` compiles some rows again and leaves the others as they are; all of them take three quarters
of an hour. The command ends with an error where a kernel does not compile (its row says so),
spills, or lacks tensor core instructions, or, for NVIDIA, where one that multiplies has no
128-bit load in its loops.

## Machine code

Pages of 128 raw tokens. *mixed*: pages of raw, int8 and int4; *int8+tc4*: raw, int8 and tc4, as
`auto` has them. Fitted codecs are built for one number of value bits each, 2 to 4.

*registers* of a thread (AMD: vector and accumulation registers); *spills* in bytes; *blocks* that
fit an SM or CU at once, and their warps as a share of the most it holds (*occupancy*), bounds by
registers and shared memory; *tensor*: matrix instructions; *128-bit loads* from global memory in
the loops that multiply (in all, where there is no such loop), of these *async* ones to shared
memory; *loop*: instructions of the longest such loop, which covers *tile* tokens. gfx942 loads
8-byte pieces where a lane's share of a tile of codes is 8 bytes.

{compiled}

## Cost model

**A model, not a measurement.** Floor of one decode step of one sequence of a model with 32
layers, 8 KV heads and 32 query heads of 128, all of the context in one codec. *bytes*: what must
be read, over the datasheet's bandwidth (A100 80GB 2.039, H100 SXM 3.35, H200 4.8, MI300X 5.3
TB/s). *instructions*: the compiled loop's length times its passes, over what all SMs or CUs can
issue (4 warp instructions a cycle and SM; 1 wave instruction a cycle and CU), at the clock of the
datasheet's peak. The floor is the larger one; latency, launches, merging and imbalance are not in
it. The last columns compare with reading the same context in bfloat16, as FlashAttention must: by
bytes alone, and floor to floor.

{decode}

Prefill is bound by products: a chunk of 2,048 rows of the same model against its context, at the
datasheet's dense bfloat16 rate, beside the time to read the context once.

{prefill}
"""


def page(result: dict[str, Any]) -> str:
    """Returns gpu_compile.md.

    Args:
        result: the content of gpu_compile.json.
    """
    return PAGE.format(
        command=result["command"],
        triton=result["triton"],
        compiled=compile_table(result["rows"]),
        decode=model_table(floors(result["rows"])),
        prefill=prefill_table(),
    )


def compile_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of what the machine code says, one line a row."""
    header = ["kernel", "codec", "head/group", "dtype", "target", "registers", "spills", "shared B"]
    header += ["blocks", "occupancy", "tensor", "128-bit loads", "async", "loop", "tile"]
    lines = []
    for r in rows:
        name = [r["kernel"], r["codec"], f"{r['head_size']}/{r['group']}", r["dtype"], r["target"]]
        if r["error"]:
            lines.append([*name, "does not compile", *["-"] * (len(header) - len(name) - 1)])
            continue
        lines.append(
            name
            + [str(r[k]) for k in ("registers", "spills", "shared_bytes", "blocks")]
            + [f"{r['occupancy']:.0%}"]
            + [str(r[k]) for k in ("tensor_core_instructions", "wide_loads", "async_loads")]
            + [str(r["loop_instructions"] or "-"), str(r["tile"] or "-")]
        )
    return report.table(header, lines)


def floors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the cost model of a decode step of one sequence, for each device, context and codec
    that `rows` have machine code for."""
    geometry = Geometry.of(model.BLOCK_SIZE, SIZE, SIZE, 2)
    shape = (LAYERS, KV_HEADS)
    found = []
    for name, device in model.DEVICES.items():
        for codec in CODECS:
            wanted = ("decode", codec, SIZE, GROUP, "bf16", device.target)
            keys = ("kernel", "codec", "head_size", "group", "dtype", "target")
            row = next((r for r in rows if tuple(r[k] for k in keys) == wanted), None)
            if row is None or row["error"]:
                continue
            for context in CONTEXTS:
                read = model.decode_bytes(codec, geometry, context, *shape)
                full = model.decode_bytes("raw", geometry, context, *shape)
                memory = read / device.bandwidth
                loop = (row["loop_instructions"], row["warps"], row["tile"])
                issue = model.issue_seconds(device, *loop, context, *shape)
                floor = max(memory, issue)
                found.append(
                    {
                        "device": name, "codec": codec, "context": context,
                        "memory_us": memory * 1e6, "issue_us": issue * 1e6,
                        "floor_us": floor * 1e6, "times_bytes": full / read,
                        "times_floor": full / device.bandwidth / floor,
                    }
                )  # fmt: skip
    return found


def model_table(found: list[dict[str, Any]]) -> str:
    """Returns the table of the cost model."""
    header = ["device", "codec", "context", "bytes: µs", "instructions: µs", "floor: µs"]
    header += ["bf16 bytes / bytes", "bf16 floor / floor"]
    return report.table(
        header,
        [
            [f["device"], f["codec"], str(f["context"])]
            + [f"{f[k]:.0f}" for k in ("memory_us", "issue_us", "floor_us")]
            + [f"{f['times_bytes']:.2f}", f"{f['times_floor']:.2f}"]
            for f in found
        ],
    )


def prefill_table() -> str:
    """Returns the table of a prefill chunk of 2,048 rows: products beside reading the context."""
    lines = []
    geometry = Geometry.of(model.BLOCK_SIZE, SIZE, SIZE, 2)
    for name, device in model.DEVICES.items():
        for context in CONTEXTS:
            ops = model.prefill_seconds(device, 2048, context, LAYERS, GROUP * KV_HEADS, SIZE)
            read = model.decode_bytes("raw", geometry, context, LAYERS, KV_HEADS)
            lines.append([name, str(context), f"{ops * 1e3:.2f}"])
            lines[-1].append(f"{read / device.bandwidth * 1e3:.2f}")
    return report.table(["device", "context", "products: ms", "reading bf16 once: ms"], lines)
