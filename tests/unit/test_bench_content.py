"""The benchmark of page contents: the models that it makes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.content.models import FACTOR, MODELS
from tests.unit.test_calibrate import make
from vllm_kvcrush.codecs.transform.calibrate import Probe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("tiny"), rope_theta=1e6))


def test_models_work_alike_with_other_keys(tiny: str) -> None:
    """Outlier channels change nothing, a bias next to nothing, of what the model says."""
    tokens = list(range(40, 120))
    said, keys = {}, {}
    for kind, change in MODELS.items():
        probe = Probe(tiny)
        change(probe)
        with torch.inference_mode():
            said[kind] = probe.network(torch.tensor([tokens])).logits.log_softmax(-1)
        keys[kind] = probe.prefill(tokens)[1]
    torch.testing.assert_close(said["outliers"], said["demo"], atol=1e-4, rtol=1e-4)
    larger = keys["outliers"].norm(dim=2) / keys["demo"].norm(dim=2)
    assert larger.max().item() == pytest.approx(FACTOR, rel=1e-3)
    assert larger.min().item() == pytest.approx(1, rel=1e-3)
    assert (said["biased"] - said["demo"]).abs().mean() < 0.05
    assert keys["biased"].mean(2).norm() > 3 * keys["demo"].mean(2).norm()
