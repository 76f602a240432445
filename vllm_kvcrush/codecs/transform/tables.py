"""Transform tables: their content, the model that they belong to, how many tokens pages hold with
them, and their file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcrush import paths
from vllm_kvcrush.codecs import CODECS, FITTED, layout
from vllm_kvcrush.codecs.transform.bits import MAX_BITS, quantiser
from vllm_kvcrush.codecs.transform.losses import Losses
from vllm_kvcrush.codecs.transform.points import (
    POINTS,
    OperatingPoint,
    TablesError,
    even_value_bits,
    even_words,
)
from vllm_kvcrush.codecs.transform.rope import Rope

FORMAT = "vllm-kvcrush-tables"
VERSION = 4


@dataclass(frozen=True)
class Tables:
    """The transform tables of one model at one operating point: what encoding and decoding need.
    Tensors are float32 unless said otherwise; components are in units of their codes.

    Attributes:
        point: the operating point.
        rope: the model's rotary embedding.
        key_mean: [L, H, D], the mean of keys as the point codes them.
        forward: [L, H, D, D]; row i gives component i of a centred key.
        inverse: [L, H, D, D], the inverse of `forward`; column i belongs to component i.
        cost: [L, H, D], what an error of 1 in a component costs, relative to all others.
        bits: uint8 [L, H, D], bits of each component, descending, equal within quads.
        value_bits: uint8 [L, H], bits of every channel of a value.
    """

    point: OperatingPoint
    rope: Rope
    key_mean: Tensor
    forward: Tensor
    inverse: Tensor
    cost: Tensor
    bits: Tensor
    value_bits: Tensor

    @property
    def words(self) -> Tensor:
        """Returns the number of 32-bit words of a key's codes, [L, H]."""
        return self.bits.long().sum(-1) // 32

    def capacity(self, layer: int, head: int, page_bytes: int, value_size: int) -> tuple[int, int]:
        """Returns how many tokens a page of this head holds, and how many of them are int8."""
        words, bits = int(self.words[layer, head]), int(self.value_bits[layer, head])
        return layout.fitted_capacity(
            page_bytes, words, bits, self.rope.size, value_size, self.point.exceptions
        )

    @classmethod
    def of(
        cls,
        point: OperatingPoint,
        rope: Rope,
        mean: Tensor,
        forward: Tensor,
        inverse: Tensor,
        weight: Tensor,
        bits: Tensor,
        value_bits: Tensor,
    ) -> Tables:
        """Returns the tables of transforms whose components have unit variance.

        Args:
            mean: `key_mean`.
            forward, inverse: as the attributes, but for components of unit variance.
            weight: [L, H, D], what a squared error of each component costs.
        """
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


class HeadTables(NamedTuple):
    """The part of a model's transform tables that encodes the pages of one head.

    Attributes:
        tables: the model's tables.
        layer, head: indices of the layer and the KV head.
        exceptions: how many tokens of a page of this head are int8.
    """

    tables: Tables
    layer: int
    head: int
    exceptions: int


def model_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the content of a model's config.json as a server sees it, completed by the defaults
    of the model's type, such as the base of its rotary embedding. Raises TablesError.

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
    except Exception:  # transformers does not know the type: what is written must do
        return written
    return dict(config.get_text_config().to_dict())


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that its transform tables depend on.

    Attributes:
        name: the model's name, for messages; nothing depends on it.
        layers, heads, kv_heads: numbers of layers, query heads and KV heads.
        size: head size.
        vocabulary: number of token ids.
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
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> ModelShape:
        """Returns the shape of the model that the content of a config.json describes. Raises
        TablesError."""
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

    def mismatch(self, other: ModelShape) -> str:
        """Returns the first difference of two models other than the name; empty if none."""
        for field in fields(self)[1:]:
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                return f"{field.name} {mine} instead of {its}"
        return ""


def default_path(
    config: Mapping[str, Any], folder: str = "tables", suffix: str = ".safetensors"
) -> pathlib.Path | None:
    """Returns the path of a model's tables unless another is given: a name that depends on the
    model's shape. Returns None where nothing is kept, see `paths.cache_root`. Raises TablesError
    for a model that transform coding cannot be used with.

    Args:
        config: content of the model's config.json.
        folder, suffix: where, and of what kind, another file about the model is.
    """
    model = ModelShape.from_config(config)
    described = json.dumps([getattr(model, f.name) for f in fields(model)[1:]])
    name = hashlib.sha256(described.encode()).hexdigest()[:16]
    root = paths.cache_root()
    return None if root is None else root / folder / f"{name}{suffix}"


# `plan.Packing.pages` of each codec, by its name.
Packings = dict[str, tuple[tuple[tuple[int, int], ...], ...]]


class Summary(NamedTuple):
    """What a file of tables says about its model.

    Attributes:
        model: the model.
        losses: what each codec costs it, or None if that was not measured.
        packings: how many tokens pages hold.
        rooms: how many tokens a page of each layer and head holds, by codec, int64 [L, H].
    """

    model: ModelShape
    losses: Losses | None
    packings: Packings
    rooms: dict[str, Tensor]


def packings(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    page_bytes: int,
    value_size: int,
    ranks: int,
) -> Packings:
    """Returns how many tokens the pages of each fitted codec hold by the tables of a file. Raises
    TablesError.

    Args:
        path, config: as in `load`.
        page_bytes: bytes of a page.
        value_size: head size of values.
        ranks: number of tensor-parallel ranks, over which the KV heads are divided.
    """
    found = {}
    for codec in FITTED:
        tables = load(path, config, codec)
        size = tables.rope.size
        widths = torch.stack([tables.words, tables.value_bits.long()], -1)
        found[codec] = _packing(tables.point, widths, page_bytes, size, value_size, ranks)
    return found


def even_packings(
    config: Mapping[str, Any], page_bytes: int, value_size: int, ranks: int
) -> Packings:
    """Returns how many tokens the pages of each fitted codec hold where there is no file: in tables
    that are fitted at start-up, all heads have `even_words`. Raises TablesError.

    Args:
        config, page_bytes, value_size, ranks: as in `packings`.
    """
    model = ModelShape.from_config(config)
    found = {}
    for point in POINTS:
        own = torch.tensor([even_words(point, model.size), even_value_bits(point)])
        widths = own.expand(model.layers, model.kv_heads, 2)
        found[point.name] = _packing(point, widths, page_bytes, model.size, value_size, ranks)
    return found


def _packing(
    point: OperatingPoint, widths: Tensor, page_bytes: int, size: int, value_size: int, ranks: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Returns `plan.Packing.pages` of one codec.

    Args:
        widths: int [L, H, 2], 32-bit words of a key and bits of a value channel.
    """
    heads = widths.shape[1] // ranks
    if heads * ranks != widths.shape[1]:
        raise TablesError(
            f"{widths.shape[1]} KV heads do not divide over {ranks} ranks: use int8 or int4."
        )

    found = _rooms(point, widths, page_bytes, size, value_size)
    rooms = [found[:, r * heads : (r + 1) * heads].flatten().tolist() for r in range(ranks)]
    if not all(map(all, rooms)):
        raise TablesError(
            f"a page of {page_bytes} bytes is too small for {point.name}: use a larger "
            "--block-size."
        )
    return tuple(tuple(sorted(Counter(own).items())) for own in rooms)


def _rooms(
    point: OperatingPoint, widths: Tensor, page_bytes: int, size: int, value_size: int
) -> Tensor:
    """Returns how many tokens a page of each layer and head holds, int64 [L, H]; arguments as for
    `_packing`."""

    @functools.cache
    def room(words: int, bits: int) -> int:
        return layout.fitted_capacity(page_bytes, words, bits, size, value_size, point.exceptions)[
            0
        ]

    found = [room(*own) for own in widths.flatten(0, 1).tolist()]
    return torch.tensor(found).view(widths.shape[:2])


_TENSORS = ("key_mean", "forward", "inverse", "cost", "bits", "value_bits")
_LOSS = "loss."
_AGAIN = "make it anew with `vllm-kvcrush calibrate`"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    path: str | os.PathLike[str],
    model: ModelShape,
    tables: Sequence[Tables],
    text: str,
    losses: Losses | None = None,
) -> None:
    """Writes the tables of several points to one file. Raises TablesError if it cannot be written.

    Args:
        text: digest of the text that they were calibrated on.
        losses: what each codec costs the model, if it was measured.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        f"{t.point.name}.{name}": getattr(t, name).contiguous() for t in tables for name in _TENSORS
    }
    if losses is not None:
        tensors |= {f"{_LOSS}{codec}": own.float() for codec, own in losses.loss.items()}
    about = {
        "version": VERSION,
        "model": asdict(model),
        "points": [asdict(t.point) for t in tables],
        "text": text,
        "losses_of": None if losses is None else losses.text,
        "sha256": _digest(tensors),
    }
    # One entry, because safetensors writes several in any order, and equal tables should give equal
    # files.
    meta = {FORMAT: json.dumps(about)}
    work = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        save_file(tensors, work, metadata=meta)
        os.replace(work, path)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise TablesError(
            f"Could not write {os.fspath(path)} ({error}): make room there, or name another file "
            "with --out."
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(work)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description and the tensors of a file. Raises TablesError for one that is
    missing, damaged, or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            if about is None:
                raise TablesError(f"{path} holds no transform tables: {_AGAIN}.")
            if about["version"] != VERSION:
                raise TablesError(
                    f"{path} has version {about['version']} of the tables, this release reads "
                    f"{VERSION}: {_AGAIN}."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about["model"] = ModelShape(**about["model"])
            about["points"] = {p["name"]: OperatingPoint(**p) for p in about["points"]}
    except FileNotFoundError:
        raise TablesError(f"{path} does not exist: {_AGAIN}.") from None
    except TablesError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise TablesError(f"{path} is damaged or no file of tables: {_AGAIN}.") from None
    if _digest(tensors) != about["sha256"]:
        raise TablesError(f"{path} is damaged: {_AGAIN}.")
    return about, tensors


def load(path: str | os.PathLike[str], config: Mapping[str, Any], point: str) -> Tables:
    """Returns the tables of one point from a file. Raises TablesError for a file that is missing,
    damaged, foreign, or made for another model.

    Args:
        config: content of the model's config.json.
        point: name of the point, such as "tc8".
    """
    mine = ModelShape.from_config(config)
    about, tensors = _read(path)
    theirs, points = about["model"], about["points"]
    if difference := theirs.mismatch(mine):
        raise TablesError(
            f"{path} was made for {theirs.name or 'another model'} ({difference}): {_AGAIN} for "
            "this model."
        )
    if point not in points:
        raise TablesError(
            f"{path} has no tables for {point}, only for {', '.join(points)}: {_AGAIN}."
        )
    parts = {name: tensors[f"{point}.{name}"] for name in _TENSORS}
    return Tables(points[point], Rope.from_config(config), **parts)


def load_losses(path: str | os.PathLike[str]) -> Losses | None:
    """Returns what each codec costs the model that a file of tables is for, or None if that was not
    measured. Raises TablesError, as `load` does."""
    about, tensors = _read(path)
    own = {
        name.removeprefix(_LOSS): tensor.double()
        for name, tensor in tensors.items()
        if name.startswith(_LOSS)
    }
    return Losses(about["losses_of"], own) if own else None


def summary(path: str | os.PathLike[str], block_size: int, itemsize: int) -> Summary:
    """Returns what a file of tables says about its model, whose values have the head size of its
    keys. Raises TablesError, as `load` does.

    Args:
        block_size: tokens of a block.
        itemsize: bytes of a channel.
    """
    about, tensors = _read(path)
    model, size = about["model"], about["model"].size
    page_bytes = 2 * block_size * size * itemsize
    found = {}
    rooms = {
        codec: torch.full(
            (model.layers, model.kv_heads), own.capacity(page_bytes, size, size, itemsize)
        )
        for codec, own in CODECS.items()
        if not own.needs_tables
    }
    for name, point in about["points"].items():
        words = tensors[f"{name}.bits"].long().sum(-1) // 32
        widths = torch.stack([words, tensors[f"{name}.value_bits"].long()], -1)
        found[name] = _packing(point, widths, page_bytes, size, size, 1)
        rooms[name] = _rooms(point, widths, page_bytes, size, size)
    return Summary(model, load_losses(path), found, rooms)
