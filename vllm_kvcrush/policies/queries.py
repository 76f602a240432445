"""What a model's queries are like: mean and covariance by layer and head, and their file."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform import tables

FORMAT, VERSION = "vllm-kvcrush-queries", "1"
RANK = 32  # directions of a head's deviations that are kept


class QueryStatistics(NamedTuple):
    """Statistics of a model's queries without rotary embedding, unscaled.

    Attributes:
        mean: float32 [L, Hq over all ranks, D].
        deviations: float32 [L, Hq over all ranks, r, D], of which the sum of the outer products
            with themselves is the covariance, but for its smallest directions; the largest first.
        kv_heads: number of KV heads over all ranks.
    """

    mean: Tensor
    deviations: Tensor
    kv_heads: int


def of_moments(mean: Tensor, covariance: Tensor, kv_heads: int) -> QueryStatistics:
    """Returns the statistics of moments [L, Hq, D] and [L, Hq, D, D]; `RANK` directions of the
    covariance are kept."""
    values, vectors = torch.linalg.eigh(covariance.double())
    rows = (values.clamp(min=0).sqrt().unsqueeze(-2) * vectors).mT.flip(-2)[..., :RANK, :]
    return QueryStatistics(mean.float(), rows.float().contiguous(), kv_heads)


def default_path(config: Mapping[str, Any]) -> pathlib.Path | None:
    """Returns the path of a model's query statistics unless another is given, as
    `transform.tables.default_path` does for tables."""
    return tables.default_path(config, "queries")


def save(path: str | os.PathLike[str], model: str, text: str, statistics: QueryStatistics) -> None:
    """Writes a file of query statistics.

    Args:
        model: the model's name, for people.
        text: digest of the text that the statistics are from.
    """
    from safetensors.torch import save_file

    about = {"format": FORMAT, "version": VERSION, "model": model, "text": text}
    about["kv_heads"] = str(statistics.kv_heads)
    content = {"mean": statistics.mean, "deviations": statistics.deviations}
    work = pathlib.Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        save_file(content, work, about)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def load(path: str) -> QueryStatistics:
    """Returns the content of a file. Raises ValueError, whose message says what is wrong with
    it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if about.get("format") != FORMAT:
        raise ValueError("is not a file of `vllm-kvcrush calibrate --queries`")
    if about.get("version") != VERSION:
        raise ValueError("is of another version: make it again with `calibrate --queries`")
    mean, deviations = content.get("mean"), content.get("deviations")
    try:
        kv_heads = int(about.get("kv_heads", ""))
    except ValueError:
        kv_heads = 0
    if (
        mean is None
        or deviations is None
        or mean.dim() != 3
        or deviations.dim() != 4
        or deviations.shape[:2] != mean.shape[:2]
        or deviations.shape[3] != mean.shape[2]
        or kv_heads < 1
        or mean.shape[1] % kv_heads
        or not all(x.dtype == torch.float32 and bool(x.isfinite().all()) for x in content.values())
    ):
        raise ValueError("has no means and deviations of queries by layer and head")
    return QueryStatistics(mean, deviations, kv_heads)
