"""Forces gold continuations token by token inside vLLM, and scores them on the raw logits.

A request names its `Forced` record in `extra_args["force"]`; the processor runs in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so results need no way back through the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

KEY = "force"


@dataclass
class Forced:
    """One continuation: `tokens` are forced, those with `scored` are measured. After the last
    one the request decodes freely.

    `reference` holds the log-probabilities `[vocab]` (float32) of the uncompressed run by step.
    Results by step: `nll` (nats), `top` (greedy token), `kl` of this run's distribution from the
    reference's (nats), `margin` (log-probability of the gold token minus the rival's).
    """

    tokens: list[int]
    scored: list[bool]
    rivals: list[int | None]
    reference: dict[int, Tensor] | None = None
    keep: bool = False
    logp: dict[int, Tensor] = field(default_factory=dict)
    nll: dict[int, float] = field(default_factory=dict)
    top: dict[int, int] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    margin: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Returns the scored steps."""
        return [i for i, wanted in enumerate(self.scored) if wanted]

    def measure(self, step: int, logits: Tensor) -> None:
        """Takes what is wanted from `logits` `[vocab]` of this step. A step may come twice (a
        prompt read in chunks has logits after each): the last one counts."""
        if not self.scored[step]:
            return
        gold, rival = self.tokens[step], self.rivals[step]
        logp = torch.log_softmax(logits.float(), dim=-1)
        self.nll[step] = -logp[gold].item()
        self.top[step] = int(logp.argmax())
        if rival is not None:
            self.margin[step] = (logp[gold] - logp[rival]).item()
        if self.keep:
            self.logp[step] = logp
        if self.reference is not None:
            full = self.reference[step]
            self.kl[step] = (full.exp() * (full - logp)).sum().item()


BOOK: dict[str, Forced] = {}


class Forcing(LogitsProcessor):
    """The logits processor behind `Forced`."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        # Row of the batch → (what to force, the request's growing output).
        self._rows: dict[int, tuple[Forced, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        def entry(params: Any, _: Any, output: list[int]) -> tuple[Forced, list[int]] | None:
            name = (params.extra_args or {}).get(KEY)
            return (BOOK[name], output) if name is not None else None

        process_dict_updates(self._rows, batch_update, entry)

    def apply(self, logits: Tensor) -> Tensor:
        for row, (forced, output) in self._rows.items():
            step = len(output)
            if step < len(forced.tokens):
                forced.measure(step, logits[row])
                logits[row] = float("-inf")
                logits[row, forced.tokens[step]] = 0.0
        return logits
