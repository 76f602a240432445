"""What tensor-parallel ranks exchange while a policy chooses."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_kvcrush.policies.choice import PolicyFailure


class Ranks:
    """The collectives of a policy.

    A policy may fail on one rank only. Before each collective, and at the end, the ranks tell each
    other what they are about to do, so that none waits for one that gave up.

    Args:
        device: device of the tensors that are gathered.
        ragged: whether heads may hold unequal numbers of tokens, so that the widths of ranks
            differ.
    """

    _STATES: ClassVar[tuple[str, ...]] = ("failed", "gathers", "done")

    def __init__(self, device: torch.device, ragged: bool = False):
        self._device, self._ragged = device, ragged
        self._over = False

    def all_heads(self, x: Tensor) -> Tensor:
        """See `View.all_heads`. Raises PolicyFailure unless all other ranks make this call too."""
        self.agree("gathers")
        if not self._ragged:
            return gather_heads(x)
        # Padded to the widest; each rank then drops what is past its own columns.
        own = x.shape[1]
        widths = gather_heads(torch.full((1, 1), own, dtype=torch.float32, device=x.device))
        return gather_heads(F.pad(x, (0, int(widths.max()) - own)))[:, :own]

    def agree(self, state: str) -> None:
        """Raises PolicyFailure unless every rank is in this state."""
        if self._over:
            raise PolicyFailure("it went on after it failed on another rank")
        if not self._all_in(state):
            self._over = True
            raise PolicyFailure("it failed on another rank, or takes other turns there")

    def give_up(self) -> None:
        """Tells the other ranks that the policy failed here, unless they know."""
        if not self._over:
            self._over = True
            self._all_in("failed")

    def _all_in(self, state: str) -> bool:
        mine = self._STATES.index(state)
        if self._device.type == "cpu":
            found = gather_heads(torch.full((1, 1), mine)).flatten().tolist()
        else:
            group = get_tp_group()
            parts = [torch.zeros(1, dtype=torch.int64) for _ in range(group.world_size)]
            torch.distributed.all_gather(parts, torch.tensor([mine]), group=group.cpu_group)
            found = torch.cat(parts).tolist()
        return all(other == mine for other in found) and state != "failed"


def gather_heads(x: Tensor) -> Tensor:
    """Returns a tensor of all ranks' heads, given this rank's, [H, ...]."""
    # vLLM's shared-memory all-gather on CPU takes floats only.
    return get_tp_group().all_gather(x.to(torch.float32).contiguous(), dim=0).to(x.dtype)
