"""What a worker measures when it starts, on the running model: statistics for the tables of fitted
codecs, and what each codec loses. It runs requests of its own, before there are others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.logger import init_logger

from vllm_kvcrush.codecs.transform.fit import fit
from vllm_kvcrush.codecs.transform.points import POINTS, horizon
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker import statistics
from vllm_kvcrush.engine.worker.backends.base import CacheLayer
from vllm_kvcrush.engine.worker.ranks import gather_heads
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.engine.worker.state import WorkerRequest
from vllm_kvcrush.engine.worker.tap import QueryTap
from vllm_kvcrush.plan import Packing, cdiv

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

logger = init_logger("vllm.kvcrush")

# The type checker takes the mixin for a runner.
_Base: Any = GPUModelRunner if TYPE_CHECKING else object


class _Excerpt(NamedTuple):
    """A context and a question over it, as they are without compression: `blocks` are those of the
    context, and then free ones to write to, `tail` those of the question; `exact` hidden states of
    the question, [m, size]; `queries` some of its queries, [L, rows, Hq, D], and `read` what they
    read from each layer's context."""

    context: list[int]
    question: list[int]
    blocks: list[int]
    tail: list[int]
    exact: Tensor
    queries: Tensor
    read: list[Tensor]


class MeasuringMixin(_Base):
    """The part of `CompactionMixin` that runs before there are requests."""

    _settings: Settings
    _layers: list[CacheLayer]
    _tap: QueryTap | None
    _requests: dict[str, WorkerRequest]
    _peaks: dict[str, int]
    # What was measured here, by codec, and whether the scheduler does not know it yet.
    _losses: dict[str, float]
    _untold: bool
    # By codec, float64 [L, H]: how what each loses is divided among this rank's heads.
    _head_losses: dict[str, np.ndarray]

    def _open_layers(self, tables: list[Tables], rank: int) -> None:
        raise NotImplementedError

    def _heads_of(self, rank: int) -> range:
        raise NotImplementedError

    def take_statistics(self) -> None:
        """Makes the tables of fitted codecs from statistics of the running model, and measures what
        each codec loses, if no file has them. It runs requests, and must be called before there are
        others."""
        settings = self._settings
        if settings.fitted and settings.tables is None:
            self._fit_tables()
        if any(loss is None for loss in settings.losses.values()):
            self._measure_losses()

    def _fit_tables(self) -> None:
        began = time.perf_counter()
        config = self.model_config.hf_text_config.to_dict()
        rope = Rope.from_config(config)
        measured = statistics.gather(self._read_pieces(), rope)
        far = horizon(config)
        self._open_layers([fit(measured, p, rope, far, even=True) for p in POINTS], 0)
        logger.info(
            "vllm-kvcrush: statistics of the model for transform coding taken in %.1f s.",
            time.perf_counter() - began,
        )

    def _read_pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs each piece of text and yields its queries [L, Hq, n, D] and keys [L, H, n, D], with
        RoPE."""
        size, tap = self.cache_config.block_size, self._tap
        assert tap is not None
        for tokens in statistics.pieces(self.model_config, min(self._room * size, self._longest)):
            n = len(tokens)
            blocks = list(range(1, 1 + cdiv(n, size)))
            tap.rows = torch.arange(n, device=self.device)
            self.execute_model(statistics.scheduled(tokens, blocks))
            self.sample_tokens(None)
            self.execute_model(statistics.finished())
            table = torch.tensor(blocks, dtype=torch.int32, device=self._layers[0].device)
            held = (
                layer.held(layer.source(None, table, n, 0), [n] * layer.heads)
                for layer in self._layers
            )
            keys = torch.stack([own.keys for own in held])
            yield tap.take().transpose(1, 2).cpu(), keys.cpu()

    @property
    def _room(self) -> int:
        return int(self._layers[0].pages.num_blocks) - 1  # vLLM keeps block 0 for itself

    @property
    def _longest(self) -> int:
        """Tokens that one step and one request can have."""
        return min(self.max_num_tokens, self.model_config.max_model_len - 1)

    def _measure_losses(self) -> None:
        """Measures `Settings.losses` by compacting contexts to each codec in turn, as requests
        are, and how they are divided among layers and heads."""
        began, size = time.perf_counter(), self.cache_config.block_size
        # The context's blocks are read for each codec, and others written.
        room = self._room // 2 * size
        found = statistics.excerpts(self.model_config, size, min(room, self._longest))
        packings = self._settings.packings(self._settings.policy, size)
        losses = {packing.codec: 0.0 for packing in packings}
        shape = len(self._layers), self._layers[0].heads
        errors = {codec: torch.zeros(shape, dtype=torch.float64) for codec in losses}
        by_layer = [0.0] * shape[0]
        self._head_losses = {}
        for i, (context, question) in enumerate(found):
            excerpt = self._read(context, question)
            for packing in packings:
                loss, region = self._lost(excerpt, [packing])
                losses[packing.codec] += loss / len(found)
                errors[packing.codec] += self._errors(excerpt, region)
            # The errors of one codec in one layer after the other.
            for layer in range(shape[0]) if i == 0 and len(packings) > 1 else ():
                ends = packings[0], packings[-1]
                alone = np.zeros(shape)
                alone[layer] = 1.0
                self._head_losses = {ends[0].codec: alone, ends[1].codec: 1 - alone}
                by_layer[layer], _ = self._lost(excerpt, ends)
            self._head_losses = {}
        self._peaks = {}
        if not found:
            logger.warning(
                "vllm-kvcrush: the context or the KV cache is too short to measure what codecs "
                "lose on this model: %s takes them in the order %s.",
                self._settings.policy,
                ", ".join(losses),
            )
            return
        # Only one rank may have logits, and all must choose alike.
        self._losses, by_layer = get_tp_group().broadcast_object((losses, by_layer), src=0)
        if len(packings) > 1:
            self._head_losses = self._divided(errors, packings[-1].codec, by_layer)
        self._untold = True
        logger.info(
            "vllm-kvcrush: measured in %.1f s what codecs lose on this model, in nats a token "
            "(KL divergence): %s.",
            time.perf_counter() - began,
            ", ".join(f"{codec} {loss:.4f}" for codec, loss in self._losses.items()),
        )

    def _read(self, context: list[int], question: list[int]) -> _Excerpt:
        """Reads a context and a question over it."""
        n, size, tap = len(context), self.cache_config.block_size, self._tap
        assert tap is not None
        blocks = list(range(1, 1 + self._room))
        tail = [blocks.pop() for _ in range(cdiv(len(question), size))]
        own = blocks[: n // size]
        tap.rows = torch.arange(n, n + len(question), statistics.EVERY, device=self.device)
        exact = self._hidden(statistics.scheduled(context + question, [*own, *tail]))[n:]
        excerpt = _Excerpt(context, question, blocks, tail, exact, tap.take(), [])
        table = torch.tensor(own, dtype=torch.int32, device=self._layers[0].device)
        return excerpt._replace(read=self._attended(excerpt, None, table))

    def _attended(self, excerpt: _Excerpt, region: Region | None, table: Tensor) -> list[Tensor]:
        """Returns what an excerpt's queries read from each layer's context, in a region or in the
        blocks `table`; see `statistics.attended`."""
        n, found = len(excerpt.context), []
        for layer, queries in zip(self._layers, excerpt.queries, strict=True):
            raw = n if region is None else 0
            held = layer.held(layer.source(region, table, raw, n - raw), [n] * layer.heads)
            found.append(statistics.attended(held, queries, layer.scale))
        return found

    def _errors(self, excerpt: _Excerpt, region: Region) -> Tensor:
        """Returns the summed squares of the errors of what an excerpt's queries read from its
        context in a region, float64 [L, H]."""
        nothing = torch.zeros(0, dtype=torch.int32, device=self._layers[0].device)
        read = self._attended(excerpt, region, nothing)
        pairs = zip(read, excerpt.read, strict=True)
        return torch.stack(
            [(own - exact).double().square().sum((1, 2)) for own, exact in pairs]
        ).cpu()

    def _lost(self, excerpt: _Excerpt, packings: Sequence[Packing]) -> tuple[float, Region]:
        """Compacts the context of an excerpt to a codec, or to several as `_head_losses` says, and
        returns what is lost, in nats a token of the question, and the region."""
        context, question, blocks = excerpt.context, excerpt.question, excerpt.blocks
        n, size = len(context), self.cache_config.block_size
        tokens = context + question
        # One token again, as only a request that is known can be compacted.
        own = blocks[: n // size]
        self._hidden(statistics.scheduled(tokens, own, n - 1, 1), last=False)
        step = statistics.compacted(packings, n, blocks, excerpt.tail, size, len(question))
        other = self._hidden(step, last=False)
        region = self._requests[statistics.REQUEST].region
        assert region is not None
        self.execute_model(statistics.finished())
        loss = statistics.divergence(self.get_model().compute_logits, excerpt.exact, other)
        return loss, region

    def _divided(
        self, errors: Mapping[str, Tensor], known: str, by_layer: Sequence[float]
    ) -> dict[str, np.ndarray]:
        """Divides `_losses` among this rank's heads; see `statistics.divided`."""
        heads = list(self._heads_of(get_tensor_model_parallel_rank()))
        every = {
            codec: gather_heads(own.T.to(self.device)).T.cpu() for codec, own in errors.items()
        }
        found = statistics.divided(self._losses, every, known, by_layer)
        return {codec: own[:, heads].numpy() for codec, own in found.items()}

    @torch.inference_mode()
    def _hidden(self, step: Any, last: bool = True) -> Tensor:
        """Runs a step of one request, its last one if so said, and returns the hidden states of its
        tokens."""
        found: list[Tensor] = []
        model = self.get_model()
        hook = model.register_forward_hook(lambda model, given, states: found.append(states))
        try:
            self.execute_model(step)
        finally:
            hook.remove()
        states = found[-1][: step.total_num_scheduled_tokens].clone()
        self.sample_tokens(None)
        if last:
            self.execute_model(statistics.finished())
        return states
