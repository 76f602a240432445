"""Scores the heads of a model, on some text, for the policies that divide pages by head."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush import paths
from vllm_kvcrush.codecs.transform.calibrate import Probe, probed
from vllm_kvcrush.codecs.transform.points import TablesError
from vllm_kvcrush.codecs.transform.tables import ModelShape, model_config
from vllm_kvcrush.ops import reduce_groups, window_attention
from vllm_kvcrush.policies import heads

# Contexts, tokens of each, and tokens of the passage that is repeated after it.
CONTEXTS, CONTEXT, PASSAGE = 8, 512, 64


def output_path(model: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where the head scores of a model belong, given its directory or its name. Raises
    TablesError."""
    try:
        place = heads.default_path(model_config(paths.model_folder(model)))
    except paths.ModelNotHere as error:
        raise TablesError(str(error)) from None
    if place is None:
        raise TablesError(
            "there is no home directory to keep head scores in: name a file with --out, and give "
            "it to the server as --kv-policy-config.duo.pattern."
        )
    return place


def passages(tokens: Sequence[int]) -> list[tuple[list[int], int]]:
    """Returns contexts, spread over the tokens, and where in each the passage begins that is to be
    repeated."""
    size = min(CONTEXT, len(tokens))
    draw = torch.Generator().manual_seed(0)
    found = []
    for start in torch.linspace(0, len(tokens) - size, CONTEXTS).long().tolist():
        # The first tokens are sinks, which every head attends to.
        first = int(torch.randint(8, size - PASSAGE + 1, (), generator=draw))
        found.append((list(tokens[start : start + size]), first))
    return found


def score(probe: Probe, tokens: Sequence[int], progress: Callable[..., Any]) -> dict[str, Tensor]:
    """Returns the scores of each kind, float64 [L, H], means over some contexts.

    Args:
        tokens: text of the kind that will be served.
        progress: as in `calibrate.calibrate`.
    """
    scale, kv_heads = probe.model.size**-0.5, probe.model.kv_heads
    totals = {kind: torch.zeros(probe.model.layers, kv_heads).double() for kind in heads.KINDS}
    found = passages(tokens)
    for context, first in progress(found, "scoring heads"):
        n = len(context)
        repeated = context[first : first + PASSAGE]
        queries, keys, _ = probe.prefill([*context, *repeated])
        at = -torch.arange(n)
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
            q, k = (probe.rope.rotate(x[:, :n].double(), at).mean(1) for x in (query, key))
            totals["retrieval"][layer] += heads.retrieval_scores(q, k, probe.rope, scale)
            weights = window_attention(query[:, n:], key, scale)[..., :n]
            copying = heads.copying_scores(weights, first)
            totals["copying"][layer] += reduce_groups(copying, kv_heads)
    return {kind: total / len(found) for kind, total in totals.items()}


def calibrate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str] | None = None,
    progress: Callable[..., Any] = lambda iterable, label: iterable,
) -> ModelShape:
    """Writes the head scores of a model and returns the model's shape. Raises TablesError.
    Arguments are those of `codecs.transform.calibrate.calibrate`."""
    probe, tokens, digest = probed(path, text, progress)
    heads.save(out, probe.model.name, digest, score(probe, tokens, progress))
    return probe.model
