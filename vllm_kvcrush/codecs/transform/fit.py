"""Statistics of a model's keys and queries, and transform tables that are fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vllm_kvcrush.codecs import layout
from vllm_kvcrush.codecs.transform.bits import MAX_BITS, head_bits, pooled_bits
from vllm_kvcrush.codecs.transform.points import OperatingPoint, even_value_bits, even_words
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables

# Least energy of a direction, as a share of the mean over all directions: calibration sees only
# some of the queries that will come.
RIDGE = 1e-3


@dataclass
class Statistics:
    """Moments of a model's keys and queries before RoPE, float64.

    Attributes:
        key_mean: [L, H, D].
        key_second: [L, H, D, D], E[k kᵀ].
        query_second: [L, H, D, D], E[q qᵀ] summed over the query heads of a KV head.
        key_gradient: [L, H, D, D], E[g gᵀ], where g is the gradient of the log-likelihood of later
            text with respect to the key; None where it was not taken.
        value_gradient: [L, H], E[|g|² |v|²], where g is the same gradient with respect to the
            value v; None where it was not taken.
    """

    key_mean: Tensor
    key_second: Tensor
    query_second: Tensor
    key_gradient: Tensor | None = None
    value_gradient: Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Tensor,
        queries: Tensor,
        gradients: Tensor | None = None,
        values: tuple[Tensor, Tensor] | None = None,
    ) -> Statistics:
        """Returns the statistics of some tokens.

        Args:
            keys: [L, H, n, D], before RoPE.
            queries: [L, Hq, m, D], before RoPE.
            gradients: [L, H, n, D], with respect to the keys before RoPE.
            values: values and the gradients with respect to them, [L, H, n, Dv] each.
        """
        k = keys.double()
        layers, heads, n, size = k.shape
        q = queries.double().reshape(layers, heads, -1, size)
        g = gradients.double() if gradients is not None else None
        return cls(
            k.mean(2),
            k.mT @ k / n,
            q.mT @ q / queries.shape[2],
            g.mT @ g / n if g is not None else None,
            values[0].double().square().sum(-1).mul(values[1].double().square().sum(-1)).mean(-1)
            if values is not None
            else None,
        )

    def merged(self, other: Statistics, mine: int, others: int) -> Statistics:
        """Returns the statistics of `mine` tokens of this and `others` tokens of the other
        together."""
        share = others / (mine + others)
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Statistics(
            *(torch.lerp(a, b, share) if a is not None else None for a, b in both)  # type: ignore[arg-type]
        )


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the square root of a symmetric positive matrix [..., D, D] and its inverse.
    Directions with next to no energy count as having a little, so that neither is infinite."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    floor = RIDGE * values.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    root = (values + floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def fit(
    statistics: Statistics,
    point: OperatingPoint,
    rope: Rope,
    horizon: int,
    most: int = MAX_BITS,
    even: bool = False,
) -> Tables:
    """Returns the transform tables of a point.

    The transform is the Karhunen-Loeve transform of W(k - mean): of all transforms with these bits
    it loses least in E[(k - k̂)ᵀ W² (k - k̂)]. W² is what errors of a key cost. With gradients it is
    E[g gᵀ], the Fisher information of the key, which gives the divergence of the model's output to
    second order. Without them it is E[q qᵀ], so that the errors of logits are smallest, whatever
    their effect on the output.

    Args:
        horizon: queries are taken at all distances from the key up to this, and keys at all
            positions up to it, or at those within a strip where the point is local.
        most: no component gets more bits.
        even: whether every head gets `even_words` and `even_value_bits`. Without gradients, values
            get the latter in any case.
    """
    far = torch.arange(horizon)
    near = torch.arange(layout.STRIP) if point.local else far
    mean, second = rope.spread(statistics.key_mean, statistics.key_second, near)
    if statistics.key_gradient is not None:
        _, cost = rope.spread(statistics.key_mean, statistics.key_gradient, near)
        # How much more one head matters than another depends on the text. The square root of the
        # ratio loses no more, and fewer pages are wasted the more alike heads are.
        trust = cost.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    else:
        _, cost = rope.spread(statistics.key_mean, statistics.query_second, far)
        trust = torch.ones(cost.shape[:2], dtype=torch.float64)
    weight, back = _root(cost)
    spread = weight @ (second - mean[..., :, None] * mean[..., None, :]) @ weight
    variances, vectors = torch.linalg.eigh((spread + spread.mT) / 2)
    variances, vectors = variances.flip(-1).clamp(min=0), vectors.flip(-1)
    variances = variances + 1e-9 * variances.mean(-1, keepdim=True)
    sigma = variances.sqrt()
    if even:
        each = 32 * even_words(point, rope.size) / rope.size
        heads = [pooled_bits(own, each, most) for own in variances.flatten(0, 1)]
        bits = torch.stack(heads).view(variances.shape)
    else:
        bits = pooled_bits(variances / trust[..., None], point.key_bits, most)
    if even or statistics.value_gradient is None:
        value_bits = torch.full(bits.shape[:2], even_value_bits(point), dtype=torch.uint8)
    else:
        value_bits = head_bits(statistics.value_gradient.sqrt(), point.value_bits)
    return Tables.of(
        point,
        rope,
        mean,
        vectors.mT @ weight / sigma[..., :, None],
        back @ vectors * sigma[..., None, :],
        variances,
        bits,
        value_bits,
    )
