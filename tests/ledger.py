"""Checks what every compaction of a running engine leaves behind, when it has run.

A ledger remembers the true position of every slot of every compressed region, and the position that
is read back from its page: the true one in pages of flat codecs; in pages of fitted codecs, which
keep the position of the first of each sixteen tokens, a guess.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS, FITTED
from vllm_kvcrush.codecs.layout import STRIP
from vllm_kvcrush.ops.angles import COARSE

FITTED_NUMBERS = {CODECS[codec].number for codec in FITTED}


class Ledger:
    """Watches the compactions of a model runner in this process, of either kind.

    Attributes:
        compactions: number of compactions by (policy, codecs of the result).
        failures: number of compactions in which a policy failed, by its name, as the runner counts
            them.
        drift: the largest difference between a position read back from a page and the true one.
        unequal: whether heads held unequal numbers of tokens.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        # By request, layer and head: true positions of the slots, and those read back from pages.
        self._true: dict[str, list[list[Tensor]]] = {}
        self._said: dict[str, list[list[Tensor]]] = {}
        self._chosen: dict[int, Tensor] = {}
        self.compactions: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.failures: Counter[str] = Counter()
        self.drift = 0
        self.unequal = False
        self._filled = False
        self._compact, self._on_select = runner._compact, runner.on_select
        runner._compact, runner.on_select = self._watched, self._selected

    def close(self) -> None:
        """Stops watching."""
        self._runner.on_select = self._on_select
        self._runner._compact = self._compact

    def _selected(self, command: Any, layer: int, slots: Tensor) -> None:
        self._chosen[layer] = slots.cpu().long()
        if self._on_select is not None:
            self._on_select(command, layer, slots)

    def _watched(self, command: Any) -> None:
        runner, name = self._runner, command.request_id
        state = runner._requests[name]
        failed = len(runner._failures)
        size = runner.cache_config.block_size
        first = state.blocks == 0
        for gone in self._true.keys() - runner._requests.keys():
            del self._true[gone], self._said[gone]
        self._chosen, self._filled = {}, False
        new = (len(command.source) - command.compressed) * size
        held = 0 if first else max(len(own) for own in self._true[name][0])
        parts = state.plan.parts(len(command.target), held + new)
        with self._watched_fills():
            self._compact(command)
        self.failures[state.label] += len(runner._failures) > failed
        codecs = tuple(part.codec for part in parts)
        told = runner._compacted[-1].pages
        if state.region is None:
            assert not told
        else:
            codecs = state.region.codecs
            assert told == state.region.codec_pages and sum(told.values()) == len(state.region.page)
            assert set(told) <= set(codecs)
        self.compactions[state.label, codecs] += 1
        if command.same_as is not None:
            assert not self._chosen, "a twin moved something"
            self._true[name] = self._true[command.same_as]
            self._said[name] = self._said[command.same_as]
            assert runner._requests[command.same_as].region is state.region
            return
        layers = runner._layers
        start = command.computed - command.tail_tokens - new
        fresh = torch.arange(start, start + new)
        assert sorted(self._chosen) == list(range(len(layers))), "every layer chooses once"
        true, said = [], []
        for i, layer in enumerate(layers):
            chosen = self._chosen[i]
            assert len(chosen) == layer.heads
            mine, theirs = [], []
            for head, padded in enumerate(chosen):
                slots = padded[padded >= 0]
                assert slots.sort().values.diff().gt(0).all(), "a slot stays twice"
                old = [fresh[:0]] * 2
                if not first:
                    old = [self._true[name][i][head], self._said[name][i][head]]
                mine.append(torch.cat((old[0], fresh))[slots])
                theirs.append(torch.cat((old[1], fresh))[slots])
            true.append(mine)
            said.append(theirs)
        if state.merges and self._filled:
            said = true  # what is merged is encoded anew, at true positions
        self._check_counts(command, state, parts, true, held + new)
        self._check_order(command, state, parts, true)
        if state.positions:
            for i, heads in enumerate(true):
                for own, kept in zip(heads, state.positions[i], strict=True):
                    assert kept[: len(own)].tolist() == own.tolist(), "kept positions are wrong"
        if state.region is not None:
            said = self._check_pages(command, state, said)
            for heads, read in zip(true, said, strict=True):
                for exact, own in zip(heads, read, strict=True):
                    if len(own) and int(own.min()) >= 0:
                        self.drift = max(self.drift, int((exact - own).abs().max()))
        self._true[name], self._said[name] = true, said

    @contextlib.contextmanager
    def _watched_fills(self) -> Iterator[None]:
        """Notes whether tokens were encoded from keys and values that a policy merged."""
        layer = type(self._runner._layers[0])
        fill = layer.fill

        def noted(*args: Any) -> None:
            self._filled = True
            fill(*args)

        layer.fill = noted
        try:
            yield
        finally:
            layer.fill = fill

    def _check_counts(
        self, command: Any, state: Any, parts: Any, true: list[list[Tensor]], candidates: int
    ) -> None:
        """Asserts that heads hold as many tokens as the plan says, or, where a policy divides the
        pages, that they fill the region's blocks."""
        counts = [len(own) for heads in true for own in heads]
        keep = sum(part.tokens for part in parts)
        if not state.allocates:
            assert set(counts) == {keep}
            return
        size = self._runner.cache_config.block_size
        if not state.plan.packings and min(counts) < candidates:
            assert sum(counts) <= len(counts) * len(command.target) * size
            assert sum(counts) > len(counts) * (len(command.target) - 1) * size
        self.unequal |= len(set(counts)) > 1

    def _check_order(self, command: Any, state: Any, parts: Any, true: list[list[Tensor]]) -> None:
        """Asserts that each part is in position order, and that the sinks and protected tokens are
        there."""
        for positions in (own for heads in true for own in heads):
            sinks = list(range(min(state.plan.sinks, len(positions))))
            assert positions.sort().values[: len(sinks)].tolist() == sinks, (
                f"sinks of {command.request_id} are gone"
            )
            tail = command.computed - command.tail_tokens
            for begin, end in state.protect:
                wanted = set(range(begin, min(end, tail)))
                assert wanted <= set(positions.tolist()), "protected tokens are gone"
            # Where positions are guesses, so is their order.
            if not self._guessed(state):
                begin = 0
                sizes = [part.tokens for part in parts]
                for size in sizes if sum(sizes) == len(positions) else [len(positions)]:
                    own = positions[begin : begin + size]
                    assert own.diff().gt(0).all(), f"{parts} are out of order"
                    begin += size

    @staticmethod
    def _guessed(state: Any) -> bool:
        return state.tiers and any(p.codec in FITTED for p in state.plan.packings)

    def _check_pages(
        self, command: Any, state: Any, said: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Reads positions back from every page, compares them with what they must be, and returns
        them. Raw pages keep none: -1."""
        region = state.region
        nothing = torch.zeros(0, dtype=torch.int32)
        owners = Counter(region.page.tolist())
        assert max(owners.values()) == 1, "two heads share a page"
        pairs = self._runner._layers[0].pages.block_pages
        assert {page // pairs for page in owners} <= set(command.target)
        limit = -(-self._runner.model_config.max_model_len // COARSE) * COARSE
        found = []
        for i, layer in enumerate(self._runner._layers):
            counts = [len(own) for own in said[i]]
            assert region.tokens[i].tolist() == counts
            source = layer.source(region, nothing, 0, command.computed)
            read = torch.full((len(counts), max(counts)), -1)
            if not bool((region.codec == CODECS["raw"].number).all()):
                read = layer.positions(source, counts).long().cpu()
            heads = []
            for head in range(layer.heads):
                asked = said[i][head]
                # Guesses may tie: then later ones are moved on. The next part begins anew.
                back = torch.nn.functional.pad(asked[1:] < asked[:-1], (1, 0))
                step = torch.arange(len(asked)) - back.cumsum(0) * 2**40
                risen = (asked - step).cummax(0).values + step
                want = torch.empty_like(asked)
                at = 0
                for entry in range(int(region.begin[i, head]), int(region.end[i, head])):
                    count = int(region.count[entry])
                    own, place = slice(at, at + count), torch.arange(count)
                    assert asked[own].diff().ge(0).all(), "slots of a page out of order"
                    found_at = risen[own]
                    if int(region.codec[entry]) == CODECS["raw"].number:
                        found_at = torch.full_like(found_at, -1)
                    elif int(region.codec[entry]) in FITTED_NUMBERS:
                        # No position runs past those that the tables have angles for.
                        found_at = found_at.minimum(place - count + limit)
                        found_at = found_at[place // STRIP * STRIP] + place % STRIP
                    want[own] = found_at
                    at += count
                assert at == counts[head]
                raw = want < 0
                assert torch.equal(read[head, :at][~raw], want[~raw]), (
                    f"{command.request_id}: pages of layer {i}"
                )
                # The positions of raw pages are kept beside them.
                heads.append(torch.where(raw, asked, want))
            found.append(heads)
        return found
