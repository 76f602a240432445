"""What a large model's ranks hold on GPUs, by arithmetic: weights, the pool that a number of long
requests needs, and what lies beside it.

    python -m benchmarks.gpu.memory        prints the table of docs/gpu.md
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import report
from vllm_kvcrush.config import RequestParams, Settings
from vllm_kvcrush.engine.worker.memory import SideMemory, Sizes

# Of 70 billion parameters: 80 layers, 64 query heads and 8 KV heads of 128, in bfloat16.
PARAMETERS, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, ITEMSIZE = 70.6e9, 80, 64, 8, 128, 2
RANKS, REQUESTS, TOKENS, BLOCK_SIZE = 8, 64, 131_072, 16
# An H200's memory, and the share of it that vLLM takes unless told otherwise.
MEMORY, SHARE = 141e9, 0.92
CASES: tuple[tuple[str, float], ...] = (
    ("none", 1.0),
    ("int8", 0.55),
    ("int4", 0.25),
    ("int4", 0.125),
    ("kvcrush", 0.125),
)


@dataclass
class Need:
    """Bytes of one rank."""

    pool: int
    side: SideMemory
    blocks: int

    @property
    def beside(self) -> int:
        """Bytes beside the pool."""
        return self.side.fixed + self.side.of_block * self.blocks


def sizes() -> Sizes:
    """Returns the sizes of one rank of the model."""
    return Sizes(
        LAYERS, HEADS // RANKS, KV_HEADS // RANKS, HEAD_SIZE, ITEMSIZE, BLOCK_SIZE, REQUESTS, TOKENS
    )


def need(policy: str, budget: float) -> Need:
    """Returns what the requests need, all at their longest, prompt and output together."""
    page = (HEAD_SIZE, HEAD_SIZE, ITEMSIZE)
    settings = Settings(policy=policy, budget=budget, allow=(policy,), page=page)
    plan = settings.plan(RequestParams(policy, budget), TOKENS - 1024, BLOCK_SIZE)
    blocks = REQUESTS * plan.bound(TOKENS)
    if policy == "none":
        return Need(blocks * sizes().block_bytes, SideMemory(0, 0, 0, 0, 0), blocks)
    return Need(blocks * sizes().block_bytes, SideMemory.of(settings, sizes()), blocks)


def table() -> str:
    """Returns a Markdown table, in GB of one rank."""
    weights = PARAMETERS * ITEMSIZE / RANKS
    head = ["policy, budget", "pool", "directory", "queries", "kept", "compaction", "with weights"]
    lines = []
    for policy, budget in CASES:
        found = need(policy, budget)
        side, total = found.side, weights + found.pool + found.beside
        parts = (
            found.pool,
            side.directory + side.entries * found.blocks,
            side.queries,
            side.kept * found.blocks,
            side.compaction,
        )
        fits = "fits" if total <= MEMORY * SHARE else "does not fit"
        row = [f"{x / 1e9:.2f}" for x in parts]
        lines.append([f"`{policy}`, {budget:g}", *row, f"{total / 1e9:.1f}, {fits}"])
    return report.table(head, lines)


if __name__ == "__main__":
    print(table())
