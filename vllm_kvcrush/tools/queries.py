"""Takes statistics of a model's queries, on some text, for the policy that expects attention by
them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_kvcrush import paths
from vllm_kvcrush.codecs.transform.calibrate import Probe, probed
from vllm_kvcrush.codecs.transform.points import TablesError
from vllm_kvcrush.codecs.transform.tables import ModelShape, model_config
from vllm_kvcrush.policies import queries

# Tokens of a context, of which the first are sinks, whose queries are like no others.
CONTEXT, SINKS = 1024, 4


def output_path(model: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where the query statistics of a model belong, given its directory or its name.
    Raises TablesError."""
    try:
        place = queries.default_path(model_config(paths.model_folder(model)))
    except paths.ModelNotHere as error:
        raise TablesError(str(error)) from None
    if place is None:
        raise TablesError(
            "there is no home directory to keep query statistics in: name a file with --out, and "
            "give it to the server as --kv-policy-config.expected_attention.statistics."
        )
    return place


def statistics(
    probe: Probe, tokens: Sequence[int], progress: Callable[..., Any]
) -> queries.QueryStatistics:
    """Returns mean and covariance of a model's queries over contexts of the text.

    Args:
        tokens: text of the kind that will be served.
        progress: as in `calibrate.calibrate`.
    """
    count, total, second = 0, torch.zeros(()), torch.zeros(())
    starts = range(0, len(tokens) - 2 * SINKS, CONTEXT)
    for start in progress(list(starts), "reading queries"):
        turned, _, _ = probe.prefill(tokens[start : start + CONTEXT])
        n = turned.shape[2]
        # One layer at a time, as float64 takes twice the memory.
        layers = [probe.rope.rotate(x.double(), -torch.arange(n))[:, SINKS:] for x in turned]
        total = total + torch.stack([x.sum(1) for x in layers])
        second = second + torch.stack([x.mT @ x for x in layers])
        count += n - SINKS
    mean = total / count
    covariance = second / count - mean.unsqueeze(3) * mean.unsqueeze(2)
    return queries.of_moments(mean, covariance, probe.model.kv_heads)


def calibrate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str] | None = None,
    progress: Callable[..., Any] = lambda iterable, label: iterable,
) -> ModelShape:
    """Writes the query statistics of a model and returns the model's shape. Raises TablesError.
    Arguments are those of `codecs.transform.calibrate.calibrate`."""
    probe, tokens, digest = probed(path, text, progress)
    queries.save(out, probe.model.name, digest, statistics(probe, tokens, progress))
    return probe.model
