"""A policy that fails, dawdles, forgets or leaks while a file says so: what alerts are for."""

from __future__ import annotations

import os
import pathlib
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies import Policy, View

CONTROL = "KVCRUSH_FLEET_FAULT"


@dataclass
class Faulty(Policy):
    """Keeps what the window looks at, as long as the control file is not there."""

    name: ClassVar[str] = "faulty"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    leaked: ClassVar[list[Tensor]] = []

    def score(self, view: View) -> Tensor:
        """Raises, sleeps or leaks four megabytes once a compaction, or prefers what the window does
        not look at, as the control file says."""
        control = pathlib.Path(os.environ[CONTROL])
        fault = control.read_text(encoding="utf-8") if control.exists() else ""
        if view.layer == 0 and fault == "raise":
            raise RuntimeError("this policy was told to fail")
        if view.layer == 0 and fault == "sleep":
            time.sleep(1)
        if view.layer == 0 and fault == "leak":
            self.leaked.append(torch.ones(2**20))
        scores = view.window_scores()
        return -scores if fault == "forget" else scores
