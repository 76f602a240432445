"""What a GPU worker holds beside the KV cache: bytes that are there from the start, or that a
compaction takes for a moment. The worker leaves as much free when it sizes the pool."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker.allowed import (
    has_biases,
    has_state,
    needs_queries,
    reads_floats,
    region_codecs,
)

_RUNS = 8  # kinds of pages that a directory tells apart; a test holds it against the kernels'
_WORD = 4
# What gear's factors, grids and single channels are found in, in copies of the keys and values that
# fill its pages: `ops.triton.codecs.gear`.
_GEAR_COPIES = 5
# Bytes that keys and values take at most on their way into new pages, but for those of one layer,
# which are always taken at once.
STAGING = 256 << 20


def copies(gear: bool) -> int:
    """Copies of keys and values on their way into new pages, of which some may be gear's."""
    return 1 + _GEAR_COPIES * gear


def staged_layers(size: int) -> int:
    """Layers whose keys and values are moved at once, if those of one are `size` numbers."""
    return max(1, STAGING // (max(1, size) * _WORD))


@dataclass(frozen=True)
class Sizes:
    """One rank's model and server.

    Attributes:
        layers, heads, kv_heads: layers, query heads and KV heads of this rank.
        head_size: channels of a head.
        itemsize: bytes of a channel.
        block_size: tokens of a block.
        requests: most at a time.
        max_model_len: most tokens of one.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    itemsize: int
    block_size: int
    requests: int
    max_model_len: int

    @property
    def pages(self) -> int:
        """Pages of a block."""
        return self.layers * self.kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the pool."""
        return self.pages * self.block_size * 2 * self.head_size * self.itemsize


@dataclass(frozen=True)
class SideMemory:
    """Bytes beside the pool, by what for.

    Attributes:
        directory: rows of the directory, by request.
        queries: the last queries of each request.
        compaction: the keys and values, in float32, of a layer of the longest request: once as its
            policy sees them (in the pages' type if all allowed ones take tiles of them), once as it
            merges them, if an allowed one does, and once on their way into new pages, several times
            where these may be gear's, or of as many layers as fit `STAGING`; and the old and the
            new region. What a policy computes is not in it.
        entries: of each block of the pool, the directory's.
        kept: of each block of the pool, what is kept of the tokens in it: true positions, which any
            request may ask for, and running state (a number a token) and log biases, where an
            allowed policy has any.
    """

    directory: int
    queries: int
    compaction: int
    entries: int
    kept: int

    @classmethod
    def of(cls, settings: Settings, sizes: Sizes) -> SideMemory:
        """What a server with these settings holds at most."""
        entry = 2 * _WORD + (8 if has_biases(settings) else 0)
        page_bytes = sizes.block_size * 2 * sizes.head_size * sizes.itemsize
        rooms = [sizes.block_size]
        for codec in region_codecs(settings):
            if codec in settings.fitted:
                rooms += [room for rank in settings.fitted[codec] for room, _ in rank]
            elif not CODECS[codec].needs_tables:
                rooms.append(
                    CODECS[codec].capacity(
                        page_bytes, sizes.head_size, sizes.head_size, sizes.itemsize
                    )
                )
        words = 1 + has_biases(settings) + has_state(settings)
        owned, tokens = settings.owns_pages, sizes.max_model_len
        query = sizes.layers * sizes.heads * sizes.head_size * sizes.itemsize
        queries = sizes.requests * settings.window * query if needs_queries(settings) else 0
        layer = sizes.kv_heads * tokens * 2 * sizes.head_size * _WORD
        moved = max(STAGING, copies("gear" in region_codecs(settings)) * layer)
        seen = layer if reads_floats(settings) else layer * sizes.itemsize // _WORD
        compaction = seen + has_biases(settings) * layer + moved
        directory = entries = 0
        if owned:
            directory = (sizes.requests + 1) * sizes.pages * _RUNS * 2 * _WORD
            entries = (1 << (sizes.pages - 1).bit_length()) * entry
            compaction += 2 * 5 * _WORD * sizes.pages * -(-tokens // sizes.block_size)
        return cls(
            directory, queries, compaction, entries, words * _WORD * max(rooms) * sizes.pages
        )

    @property
    def fixed(self) -> int:
        """Bytes whatever the pool's size."""
        return self.directory + self.queries + self.compaction

    @property
    def of_block(self) -> int:
        """Bytes for each block of the pool."""
        return self.entries + self.kept

    def left_for_pool(self, available: int, block_bytes: int) -> int:
        """Bytes that the pool may take of `available` ones, so that all of this fits beside it."""
        rest = max(0, available - self.fixed)
        return rest * block_bytes // (block_bytes + self.of_block)
