"""How what codecs lose is divided among layers and heads when a server starts."""

from __future__ import annotations

import pytest
import torch

from vllm_kvcrush.engine.worker.statistics import divided


def test_losses_are_divided_by_errors_and_layers() -> None:
    errors = {
        "fine": torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64),
        "coarse": torch.tensor([[4.0, 12.0], [8.0, 8.0]], dtype=torch.float64),
    }
    totals = {"fine": 0.1, "coarse": 0.8}
    # What both layers have in common, 0.95 of the least, tells nothing of either.
    found = divided(totals, errors, "coarse", [1.0, 1.75])
    shares = torch.tensor([0.05, 0.8], dtype=torch.float64).sqrt()
    shares = shares / shares.sum()
    for codec, total in totals.items():
        assert float(found[codec].sum()) == pytest.approx(total)
        assert (found[codec].sum(1) / total).tolist() == pytest.approx(shares.tolist())
        assert (found[codec][:, 1] / found[codec][:, 0]).tolist() == pytest.approx([3.0, 1.0])
    # Where layers were not told apart, errors alone divide.
    alike = divided(totals, errors, "coarse", [0.0, 0.0])["fine"]
    assert alike.flatten().tolist() == pytest.approx([0.0125, 0.0375, 0.025, 0.025])
