"""Transform-coded pages: keys in unequal bits per component, values in equal ones.

The codec in one paragraph. A key is taken back to a frame in which keys of one head look alike
(`FRAMES`), centred, and turned by a transform whose components are uncorrelated and count equally
for the queries. Each component gets 0 to 7 bits; the bits are pooled over
all layers and heads. A value is turned by random signs and a Hadamard matrix, which makes its
channels alike, and stored in equal bits with one 8-bit scale. `Tables` holds what a model needs
for it, `encode_keys` ... `decode_values` are the plain-torch oracle of every faster implementation.

Shapes use L layers, H KV heads, n tokens, and key and value sizes D and Dv. Pure torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

FORMAT = "vllm-kvcrush-tables"
VERSION = 1
# Tokens of a tile: the codes of one component of a tile are one word per bit.
TILE = 32
# A few components carry most of the logits: capped at 4 bits they would lose as much as all others.
MAX_BITS = 7
# Kernels look levels up in tables of 16; a code of more bits is the sum of two such levels.
PIECE_BITS = 4
MAX_INT8 = 127
# A request's first tokens draw attention whatever the query: they are always exceptions.
SINKS = 4
_WORD = 0xFFFFFFFF
SCALE_STEPS = 16  # value scales: steps per octave
SCALE_ZERO = 128  # the byte that means 1

# Energy that every direction of the queries has at least, as a share of the mean: calibration saw
# only some of the queries that will come.
RIDGE = 1e-3

FRAMES = ("rotated", "tile", "unrotated")


class TablesError(ValueError):
    """Tables that cannot be used; the message is one sentence for a user."""


# -- quantisers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantiser:
    """A scalar quantiser for a unit Gaussian, with levels that fit int8.

    Attributes:
        levels: int8 [2**bits], ascending; `step * levels` are the values.
        step: factor of `levels`.
        thresholds: float64 [2**bits - 1], halfway between levels.
        distortion: mean squared error on a unit Gaussian.
    """

    levels: Tensor
    step: float
    thresholds: Tensor
    distortion: float


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


@functools.cache
def quantiser(bits: int) -> Quantiser:
    """The quantiser of a component with 0 to MAX_BITS bits.

    Up to PIECE_BITS it is the Lloyd-Max one (Max 1960, Lloyd 1982), its levels rounded to int8.
    Beyond, levels are evenly spaced, so that they split into `pieces`.
    """
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits!r} is not one of 0..{MAX_BITS}")
    if bits <= PIECE_BITS:
        x = _lloyd_max(bits)
        step = float(x.max()) / MAX_INT8 if bits else 1.0
        levels = (x / step).round()
    else:
        levels = torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float64)
        # The error has one minimum between overload and granularity.
        steps = torch.linspace(0.5, 1.5, 401, dtype=torch.float64) * 3.3 / 2**bits
        step = float(steps[int(torch.stack([_error(levels * s) for s in steps]).argmin())])
    x = levels * step
    return Quantiser(levels.to(torch.int8), step, (x[1:] + x[:-1]) / 2, float(_error(x)))


@functools.cache
def pieces(bits: int) -> tuple[tuple[int, Tensor, float], ...]:
    """A component's code as kernels hold it: bits, int8 levels and step of each piece, from the
    high bits to the low ones. The steps times the levels that the pieces' codes name add up to
    the component; the pieces' bits, one after the other, are the quantiser's code."""
    whole = quantiser(bits)
    if bits <= PIECE_BITS:
        return ((bits, whole.levels, whole.step),) if bits else ()
    low = bits - PIECE_BITS

    def even(width: int) -> Tensor:
        return torch.arange(1 - 2**width, 2**width, 2).to(torch.int8)

    high = PIECE_BITS, even(PIECE_BITS), whole.step * 2**low
    return high, (low, even(low), whole.step)


def _cells(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and first moment of a unit Gaussian over the cells nearest to `x`, ascending."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    cuts = torch.cat([-edge, (x[1:] + x[:-1]) / 2, edge])
    return _cumulative(cuts).diff(), -_density(cuts).diff()


def _error(x: Tensor) -> Tensor:
    """Mean squared error of a unit Gaussian, rounded to `x`."""
    mass, first = _cells(x)
    return 1.0 + (x * x * mass - 2 * x * first).sum()


def _lloyd_max(bits: int) -> Tensor:
    if not bits:
        return torch.zeros(1, dtype=torch.float64)
    x = torch.linspace(-1, 1, 2**bits, dtype=torch.float64) * (1.0 + bits / 2)
    for _ in range(100 * 4**bits):
        mass, first = _cells(x)
        old, x = x, first / mass
        x = (x - x.flip(0)) / 2
        if (x - old).abs().max() < 1e-9:
            break
    return x


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


def origins(frame: str, positions: Tensor) -> Tensor:
    """The position to which each key's frame belongs, by which it is turned back.

    Args:
        frame: "rotated": none, keys stay as the cache holds them; "tile": that of the first token
            of each tile, so that a query is turned once for 32 keys; "unrotated": the key's own.
        positions: [n], slot order.
    """
    if frame == "rotated":
        return torch.zeros_like(positions)
    if frame == "tile":
        starts = torch.arange(len(positions), device=positions.device) // TILE * TILE
        return positions[starts]
    if frame == "unrotated":
        return positions
    raise ValueError(f"frame={frame!r} is not one of {', '.join(FRAMES)}")


# -- what a model needs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One point between size and loss.

    Attributes:
        name: as policies and files call it.
        frame: in which keys are transformed, one of FRAMES.
        key_bits: bits per key component, the mean over all layers and heads.
        value_bits: bits per value channel; the scale comes on top.
        exceptions: share of a page's tokens that are int8 instead.
    """

    name: str
    frame: str
    key_bits: float
    value_bits: int
    exceptions: float


@dataclass
class Statistics:
    """Moments of a model's keys and queries before RoPE, float64.

    Attributes:
        key_mean: [L, H, D].
        key_second: [L, H, D, D], E[k kᵀ].
        query_second: [L, H, D, D], E[q qᵀ] summed over the query heads of a KV head.
        value_mean: [L, H, Dv].
        value_square: [L, H], E[|v|²].
    """

    key_mean: Tensor
    key_second: Tensor
    query_second: Tensor
    value_mean: Tensor
    value_square: Tensor

    @classmethod
    def of(cls, keys: Tensor, queries: Tensor, values: Tensor) -> Statistics:
        """From keys [L, H, n, D], values [L, H, n, Dv] and queries [L, Hq, m, D], all without
        RoPE."""
        k, v = keys.double(), values.double()
        layers, heads, n, size = k.shape
        q = queries.double().reshape(layers, heads, -1, size)
        return cls(
            k.mean(2),
            k.mT @ k / n,
            q.mT @ q / queries.shape[2],
            v.mean(2),
            v.square().sum((2, 3)) / n,
        )

    def merged(self, other: Statistics, mine: int, others: int) -> Statistics:
        """Of `mine` tokens here and `others` there together."""
        share = others / (mine + others)
        return Statistics(
            *(
                torch.lerp(getattr(self, f.name), getattr(other, f.name), share)
                for f in fields(self)
            )
        )


@dataclass(frozen=True)
class Tables:
    """What encoding and decoding at one point needs, float32 unless said otherwise.

    Attributes:
        point: the point.
        rope: the model's rotary embedding.
        key_mean: [L, H, D], in the frame of the point.
        forward: [L, H, D, D]; row i gives component i of a centred key, with unit variance.
        inverse: [L, H, D, D], the inverse of `forward`; column i belongs to component i.
        sigma: [L, H, D]; an error of 1 in component i costs sigma_i² in the squared logit.
        bits: uint8 [L, H, D], descending.
    """

    point: Point
    rope: Rope
    key_mean: Tensor
    forward: Tensor
    inverse: Tensor
    sigma: Tensor
    bits: Tensor

    def lost(self, horizon: int) -> Tensor:
        """E[e eᵀ] of the keys' errors e, [L, H, D, D], for `mass_bias`: for queries with RoPE in
        the frame "rotated", else for queries without, at distances up to `horizon`."""
        errors = torch.tensor([quantiser(b).distortion for b in range(MAX_BITS + 1)])
        scaled = self.inverse * errors[self.bits.long()].sqrt()[..., None, :]
        second = scaled @ scaled.mT
        if self.point.frame == "rotated":
            return second
        # Averaged over the distances at which queries see a key.
        _, second = self.rope.spread(self.key_mean, second, -torch.arange(horizon))
        return second.float()


def pooled_bits(variances: Tensor, mean_bits: float, most: int = MAX_BITS) -> Tensor:
    """Gives `mean_bits` per component, on average, to those where they lower the error most.

    Args:
        variances: [..., D]; bits are pooled over all leading dimensions.
        mean_bits: 0 <= mean_bits <= most.
        most: no component gets more.

    Returns:
        uint8, of the same shape. The first of equal components get the bits.
    """
    if not 0 <= mean_bits <= most:
        raise ValueError(f"mean_bits={mean_bits!r} is not between 0 and {most}")
    errors = torch.tensor([quantiser(b).distortion for b in range(most + 1)], dtype=torch.float64)
    # Errors fall convexly with bits, so that a component's bits come in order.
    gains = (variances.double()[..., None] * -errors.diff()).flatten()
    order = gains.sort(descending=True, stable=True).indices
    given = torch.zeros_like(gains)
    given[order[: round(mean_bits * variances.numel())]] = 1
    return given.view(*variances.shape, most).sum(-1).to(torch.uint8)


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive matrix [..., D, D] and its inverse. Directions with
    next to no energy count as having a little, so that neither is infinite."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    floor = RIDGE * values.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    root = (values + floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def fit(
    statistics: Statistics, point: Point, rope: Rope, horizon: int, most: int = MAX_BITS
) -> Tables:
    """Makes the tables of a point.

    The transform is the Karhunen-Loeve transform of W(k - mean) with W = E[q qᵀ]^½: of all
    transforms with these bits it loses least in E[(q·k - q·k̂)²]. Queries are taken at all
    distances up to `horizon` from the key, and in the frame "rotated" keys at all positions up to
    it.
    """
    far = torch.arange(horizon)
    near = {"rotated": far, "tile": torch.arange(TILE), "unrotated": torch.zeros(1)}[point.frame]
    mean, second = rope.spread(statistics.key_mean, statistics.key_second, near)
    _, query = rope.spread(statistics.key_mean, statistics.query_second, far)
    weight, back = _root(query)
    spread = weight @ (second - mean[..., :, None] * mean[..., None, :]) @ weight
    variances, vectors = torch.linalg.eigh((spread + spread.mT) / 2)
    variances, vectors = variances.flip(-1).clamp(min=0), vectors.flip(-1)
    sigma = (variances + 1e-9 * variances.mean(-1, keepdim=True)).sqrt()
    return Tables(
        point,
        rope,
        mean.float(),
        (vectors.mT @ weight / sigma[..., :, None]).float(),
        (back @ vectors * sigma[..., None, :]).float(),
        sigma.float(),
        pooled_bits(variances, point.key_bits, most),
    )


def online(
    keys: Tensor,
    queries: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    point: Point,
    rope: Rope,
) -> Tables:
    """Tables of one request, from its own keys, for a model without a file: every channel is its
    own component. Each head gets the same number of bits, so that capacities are known before.

    Args:
        keys: [L, H, n, D] with RoPE, n > 1; the sinks count as little as they are many.
        queries: [L, Hq, w, D] with RoPE, the newest.
        positions, query_positions: [n] and [w].
    """
    layers, heads, _, size = keys.shape
    x = rope.rotate(keys.double(), -origins(point.frame, positions))
    later = positions >= SINKS if bool((positions >= SINKS).sum() > 1) else positions >= 0
    mean, sigma = x[:, :, later].mean(2), x[:, :, later].std(2)
    sigma = sigma.clamp(min=1e-6 * float(sigma.max()) + torch.finfo(torch.float32).tiny)
    q = queries.double()
    if point.frame != "rotated":
        q = rope.rotate(q, -query_positions)
    square = q.square().mean(2).view(layers, heads, -1, size).sum(2)
    # A query meets a key at any angle: both channels of a pair weigh the same.
    pair = (square[..., : size // 2] + square[..., size // 2 :]) / 2
    weight = torch.cat([pair, pair], -1).sqrt()
    variances = (sigma * weight) ** 2
    bits = torch.stack(
        [pooled_bits(head, point.key_bits) for head in variances.flatten(0, 1)]
    ).view(layers, heads, size)
    order = bits.long().sort(dim=-1, descending=True, stable=True).indices
    turn = torch.eye(size, dtype=torch.float64)[order]  # row i picks component i's channel
    s = sigma.gather(-1, order)
    return Tables(
        point,
        rope,
        mean.float(),
        (turn / s[..., None]).float(),
        (turn.mT * s[..., None, :]).float(),
        (s * weight.gather(-1, order)).float(),
        bits.gather(-1, order),
    )


# -- keys -----------------------------------------------------------------------------------------


def quantise(x: Tensor, bits: Tensor) -> Tensor:
    """Codes of unit Gaussian components.

    Args:
        x: [n, D].
        bits: [D], descending.

    Returns:
        uint8 [n, D]; 0 where a component has no bits.
    """
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for b, here in _runs(bits):
        cuts = quantiser(b).thresholds.to(x)
        codes[:, here] = torch.bucketize(x[:, here].contiguous(), cuts).to(torch.uint8)
    return codes


def values_of(codes: Tensor, bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The components that codes stand for; arguments as in `quantise`, codes [n, D]."""
    x = torch.zeros(codes.shape, dtype=dtype, device=codes.device)
    for b, here in _runs(bits):
        table = quantiser(b).levels.to(codes.device, dtype) * quantiser(b).step
        x[:, here] = table[codes[:, here].long()]
    return x


def _runs(bits: Tensor) -> list[tuple[int, slice]]:
    """Components with equal bits, as slices, from most bits to 1."""
    runs, start = [], 0
    counts = torch.bincount(bits.long(), minlength=1).tolist()
    for b in range(len(counts) - 1, 0, -1):
        if counts[b]:
            runs.append((b, slice(start, start + counts[b])))
            start += counts[b]
    return runs


def encode_keys(
    keys: Tensor, positions: Tensor, tables: Tables, layer: int, head: int
) -> tuple[Tensor, Tensor]:
    """Codes of one head's keys.

    Args:
        keys: [n, D] with RoPE.
        positions: [n] of the tokens, in slot order.

    Returns:
        Codes, uint8 [n, D], components in the order of the tables; and each token's loss [n], the
        squared error of its logit expected over queries.
    """
    bits = tables.bits[layer, head]
    origin = origins(tables.point.frame, positions)
    x = tables.rope.rotate(keys, -origin) - tables.key_mean[layer, head].to(keys)
    x = x @ tables.forward[layer, head].to(keys).mT
    codes = quantise(x, bits)
    loss = (x - values_of(codes, bits, x.dtype)) * tables.sigma[layer, head].to(x)
    return codes, loss.square().sum(-1)


def decode_keys(
    codes: Tensor,
    positions: Tensor,
    tables: Tables,
    layer: int,
    head: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The keys [n, D], with RoPE, that codes stand for."""
    x = values_of(codes, tables.bits[layer, head], dtype)
    x = x @ tables.inverse[layer, head].to(x).mT + tables.key_mean[layer, head].to(x)
    return tables.rope.rotate(x, origins(tables.point.frame, positions))


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
        Codes, uint8 [n, Dv], and scales, uint8 [n]: byte b > 0 means 2^((b - 128) / 16), and 0
        means a value of nothing but zeros.
    """
    y = hadamard(values * signs(values.shape[-1]).to(values))
    norm = y.square().mean(-1, keepdim=True).sqrt()
    tiny = torch.finfo(values.dtype).tiny
    q = quantiser(bits)
    codes = torch.bucketize(y / norm.clamp(min=tiny), q.thresholds.to(y))
    c = (q.levels.to(y) * q.step)[codes]
    # The scale that loses least with these codes.
    scale = (y * c).sum(-1) / c.square().sum(-1).clamp(min=tiny)
    byte = SCALE_ZERO + (SCALE_STEPS * scale.clamp(min=tiny).log2()).round()
    byte = byte.clamp(1, 255).where(norm[..., 0] > 0, torch.zeros_like(scale))
    return codes.to(torch.uint8), byte.to(torch.uint8)


def decode_values(
    codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values [n, Dv] that codes stand for."""
    q = quantiser(bits)
    scale = torch.exp2((scales.to(dtype) - SCALE_ZERO) / SCALE_STEPS) * (scales > 0)
    y = (q.levels.to(codes.device, dtype) * q.step)[codes.long()] * scale[:, None]
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
    value_codes, scales = encode_values(values, tables.point.value_bits)
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
    values = decode_values(page.value_codes, page.value_scales, tables.point.value_bits, dtype)
    keys[page.slots] = page.keys.to(dtype)
    values[page.slots] = page.values.to(dtype)
    return keys, values


def mass_bias(queries: Tensor, lost: Tensor, scale: float) -> Tensor:
    """What to add to the logits of tokens that are not exceptions.

    A code stands for the mean of the keys that it is the code of; the exponential of a mean is
    less than the mean of exponentials, by half the variance. Without this a query gives exact
    tokens (the tail, exceptions) more weight than they have.

    Args:
        queries: [..., m, D], unscaled, with RoPE or without as `lost` wants them.
        lost: [..., D, D], `Tables.lost` of the head.
        scale: factor of q·k.

    Returns:
        [..., m].
    """
    return scale * scale / 2 * ((queries @ lost.to(queries)) * queries).sum(-1)


# -- how many pages -------------------------------------------------------------------------------

HEADER_BYTES = 32  # of a page: base position and counts
DIRECTORY_BYTES = 7  # of a page in its request's directory: page, codec, count


def exceptions(share: float, capacity: int) -> int:
    """Least exceptions of a page of `capacity` tokens; the sinks are among the first page's."""
    return max(SINKS, math.ceil(share * capacity))


@dataclass(frozen=True)
class Layout:
    """How many bytes a page's parts take, for one (layer, head).

    A page is tiles of 32 tokens, then the exceptions, then a header. A tile is one 32-bit word per
    bit and component for keys, the same for values, and 32 value scales. Tokens of a page are a
    run of consecutive positions; where tokens are evicted in between, each takes two bytes more.

    Attributes:
        key_bits: bits of all components of a key together.
        value_bits: bits of a value channel.
        key_size, value_size: D and Dv.
        exceptions: share of the tokens that are exceptions.
        listed: whether positions are kept per token.
    """

    key_bits: int
    value_bits: int
    key_size: int
    value_size: int
    exceptions: float
    listed: bool = False

    @property
    def tile_bytes(self) -> int:
        planes = self.key_bits + self.value_bits * self.value_size
        return planes * TILE // 8 + TILE + 2 * TILE * self.listed

    @property
    def exception_bytes(self) -> int:
        """int8 key and value, their float16 scales, and the slot."""
        return self.key_size + self.value_size + 4 + 2

    def capacity(self, page_bytes: int) -> int:
        """The most tokens, a multiple of 32, that fit. Raises TablesError if none do."""
        tiles = page_bytes // self.tile_bytes + 1
        while tiles and self._bytes(tiles) > page_bytes:
            tiles -= 1
        if not tiles:
            raise TablesError(
                f"a page of {page_bytes} bytes is too small for {TILE} transform-coded tokens: "
                "use a larger --block-size."
            )
        return tiles * TILE

    def slots(self, page_bytes: int) -> int:
        """Exceptions that fit a page of `capacity` tokens: what the tiles leave over is theirs,
        so that a page has no unused bytes."""
        tiles = self.capacity(page_bytes) // TILE
        left = page_bytes - HEADER_BYTES - tiles * self.tile_bytes
        return min(tiles * TILE, left // self.exception_bytes)

    def _bytes(self, tiles: int) -> int:
        used = HEADER_BYTES + tiles * self.tile_bytes
        return used + exceptions(self.exceptions, tiles * TILE) * self.exception_bytes


@dataclass(frozen=True)
class Capacities:
    """Tokens that a page of each (layer, head) holds; what the scheduler plans with.

    Attributes:
        tokens: [L·H], heads of a layer together.
        page_bytes: size of a page.
        slots: [L·H], how many of a page's tokens are exceptions.
    """

    tokens: tuple[int, ...]
    page_bytes: int
    slots: tuple[int, ...]

    @functools.cached_property
    def _counts(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(Counter(self.tokens).items()))

    def pages(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one request fill, over all layers and heads."""
        return sum(heads * -(-tokens // held) for held, heads in self._counts)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold these pages; a block is one page for each (layer, head)."""
        return -(-self.pages(tokens) // len(self.tokens))

    def bytes(self, tokens: int) -> int:
        """Bytes that these tokens take: whole blocks, and the directory."""
        pages = self.blocks(tokens) * len(self.tokens)
        return pages * self.page_bytes + self.pages(tokens) * DIRECTORY_BYTES

    def ratio(self, tokens: int, token_bytes: int) -> float:
        """Raw bytes, `token_bytes` a token in all layers, over `bytes`."""
        return tokens * token_bytes / self.bytes(tokens)


def capacities(
    tables: Tables, value_size: int, page_bytes: int, listed: bool = False
) -> Capacities:
    """What pages hold with these tables. Raises TablesError if a page is too small."""
    sums = tables.bits.long().sum(-1).flatten().tolist()
    size, point = tables.rope.size, tables.point
    layouts = [
        Layout(bits, point.value_bits, size, value_size, point.exceptions, listed) for bits in sums
    ]
    return _capacities(layouts, page_bytes)


def _capacities(layouts: Sequence[Layout], page_bytes: int) -> Capacities:
    held = {x: (x.capacity(page_bytes), x.slots(page_bytes)) for x in set(layouts)}
    tokens, slots = zip(*(held[x] for x in layouts), strict=True)
    return Capacities(tokens, page_bytes, slots)


def online_capacities(
    point: Point, heads: int, key_size: int, value_size: int, page_bytes: int, listed: bool = False
) -> Capacities:
    """What pages hold with tables from `online`; `heads` counts all layers' together."""
    bits = round(point.key_bits * key_size)
    layout = Layout(bits, point.value_bits, key_size, value_size, point.exceptions, listed)
    return _capacities([layout] * heads, page_bytes)


def pages_needed(tokens: int, capacities: Capacities) -> int:
    """Pages that `tokens` tokens of one request fill, over all layers and heads."""
    return capacities.pages(tokens)


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


_TENSORS = ("key_mean", "forward", "inverse", "sigma", "bits")


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
