"""The plan: how many blocks a request holds, and at which token counts it is compacted.

A pure function of the request's parameters and its token counts. The scheduler calls it to
allocate blocks, the worker to know which queries to remember; because both get the same answer,
block counts need no message between them (design rule 2), and a request that is preempted and
read again is compacted at the same positions with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b for non-negative a, positive b."""
    return -(-a // b)


class Shape(NamedTuple):
    """Result of one compaction: `compressed` blocks, then a raw tail of `tail_tokens`."""

    compressed: int
    tail_tokens: int


@dataclass(frozen=True)
class Packing:
    """How many tokens the pages of a codec hold.

    A block is one page for each (layer, KV head); in the compressed region a request's pages go to
    whichever layer and head needs them, so that heads whose tokens take more bits get more pages.

    Args:
        codec: its name in `pages.CODECS`.
        pages: for each tensor-parallel rank, which has the same number of blocks: (tokens that a
            page holds, how many pairs of layer and KV head have such pages), ...
    """

    codec: str
    pages: tuple[tuple[tuple[int, int], ...], ...]

    def blocks(self, tokens: int, other: Packing | None = None, more: int = 0) -> int:
        """Blocks that hold `tokens` tokens in this codec, and `more` in another one."""
        most = 0
        for rank, pages in enumerate(self.pages):
            needed = sum(heads * cdiv(tokens, room) for room, heads in pages)
            if other is not None:
                needed += sum(heads * cdiv(more, room) for room, heads in other.pages[rank])
            most = max(most, cdiv(needed, sum(heads for _, heads in pages)))
        return most

    def tokens(self, blocks: int) -> int:
        """The most tokens that `blocks` blocks hold."""
        most = min(max(room for room, _ in pages) for pages in self.pages)
        return _last(lambda t: self.blocks(t) <= blocks, blocks * most)


def _last(holds: Callable[[int], bool], limit: int) -> int:
    """The largest of 0 ... limit for which `holds`, if it never holds again once it does not; else
    one that holds and whose successor does not. `holds` holds for 0."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


class Part(NamedTuple):
    """Neighbouring tokens of a compressed region, in pages of one codec."""

    codec: str
    tokens: int


def min_blocks(block_size: int, window: int, sinks: int) -> int:
    """Fewest blocks a compacted request can hold: the sinks' blocks (at least one compressed
    block) and the longest tail that keeps `window` tokens and starts on a block boundary."""
    return max(1, cdiv(sinks, block_size)) + cdiv(window + block_size - 1, block_size)


@dataclass(frozen=True)
class Plan:
    """Block counts and compaction positions of one request.

    Args:
        budget: `float` in (0, 1]: share of the raw tokens; `int`: tokens. Tokens here are
            raw-token equivalents: bytes a raw token of this model takes.
        num_prompt_tokens: length of the prompt, in tokens.
        block_size: tokens in a block.
        window: newest tokens that always stay raw (the observation window).
        sinks: leading tokens that always stay.
        prefill_interval: tokens by which a prompt may outgrow its budget while it is read.
        decode_interval: decoded tokens between two compactions.
        packings: codecs that the compressed region may have, those that lose least first; empty:
            raw tokens.
        tiers: whether the most important tokens get the finer of two codecs, not the newest.

    All positions are counts of computed tokens, `n`; "at n" means tokens [0, n) have KV.
    """

    budget: float | int
    num_prompt_tokens: int
    block_size: int
    window: int = 16
    sinks: int = 4
    prefill_interval: int = 2048
    decode_interval: int = 128
    packings: tuple[Packing, ...] = ()
    tiers: bool = False

    @property
    def never(self) -> bool:
        """A budget of 1.0 never compacts."""
        return isinstance(self.budget, float) and self.budget >= 1.0

    def tokens(self, n: int) -> int:
        """Tokens' worth of KV that the budget allows at n. A fraction counts the whole prompt
        from the start: its length is known, so early chunks need not be squeezed harder."""
        if isinstance(self.budget, float):
            return int(self.budget * max(n, self.num_prompt_tokens))
        return self.budget

    def blocks(self, n: int) -> int:
        """Most blocks a request holds right after a compaction at n (compressed region and
        tail)."""
        floor = min_blocks(self.block_size, self.window, self.sinks)
        return max(floor, self.tokens(n) // self.block_size)

    def parts(self, compressed: int, candidates: int) -> tuple[Part, ...]:
        """What `compressed` blocks hold of `candidates` tokens before the tail, in slot order.

        The first codec in which all of them fit; where that leaves room, the newest in the codec
        before it: with one more they would not fit. With `tiers`, the most important ones, which
        come first. If they fit in none, as many as the last one holds."""
        if not self.packings:
            return (Part("raw", min(candidates, compressed * self.block_size)),)
        better: Packing | None = None
        for packing in self.packings:
            if packing.blocks(candidates) <= compressed:
                break
            better = packing
        else:
            return (Part(packing.codec, packing.tokens(compressed)),)
        if better is None:
            return (Part(packing.codec, candidates),)
        own, finer = packing, better
        newest = _last(lambda t: own.blocks(candidates - t, finer, t) <= compressed, candidates)
        parts = (Part(own.codec, candidates - newest), Part(finer.codec, newest))
        return tuple(part for part in parts[:: -1 if self.tiers else 1] if part.tokens)

    def shape(self, n: int, held: int) -> Shape:
        """Blocks and tail after a compaction at n of a request that holds `held` tokens' slots.

        The tail starts on a block boundary, so its blocks stay where they are."""
        tail = held - max(0, held - self.window) // self.block_size * self.block_size
        compressed = self.blocks(n) - cdiv(tail, self.block_size)
        if self.packings:
            # Blocks that all tokens together would not fill are not taken.
            compressed = min(compressed, self.packings[0].blocks(n - tail))
        return Shape(compressed, tail)

    def held_after(self, n: int, held: int) -> int:
        """Slots held after a compaction at n."""
        shape = self.shape(n, held)
        return shape.compressed * self.block_size + shape.tail_tokens

    def due(self, n: int, held: int) -> bool:
        """Whether a request at n is over its budget, so that a compaction gives blocks back."""
        return not self.never and cdiv(held, self.block_size) > self.blocks(n)

    def check_after(self, n: int) -> int:
        """The first compaction position > n: while the prompt is read, whenever the tail has
        grown by `prefill_interval`; at its end; then every `decode_interval` tokens."""
        prompt = self.num_prompt_tokens
        if n >= prompt:
            return prompt + ((n - prompt) // self.decode_interval + 1) * self.decode_interval
        grown = self.blocks(prompt) * self.block_size + self._prefill_step
        if n >= grown:
            grown += ((n - grown) // self._prefill_step + 1) * self._prefill_step
        return min(grown, prompt)

    @property
    def _prefill_step(self) -> int:
        return max(1, self.prefill_interval // self.block_size) * self.block_size

    def is_check(self, n: int) -> bool:
        """Whether n is a compaction position."""
        return n > 0 and self.check_after(n - 1) == n

    def next_compaction(self, n: int, held: int, limit: int) -> int | None:
        """The first position in (n, limit] where a request that holds `held` slots at n will be
        compacted, or None."""
        if self.never:
            return None
        # Before the slots outgrow today's blocks no position can be due.
        check = self.check_after(n + max(0, self.blocks(n) * self.block_size - held))
        while check <= limit:
            if self.due(check, held + check - n):
                return check
            check = self.check_after(check)
        return None

    def first_compaction(self, limit: int) -> int | None:
        """Where a request that reaches `limit` tokens is compacted first, or None. Tokens before
        it have exact KV; blocks of later ones are never put into the prefix cache."""
        return self.next_compaction(0, 0, limit)

    def bound(self, n: int) -> int:
        """Most blocks held at any time by a request that grows to n tokens (design rule 5)."""
        raw = cdiv(n, self.block_size)
        if self.never:
            return raw
        prefill = self.blocks(self.num_prompt_tokens) + self._prefill_step // self.block_size
        if n <= self.num_prompt_tokens:
            return min(raw, prefill)
        decode = self.blocks(n) + cdiv(self.decode_interval, self.block_size)
        return min(raw, max(min(prefill, cdiv(self.num_prompt_tokens, self.block_size)), decode))
