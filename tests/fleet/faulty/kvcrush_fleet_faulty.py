"""A policy that fails or dawdles while a file says so: what alerts are for."""

from __future__ import annotations

import os
import pathlib
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies import Policy, View

CONTROL = "KVCRUSH_FLEET_FAULT"


@dataclass
class Faulty(Policy):
    """Keeps what the window looks at, as long as the control file is not there."""

    name: ClassVar[str] = "faulty"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, view: View) -> Tensor:
        """Raises or sleeps once a compaction, as the control file says."""
        control = pathlib.Path(os.environ[CONTROL])
        fault = control.read_text(encoding="utf-8") if control.exists() else ""
        if view.layer == 0 and fault == "raise":
            raise RuntimeError("this policy was told to fail")
        if view.layer == 0 and fault == "sleep":
            time.sleep(1)
        return view.window_scores()
