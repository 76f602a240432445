"""KVzip's second pass: the model repeats tokens of a request over all that the request holds, and
what it attends to meanwhile is noted. Nothing is written to the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.engine.worker.move import Move
from vllm_kvcrush.policies.base import View
from vllm_kvcrush.policies.choice import PolicyFailure

CHUNK = 2048  # tokens that are repeated in one pass
LEAD = 8  # tokens before a chunk that its instruction says
FIRST = "\n\nRepeat the previous context:"
LATER = "\n\nRepeat the previous context starting with `", "`:"


class Pass(NamedTuple):
    """One pass of the model.

    Attributes:
        first, end: positions of the tokens that it repeats.
        tokens: token ids that it reads: an instruction, and those.
    """

    first: int
    end: int
    tokens: list[int]


def passes(
    encode: Callable[[str], Sequence[int]], tokens: Sequence[int], first: int, end: int, most: int
) -> Iterator[Pass]:
    """Yields the passes that repeat the tokens at positions [first, end), in chunks.

    Args:
        encode: the tokenizer, without special tokens.
        tokens: token ids of the request, up to `end` at least.
        most: tokens of a pass.

    Raises:
        PolicyFailure: there is no room for a chunk.
    """
    while first < end:
        if first == 0:
            told = list(encode(FIRST))
        else:
            before, after = map(encode, LATER)
            told = [*before, *tokens[max(0, first - LEAD) : first], *after]
        count = min(CHUNK, end - first, most - len(told))
        if count < 1:
            raise PolicyFailure(
                f"the model cannot repeat the context: {max(0, most)} tokens more are all that it "
                "reads at once, or before it reaches its longest"
            )
        chunk = tokens[first : first + count]
        if min(chunk) < 0:
            raise PolicyFailure("the model cannot repeat tokens that are not known yet")
        yield Pass(first, first + count, [*told, *chunk])
        first += count


class Repetition:
    """The attention of all layers while the model repeats tokens of one request.

    Args:
        impls: the layers' attention, by index.
        move: the compaction that wants to know.

    Attributes:
        received: by layer, the greatest attention that each candidate received from the passes
            that repeated it, float32 [H, m]; 0 for candidates that are not new.
    """

    def __init__(self, impls: Mapping[int, Any], move: Move) -> None:
        self._impls, self._move = impls, move
        self._chunk = (0, 0)
        self.received: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def repeating(self, first: int, end: int) -> Iterator[None]:
        """While it is open, the model reads an instruction and then the tokens at positions
        [first, end)."""
        self._chunk = first, end
        own = {index: impl.forward for index, impl in self._impls.items()}
        try:
            for index, impl in self._impls.items():
                impl.forward = self._of_layer(index)
            yield
        finally:
            for index, impl in self._impls.items():
                impl.forward = own[index]

    def _of_layer(self, index: int) -> Callable[..., Tensor]:
        def forward(
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Any,
            attn_metadata: Any,
            output: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            view = self._move.held_view(index)
            values = view.values
            assert values is not None
            found, weights = ops.attend_and_score(
                query,
                key,
                value,
                (view.keys, values),
                view.scale,
                view.log_bias,
                view.held_valid if view.ragged else None,
            )
            self._move.saw(view)
            output.copy_(found)
            self._note(index, view, weights)
            return output

        return forward

    def _note(self, index: int, view: View, weights: Tensor) -> None:
        """Keeps what a chunk's own slots received: those after the survivors of the last
        compaction, in the order of their positions."""
        assert view.known is not None
        rank = (~view.known).cumsum(1) - 1 + self._move.new[0]
        own = ~view.known & view.valid & (rank >= self._chunk[0]) & (rank < self._chunk[1])
        known = self.received.get(index, torch.zeros(own.shape, device=own.device))
        greatest = weights[:, : view.candidates].float()
        self.received[index] = torch.where(own, greatest, known)
