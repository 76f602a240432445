"""The benchmark of page contents: codecs by head, and the models that it makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.content.allocation import least_loss_codecs
from benchmarks.content.models import FACTOR, MODELS
from tests.unit.test_calibrate import make
from vllm_kvcrush.codecs.transform.calibrate import Probe


@settings(deadline=None)
@given(st.data())
def test_codecs_by_head(data: st.DataObject) -> None:
    codecs, layers, heads = (data.draw(st.integers(1, 4)) for _ in range(3))
    shape, size = (codecs, layers, heads), codecs * layers * heads

    def table(of: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(data.draw(st.lists(of, min_size=size, max_size=size))).reshape(shape)

    pages, losses = table(st.integers(1, 9)), table(st.floats(0, 5, width=32))
    total = data.draw(st.integers(0, 9 * layers * heads))
    choice = least_loss_codecs(losses, pages, total)
    fewest = int(pages.min(0).sum())
    if choice is None:
        assert fewest > total
        return
    taken = int(np.take_along_axis(pages, choice[None], 0).sum())
    assert fewest <= total and taken <= total
    # No head could do better alone with what is left.
    for codec, layer, head in np.ndindex(*shape):
        more = int(pages[codec, layer, head] - pages[choice[layer, head], layer, head])
        if more <= total - taken:
            assert losses[choice[layer, head], layer, head] <= losses[codec, layer, head] + 1e-9


def test_codecs_by_head_are_the_best_for_their_price() -> None:
    """A hundred heads that differ in what errors cost: the dear ones get the finer codec, and all
    lose less together than in one mixture for all."""
    cost = np.logspace(-3, 0, 100).reshape(50, 2)
    losses = np.stack([0.1 * cost, 0.4 * cost, cost])
    pages = np.stack([np.full((50, 2), n) for n in (16, 8, 4)])
    for total in (400, 700, 1000, 1600, 5000):
        choice = least_loss_codecs(losses, pages, total)
        assert choice is not None
        assert int(np.take_along_axis(pages, choice[None], 0).sum()) <= total
        assert (np.diff(choice.ravel()) <= 0).all(), "in the order of cost"
        lost = float(np.take_along_axis(losses, choice[None], 0).sum())
        share = (total / 100 - 4) / 4, (total / 100 - 8) / 8
        mixed = 1 - 0.6 * share[0] if total <= 800 else max(0.1, 0.4 - 0.3 * share[1])
        assert lost <= mixed * cost.sum() + 1e-9
    assert least_loss_codecs(losses, pages, 399) is None


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
