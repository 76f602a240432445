"""The oracle of codecs whose pages are one chunk: what their pages get for free, and what not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_kvcrush.codecs import CODECS, chunk
from vllm_kvcrush.codecs.layout import GEAR, STRIP, TADA, Chunk


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def loss(read: torch.Tensor, x: torch.Tensor) -> float:
    return float((read - x).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tada_codes_what_differs_from_the_mean(bits: int) -> None:
    """What all tokens have in common costs nothing, whatever its size; without it a token's grid
    would have to reach it."""
    x = torch.randn(96, 64)
    plain = loss(chunk.tada_kept(x, Chunk(bits)), x)
    offset = torch.zeros(64)
    offset[7], offset[40] = 30, -80
    moved = loss(chunk.tada_kept(x + offset, Chunk(bits)), x + offset)
    assert moved == pytest.approx(plain, rel=0.05)
    # Its largest code apart from its middle is half its step; the mean is that of the page alone.
    codes, scales, mean = chunk.tada_side(x + offset, Chunk(bits))
    assert codes.min() == 0 and codes.max() == 2**bits - 1 and (scales > 0).all()
    turn = chunk.rotation(64)
    torch.testing.assert_close(
        mean.double() @ turn, (x + offset).mean(0).double(), rtol=0, atol=0.1
    )


@pytest.mark.parametrize(("bits", "most"), [(2, 0.14), (3, 0.045), (4, 0.013)])
def test_bits_cost_what_they_should(bits: int, most: float) -> None:
    x = torch.randn(128, 64)
    assert loss(chunk.tada_kept(x, Chunk(bits)), x) < most
    assert loss(chunk.gear_values(x, Chunk(bits, 1, 8)), x) < most


def test_the_directions_are_those_of_the_singular_values() -> None:
    one, other = torch.linalg.qr(torch.randn(64, 2)).Q.mT.double()
    x = (
        40 * torch.randn(200, 1) * one
        + 9 * torch.randn(200, 1) * other
        + 0.1 * torch.randn(200, 64)
    )
    found = chunk.directions(x, 2)
    assert (found[0] @ one).abs() > 0.999 and (found[1] @ other).abs() > 0.99
    assert chunk.directions(torch.zeros(5, 64), 1).abs().max() == 0
    along = chunk.weights(x.double(), found)
    low_rank = along @ found
    assert loss(low_rank, x) < 0.05


def test_gear_takes_a_product_of_low_rank_off_before_it_quantises() -> None:
    x = torch.randn(128, 64)
    plain = loss(chunk.gear_keys(x)[0], x)
    large = x + 50 * torch.randn(128, 1) * torch.randn(64) / 8
    assert loss(chunk.gear_keys(large)[0], large) < 1.5 * plain
    without = dataclasses.replace(GEAR, rank=0)
    assert loss(chunk.gear_keys(large, without)[0], large) > 10 * plain
    assert loss(chunk.gear_values(large), large) < 2 * plain


def test_gear_keeps_single_channels_as_they_are() -> None:
    x = torch.randn(80, 64)
    for token, channel in ((3, 5), (3, 60), (40, 5), (79, 0)):
        x[token, channel] = 30 * (-1) ** channel
    read, apart = chunk.gear_keys(x)
    assert apart[3, 5] and apart[3, 60] and apart[40, 5] and apart[79, 0]
    assert apart.view(-1, STRIP, 64).sum((1, 2)).tolist() == [64 // GEAR.per_single] * 5
    torch.testing.assert_close(read[apart], x[apart].double(), rtol=1e-3, atol=1e-2)
    # The others' grids do not reach for them.
    assert loss(read, x) < loss(CODECS["int4"].kept(x, x, torch.float32)[0], x) / 2


@pytest.mark.parametrize("codec", ["tada", "gear"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_few_tokens_and_equal_ones(codec: str, tokens: int) -> None:
    x = torch.randn(tokens, 64)
    for keys in (x, x[:1].expand(tokens, -1), torch.zeros(tokens, 64)):
        read = CODECS[codec].kept(keys, keys, torch.float32)
        for own in read:
            assert own.shape == keys.shape and own.isfinite().all()
            assert (own - keys).norm() <= 0.35 * keys.norm()


def test_the_codecs_take_these_bits() -> None:
    """csrc/layout.h has them too."""
    assert 2 <= TADA.bits <= 4 and Chunk(TADA.bits) == TADA
    assert 2 <= GEAR.bits <= 4 and GEAR.rank >= 1 and 256 // GEAR.per_single <= 32
