"""Transform-coded pages: keys in unequal bits per component, values in equal ones.

The codec in one paragraph. A key is, where the point says so, turned to how it looks from its
strip's first token, centred, and turned by a transform whose components are uncorrelated and whose
errors cost the model's output equally. Each four components share 0 to 8 bits; the bits are pooled
over all layers and heads. A value is turned by random signs and a Hadamard matrix, which makes its
channels alike, and stored in equal bits, 2 to 4 by head, with one 8-bit scale. `Tables` holds what
a model needs for it, `encode_keys` ... `decode_values` are the plain-torch oracle of csrc/fitted.h
and csrc/encode.h.

Shapes use L layers, H KV heads, n tokens, and key and value sizes D and Dv. Pure torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcrush import paths
from vllm_kvcrush.codecs import layout

FORMAT = "vllm-kvcrush-tables"
VERSION = 4
# Components that share a field of bits: one in each byte of a word.
QUAD = 4
# Bits of a quad's components that fill a word of 32 bits.
WORD_BITS = 32 // QUAD
MAX_BITS = 8
PIECE_BITS = 4  # most bits of a field
MAX_INT8 = 127
VALUE_BITS = (2, 4)  # fewest and most bits of a value's channel
# A request's first tokens draw attention whatever the query: they are always exceptions.
SINKS = 4
_WORD = 0xFFFFFFFF
SCALE_STEPS = 16  # value scales: steps per octave
SCALE_ZERO = 128  # the byte that means 1

# Energy that every direction of the queries has at least, as a share of the mean: calibration saw
# only some of the queries that will come.
RIDGE = 1e-3


class TablesError(ValueError):
    """Tables that cannot be used; the message is one sentence for a user."""


# -- quantisers -----------------------------------------------------------------------------------


class Quantiser(NamedTuple):
    """A uniform scalar quantiser of a unit Gaussian: code c stands for step * (c - middle).

    Uniform levels cost a few percent more error than Lloyd-Max ones (Max 1960) and let kernels
    multiply codes instead of looking levels up.

    Attributes:
        step: distance of levels.
        middle: (2**bits - 1) / 2.
        distortion: mean squared error on a unit Gaussian.
    """

    step: float
    middle: float
    distortion: float


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _error(x: Tensor) -> Tensor:
    """Mean squared error of a unit Gaussian, rounded to the nearest of `x`, ascending."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    cuts = torch.cat([-edge, (x[1:] + x[:-1]) / 2, edge])
    mass, first = _cumulative(cuts).diff(), -_density(cuts).diff()
    return 1.0 + (x * x * mass - 2 * x * first).sum()


@functools.cache
def quantiser(bits: int) -> Quantiser:
    """The quantiser of a component with 0 to MAX_BITS bits; without bits everything is 0."""
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r} is not one of 0..{MAX_BITS}")
    if not bits:
        return Quantiser(1.0, 0.0, 1.0)
    levels = torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float64) / 2
    # The error has one minimum between overload and granularity.
    low, high = 0.0, 4.0
    for _ in range(80):
        third = (high - low) / 3
        if _error(levels * (low + third)) < _error(levels * (high - third)):
            high -= third
        else:
            low += third
    return Quantiser(low, (2**bits - 1) / 2, float(_error(levels * low)))


class Piece(NamedTuple):
    """A field of the codes of one quad, as csrc/kvcrush.h has it."""

    quad: int
    weight: int  # the field counts 2**weight times
    word: int
    first: int  # lowest bit in each byte of the word
    bits: int


def pieces(bits: Tensor) -> list[Piece]:
    """Where a token's key codes lie: fields of up to 4 bits that fill words.

    Args:
        bits: [D], equal within quads; the sum over quads is a multiple of WORD_BITS.
    """
    left: list[tuple[int, int, int]] = []  # (bits, weight, quad), most bits first
    for quad, width in enumerate(bits.view(-1, QUAD)[:, 0].tolist()):
        high = max(0, int(width) - PIECE_BITS)
        left += [(int(width) - high, high, quad)] * (width > 0) + [(high, 0, quad)] * (high > 0)
    assert sum(field[0] for field in left) % WORD_BITS == 0, "key codes do not fill words"
    left.sort(key=lambda field: (-field[0], field[2]))
    found, word = [], 0
    while left:
        room = WORD_BITS
        while room:
            fits = next((i for i, field in enumerate(left) if field[0] <= room), None)
            if fits is None:
                # None is that small: a part of the smallest one fills the word.
                width, weight, quad = left.pop()
                rest = width - room
                left.append((room, weight + rest, quad))
                left.append((rest, weight, quad))
                left.sort(key=lambda field: (-field[0], field[2]))
                continue
            width, weight, quad = left.pop(fits)
            found.append(Piece(quad, weight, word, WORD_BITS - room, width))
            room -= width
        word += 1
    # Fields of equal weight are neighbours: kernels round the weights of a few together.
    return sorted(found, key=lambda piece: (-piece.weight, piece.quad))


# -- rotary embedding -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """A rotary embedding that turns channel j with channel j + D/2 (rotate-half).

    Attributes:
        frequencies: float64 [D/2], radians per position.
    """

    frequencies: Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """From the content of a model's config.json. Raises TablesError for what was not verified
        against transformers."""
        settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(settings, Mapping) or any(
            isinstance(v, Mapping) for v in settings.values()
        ):
            raise TablesError(
                "transform coding does not know rotary embeddings that differ by layer."
            )
        settings = {**config, **settings}
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise TablesError(
                f"transform coding was not verified with rope_type {kind!r}: use int8 or int4."
            )
        if 0 in (settings.get("no_rope_layers") or ()) or settings.get("nope_layer_interval"):
            raise TablesError(
                "transform coding does not know layers without rotary embedding: use int8 or int4."
            )
        share = settings.get("partial_rotary_factor") or settings.get("rotary_pct") or 1.0
        theta = settings.get("rope_theta")
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if theta is None or share != 1.0 or size % 2:
            raise TablesError(
                "transform coding needs a rotary embedding that turns all channels of a head "
                "(rope_theta, no partial_rotary_factor): use int8 or int4."
            )
        frequencies = float(theta) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        if kind != "default":
            frequencies = _scaled(frequencies, kind, settings)
        return cls(frequencies)

    @property
    def size(self) -> int:
        """D."""
        return 2 * self.frequencies.numel()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns `x` [..., n, D] forward by `positions` [..., n]; negative ones turn back."""
        angle = positions.to(torch.float64)[..., None] * self.frequencies
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def spread(self, mean: Tensor, second: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of R(p)x for p uniform over `positions`, independent of x.

        Args:
            mean: [..., D], E[x].
            second: [..., D, D], E[x xᵀ].
            positions: [m].

        Returns:
            E[R(p)x] and E[R(p)x xᵀR(p)ᵀ], float64.
        """
        phase = torch.polar(
            torch.ones(1, dtype=torch.float64),
            positions.to(torch.float64)[:, None] * self.frequencies,
        )
        half = self.size // 2
        # Pairs as complex numbers z: a turn multiplies z by its phase, so that E[z z̄ᵀ] and E[z zᵀ]
        # are multiplied by the means of differences and of sums of angles.
        mean, second = mean.double(), second.double()
        turned = torch.complex(mean[..., :half], mean[..., half:]) * phase.mean(0)
        aa, ab = second[..., :half, :half], second[..., :half, half:]
        ba, bb = second[..., half:, :half], second[..., half:, half:]
        m = len(positions)
        hermitian = torch.complex(aa + bb, ba - ab) * (phase.mT @ phase.conj() / m)
        symmetric = torch.complex(aa - bb, ba + ab) * (phase.mT @ phase / m)
        plus, minus = hermitian + symmetric, hermitian - symmetric
        top = torch.cat([plus.real, (symmetric - hermitian).imag], -1)
        bottom = torch.cat([plus.imag, minus.real], -1)
        return torch.cat([turned.real, turned.imag], -1), torch.cat([top, bottom], -2) / 2


def _scaled(frequencies: Tensor, kind: str, settings: Mapping[str, Any]) -> Tensor:
    """Frequencies of contexts stretched by "linear" or "llama3" scaling."""
    slow = frequencies / settings["factor"]
    if kind == "linear":
        return slow
    # Llama 3: long waves are stretched, short ones are not, those between are blended.
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * slow + blend * frequencies


def model_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a model's config.json with what its type leaves unsaid, such as the base of
    its rotary embedding: the same that a server sees. Raises TablesError.

    Args:
        folder: the model's directory.
    """
    path = pathlib.Path(folder, "config.json")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = None
    if not isinstance(written, dict):
        raise TablesError(f"{folder} is no model here: it has no config.json that can be read.")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception:  # a type that transformers does not know: what is written must do
        return written
    return dict(config.get_text_config().to_dict())


# -- what a model needs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One point between size and loss.

    Attributes:
        name: as policies and files call it.
        local: whether keys are coded as seen from the position of their strip's first token: fewer
            bits say as much, and a query is turned anew for every strip.
        key_bits: bits per key component, the mean over all layers and heads.
        value_bits: bits per value channel, likewise, 2 to 4 in each head; the scale comes on top.
        exceptions: share of a page's tokens that are int8 instead.
    """

    name: str
    local: bool
    key_bits: float
    value_bits: float
    exceptions: float


# What there is, those that lose least first.
POINTS = (
    Point("tc4", local=False, key_bits=3.25, value_bits=4.0, exceptions=0.005),
    Point("tc6", local=True, key_bits=1.75, value_bits=2.5, exceptions=0.005),
    Point("tc8", local=True, key_bits=1.375, value_bits=2.25, exceptions=0.005),
)
# Queries are taken at distances up to this from a key: further ones look alike.
HORIZON = 8192


def horizon(config: Mapping[str, Any]) -> int:
    """How far queries can be from a key, for `fit`; `config` is the content of config.json."""
    return min(HORIZON, config.get("max_position_embeddings") or HORIZON)


@dataclass
class Statistics:
    """Moments of a model's keys and queries before RoPE, float64.

    Attributes:
        key_mean: [L, H, D].
        key_second: [L, H, D, D], E[k kᵀ].
        query_second: [L, H, D, D], E[q qᵀ] summed over the query heads of a KV head.
        key_gradient: [L, H, D, D], E[g gᵀ] of the gradient g that a key has of the log-likelihood
            of text that comes after it; None where nobody took it.
        value_gradient: [L, H], E[|g|² |v|²] of values' gradients, likewise.
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
        """From keys [L, H, n, D], their gradients and queries [L, Hq, m, D], all without RoPE;
        and values with their gradients, [L, H, n, Dv] each."""
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
        """Of `mine` tokens here and `others` there together."""
        share = others / (mine + others)
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Statistics(
            *(torch.lerp(a, b, share) if a is not None else None for a, b in both)  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Tables:
    """What encoding and decoding at one point needs, float32 unless said otherwise. Components are
    in units of their codes.

    Attributes:
        point: the point.
        rope: the model's rotary embedding.
        key_mean: [L, H, D], of keys as the point codes them.
        forward: [L, H, D, D]; row i gives component i of a centred key.
        inverse: [L, H, D, D], the inverse of `forward`; column i belongs to component i.
        cost: [L, H, D]: what an error of 1 in a component costs, relative to all others.
        bits: uint8 [L, H, D], descending, equal within quads.
        value_bits: uint8 [L, H], of every channel of a value.
    """

    point: Point
    rope: Rope
    key_mean: Tensor
    forward: Tensor
    inverse: Tensor
    cost: Tensor
    bits: Tensor
    value_bits: Tensor

    @property
    def words(self) -> Tensor:
        """[L, H], 32-bit words of a key's codes."""
        return self.bits.long().sum(-1) // 32

    def capacity(self, layer: int, head: int, page_bytes: int, value_size: int) -> tuple[int, int]:
        """Tokens of a page of this head, and how many of them are int8."""
        words, bits = int(self.words[layer, head]), int(self.value_bits[layer, head])
        return layout.fitted_capacity(
            page_bytes, words, bits, self.rope.size, value_size, self.point.exceptions
        )

    @classmethod
    def of(
        cls,
        point: Point,
        rope: Rope,
        mean: Tensor,
        forward: Tensor,
        inverse: Tensor,
        weight: Tensor,
        bits: Tensor,
        value_bits: Tensor,
    ) -> Tables:
        """From transforms whose components have unit variance; `weight` [L, H, D] is what their
        squared error costs."""
        steps = torch.tensor([quantiser(b).step for b in range(MAX_BITS + 1)], dtype=torch.float64)
        step = steps[bits.long()]
        return cls(
            point,
            rope,
            mean.float(),
            (forward / step[..., :, None]).float(),
            (inverse * step[..., None, :]).float(),
            (weight * step.square()).float(),
            bits,
            value_bits,
        )


def pooled_bits(variances: Tensor, mean_bits: float, most: int = MAX_BITS) -> Tensor:
    """Gives `mean_bits` per component, on average, to those where they lower the error most:
    quads of neighbours alike, whole words to each head, pooled over all leading dimensions.

    Args:
        variances: [..., D], descending.
        mean_bits: 0 <= mean_bits <= most.
        most: no component gets more.

    Returns:
        uint8, of the same shape. The first of equal ones get the bits.
    """
    if not 0 <= mean_bits <= most:
        raise ValueError(f"mean_bits={mean_bits!r} is not between 0 and {most}")
    errors = torch.tensor([quantiser(b).distortion for b in range(most + 1)], dtype=torch.float64)
    size = variances.shape[-1]
    quads = variances.double().reshape(-1, size // QUAD, QUAD).sum(-1)
    # Errors fall convexly with bits, so that a quad's bits, a head's words and all words come in
    # order of what they gain.
    gains = (quads[..., None] * -errors.diff()).flatten(1)
    order = gains.sort(dim=-1, descending=True, stable=True)
    whole = gains.shape[1] // WORD_BITS * WORD_BITS
    words = order.values[:, :whole].view(len(gains), -1, WORD_BITS).sum(-1)
    given = torch.zeros_like(words)
    chosen = words.flatten().sort(descending=True, stable=True).indices
    given.view(-1)[chosen[: round(mean_bits * variances.numel() / 32)]] = 1
    rank = order.indices.argsort(-1)
    held = (rank < given.sum(-1, keepdim=True) * WORD_BITS).view(*quads.shape, most).sum(-1)
    return held.to(torch.uint8).repeat_interleave(QUAD, -1).view(variances.shape)


def head_bits(costs: Tensor, mean_bits: float) -> Tensor:
    """Gives the values of each head 2 to 4 bits a channel, `mean_bits` on average: more where they
    take most off the error times its cost.

    Args:
        costs: [L, H], of an error as large as the value.

    Returns:
        uint8 [L, H].
    """
    few, most = VALUE_BITS
    errors = torch.tensor([quantiser(b).distortion for b in range(few, most + 1)])
    # Errors fall convexly with bits: a head's second bit gains less than its first.
    gains = (costs.double().flatten()[:, None] * -errors.diff()).flatten()
    spare = round((mean_bits - few) * costs.numel())
    taken = gains.sort(descending=True, stable=True).indices[:spare] // (most - few)
    given = torch.bincount(taken, minlength=costs.numel())
    return (few + given).to(torch.uint8).view(costs.shape)


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive matrix [..., D, D] and its inverse. Directions with
    next to no energy count as having a little, so that neither is infinite."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    floor = RIDGE * values.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    root = (values + floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def even_value_bits(point: Point) -> int:
    """Bits of a value's channel where every head has the same: about what heads share out."""
    return int(point.value_bits + 0.5)


def even_words(point: Point, size: int) -> int:
    """Words of a key's codes where every head has the same number, so that they are known before
    there are any statistics: no fewer than where heads share them out."""
    return math.ceil(point.key_bits * size / 32)


def fit(
    statistics: Statistics,
    point: Point,
    rope: Rope,
    horizon: int,
    most: int = MAX_BITS,
    even: bool = False,
) -> Tables:
    """Makes the tables of a point.

    The transform is the Karhunen-Loeve transform of W(k - mean): of all transforms with these bits
    it loses least in E[(k - k̂)ᵀ W² (k - k̂)]. W² is what errors of a key cost: to second order in
    the divergence of the model's output E[g gᵀ], the Fisher information of the key (its gradient g
    on text that the model is unsure of as the text is); without gradients E[q qᵀ], so that logits
    lose least, whatever becomes of them. Queries are taken at all distances up to `horizon` from
    the key, and keys at all positions up to it, or in a strip. With `even`, every head gets
    `even_words`. Values have `even_value_bits` then, and where there are no gradients.
    """
    far = torch.arange(horizon)
    near = torch.arange(layout.STRIP) if point.local else far
    mean, second = rope.spread(statistics.key_mean, statistics.key_second, near)
    if statistics.key_gradient is not None:
        _, cost = rope.spread(statistics.key_mean, statistics.key_gradient, near)
        # How much more one head matters than another depends on the text: half of it, in the
        # logarithm, loses no more, and heads whose pages hold alike waste fewer of them.
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


# -- keys -----------------------------------------------------------------------------------------


def origins(positions: Tensor) -> Tensor:
    """The position of each token's strip, [n]: that of its first token."""
    return positions[torch.arange(len(positions)) // layout.STRIP * layout.STRIP]


def encode_keys(
    keys: Tensor, positions: Tensor, tables: Tables, layer: int, head: int
) -> tuple[Tensor, Tensor]:
    """Codes of one head's keys.

    Args:
        keys: [n, D] with RoPE.
        positions: [n] of the tokens.

    Returns:
        Codes, uint8 [n, D], components in the order of the tables, 0 where one has no bits; and
        each token's loss [n], what its error costs (`fit` says in what).
    """
    x = tables.rope.rotate(keys, -origins(positions)) if tables.point.local else keys
    x = (x - tables.key_mean[layer, head].to(x)) @ tables.forward[layer, head].to(x).mT
    top = (2 ** tables.bits[layer, head].long() - 1).to(x)
    codes = (x + top / 2).round().clamp(torch.zeros_like(top), top)
    loss = (x - (codes - top / 2)).square() @ tables.cost[layer, head].to(x)
    return codes.to(torch.uint8), loss


def decode_keys(
    codes: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The keys [n, D], with RoPE, that codes stand for."""
    middle = (2 ** tables.bits[layer, head].long() - 1).to(dtype) / 2
    x = (codes.to(dtype) - middle) @ tables.inverse[layer, head].to(dtype).mT
    x = x + tables.key_mean[layer, head].to(x)
    return tables.rope.rotate(x, origins(positions)) if tables.point.local else x


# -- values ---------------------------------------------------------------------------------------


@functools.cache
def signs(size: int) -> Tensor:
    """The random signs that go before the Hadamard matrix: int8 [size]. The same hash of the
    channel as `rotation_sign` in csrc/layout.h."""
    x = (torch.arange(size) * 2654435769 + 0x9E3779B9) & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return (1 - 2 * ((x ^ (x >> 16)) & 1)).to(torch.int8)


def hadamard(x: Tensor) -> Tensor:
    """Multiplies the last dimension by an orthonormal, symmetric Hadamard matrix, block by block:
    blocks are the largest power of two that divides it."""
    size = x.shape[-1]
    block = size & -size
    y = x.reshape(-1, size // block, block)
    step = 1
    while step < block:
        y = y.view(-1, size // block, block // (2 * step), 2, step)
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2)
        step *= 2
    return (y / math.sqrt(block)).reshape(x.shape)


def encode_values(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of values.

    Args:
        values: [n, Dv].

    Returns:
        Codes, uint8 [n, Dv], and scales, uint8 [n]: byte b > 0 means 2^((b - 128) / 16) between
        two codes, and 0 means a value of nothing but zeros.
    """
    y = hadamard(values * signs(values.shape[-1]).to(values))
    norm = y.square().mean(-1, keepdim=True).sqrt()
    tiny = torch.finfo(values.dtype).tiny
    q = quantiser(bits)
    codes = (y / (norm.clamp(min=tiny) * q.step) + q.middle).round().clamp(0, 2 * q.middle)
    c = codes - q.middle
    # The scale that loses least with these codes.
    scale = (y * c).sum(-1) / c.square().sum(-1).clamp(min=tiny)
    byte = SCALE_ZERO + (SCALE_STEPS * scale.clamp(min=tiny).log2()).round()
    byte = byte.clamp(1, 255).where(norm[..., 0] > 0, torch.zeros_like(scale))
    return codes.to(torch.uint8), byte.to(torch.uint8)


def decode_values(
    codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values [n, Dv] that codes stand for."""
    scale = torch.exp2((scales.to(dtype) - SCALE_ZERO) / SCALE_STEPS) * (scales > 0)
    y = (codes.to(dtype) - quantiser(bits).middle) * scale[:, None]
    return hadamard(y) * signs(codes.shape[-1]).to(y)


# -- pages ----------------------------------------------------------------------------------------


def to_int8(x: Tensor) -> Tensor:
    """What int8 codes with one float16 scale a row leave of `x` [..., D]."""
    scale = (x.abs().amax(-1, keepdim=True) / MAX_INT8).half().to(x.dtype)
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny)
    return (x / scale).round().clamp(-MAX_INT8, MAX_INT8) * scale


@dataclass(frozen=True)
class Page:
    """One head's n tokens as a page holds them; x of them are exceptions.

    Attributes:
        positions: [n], ascending.
        key_codes: uint8 [n, D].
        value_codes: uint8 [n, Dv].
        value_scales: uint8 [n].
        slots: [x], the exceptions' places among the n. What the codes say there does not count.
        keys, values: [x, D] and [x, Dv], the exceptions after int8.
    """

    positions: Tensor
    key_codes: Tensor
    value_codes: Tensor
    value_scales: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor


def encode_page(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    exceptions: int,
) -> Page:
    """Encodes the tokens of one page of one head.

    Exceptions are the first SINKS tokens of a request, then the tokens whose keys lose most: a
    function of the page's content alone, so that equal tokens give equal pages.

    Args:
        keys: [n, D] with RoPE.
        values: [n, Dv].
        positions: [n], ascending.
        exceptions: how many; all if there are fewer tokens.
    """
    key_codes, loss = encode_keys(keys, positions, tables, layer, head)
    value_codes, scales = encode_values(values, int(tables.value_bits[layer, head]))
    # topk returns equal values in any order; a stable sort prefers the lower slot everywhere.
    order = loss.masked_fill(positions < SINKS, torch.inf).sort(descending=True, stable=True)
    slots = order.indices[:exceptions].sort().values
    exact_keys, exact_values = to_int8(keys[slots]), to_int8(values[slots])
    return Page(positions, key_codes, value_codes, scales, slots, exact_keys, exact_values)


def decode_page(
    page: Page, tables: Tables, layer: int, head: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys [n, D], with RoPE, and values [n, Dv] of a page."""
    keys = decode_keys(page.key_codes, page.positions, tables, layer, head, dtype)
    bits = int(tables.value_bits[layer, head])
    values = decode_values(page.value_codes, page.value_scales, bits, dtype)
    keys[page.slots] = page.keys.to(dtype)
    values[page.slots] = page.values.to(dtype)
    return keys, values


# -- file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What ties tables to a model.

    Attributes:
        name: for messages.
        layers, heads, kv_heads, size, vocabulary: the obvious counts.
        rope: digest of the rotary embedding.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    size: int
    vocabulary: int
    rope: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> Model:
        """From the content of config.json. Raises TablesError."""
        try:
            heads = config["num_attention_heads"]
            rope = Rope.from_config(config)
            turns = ",".join(f"{f:.6e}" for f in rope.frequencies.tolist())
            return cls(
                name or str(config.get("_name_or_path") or config.get("model_type", "")),
                config["num_hidden_layers"],
                heads,
                config.get("num_key_value_heads") or heads,
                rope.size,
                config["vocab_size"],
                hashlib.sha256(turns.encode()).hexdigest()[:16],
            )
        except KeyError as missing:
            raise TablesError(
                f"the model's configuration has no {missing.args[0]}: transform coding is for text "
                "models with plain attention."
            ) from None

    def mismatch(self, other: Model) -> str:
        """The first field, save the name, in which two models differ; empty if none."""
        for field in fields(self)[1:]:
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                return f"{field.name} {mine} instead of {its}"
        return ""


def default_path(config: Mapping[str, Any]) -> pathlib.Path | None:
    """Where the tables of a model are looked for and written to unless a path is given: a name that
    the model's shape decides. None where nothing is kept, see `paths.cache_root`. Raises
    TablesError for a model that transform coding does not fit.

    Args:
        config: content of the model's config.json.
    """
    model = Model.from_config(config)
    described = json.dumps([getattr(model, f.name) for f in fields(model)[1:]])
    name = hashlib.sha256(described.encode()).hexdigest()[:16]
    root = paths.cache_root()
    return None if root is None else root / "tables" / f"{name}.safetensors"


# By codec, `plan.Packing.pages`.
Packings = dict[str, tuple[tuple[tuple[int, int], ...], ...]]


def packings(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    page_bytes: int,
    value_size: int,
    ranks: int,
) -> Packings:
    """How many tokens the pages of each fitted codec hold that the file has tables for. Raises
    TablesError.

    Args:
        path, config: as in `load`.
        page_bytes: bytes of a page.
        value_size: head size of values.
        ranks: tensor-parallel ranks, which share the KV heads out.
    """
    found = {}
    for codec in layout.FITTED:
        tables = load(path, config, codec)
        size = tables.rope.size
        widths = torch.stack([tables.words, tables.value_bits.long()], -1)
        found[codec] = _packing(tables.point, widths, page_bytes, size, value_size, ranks)
    return found


def even_packings(
    config: Mapping[str, Any], page_bytes: int, value_size: int, ranks: int
) -> Packings:
    """The same of a model without a file, whose heads all have `even_words`."""
    model = Model.from_config(config)
    found = {}
    for point in POINTS:
        own = torch.tensor([even_words(point, model.size), even_value_bits(point)])
        widths = own.expand(model.layers, model.kv_heads, 2)
        found[point.name] = _packing(point, widths, page_bytes, model.size, value_size, ranks)
    return found


def _packing(
    point: Point, widths: Tensor, page_bytes: int, size: int, value_size: int, ranks: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """`widths` are a head's words of a key and bits of a value's channel, [L, H, 2]."""
    heads = widths.shape[1] // ranks
    if heads * ranks != widths.shape[1]:
        raise TablesError(
            f"{widths.shape[1]} KV heads do not divide over {ranks} ranks: use int8 or int4."
        )

    @functools.cache
    def room(words: int, bits: int) -> int:
        return layout.fitted_capacity(page_bytes, words, bits, size, value_size, point.exceptions)[
            0
        ]

    rooms = [
        [room(*own) for own in widths[:, r * heads : (r + 1) * heads].flatten(0, 1).tolist()]
        for r in range(ranks)
    ]
    if not all(map(all, rooms)):
        raise TablesError(
            f"a page of {page_bytes} bytes is too small for {point.name}: use a larger "
            "--block-size."
        )
    return tuple(tuple(sorted(Counter(own).items())) for own in rooms)


_TENSORS = ("key_mean", "forward", "inverse", "cost", "bits", "value_bits")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path: str | os.PathLike[str], model: Model, tables: Sequence[Tables], text: str) -> None:
    """Writes tables of several points to one file. `text` is the digest of what they were
    calibrated on."""
    from safetensors.torch import save_file

    tensors = {
        f"{t.point.name}.{name}": getattr(t, name).contiguous() for t in tables for name in _TENSORS
    }
    about = {
        "version": VERSION,
        "model": asdict(model),
        "points": [asdict(t.point) for t in tables],
        "text": text,
        "sha256": _digest(tensors),
    }
    # One entry: safetensors writes several in any order, and equal tables should be equal files.
    meta = {FORMAT: json.dumps(about)}
    work = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        save_file(tensors, work, metadata=meta)
        os.replace(work, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(work)


def load(path: str | os.PathLike[str], config: Mapping[str, Any], point: str) -> Tables:
    """Reads the tables of one point. Raises TablesError, with one sentence, for a file that is
    missing, damaged, foreign, or made for another model.

    Args:
        config: content of the model's config.json.
        point: name of the point, such as "tc8".
    """
    from safetensors import SafetensorError, safe_open

    again = "make it anew with `vllm-kvcrush calibrate`"
    mine = Model.from_config(config)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            if about is None:
                raise TablesError(f"{path} holds no transform tables: {again}.")
            if about["version"] != VERSION:
                raise TablesError(
                    f"{path} has version {about['version']} of the tables, this release reads "
                    f"{VERSION}: {again}."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            theirs = Model(**about["model"])
            points = {p["name"]: Point(**p) for p in about["points"]}
    except FileNotFoundError:
        raise TablesError(f"{path} does not exist: {again}.") from None
    except TablesError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise TablesError(f"{path} is damaged or no file of tables: {again}.") from None
    if _digest(tensors) != about["sha256"]:
        raise TablesError(f"{path} is damaged: {again}.")
    if difference := theirs.mismatch(mine):
        raise TablesError(
            f"{path} was made for {theirs.name or 'another model'} ({difference}): {again} for "
            "this model."
        )
    if point not in points:
        raise TablesError(
            f"{path} has no tables for {point}, only for {', '.join(points)}: {again}."
        )
    parts = {name: tensors[f"{point}.{name}"] for name in _TENSORS}
    return Tables(points[point], Rope.from_config(config), **parts)
