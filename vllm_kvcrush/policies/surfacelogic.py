"""SurfaceLogicKV: heads that find what is repeated keep more tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies.base import Room, is_number
from vllm_kvcrush.policies.heads import ByHeads
from vllm_kvcrush.policies.shares import average_tokens


@dataclass
class SurfaceLogic(ByHeads):
    """SurfaceLogicKV (arXiv 2508.15806), in the form of its base HeadKV (arXiv 2410.19258 Eq. 6)
    and of its successor REAL, since its own formula and code are not public: each head keeps
    b - b / beta tokens, b being the average budget, and all heads share the other b / beta of each
    as their scores S do: S^temperature / sum(S^temperature). To a head's score 0.01 of its part of
    its layer's scores is added, so that layers count too.

    The scores are REAL's: how well a head, at each token of a repeated passage, attends to the
    earlier one, by the harmonic mean of precision and recall among its ten best tokens; by query
    heads, averaged over those of a KV head. Needles and questions are replaced by passages of the
    calibration text, so that heads that copy are found ("surface" behaviour) and those that reason
    only as far as they copy. Without a pattern, scores are those of `duo`. Which tokens stay is the
    base's choice, in the papers SnapKV's. Under tensor parallelism with a pattern, each rank
    divides its own pages by its own heads' scores.

    Cost: as `duo`.

    Choose it where answers copy from the prompt, as in extraction.

    Attributes:
        beta: how many times what is shared by scores the whole budget is.
        temperature: exponent of the scores.
    """

    name: ClassVar[str] = "surfacelogic"
    kind: ClassVar[str] = "copying"

    beta: float = 1.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", is_number(self.beta) and self.beta >= 1, "a number, 1 or more")
        above = is_number(self.temperature) and self.temperature > 0
        self.require("temperature", above, "a number above 0")

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        assert demand is not None
        scores = demand + 0.01 * demand / demand.sum(1, keepdim=True).clamp(min=1e-12)
        parts = scores**self.temperature
        parts = parts / parts.sum() if parts.sum() > 0 else parts + 1 / parts.numel()
        average = average_tokens(room)
        pool = average / self.beta
        return (parts * pool * parts.numel() + average - pool) / room.page_tokens
