"""How much each head of a model looks back: scores, their file, and policies that divide pages by
them."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform import tables
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.policies.base import Room, View, Wrapper

FORMAT, VERSION = "vllm-kvcrush-heads", 1
# Policies that take a file, for which the server names the one in the default place.
POLICIES = ("duo", "surfacelogic")
# Kinds of scores in a file, each from 0 to 1.
KINDS = ("retrieval", "copying")
REACH = 500  # tokens over which a head's attention is followed
_SAMPLE = 1024  # candidates of which the mean key is taken


def retrieval_scores(query: Tensor, key: Tensor, rope: Rope, scale: float) -> Tensor:
    """Returns how far back heads look: the area under the cumulated attention, from the oldest
    token to the newest, of the last of `REACH` equal queries over as many equal keys, of which only
    their positions differ. It is near 0 for a head that looks at the newest tokens alone, 0.5 for
    one that looks at all alike (the untrained score of kvpress for DuoAttention).

    Args:
        query: [Hq, D], the mean query of each head, without RoPE.
        key: [H, D], the mean key of each KV head, without RoPE.
        rope: the model's rotary embedding.
        scale: factor of q·k.

    Returns:
        float64 [H], means over the query heads of a KV head.
    """
    heads, at = len(key), torch.arange(REACH)
    keys = rope.rotate(key.double().cpu().unsqueeze(1).expand(-1, REACH, -1), at)
    queries = rope.rotate(query.double().cpu().unsqueeze(1), at[-1:]).view(heads, -1, key.shape[1])
    weights = (queries @ keys.mT * scale).softmax(-1)
    return weights.cumsum(-1).mean((1, 2))


def copying_scores(weights: Tensor, first: int, top: int = 10) -> Tensor:
    """Returns how well heads find what is repeated: for each token of a passage that repeats an
    earlier one, the harmonic mean of the precision and the recall with which the `top` tokens that
    it attends to most lie in the earlier passage, by their attention (the score of REAL, the
    successor of SurfaceLogicKV).

    Args:
        weights: [Hq, n, m], attention of the n tokens of the repetition over the m before it.
        first: where the earlier passage of n tokens begins.

    Returns:
        float64 [Hq], means over the n tokens.
    """
    count = weights.shape[1]
    best = weights.double().topk(min(top, weights.shape[2]), -1)
    inside = (best.indices >= first) & (best.indices < first + count)
    found = (best.values * inside).sum(-1)
    precision = found / best.values.sum(-1).clamp(min=1e-300)
    passage = weights[..., first : first + count].double().sum(-1)
    recall = found / passage.clamp(min=1e-300)
    # Sums in another order may be greater by a rounding error.
    both = (precision + recall).clamp(min=1e-300)
    return (2 * precision * recall / both).mean(-1).clamp(max=1.0)


def default_path(config: Mapping[str, Any]) -> pathlib.Path | None:
    """Returns the path of a model's head scores unless another is given, as
    `transform.tables.default_path` does for tables."""
    return tables.default_path(config, "heads", ".json")


def save(path: str | os.PathLike[str], model: str, text: str, scores: Mapping[str, Tensor]) -> None:
    """Writes a file of head scores.

    Args:
        model: the model's name, for people.
        text: digest of the text that the scores are from.
        scores: by kind, [L, H over all ranks].
    """
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": model, "text": text}
    content |= {kind: scores[kind].tolist() for kind in KINDS}
    work = pathlib.Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        work.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def load(path: str, kind: str) -> Tensor:
    """Returns the scores of a kind, float64 [L, H over all ranks]. Raises ValueError, whose message
    says what is wrong with the file."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("is not a file of `vllm-kvcrush calibrate --heads`")
    if content.get("version") != VERSION:
        raise ValueError("is of another version: make it again with `calibrate --heads`")
    rows = content.get(kind)
    try:
        scores = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        scores = torch.zeros(0)
    if scores.dim() != 2 or not scores.numel() or not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError(f"has no table of {kind!r} scores from 0 to 1, by layer and head")
    return scores


@dataclass
class ByHeads(Wrapper):
    """The base of policies that divide pages by head scores.

    Attributes:
        pattern: file of head scores, of `vllm-kvcrush calibrate MODEL --heads`; without one, heads
            are scored at each compaction by `retrieval_scores` of the window's mean query and the
            mean key of what is held.
    """

    allocates: ClassVar[bool] = True
    kind: ClassVar[str]  # of the file's scores

    pattern: str | None = None
    known: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_alone("divides pages")
        if self.pattern is None:
            return
        self.require("pattern", isinstance(self.pattern, str), "a path")
        try:
            self.known = load(self.pattern, self.kind)
        except ValueError as error:
            self.require("pattern", False, f"a pattern of heads: it {error}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns what the base needs, and queries and positions where there is no file."""
        more = {"queries", "positions"} if self.known is None else set()
        return self.base.needs | more

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Returns the shape of the file's scores, or what the base is for."""
        if self.known is None:
            return super().made_for
        return self.known.shape[0], self.known.shape[1]

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor:
        heads = view.num_kv_heads
        if self.known is not None:
            return self.known[view.layer, view.first_head : view.first_head + heads]
        return _of_request(view)


def _of_request(view: View) -> Tensor:
    """Returns `retrieval_scores` of a request's own keys and last queries, float64 [H]."""
    queries, rope = view.queries, view.rope
    assert queries is not None
    if rope is None:
        raise ValueError(
            "heads cannot be scored without the model's rotary embedding: name a pattern"
        )
    # The raw tail follows the newest candidate, and the window is its end.
    tail, window = view.keys.shape[1] - view.candidates, queries.shape[1]
    newest = int(view.positions.masked_fill(~view.valid, -1).max())
    at = torch.arange(newest + 1 + tail - window, newest + 1 + tail)
    query = rope.rotate(queries.double().cpu(), -at).mean(1)
    means = []
    for head, n in enumerate(view.sizes.tolist()):
        slots = torch.arange(0, n, max(1, math.ceil(n / _SAMPLE)))
        own = view.keys[head, slots].double().cpu()
        means.append(rope.rotate(own, -view.positions[head, slots].cpu()).sum(0) / max(1, len(own)))
    return retrieval_scores(query, torch.stack(means), rope, view.scale)
