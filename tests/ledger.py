"""What every compaction of a running engine must leave behind, checked as it happens.

A ledger remembers the true position of every slot of every compressed region, and what its page
must say of it: the same in pages of flat codecs, the position of the first of sixteen in pages of
fitted ones.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs.layout import CODECS, FITTED, STRIP
from vllm_kvcrush.ops.angles import COARSE

FITTED_NUMBERS = {CODECS[codec] for codec in FITTED}


class Ledger:
    """Watches the compactions of a model runner in this process, of either kind.

    Attributes:
        compactions: by (policy, codecs of the result).
        failures: compactions in which a policy failed, by its name, as the runner counts them.
        drift: the most by which a page's idea of a position was off the truth.
    """

    def __init__(self, runner: Any):
        self._runner = runner
        # By request and layer: true positions [heads, slots] and what pages say of them.
        self._true: dict[str, list[Tensor]] = {}
        self._said: dict[str, list[Tensor]] = {}
        self._chosen: dict[int, Tensor] = {}
        self.compactions: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.failures: Counter[str] = Counter()
        self.drift = 0
        self._compact, self._on_select = runner._compact, runner.on_select
        runner._compact, runner.on_select = self._watched, self._selected

    def close(self) -> None:
        """Watches no longer."""
        self._runner.on_select = self._on_select
        self._runner._compact = self._compact

    def _selected(self, command: Any, layer: int, slots: Tensor) -> None:
        self._chosen[layer] = slots.cpu().long()
        if self._on_select is not None:
            self._on_select(command, layer, slots)

    def _watched(self, command: Any) -> None:
        runner, name = self._runner, command.request_id
        state = runner._crushed[name]
        failed = len(runner._failures)
        size = runner.cache_config.block_size
        first = state.region is None and state.evicted == 0
        for gone in self._true.keys() - runner._crushed.keys():
            del self._true[gone], self._said[gone]
        self._chosen = {}
        self._compact(command)
        self.failures[state.params.policy] += len(runner._failures) > failed
        codecs = tuple(part.codec for part in command.parts)
        self.compactions[state.params.policy, codecs] += 1
        if command.same_as is not None:
            assert not self._chosen, "a twin moved something"
            self._true[name] = self._true[command.same_as]
            self._said[name] = self._said[command.same_as]
            assert runner._crushed[command.same_as].region is state.region
            return
        layers = runner._layers
        new = (len(command.source) - command.compressed) * size
        start = command.computed - command.tail_tokens - new
        fresh = torch.arange(start, start + new).expand(layers[0].heads, -1)
        assert sorted(self._chosen) == list(range(len(layers))), "every layer chooses once"
        true, said = [], []
        for i in range(len(layers)):
            old = [fresh[:, :0]] * 2 if first else [self._true[name][i], self._said[name][i]]
            assert old[0].shape[1] == command.compressed_tokens
            slots = self._chosen[i]
            assert slots.shape == (layers[0].heads, command.keep)
            assert slots.sort(1).values.diff(dim=1).gt(0).all(), "a slot stays twice"
            true.append(torch.cat((old[0], fresh), 1).gather(1, slots))
            said.append(torch.cat((old[1], fresh), 1).gather(1, slots))
        self._check_order(command, state, true)
        if state.region is not None:
            said = self._check_pages(command, state, said)
            for exact, read in zip(true, said, strict=True):
                self.drift = max(self.drift, int((exact - read).abs().max()))
        self._true[name], self._said[name] = true, said

    def _check_order(self, command: Any, state: Any, true: list[Tensor]) -> None:
        """Each part is in position order, and the sinks are there."""
        sinks = torch.arange(min(state.plan.sinks, command.keep))
        for positions in true:
            assert torch.equal(
                positions.sort(1).values[:, : len(sinks)], sinks.expand(len(positions), -1)
            ), f"sinks of {command.request_id} are gone"
            # Where pages have only an idea of positions, so has their order.
            if not self._guessed(command, state):
                begin = 0
                for part in command.parts:
                    own = positions[:, begin : begin + part.tokens]
                    assert own.diff(dim=1).gt(0).all(), f"{command.parts} are out of order"
                    begin += part.tokens

    @staticmethod
    def _guessed(command: Any, state: Any) -> bool:
        return state.tiers and any(p.codec in FITTED for p in state.plan.packings)

    def _check_pages(self, command: Any, state: Any, said: list[Tensor]) -> list[Tensor]:
        """Reads positions back from every page, and compares them with what they must be."""
        region = state.region
        nothing = torch.zeros(0, dtype=torch.int32)
        owners = Counter(region.page.tolist())
        assert max(owners.values()) == 1, "two heads share a page"
        pairs = self._runner._layers[0].pages.block_pages
        assert {page // pairs for page in owners} <= set(command.target)
        limit = -(-self._runner.model_config.max_model_len // COARSE) * COARSE
        found = []
        for i, layer in enumerate(self._runner._layers):
            request = layer.request(region, nothing, 0, command.computed)
            read = layer.positions(request, command.keep).long().cpu()
            want = torch.empty_like(read)
            for head in range(layer.heads):
                asked = said[i][head]
                # Guesses may tie: then the later one moves on. Another part begins anew.
                back = torch.nn.functional.pad(asked[1:] < asked[:-1], (1, 0))
                step = torch.arange(len(asked)) - back.cumsum(0) * 2**40
                risen = (asked - step).cummax(0).values + step
                at = 0
                for entry in range(int(region.begin[i, head]), int(region.end[i, head])):
                    count = int(region.count[entry])
                    own, place = slice(at, at + count), torch.arange(count)
                    assert asked[own].diff().ge(0).all(), "slots of a page out of order"
                    found_at = risen[own]
                    if int(region.codec[entry]) in FITTED_NUMBERS:
                        # None runs past what the tables know.
                        found_at = found_at.minimum(place - count + limit)
                        found_at = found_at[place // STRIP * STRIP] + place % STRIP
                    want[head, own] = found_at
                    at += count
                assert at == command.keep
            assert torch.equal(read, want), f"{command.request_id}: pages of layer {i}"
            found.append(read)
        return found
