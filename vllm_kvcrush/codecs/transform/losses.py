"""What codecs cost a model: measured on text that nothing was fitted to.

The loss of a codec is the mean Kullback-Leibler divergence, in nats, of the model's next-token
distribution over a context in that codec from the same over exact keys and values. Its share of a
layer and head is predicted from gradients: to second order in the errors e of keys and values, the
divergence is the mean of (g·e)² / 2 for gradients g of a drawn token's log-likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS, PACKED

if TYPE_CHECKING:
    from vllm_kvcrush.codecs.transform.calibrate import Probe
    from vllm_kvcrush.codecs.transform.tables import Tables

# Raw tokens, of 16 bits a channel, that fill as many bytes as a page here.
PAGE_TOKENS = 64
_ITEMSIZE = 2


def stored(
    name: str, keys: Tensor, values: Tensor, tables: Mapping[str, Tables]
) -> tuple[Tensor, Tensor]:
    """Returns keys and values as pages of a codec give them back, float32.

    Args:
        name: the codec's name.
        keys, values: [L, H, n, D] with RoPE, of positions from 0 on, and [L, H, n, Dv].
        tables: transform tables, by the names of the codecs that need them.
    """
    from vllm_kvcrush.codecs.transform.tables import HeadTables

    codec = CODECS[name]
    layers, heads, n, size = keys.shape
    page = PAGE_TOKENS * (size + values.shape[-1]) * _ITEMSIZE
    kept = (
        torch.empty_like(keys, dtype=torch.float32),
        torch.empty_like(values, dtype=torch.float32),
    )
    positions = torch.arange(n)
    for layer in range(layers):
        for head in range(heads):
            own = None
            if codec.needs_tables:
                room, exact = tables[name].capacity(layer, head, page, values.shape[-1])
                own = HeadTables(tables[name], layer, head, exact)
            else:
                room = codec.capacity(page, size, values.shape[-1], _ITEMSIZE)
            for first in range(0, n, room):
                here = layer, head, slice(first, first + room)
                pair = codec.kept(
                    keys[here].float(), values[here].float(), torch.float32, positions[here[2]], own
                )
                kept[0][here], kept[1][here] = pair[0].float(), pair[1].float()
    return kept


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Returns the divergence of distributions from the exact ones, [...], given log-probabilities
    [..., vocabulary]."""
    return (exact.exp() * (exact - other)).sum(-1).clamp(min=0)


def by_head(errors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], tokens: int) -> Tensor:
    """Returns what errors of keys and values are predicted to cost by layer and head, [L, H], in
    nats a token.

    Errors of different tokens are taken to be independent.

    Args:
        errors: of keys [L, H, n, D] and values [L, H, n, Dv].
        gradients: of the log-likelihood of drawn tokens, of the same shapes.
        tokens: the number of drawn tokens.
    """
    costs = [
        (error * gradient).double().sum(-1).square().sum(-1)
        for error, gradient in zip(errors, gradients, strict=True)
    ]
    return (costs[0] + costs[1]) / (2 * tokens)


@dataclass
class Losses:
    """What each codec costs a model.

    Attributes:
        text: what it was measured on.
        loss: by codec, float64 [L, H]; the sum is the measured loss, and how it is divided was
            predicted.
    """

    text: str
    loss: dict[str, Tensor]

    @property
    def total(self) -> dict[str, float]:
        """The loss of each codec, in nats a token."""
        return {codec: float(own.sum()) for codec, own in self.loss.items()}


def measure(
    probe: Probe,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    tables: Mapping[str, Tables],
    about: str,
    progress: Callable[..., Any],
) -> Losses:
    """Measures all codecs on a model in transformers.

    Args:
        probe: the model.
        texts: pairs of a context and a question over it, in token ids.
        tables: transform tables, by the names of the codecs that need them; of these, codecs
            without tables are left out.
        about: `Losses.text`.
        progress: as in `calibrate.calibrate`.
    """
    codecs = [name for name in PACKED if not CODECS[name].needs_tables or name in tables]
    total = dict.fromkeys(codecs, 0.0)
    shares: dict[str, Any] = dict.fromkeys(codecs, 0.0)
    generator = torch.Generator().manual_seed(0)
    for context, question in progress(texts, "measuring codecs"):
        n = len(context)
        _, keys, values = probe.prefill(context)
        gradients = probe.gradients(keys, values, question, generator)
        with torch.inference_mode():
            exact = probe.log_probabilities(keys, values, n, question)
            for name in codecs:
                k, v = stored(name, keys, values, tables)
                found = divergence(exact, probe.log_probabilities(k, v, n, question))
                total[name] += float(found.double().mean()) / len(texts)
                shares[name] += by_head((k - keys, v - values), gradients, len(question))
    return Losses(
        about,
        {name: shares[name] * (total[name] / float(shares[name].sum())) for name in codecs},
    )
