"""One compaction on a worker: which tokens are read, which stay, and where these are written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcrush import ops
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.engine.commands import Compact
from vllm_kvcrush.engine.worker.allocation import least_loss_codecs, page_counts
from vllm_kvcrush.engine.worker.backends.base import CacheLayer, CacheLayers
from vllm_kvcrush.engine.worker.ranks import Ranks
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.policies.base import LayerKV, Policy, Room, View
from vllm_kvcrush.policies.choice import (
    Choice,
    PolicyFailure,
    allocated,
    choose,
    demanded,
    in_position_order,
    newest,
    reordered,
    scored,
)

# Scores that were computed to divide pages are kept for choosing, up to this many bytes; those of
# further layers are computed again.
_KEPT_SCORES = 64 << 20

T = TypeVar("T")
_Given = tuple[Tensor, dict[str, Tensor]]


class _Chosen:
    """What stays of a layer, by slot.

    Attributes:
        slots: int64 [H, k], slots of the source in the order of the target; 0 past a head's count.
        columns: int64 [H, k], the view's columns of the same tokens.
        choice: the policy's choice.
        view: the view that the policy chose from.
    """

    def __init__(self, slots: Tensor, columns: Tensor, choice: Choice, view: View) -> None:
        self.slots, self.columns, self.choice, self.view = slots, columns, choice, view


class Move:
    """Fills the target blocks of a compaction, layer by layer.

    Args:
        command: the compaction.
        state: what the worker knows about the request.
        layers: the layers' caches, in the order of their pages.
        block_size: tokens in a block.
        rope: the model's rotary embedding, for policies.
        losses: by codec, what the tokens of each layer and head are expected to lose in it, float64
            [L, H]; empty where that was not measured.
        failed: called each time that the policy fails.
        on_select: called with the command, the layer's index, and the layer's choice: slots
            [kv_heads, keep], -1 past a head's own; or None.
        together: the layers as one, if several can be moved at once.

    Attributes:
        target: the new region; set by `run`.
        scores: whether the policy is asked for scores, so that what it `needs` must be there.
        queries: queries of the observation window, `[layers, query_heads, window, size]`; the
            caller sets them before `run` if `scores` and the policy needs them.
        repeated: by layer, what slots receive while the model repeats them, float32 [H, m], see
            `View.repeated`; likewise.
        kept_state: by name and layer, what the policy remembers about the survivors, [H, k, ...].
        layer_state: by layer and name, what it remembers about the layer, [H, c].
        positions: by layer, positions of the survivors, int32 [H, k]; empty unless they are kept.
        finer: number of leading slots of the new region that are in the finer of two codecs.
        sound: `Choice.sound` of each layer's choice.
        gathered: the most bytes of keys and values that were copied for the policy.
        held, evicted: tokens that stay and tokens that are dropped, means over layers and heads.
    """

    def __init__(
        self,
        command: Compact,
        state: WorkerRequest,
        layers: Sequence[CacheLayer],
        block_size: int,
        rope: Rope | None,
        losses: Mapping[str, np.ndarray],
        failed: Callable[[PolicyFailure], None],
        on_select: Callable[[Compact, int, Tensor], None] | None,
        together: CacheLayers | None = None,
    ) -> None:
        self._command, self._state, self._layers = command, state, layers
        self._block_size, self._rope, self._losses = block_size, rope, losses
        self._together = together
        self._failed, self._on_select = failed, on_select
        self._device, self._heads = layers[0].device, layers[0].heads
        region = state.region
        # Raw blocks, also those of a compressed region that is raw, are read as one tail: their
        # slots are in order.
        self._raw = command.source[command.compressed if region else 0 :]
        blocks = np.array((*self._raw, *command.tail), dtype=np.int32)
        self._tail = async_tensor_h2d(blocks, device=self._device)
        self._tail_tokens = len(self._raw) * block_size + command.tail_tokens
        # Tokens of each layer and head in the old region, and below with the new candidates.
        shape = (len(layers), self._heads)
        self._old = np.full(shape, state.region_tokens(block_size), dtype=np.int64)
        if region is not None:
            self._old = region.tokens.numpy()
        new = len(command.source) - command.compressed
        self._counts = self._old + new * block_size
        self._candidates = int(self._counts.max())
        self._parts = state.plan.parts(len(command.target), self._candidates)
        # The tokens of two tiers lie one tier after the other, so the policy's view is sorted by
        # position. Even when one tier is left, its fitted pages, which keep the positions of some
        # tokens only, may seem to overlap.
        self._mixed = state.tiers and region is not None
        self._two = state.tiers and len(self._parts) > 1
        self.scores = (
            state.allocates
            or "state" in state.needs
            or self._two
            or sum(part.tokens for part in self._parts) < self._candidates
        )
        self._asks = self.scores
        self.target: Region
        self.queries: Tensor | None = None
        self.repeated: dict[int, Tensor] = {}
        self.kept_state: dict[str, dict[int, Tensor]] = {}
        self.layer_state: dict[int, dict[str, Tensor]] = {}
        self._demands: Tensor | None = None
        self.positions: dict[int, Tensor] = {}
        first, finest = self._parts[0], state.plan.packings[:1]
        one_finest = bool(finest) and first.codec == finest[0].codec
        self.finer = first.tokens if self._two or one_finest or not finest else 0
        self.sound: list[Tensor] = []
        self.gathered = 0
        self.held = self.evicted = 0.0

    def give_up(self, why: PolicyFailure) -> None:
        """Makes `run` do without the policy."""
        self._failed(why)
        self._asks = False

    def run(self) -> None:
        """Reads the source and writes the target, layer by layer."""
        codecs, tokens = self._shared_out()
        self._keep = torch.from_numpy(tokens.sum(0))
        self.held = float(self._keep.double().mean())
        self.evicted = float(self._counts.mean()) - self.held
        self.target, order = Region.of(
            self._command.target,
            codecs,
            tokens,
            [layer.pages for layer in self._layers],
            self._raw,
            self._state.region,
        )
        if self._state.merges or (self._state.region and self._state.region.log_bias is not None):
            self.target.open_biases(self._device)
        ranks = get_tensor_model_parallel_world_size()
        chosen: dict[int, _Chosen] = {}
        if self._chooses and ranks > 1 and order != sorted(order):
            # Ranks fill their layers in different orders, but must choose in the same one.
            chosen = {i: self._chosen(i, self._source(i)) for i in range(len(self._layers))}
        for some in self._neighbours(order):
            if len(some) == 1:
                self._fill(some[0], chosen.pop(some[0], None))
            else:
                self._fill_together(some, chosen)

    def _neighbours(self, order: list[int]) -> Iterator[list[int]]:
        """Divides the layers, in the order in which they must be filled, into neighbours that are
        moved at once: all of them are read before any is written."""
        most = 1
        if self._together is not None and not self._state.merges:
            most = self._together.at_once(int(self._keep.max()), self.target.codecs)
        while order:
            sizes = range(1, min(most, len(order)) + 1)
            n = max(n for n in sizes if max(order[:n]) - min(order[:n]) == n - 1)
            yield sorted(order[:n])
            order = order[n:]

    @property
    def _chooses(self) -> bool:
        state = self._state
        return self.scores or self._mixed or state.keeps_positions or state.merges

    # -- how many tokens of which head -----------------------------------------------------------

    def _shared_out(self) -> tuple[list[str], np.ndarray]:
        """Returns the codecs of the region's parts, and how many tokens of each layer and head fill
        them, int64 [parts, L, H]."""
        self._given: dict[int, _Given] = {}
        if not self._state.allocates:
            if (choice := self._least_loss()) is not None:
                return choice
            tokens = np.array([part.tokens for part in self._parts])
            return (
                [part.codec for part in self._parts],
                np.broadcast_to(tokens[:, None, None], (len(tokens), *self._counts.shape)).copy(),
            )
        codec = self._parts[0].codec  # the coarsest
        rooms = np.array(
            [[own.pages.capacity(codec, h) for h in range(self._heads)] for own in self._layers]
        )
        room = Room(
            len(self._command.target) * self._counts.size,
            torch.from_numpy(rooms),
            torch.from_numpy(self._counts),
        )
        shares = self._shares(room) if self._asks else None
        if shares is None:
            shares = torch.ones(room.candidates.shape, dtype=torch.float64)
        protected = self._state.plan.sinks + self._state.plan.protected
        least = -(-np.minimum(protected, self._counts) // rooms)
        least = np.minimum(least, len(self._command.target))
        pages = page_counts(shares, room, least)
        return [codec], np.minimum(pages * rooms, self._counts)[None]

    def _least_loss(self) -> tuple[list[str], np.ndarray] | None:
        """Returns codecs and tokens as `_shared_out` does, where each layer and head has all tokens
        in the one codec with which all lose least together; or None where the plan does not go by
        losses, they are not known by head, or tokens have to be dropped."""
        plan, region = self._state.plan, self._state.region
        codecs = [packing.codec for packing in plan.packings]
        if not (plan.least_loss and codecs and all(codec in self._losses for codec in codecs)):
            return None
        if self._two or sum(part.tokens for part in self._parts) < self._candidates:
            return None
        rooms = np.array(
            [
                [[own.pages.capacity(codec, h) for h in range(self._heads)] for own in self._layers]
                for codec in codecs
            ]
        )
        losses = np.stack([self._losses[codec] for codec in codecs])
        if region is not None:
            # Tokens that are in a codec already lose nothing more if they stay in it.
            for codec, stored in zip(region.codecs, region.part_tokens, strict=True):
                if codec in codecs:
                    losses[codecs.index(codec)] *= 1 - stored / self._counts
        total = len(self._command.target) * self._counts.size
        choice = least_loss_codecs(losses, -(-self._counts // rooms), total)
        if choice is None:
            return None
        used = np.unique(choice)
        tokens = np.where(choice == used[:, None, None], self._counts, 0)
        return [codecs[i] for i in used], tokens

    def _shares(self, room: Room) -> Tensor | None:
        """Returns the policy's shares, or None if it failed."""

        def ask(policy: Policy, ranks: Ranks | None) -> Tensor:
            demands, size = [], 0
            for index in range(len(self._layers)):
                view = self._view(index, self._source(index), ranks)[0]
                given = scored(policy, view)
                demands.append(demanded(policy, view, given[0], room))
                size += sum(x.nbytes for x in (given[0], *given[1].values()))
                if size <= _KEPT_SCORES:
                    self._given[index] = given
                self.saw(view)
            known = [demand for demand in demands if demand is not None]
            found = torch.stack(known).cpu() if known else None  # waits for the device, once
            shares = allocated(policy, found, room)
            self._demands = found
            return shares

        shares = self._guarded(ask)
        if shares is None:  # a policy that failed, maybe on another rank, has divided nothing
            self._demands = None
        return shares

    def _guarded(self, ask: Callable[[Policy, Ranks | None], T]) -> T | None:
        """Returns what `ask` returns, or None if the policy failed, here or on another rank."""
        alone = get_tensor_model_parallel_world_size() == 1
        ranks = None if alone else Ranks(self._device, self._state.allocates)
        try:
            if self._state.policy is None:
                raise PolicyFailure("it cannot be built")
            answer = ask(self._state.policy, ranks)
            if ranks is not None:
                ranks.agree("done")
        except PolicyFailure as why:
            if ranks is not None:
                ranks.give_up()
            self._failed(why)
            return None
        return answer

    # -- one layer -------------------------------------------------------------------------------

    def _source(self, index: int) -> Any:
        position = self._command.computed - self._tail_tokens
        return self._layers[index].source(
            self._state.region, self._tail, self._tail_tokens, position
        )

    def _fill(self, index: int, chosen: _Chosen | None = None) -> None:
        """Moves the tokens of a layer."""
        source = self._source(index)
        if chosen is None and self._chooses:
            chosen = self._chosen(index, source)
        if chosen is None:
            everything = torch.arange(self._candidates, device=self._device)
            slots = everything.expand(self._heads, -1)
        else:
            slots = chosen.slots
        self._tell(index, slots)
        try:
            self._write(index, source, slots, chosen)
        except Exception as error:
            # The kernels refused the slots before they wrote anything. If no policy chose them,
            # another choice would not help.
            if chosen is None:
                raise
            self._failed(PolicyFailure(str(error)))
            self._fill_with_newest(index, source)
        else:
            if chosen is not None:
                self._remember(index, chosen)

    def _fill_together(self, layers: list[int], chosen: dict[int, _Chosen]) -> None:
        """Moves the tokens of some layers, which are neighbours, at once."""
        assert self._together is not None
        own = self._keep[layers[0] : layers[-1] + 1]
        most = int(own.max())
        slots = torch.arange(most, device=self._device).expand(own.numel(), -1)
        if self._chooses:
            found = []
            for index in layers:
                # What a policy has read of a layer is given back before the next.
                kept = chosen.pop(index, None) or self._chosen(index, self._source(index))
                self._remember(index, kept)
                found.append(kept.slots)
            slots = torch.cat([F.pad(x, (0, most - x.shape[1])) for x in found])
        for index, part in zip(layers, torch.split(slots, self._heads), strict=True):
            self._tell(index, part)
        position = self._command.computed - self._tail_tokens
        try:
            self._together.compact(
                range(layers[0], layers[-1] + 1), self._state.region, self._tail,
                self._tail_tokens, position, slots, bool((own == most).all()), self.target,
            )  # fmt: skip
        except Exception as error:
            if not self._chooses:
                raise
            self._failed(PolicyFailure(str(error)))
            for index in layers:
                self._fill_with_newest(index, self._source(index))

    def _fill_with_newest(self, index: int, source: Any) -> None:
        chosen = self._chosen(index, source, ask=False)
        self._write(index, source, chosen.slots, chosen)
        self._remember(index, chosen)

    def _tell(self, index: int, slots: Tensor) -> None:
        if self._on_select is not None:
            at = torch.arange(slots.shape[1], device=slots.device)
            past = at >= self._keep[index].to(slots.device).unsqueeze(1)
            self._on_select(self._command, index, slots.masked_fill(past, -1))

    def _write(self, index: int, source: Any, slots: Tensor, chosen: _Chosen | None) -> None:
        layer, counts = self._layers[index], self._keep[index].tolist()
        merged = None if chosen is None else chosen.choice.merged
        if merged is None:
            layer.compact(source, slots, counts, self.target)
        else:
            assert chosen is not None
            keys, values = (reordered(x, chosen.columns) for x in (merged.keys, merged.values))
            positions = reordered(chosen.view.positions, chosen.columns)
            layer.fill(keys.float(), values.float(), positions, counts, self.target)

    def _remember(self, index: int, chosen: _Chosen) -> None:
        """Keeps state, positions and log biases of a layer's survivors."""
        columns, choice, view = chosen.columns, chosen.choice, chosen.view
        self.sound.append(choice.sound)
        self.layer_state[index] = choice.layer_state
        for name, value in choice.state.items():
            self.kept_state.setdefault(name, {})[index] = reordered(value, columns)
        if self._state.keeps_positions:
            self.positions[index] = reordered(view.positions, columns)
        bias = view.log_bias if choice.merged is None else choice.merged.log_bias
        if self.target.log_bias is not None and bias is not None:
            own = reordered(bias, columns).float()
            for head, part in enumerate(self.target.biases(index)):
                part.copy_(own[head, : len(part)])

    def _chosen(self, index: int, source: Any, ask: bool = True) -> _Chosen:
        """Returns what stays of a layer. With `ask` False, the policy is not asked."""
        view, order = self._view(index, source)
        keep = self._keep[index]
        finer = torch.full_like(keep, self._parts[0].tokens) if self._two else None
        choice: Choice | None = None
        if ask and self._asks:
            given = self._given.pop(index, None)

            def chosen(policy: Policy, ranks: Ranks | None) -> Choice:
                seen = view if ranks is None else replace(view, all_heads=ranks.all_heads)
                demoted = self._demoted(order) if self._two else None
                return choose(policy, seen, keep, finer, demoted, given)

            choice = self._guarded(chosen)
        if choice is None:
            choice = newest(view, keep, finer)
        self.saw(view)
        if choice.finer is None or finer is None:
            columns = ops.mask_slots(choice.kept, keep)
        else:
            rest = ops.mask_slots(choice.kept & ~choice.finer, keep - finer)
            columns = torch.cat((ops.mask_slots(choice.finer, finer), rest), 1)
        columns = columns.clamp_(min=0)  # padding past a head's count
        slots = columns if order is None else order.gather(1, columns)
        return _Chosen(slots, columns, choice, view)

    def saw(self, view: View) -> None:
        """Takes note of the keys and values that were copied for a view."""
        held: Any = getattr(view.held, "_held", view.held)
        known = vars(held)  # what was read is kept there
        copies = [known.get("keys"), known.get("values")]
        self.gathered = max(self.gathered, sum(x.nbytes for x in copies if x is not None))

    # -- what a policy sees ----------------------------------------------------------------------

    @property
    def new(self) -> tuple[int, int]:
        """The positions, first and end, of the candidates that are new since the last
        compaction."""
        end = self._command.computed - self._command.tail_tokens
        return end - (len(self._command.source) - self._command.compressed) * self._block_size, end

    def held_view(self, index: int) -> View:
        """Returns all that the request holds in a layer, by slot."""
        return self._view(index, self._source(index), ordered=False)[0]

    @functools.cached_property
    def _old_there(self) -> Tensor:
        return async_tensor_h2d(self._old, device=self._device)

    def _view(
        self, index: int, source: Any, ranks: Ranks | None = None, ordered: bool = True
    ) -> tuple[View, Tensor | None]:
        """Returns what the policy sees of a layer, in the order of the positions that pages keep,
        unless `ordered` is False, and that order, int64 [H, m], or None if it is the order of the
        slots."""
        state, layer = self._state, self._layers[index]
        counts = self._counts[index].tolist()
        tail = self._command.tail_tokens
        exact = state.policy is None or not state.policy.tiled
        held: LayerKV = layer.held(source, [count + tail for count in counts], exact)
        m = max(counts)
        old = self._old_there[index].unsqueeze(1)
        columns = torch.arange(m, device=self._device)
        known = (columns < old).expand(self._heads, -1)
        view = View(
            held=held,
            queries=None if self.queries is None else self.queries[index],
            scale=layer.scale,
            candidates=m,
            sinks=state.plan.sinks,
            page_size=self._block_size,
            layer=index,
            layers=len(self._layers),
            all_heads=_identity if ranks is None else ranks.all_heads,
            counts=torch.from_numpy(self._counts[index]) if min(counts) < m else None,
            # A policy that failed in this layer has left no state.
            state={
                name: self._widened(by[index], m)
                for name, by in state.kept_state.items()
                if index in by
            },
            known=known,
            log_bias=self._log_bias(index, m),
            true_positions=self._positions(index, known, columns - old),
            spans=state.spans,
            rope=self._rope,
            computed=self._command.computed,
            first_head=get_tensor_model_parallel_rank() * self._heads,
            demands=self._demands,
            layer_state=state.layer_state.get(index, {}),
            repeated=self._received(index, m),
        )
        order: Tensor | None = None
        if self._mixed and ordered:
            # Those that pages keep, not the true ones: by these the slots of a page must be in
            # order, and fitted pages know the first of each strip only.
            places = layer.positions(source, counts)
            order = places.argsort(dim=1, stable=True)
            view = in_position_order(view, order)
        if state.protect:
            view = replace(view, protected=self._protected(view))
        return view, order

    def _widened(self, old: Tensor, m: int) -> Tensor:
        """Returns what is known about survivors, [H, k, ...], with zeros for newer tokens,
        [H, m, ...]."""
        wide = torch.zeros(self._heads, m, *old.shape[2:], dtype=old.dtype, device=self._device)
        wide[:, : old.shape[1]] = old
        return wide

    def _received(self, index: int, m: int) -> Tensor | None:
        """Returns what candidates received while the model repeated them, [H, m]; None unless the
        policy needs it."""
        if "repeat" not in self._state.needs:
            return None
        # No pass was made where nothing is new.
        return self.repeated.get(index, torch.zeros(self._heads, m, device=self._device))

    def _log_bias(self, index: int, m: int) -> Tensor | None:
        region = self._state.region
        if region is None or region.log_bias is None:
            return None
        wide = torch.zeros(self._heads, m, device=self._device)
        for head, own in enumerate(region.biases(index)):
            wide[head, : len(own)] = own
        return wide

    def _positions(self, index: int, known: Tensor, new: Tensor) -> Tensor | None:
        """Returns the positions of the candidates, int32 [H, m], or None unless they are kept.
        `new` [H, m] has the places of newer candidates among the newer ones."""
        if not self._state.keeps_positions:
            return None
        where = (new + self.new[0]).int()
        if index in self._state.positions:
            where = torch.where(
                known, self._widened(self._state.positions[index], new.shape[1]), where
            )
        return where

    def _protected(self, view: View) -> Tensor:
        """Returns the slots that stay whatever a policy says, bool [H, m]."""
        where = view.positions
        protected = where < view.sinks
        for first, end in self._state.protect:
            protected |= (where >= first) & (where < end)
        return protected & view.valid

    def _demoted(self, order: Tensor | None) -> Tensor:
        """Returns which candidates, in the view's order, are in the coarser codec already, bool
        [H, m]."""
        at = torch.arange(self._candidates, device=self._device)
        demoted = (at >= self._state.finer) & (at < int(self._old.max()))
        demoted = demoted.expand(self._heads, -1)
        return demoted if order is None else demoted.gather(1, order)


def _identity(x: Tensor) -> Tensor:
    return x
