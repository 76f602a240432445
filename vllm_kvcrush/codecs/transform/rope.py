"""Rotary position embeddings, and what they do to moments of keys and queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.points import TablesError


@dataclass(frozen=True)
class Rope:
    """A rotary embedding that rotates channel j with channel j + D/2 (rotate-half).

    Attributes:
        frequencies: float64 [D/2], radians per position.
    """

    frequencies: Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """Returns the rotary embedding that the content of a model's config.json describes. Raises
        TablesError for one that was not verified against transformers."""
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

    @classmethod
    def if_known(cls, config: Mapping[str, Any]) -> Rope | None:
        """Returns what `from_config` does, or None for an embedding that it does not know."""
        try:
            return cls.from_config(config)
        except (TablesError, KeyError):
            return None

    @property
    def size(self) -> int:
        """Returns the head size D."""
        return 2 * self.frequencies.numel()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns `x` [..., n, D] rotated by `positions` [..., n]; negative ones rotate back."""
        angle = positions.to(torch.float64)[..., None] * self.frequencies
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def averaged(self, x: Tensor, first: Tensor, count: int) -> Tensor:
        """Returns the mean of `x` [..., n, D] over the rotations by `first`, `first` + 1, ...,
        `first` + `count` - 1, where `first` is [..., n]."""
        half = 0.5 * self.frequencies.to(x.device)
        # The sum of a geometric series of phases.
        ratio = (count * half).sin() / (count * half.sin())
        length = torch.where(half.sin() == 0, 1.0, ratio)
        angle = (first.to(torch.float64)[..., None] + 0.5 * (count - 1)) * 2 * half
        cos, sin = (angle.cos() * length).to(x.dtype), (angle.sin() * length).to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def spread(self, mean: Tensor, second: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the moments E[R(p)x] and E[R(p)x xᵀR(p)ᵀ], float64, for positions p that are
        uniform over `positions` and independent of x.

        Args:
            mean: [..., D], E[x].
            second: [..., D, D], E[x xᵀ].
            positions: [m].
        """
        phase = torch.polar(
            torch.ones(1, dtype=torch.float64),
            positions.to(torch.float64)[:, None] * self.frequencies,
        )
        half = self.size // 2
        # With pairs as complex numbers z, rotation multiplies z by a phase, so E[z z̄ᵀ] and E[z zᵀ]
        # are multiplied by the mean phases of differences and of sums of angles.
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
    """Returns the frequencies for contexts that "linear" or "llama3" scaling stretches."""
    slow = frequencies / settings["factor"]
    if kind == "linear":
        return slow
    # Llama 3 stretches long waves, leaves short ones, and blends those between.
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * slow + blend * frequencies
