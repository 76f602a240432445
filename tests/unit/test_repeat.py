"""The second pass of `kvzip`: what the model reads, and what attention over a held cache gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.unit import methods_oracle as oracle
from vllm_kvcrush import ops
from vllm_kvcrush.engine.worker import repeat
from vllm_kvcrush.engine.worker.repeat import Pass, passes
from vllm_kvcrush.policies.choice import PolicyFailure


@pytest.mark.parametrize("most", [1, 700, 1 << 22])
@pytest.mark.parametrize("counts", [[23, 23], [23, 9]], ids=["equal", "unequal"])
def test_attention_and_scores_are_those_of_the_formulas(counts: list[int], most: int) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    draw = torch.Generator().manual_seed(seed)
    heads, group, tokens, n, size = 2, 3, 11, max(counts), 8

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    queries, keys = randn(tokens, heads * group, size), randn(tokens, heads, size)
    values = randn(tokens, heads, 5)
    held = 2 * randn(heads, n, size), randn(heads, n, 5)
    bias = randn(heads, n - 4)
    valid = torch.arange(n) < torch.tensor(counts)[:, None]
    output, greatest = ops.attend_and_score(
        queries, keys, values, held, 0.4, bias, None if min(counts) == n else valid, most
    )
    for head, count in enumerate(counts):
        wide = np.zeros(n)
        wide[: n - 4] = bias[head].double().numpy()
        own = slice(head * group, (head + 1) * group)
        want, best = oracle.repeated(
            queries[:, own].transpose(0, 1).double().numpy(),
            keys[:, head].double().numpy(),
            values[:, head].double().numpy(),
            held[0][head, :count].double().numpy(),
            held[1][head, :count].double().numpy(),
            0.4,
            wide[:count],
        )
        got = output[:, own].transpose(0, 1).double()
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            greatest[head, :count].double(), torch.from_numpy(best), rtol=1e-4, atol=1e-6
        )
        assert not greatest[head, count:].any()


def encode(text: str) -> list[int]:
    return [1000 + ord(letter) for letter in text]


def test_chunks_are_repeated_after_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "CHUNK", 20)
    tokens = list(range(50))
    found = list(passes(encode, tokens, 0, 50, 1000))
    assert [(own.first, own.end) for own in found] == [(0, 20), (20, 40), (40, 50)]
    assert found[0] == Pass(0, 20, [*encode("\n\nRepeat the previous context:"), *range(20)])
    said = encode("\n\nRepeat the previous context starting with `")
    assert found[1].tokens == [*said, *range(12, 20), *encode("`:"), *range(20, 40)]
    # A later compaction repeats what is new since, and knows what came before it.
    (own,) = passes(encode, tokens, 40, 50, 1000)
    assert own == found[2]
    (own,) = passes(encode, tokens, 3, 9, 1000)
    assert own.tokens == [*said, 0, 1, 2, *encode("`:"), *range(3, 9)]
    assert not list(passes(encode, tokens, 50, 50, 0))


def test_chunks_fit_into_what_the_model_reads_at_once() -> None:
    tokens, told = list(range(50)), len(encode("\n\nRepeat the previous context starting with ``:"))
    found = list(passes(encode, tokens, 10, 50, told + 8 + 15))
    assert [own.end - own.first for own in found] == [15, 15, 10]
    assert all(len(own.tokens) <= told + 8 + 15 for own in found)
    with pytest.raises(PolicyFailure, match=f"{told + 8} tokens more are all that it reads"):
        list(passes(encode, tokens, 10, 50, told + 8))
    with pytest.raises(PolicyFailure, match="not known yet"):
        list(passes(encode, [*tokens[:20], -1], 10, 21, 1000))
