"""One compaction on a worker: what is read, what of it stays, and where that goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size

from vllm_kvcrush.engine.commands import Compaction
from vllm_kvcrush.engine.worker.ranks import Ranks
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.engine.worker.state import CacheLayer, Request
from vllm_kvcrush.policies.base import Held, View
from vllm_kvcrush.policies.choice import (
    Choice,
    PolicyFailure,
    choose,
    in_position_order,
    newest,
)


class Move:
    """Fills the target blocks of a compaction, layer by layer.

    Args:
        command, state: of the request.
        layers: in the order of their pages.
        block_size: of a block, in tokens.
        failed: told each time that the policy fails.
        on_select: called with each layer's choice, slots [kv_heads, keep].

    Attributes:
        target: the new region.
        two: whether it has two tiers.
        scores: whether the policy is asked; for what it `needs`.
        queries: the observation window, `[layers, query_heads, window, size]`; the caller's to set
            before `run` where the policy needs it.
        running: by layer, what the policy keeps of the survivors.
        sound: of each layer's choice, `Choice.sound`.
        gathered: the most bytes of keys and values that the policy had copied.
    """

    def __init__(
        self,
        command: Compaction,
        state: Request,
        layers: Sequence[CacheLayer],
        block_size: int,
        failed: Callable[[PolicyFailure], None],
        on_select: Callable[[Compaction, int, Tensor], None] | None,
    ) -> None:
        self._command, self._state, self._layers = command, state, layers
        self._block_size, self._failed, self._on_select = block_size, failed, on_select
        self._device, self._heads = layers[0].device, layers[0].heads
        region = state.region
        # Raw blocks, among them a raw compressed region, are read as one tail: slots are in order.
        raw = command.source[command.compressed if region else 0 :]
        self._tail = torch.tensor((*raw, *command.tail), dtype=torch.int32, device=self._device)
        self._tail_tokens = len(raw) * block_size + command.tail_tokens
        self._held = self._tail_tokens + (command.compressed_tokens if region else 0)
        self._candidates = self._held - command.tail_tokens
        self.target, self._order = Region.of(
            command.target, command.parts, [layer.pages for layer in layers], raw, region
        )
        # Tokens of two tiers lie one tier after the other. Once they are together again, fitted
        # pages, which know the positions of some tokens only, may say of two neighbouring pages
        # that they overlap.
        self._mixed = state.tiers and region is not None
        self.two = state.tiers and len(command.parts) > 1
        self.scores = command.keep < self._candidates or "running" in state.needs or self.two
        self._asks = self.scores
        self.queries: Tensor | None = None
        self.running: dict[int, Tensor] = {}
        self.sound: list[Tensor] = []
        self.gathered = 0

    def give_up(self, why: PolicyFailure) -> None:
        """Does without the policy."""
        self._failed(why)
        self._asks = False

    def run(self) -> None:
        """Reads all that is to be read and writes the target."""
        ranks = get_tensor_model_parallel_world_size()
        if self._chooses and ranks > 1 and self._order != sorted(self._order):
            # Ranks share pages out in orders of their own, but must choose in the same one.
            choices = [self._chosen(i, self._request(i)).int() for i in range(len(self._layers))]
            for index in self._order:
                self._fill(index, choices[index].long())
        else:
            for index in self._order:
                self._fill(index)

    @property
    def _chooses(self) -> bool:
        return self.scores or self._mixed

    def _request(self, index: int) -> Any:
        position = self._command.computed - self._tail_tokens
        return self._layers[index].request(
            self._state.region, self._tail, self._tail_tokens, position
        )

    def _fill(self, index: int, kept: Tensor | None = None) -> None:
        """Moves the tokens of a layer."""
        layer, request = self._layers[index], self._request(index)
        if kept is None and self._chooses:
            kept = self._chosen(index, request)
        elif kept is None:
            everything = torch.arange(self._command.keep, device=self._device)
            kept = everything.expand(self._heads, -1)
        if self._on_select is not None:
            self._on_select(self._command, index, kept)
        try:
            layer.compact(request, kept, self.target)
        except Exception as error:
            # Refused before anything was written: a choice of ours cannot be at fault twice.
            if not self._chooses:
                raise
            self._failed(PolicyFailure(str(error)))
            layer.compact(request, self._chosen(index, request, ask=False), self.target)

    def _chosen(self, index: int, request: Any, ask: bool = True) -> Tensor:
        """The slots of a layer that stay, in the order in which the target holds them."""
        held = self._layers[index].held(request, self._held)
        view, slots = self._view(index, held), None
        if self._mixed:
            places = self._layers[index].positions(request, self._candidates)
            slots = places.argsort(dim=1, stable=True)
            view = in_position_order(view, slots)
        keep, finer = self._command.keep, self._command.parts[0].tokens if self.two else 0
        choice = self._ask(view, keep, finer, slots) if ask and self._asks else None
        if choice is None:
            choice = newest(view, keep, finer)
        else:
            self.sound.append(choice.sound)
        if choice.running is not None:
            self.running[index] = choice.running
        if (copies := vars(held).get("_read")) is not None:
            self.gathered = max(self.gathered, sum(x.nbytes for x in copies))
        return choice.slots if slots is None else slots.gather(1, choice.slots)

    def _view(self, index: int, held: Held) -> View:
        """What the policy sees of a layer, by slot."""
        state, running = self._state, None
        if "running" in state.needs:
            running = torch.zeros(self._heads, self._candidates, device=self._device)
            if state.running is not None:
                running[:, : state.running[index].shape[1]] = state.running[index]
        return View(
            held=held,
            queries=None if self.queries is None else self.queries[index],
            scale=self._layers[index].scale,
            candidates=self._candidates,
            sinks=state.plan.sinks,
            page_size=self._block_size,
            running=running,
            layer=index,
            all_heads=_identity,
        )

    def _demoted(self, slots: Tensor | None) -> Tensor:
        """Which candidates, in the view's order, are in the coarser codec already."""
        at = torch.arange(self._candidates, device=self._device)
        demoted = (at >= self._state.finer) & (at < self._command.compressed_tokens)
        demoted = demoted.expand(self._heads, -1)
        return demoted if slots is None else demoted.gather(1, slots)

    def _ask(self, view: View, keep: int, finer: int, slots: Tensor | None) -> Choice | None:
        """The policy's choice for one layer, or None where it failed, here or on another rank."""
        ranks = Ranks(self._device) if get_tensor_model_parallel_world_size() > 1 else None
        if ranks is not None:
            view = replace(view, all_heads=ranks.all_heads)
        try:
            if self._state.policy is None:
                raise PolicyFailure("it cannot be built")
            demoted = self._demoted(slots) if self.two else None
            choice = choose(self._state.policy, view, keep, finer, demoted)
            if ranks is not None:
                ranks.agree("done")
        except PolicyFailure as why:
            if ranks is not None:
                ranks.give_up()
            self._failed(why)
            return None
        return choice


def _identity(x: Tensor) -> Tensor:
    return x
