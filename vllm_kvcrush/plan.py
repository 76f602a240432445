"""The plan: how many blocks a request holds, and at which token counts it is compacted.

A pure function of the request's parameters and its token counts. The scheduler calls it to
allocate blocks and to say whose queries to keep, and sends it to the workers once; block counts
follow from it alone (design rule 2), and a request that is preempted and prefilled again is
compacted at the same positions with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


def cdiv(a: int, b: int) -> int:
    """Returns the ceiling of a / b for non-negative a and positive b."""
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
        codec: the codec's name in `codecs.CODECS`.
        pages: for each tensor-parallel rank (all have the same number of blocks), pairs of the
            tokens that a page holds and the number of (layer, KV head) pairs with such pages.
        loss: expected loss of a context in this codec, in nats a later token, or None where it was
            not measured. Nothing but `Plan.parts` depends on it, so no block count does.
    """

    codec: str
    pages: tuple[tuple[tuple[int, int], ...], ...]
    loss: float | None = None

    def blocks(self, tokens: int, other: Packing | None = None, more: int = 0) -> int:
        """Returns the number of blocks that hold `tokens` tokens in this codec and `more` tokens in
        the codec `other`."""
        most = 0
        for rank, pages in enumerate(self.pages):
            needed = sum(heads * cdiv(tokens, room) for room, heads in pages)
            if other is not None:
                needed += sum(heads * cdiv(more, room) for room, heads in other.pages[rank])
            most = max(most, cdiv(needed, sum(heads for _, heads in pages)))
        return most

    def tokens(self, blocks: int) -> int:
        """Returns the most tokens that `blocks` blocks hold."""
        # More tokens never take fewer blocks, so bisecting finds the last that fits.
        low, high = 0, blocks * min(max(room for room, _ in pages) for pages in self.pages)
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks(middle) <= blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def most_beside(self, other: Packing, tokens: int, blocks: int) -> int:
        """Returns how many of `tokens` tokens can be in the codec `other`, with the rest in this
        one, so that `blocks` blocks hold them all. The blocks must be able to hold all of them in
        this codec.

        Whether a number of tokens fits is not monotone: one more token in the other codec may open
        a page there, or empty a page here. But with the largest number that fits, a page of the
        other codec is full. The search goes downwards over such numbers, from where pages could not
        suffice even if all of them were full."""
        if self.blocks(0, other, tokens) <= blocks:
            return tokens
        best = tokens
        for own, theirs in zip(self.pages, other.pages, strict=True):
            # Everything is in units of 1 / whole pages, so that the count is exact.
            whole = math.lcm(*(room for room, _ in (*own, *theirs)))
            a_token = sum(heads * whole // room for room, heads in own)
            more = sum(heads * whole // room for room, heads in theirs) - a_token
            if more > 0:
                room_left = blocks * sum(heads for _, heads in own) * whole - a_token * tokens
                best = min(best, room_left // more)
        rooms = {room for pages in other.pages for room, _ in pages}
        while best > 0:
            best = max(best // room * room for room in rooms)
            if self.blocks(tokens - best, other, best) <= blocks:
                return best
            best -= 1
        return 0


class Part(NamedTuple):
    """Neighbouring tokens of a compressed region, in pages of one codec."""

    codec: str
    tokens: int


# Losses that differ by less than this, in nats a token, differ by rounding only.
NO_LOSS = 1e-6


def least_loss(packings: Sequence[Packing], blocks: int, tokens: int) -> tuple[Part, ...] | None:
    """Returns the parts of a region of up to `blocks` blocks that hold `tokens` tokens with the
    least expected loss: one codec, or two of which the one that loses less has the newest tokens.
    Returns None if no codec has room for all, or if a packing has no loss. Of codecs that lose
    alike, it is the first.

    The loss is a sum over tokens, so more than two codecs are never better than the best two,
    but for pages that are not full."""
    losses: list[float] = []
    for i, packing in enumerate(packings):
        if packing.loss is None:
            return None
        losses.append(packing.loss + i * NO_LOSS)
    found: tuple[float, tuple[Part, ...]] | None = None
    for own, lost in zip(packings, losses, strict=True):
        if own.blocks(tokens) > blocks:
            continue
        ways = [(own, lost, 0)]
        for other, less in zip(packings, losses, strict=True):
            if less < lost:
                ways.append((other, less, own.most_beside(other, tokens, blocks)))
        for other, less, newest in ways:
            loss = newest * less + (tokens - newest) * lost
            if found is None or loss < found[0]:
                parts = Part(own.codec, tokens - newest), Part(other.codec, newest)
                found = loss, tuple(part for part in parts if part.tokens)
    return None if found is None else found[1]


def expected(
    packings: Sequence[Packing], block_size: int, share: float
) -> tuple[float, tuple[Part, ...]] | None:
    """Returns the expected loss of a long context that is compressed to a share of its raw size, in
    nats a later token, and the parts that have it, with shares of the tokens in percent; None if no
    codec has room for all of them, or if no losses are known.

    Args:
        block_size: tokens of a block.
        share: above 0, up to 1.
    """
    blocks = 4096
    tokens = blocks * block_size
    parts = least_loss(packings, int(blocks * share), tokens)
    if parts is None:
        return None
    losses = {packing.codec: packing.loss or 0.0 for packing in packings}
    loss = sum(losses[part.codec] * part.tokens for part in parts) / tokens
    return loss, tuple(Part(part.codec, round(100 * part.tokens / tokens)) for part in parts)


def min_blocks(block_size: int, window: int, sinks: int) -> int:
    """Returns the fewest blocks that a compacted request can hold: the sinks' blocks (at least one
    compressed block) and the longest tail that keeps `window` tokens and starts on a block
    boundary."""
    return max(1, cdiv(sinks, block_size)) + cdiv(window + block_size - 1, block_size)


class PlannedCompaction(NamedTuple):
    """One compaction of a request, before it runs.

    Attributes:
        n: the position of the compaction, in computed tokens.
        candidates: number of tokens before the new tail, compressed and raw ones together.
        parts: the tokens that the new compressed region holds.
        shape: blocks and tail after the compaction.
    """

    n: int
    candidates: int
    parts: tuple[Part, ...]
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """Block counts and compaction positions of one request.

    Args:
        budget: a `float` in (0, 1] is a share of the raw tokens, an `int` a number of tokens.
            Tokens here are raw-token equivalents: the bytes that a raw token of this model takes.
        num_prompt_tokens: length of the prompt, in tokens.
        block_size: tokens in a block.
        window: newest tokens that always stay raw (the observation window).
        sinks: leading tokens that always stay.
        prefill_interval: tokens by which a prompt may outgrow its budget during prefill.
        decode_interval: decoded tokens between two compactions.
        min_tokens: a request shorter than this, prompt and output together, is left alone if its
            budget is a fraction. A budget in tokens is a promise and is kept whatever the length.
        packings: packings of the codecs that the compressed region may have, those that lose least
            first; empty for raw tokens.
        tiers: whether the most important tokens get the finer of two codecs, instead of the newest.
        least_loss: whether a region's codecs are those with the least expected loss, if all
            packings have one, instead of the first in which all tokens fit.
        protected: number of tokens that always stay, beside the sinks and the window.

    All positions are counts of computed tokens, `n`; "at n" means tokens [0, n) have KV.
    """

    budget: float | int
    num_prompt_tokens: int
    block_size: int
    window: int = 16
    sinks: int = 4
    prefill_interval: int = 2048
    decode_interval: int = 128
    min_tokens: int = 0
    packings: tuple[Packing, ...] = ()
    tiers: bool = False
    least_loss: bool = False
    protected: int = 0

    @property
    def never(self) -> bool:
        """Returns whether the request is never compacted, which is what a budget of 1.0 means."""
        return isinstance(self.budget, float) and self.budget >= 1.0

    @property
    def _spared(self) -> bool:
        """Returns whether the prompt alone is too short to be compacted. A longer prompt is
        compacted from its first chunks on, since its length is known."""
        return isinstance(self.budget, float) and self.num_prompt_tokens < self.min_tokens

    def tokens(self, n: int) -> int:
        """Returns the budget at n, in tokens. A fraction counts the whole prompt from the start:
        its length is known, so early chunks need not be squeezed harder."""
        if isinstance(self.budget, float):
            return int(self.budget * max(n, self.num_prompt_tokens))
        return self.budget

    def blocks(self, n: int) -> int:
        """Returns the most blocks that a request holds right after a compaction at n, compressed
        region and tail together."""
        floor = min_blocks(self.block_size, self.window, self.sinks + self.protected)
        return max(floor, self.tokens(n) // self.block_size)

    def parts(self, compressed: int, candidates: int) -> tuple[Part, ...]:
        """Returns the parts of a compressed region of `compressed` blocks, given `candidates`
        tokens before the tail. The parts are in slot order.

        The first codec in which all candidates fit holds them. If that leaves room, as many as
        possible of the newest (with `tiers`, of the most important, which come first) are in the
        codec before it, which loses less. With `least_loss`, it is the codec, or the two, that are
        expected to lose least. If the candidates fit in no codec, the last codec holds as many as
        it can."""
        if not self.packings:
            return (Part("raw", min(candidates, compressed * self.block_size)),)
        if self.least_loss and (best := least_loss(self.packings, compressed, candidates)):
            return best
        better: Packing | None = None
        for packing in self.packings:
            if packing.blocks(candidates) <= compressed:
                break
            better = packing
        else:
            return (Part(packing.codec, packing.tokens(compressed)),)
        if better is None:
            return (Part(packing.codec, candidates),)
        newest = packing.most_beside(better, candidates, compressed)
        parts = (Part(packing.codec, candidates - newest), Part(better.codec, newest))
        return tuple(part for part in parts[:: -1 if self.tiers else 1] if part.tokens)

    def with_losses(self, losses: Mapping[str, float]) -> Plan:
        """Returns the same plan with the losses of codecs, by name, where it goes by losses and has
        none yet."""
        if not (self.least_loss and losses):
            return self
        known = tuple(
            replace(packing, loss=losses.get(packing.codec, packing.loss))
            for packing in self.packings
        )
        return replace(self, packings=known)

    def kept(self, compressed: int, candidates: int) -> int:
        """Returns how many of `candidates` tokens `compressed` blocks hold: the sum of their
        `parts`."""
        if not self.packings:
            return min(candidates, compressed * self.block_size)
        if any(packing.blocks(candidates) <= compressed for packing in self.packings):
            return candidates
        return self.packings[-1].tokens(compressed)

    def needs_scores(self, compressed: int, candidates: int) -> bool:
        """Returns whether a compaction of `candidates` tokens into `compressed` blocks chooses
        among them: to drop some, or, with `tiers`, to say which get the finer codec. If it does
        not, it has no use for scores, unless the policy keeps running ones."""
        if self.kept(compressed, candidates) < candidates:
            return True
        return self.tiers and len(self.parts(compressed, candidates)) > 1

    def tail(self, held: int) -> int:
        """Returns the tokens of the raw tail after a compaction of a request that holds `held`
        slots."""
        return held - max(0, held - self.window) // self.block_size * self.block_size

    def shape(self, n: int, held: int) -> Shape:
        """Returns the blocks and the tail after a compaction at n of a request that holds `held`
        slots.

        The tail starts on a block boundary, so its blocks stay where they are."""
        tail = self.tail(held)
        compressed = self.blocks(n) - cdiv(tail, self.block_size)
        if self.packings:
            # No more blocks than all tokens fill in the codec that takes most room.
            compressed = min(compressed, self.packings[0].blocks(n - tail))
        return Shape(compressed, tail)

    def held_after(self, n: int, held: int) -> int:
        """Returns the number of slots held after a compaction at n."""
        shape = self.shape(n, held)
        return shape.compressed * self.block_size + shape.tail_tokens

    def may_compact(self, n: int) -> bool:
        """Returns whether a request at n may be compacted at all: it has a budget, and is long
        enough."""
        return not (self.never or (self._spared and n < self.min_tokens))

    def due(self, n: int, held: int) -> bool:
        """Returns whether a request at n is over its budget, so that a compaction gives blocks
        back."""
        return self.may_compact(n) and cdiv(held, self.block_size) > self.blocks(n)

    def check_after(self, n: int) -> int:
        """Returns the first compaction position after n. These positions are, during prefill, where
        the tail has grown by `prefill_interval`; the end of the prompt; and then every
        `decode_interval` tokens."""
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
        """Returns whether n is a compaction position."""
        return n > 0 and self.check_after(n - 1) == n

    def next_compaction(self, n: int, held: int, limit: int) -> int | None:
        """Returns the first position in (n, limit] at which a request that holds `held` slots at n
        will be compacted, or None."""
        if self.never:
            return None
        # No position can be due before the slots outgrow the blocks allowed at n.
        idle = n + max(0, self.blocks(n) * self.block_size - held)
        check = self.check_after(max(idle, self.min_tokens - 1) if self._spared else idle)
        while check <= limit:
            if self.due(check, held + check - n):
                return check
            check = self.check_after(check)
        return None

    def first_compaction(self, limit: int) -> int | None:
        """Returns where a request that reaches `limit` tokens is compacted first, or None. Tokens
        before that position have exact KV; blocks of later ones are never put into the prefix
        cache."""
        return self.next_compaction(0, 0, limit)

    def compactions(self, limit: int) -> Iterator[PlannedCompaction]:
        """Yields all compactions of a request that reaches `limit` tokens, in order.

        This is what happens if each compaction runs where it is due. A scheduler may put one off,
        because blocks are shared or there are none to write to; from there on the request holds
        other numbers of tokens, which `shape`, `parts` and `needs_scores` must be given."""
        for n, candidates, shape in self._walk(limit):
            yield PlannedCompaction(n, candidates, self.parts(shape.compressed, candidates), shape)

    def first_scoring(self, limit: int) -> int | None:
        """Returns the position of the first of the `compactions` of a request that reaches `limit`
        tokens that `needs_scores`, or None. Like those, it is a prediction."""
        for n, candidates, shape in self._walk(limit):
            if self.needs_scores(shape.compressed, candidates):
                return n
        return None

    def scoring_within(
        self, n: int, held: int, region: tuple[int, int], limit: int
    ) -> Iterator[int]:
        """Yields where in (n, limit] a request that holds `held` slots at n has compactions that
        need scores, if each runs where it is due; `region`: blocks and tokens of its region."""
        for at, candidates, shape in self._walk(limit, n, held, region):
            if self.needs_scores(shape.compressed, candidates):
                yield at

    def _walk(
        self, limit: int, n: int = 0, held: int = 0, start: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[int, int, Shape]]:
        region, region_tokens = start
        while (check := self.next_compaction(n, held, limit)) is not None:
            held, n = held + check - n, check
            shape = self.shape(n, held)
            # The old region's tokens, and the raw ones up to the new tail.
            candidates = region_tokens + held - shape.tail_tokens - region * self.block_size
            yield n, candidates, shape
            region, region_tokens = shape.compressed, self.kept(shape.compressed, candidates)
            held = region * self.block_size + shape.tail_tokens

    def bound(self, n: int) -> int:
        """Returns the most blocks that a request that grows to n tokens holds at any time (design
        rule 5)."""
        raw = cdiv(n, self.block_size)
        if self.never:
            return raw
        prompt = cdiv(self.num_prompt_tokens, self.block_size)
        if self._spared:
            # Raw up to the first compaction position at which it has min_tokens.
            prefill = prompt = cdiv(self.check_after(self.min_tokens - 1), self.block_size)
        else:
            prefill = self.blocks(self.num_prompt_tokens) + self._prefill_step // self.block_size
        if n <= self.num_prompt_tokens:
            return min(raw, prefill)
        decode = self.blocks(n) + cdiv(self.decode_interval, self.block_size)
        return min(raw, max(min(prefill, prompt), decode))
