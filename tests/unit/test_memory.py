"""What a GPU worker holds beside the KV cache, by arithmetic."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker.memory import STAGING, SideMemory, Sizes

# A rank of 8 of a model with 80 layers, 64 query heads and 8 KV heads of 128, in bfloat16.
LARGE = Sizes(
    layers=80, heads=8, kv_heads=1, head_size=128, itemsize=2, block_size=16, requests=64,
    max_model_len=131_072,
)  # fmt: skip


def side(*allow: str, sizes: Sizes = LARGE) -> SideMemory:
    return SideMemory.of(Settings(policy=allow[0], allow=allow), sizes)


def test_what_is_allowed_decides() -> None:
    assert LARGE.block_bytes == 80 * 8192
    # Pages in the order of their blocks need no directory, and the newest tokens no queries.
    plain = side("streaming")
    assert (plain.directory, plain.queries, plain.entries) == (0, 0, 0)
    assert plain.kept == 80 * 16 * 4  # positions
    scored = side("snapkv")
    assert scored.queries == 64 * 16 * 80 * 8 * 128 * 2 and scored.directory == 0
    assert side("h2o").kept == 2 * plain.kept
    packed = side("int4")
    assert packed.directory == 65 * 80 * 8 * 8 and packed.entries == 128 * 8
    assert packed.kept == 80 * 4 * 48  # an int4 page holds 48 tokens
    assert side("keepkv", "int4").entries == 2 * packed.entries
    assert side("none", "int4") == packed


def test_the_longest_request_decides_what_a_compaction_takes() -> None:
    short = dataclasses.replace(LARGE, max_model_len=1024)
    wide = dataclasses.replace(LARGE, kv_heads=8, heads=64)
    # Keys and values in float32 as the policy sees them, and as many layers as fit the staging.
    layer = 131_072 * 2 * 128 * 4
    assert side("streaming").compaction == layer + STAGING and layer < STAGING
    assert side("streaming", sizes=short).compaction == layer // 128 + STAGING
    # One layer at least.
    assert side("streaming", sizes=wide).compaction == 8 * layer + 8 * layer
    # What only gear's pages are made from.
    more = side("gear", sizes=wide).compaction - side("tada", sizes=wide).compaction
    assert more >= 5 * 8 * layer // 2


@pytest.mark.parametrize("allow", [("streaming",), ("int4", "keepkv", "h2o")])
def test_pool_and_side_fit_together(allow: tuple[str, ...]) -> None:
    own = side(*allow)
    for available in (own.fixed + 40 * LARGE.block_bytes, 50 << 30):
        pool = own.left_for_pool(available, LARGE.block_bytes)
        blocks = pool // LARGE.block_bytes
        assert pool + own.fixed + blocks * own.of_block <= available
        # And no more than a block is given away.
        more = (blocks + 2) * (LARGE.block_bytes + own.of_block)
        assert own.fixed + more > available
    assert own.left_for_pool(own.fixed, LARGE.block_bytes) == 0
    assert own.left_for_pool(1, LARGE.block_bytes) == 0
