"""Transform tables and losses without a file: statistics of the running model's own keys and
queries, and what each codec costs it, taken when the server starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.codecs.transform import losses, texts
from vllm_kvcrush.codecs.transform.fit import Statistics
from vllm_kvcrush.codecs.transform.points import TablesError
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.engine.commands import Admitted, Compact, StepCommands
from vllm_kvcrush.plan import Packing, Plan

TOKENS = 4096  # tokens to read in all
# Tokens of one request: its first half is read twice in a row, because the second time queries
# look for what they have seen before, as a question over a context does.
PIECE = 512
# Most tokens of a context that losses are measured with, tokens that then attend to it, and number
# of such excerpts.
CONTEXT, QUESTION, EXCERPTS = 768, 96, 2
_LOGITS = 64  # rows of logits that are computed at once
_REQUEST = "vllm-kvcrush-statistics"
_POLICY = "streaming"  # any: all tokens stay


def pieces(model_config: Any, longest: int) -> list[list[int]]:
    """Returns the token ids of the requests to run, none longer than `longest`, or an empty list if
    that is too short."""
    half = min(PIECE, longest) // 2
    if half <= SINKS:
        return []
    tokenizer = cached_tokenizer_from_config(model_config)
    ids = tokenizer.encode(texts.fitting(), add_special_tokens=False)[: TOKENS // 2]
    return [2 * ids[i : i + half] for i in range(0, len(ids) - half + 1, half)]


def excerpts(model_config: Any, block_size: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Returns pairs of a context, of whole blocks, and a question over it, as token ids; together
    they have at most `longest` tokens. Returns an empty list if that is too short."""
    question = min(QUESTION, longest // 4)
    context = min(CONTEXT, longest - question) // block_size * block_size
    if not context or question < 2:
        return []
    tokenizer = cached_tokenizer_from_config(model_config)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return texts.excerpts(texts.held_out(), encode, context, question, EXCERPTS)


def scheduled(
    tokens: list[int], blocks: list[int], computed: int = 0, count: int | None = None
) -> SchedulerOutput:
    """Returns the scheduler's output of a step that reads one new request.

    Args:
        tokens: the request's token ids.
        blocks: ids of its blocks.
        computed: how many tokens the blocks hold already.
        count: how many tokens to read; None for all others.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1)
    new = NewRequestData(
        req_id=_REQUEST,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(blocks,),
        num_computed_tokens=computed,
        lora_request=None,
        prefill_token_ids=tokens,
    )
    return _step([new], {_REQUEST: len(tokens) - computed if count is None else count}, set())


def compacted(
    packing: Packing, context: int, blocks: list[int], tail: list[int], block_size: int, count: int
) -> SchedulerOutput:
    """Returns the scheduler's output of a step in which a request whose context was read goes on to
    read `count` tokens, after the context's blocks were compacted.

    Args:
        packing: of the codec to compact to.
        context: number of tokens of the context, all of whole blocks.
        blocks: ids of the context's blocks, and then of free ones to write to.
        tail: ids of blocks for the tokens to read.
        block_size: tokens of a block.
    """
    raw = context // block_size
    target = tuple(blocks[raw : raw + packing.blocks(context)])
    plan = Plan(0.5, context + count, block_size, packings=(packing,))
    output = _step([], {_REQUEST: count}, set())
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=[_REQUEST],
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[(tail,)],
        num_computed_tokens=[context],
        num_output_tokens=[0],
    )
    shift = context - len(target) * block_size
    output.kvcrush = StepCommands(
        [Compact(_REQUEST, context, tuple(blocks[:raw]), 0, target, (), 0, shift)],
        {_REQUEST: Admitted(_POLICY, plan)},
    )
    return output


def divergence(logits: Callable[[Tensor], Tensor | None], exact: Tensor, other: Tensor) -> float:
    """Returns the mean divergence of next-token distributions, in nats; NaN on a rank that gets no
    logits.

    Args:
        logits: computes logits of hidden states.
        exact, other: hidden states [m, size] over exact KV, and over what is compared with it.
    """
    found = []
    for first in range(0, len(exact), _LOGITS):
        own, its = (logits(states[first : first + _LOGITS]) for states in (exact, other))
        if own is None or its is None:
            return float("nan")
        both = own.float().log_softmax(-1), its.float().log_softmax(-1)
        found.append(losses.divergence(*both))
    return float(torch.cat(found).double().mean())


def finished() -> SchedulerOutput:
    """Returns the scheduler's output of a step that only ends the request."""
    return _step([], {}, {_REQUEST})


def _step(new: list[NewRequestData], tokens: dict[str, int], over: set[str]) -> SchedulerOutput:
    return SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=over,
        free_encoder_mm_hashes=[],
    )


def gather(read: Iterator[tuple[Tensor, Tensor]], rope: Rope) -> Statistics:
    """Returns the moments over all tokens of all pieces, except the sinks. Each piece is a text
    twice in a row.

    Args:
        read: for each piece, queries [L, Hq, n, D] and keys [L, H, n, D], with RoPE.
        rope: the rotary embedding that the model's configuration describes.

    Raises:
        TablesError: the model does not have that rotary embedding, or there are no pieces.
    """
    total: Statistics | None = None
    count = 0
    for q, k in read:
        positions = torch.arange(k.shape[2])
        q, k = rope.rotate(q.float(), -positions), rope.rotate(k.float(), -positions)
        # A token's key in the first layer depends on nothing but its position.
        first, second = k[0].chunk(2, 1)
        if not (first - second).norm() < 0.05 * first.norm():
            raise TablesError(
                "the model's rotary embedding is not the one that its configuration describes to "
                "vllm-kvcrush: use int8 or int4."
            )
        new = Statistics.of(k[:, :, SINKS:], q[:, :, SINKS:])
        more = k.shape[2] - SINKS
        total = new if total is None else total.merged(new, count, more)
        count += more
    if total is None:
        raise TablesError(
            "the context or the KV cache is too short to take statistics of the model in: make "
            "tables with `vllm-kvcrush calibrate MODEL`, or use int8 or int4."
        )
    return total
