"""Transform tables and losses without a file: statistics of the running model's own keys and
queries, and what each codec costs it, taken when the server starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from vllm_kvcrush.policies.base import LayerKV

TOKENS = 4096  # tokens to read in all
# Tokens of one request: its first half is read twice in a row, because the second time queries
# look for what they have seen before, as a question over a context does.
PIECE = 512
# Most tokens of a context that losses are measured with, tokens that then attend to it, and number
# of such excerpts.
CONTEXT, QUESTION, EXCERPTS = 768, 96, 2
_LOGITS = 64  # rows of logits that are computed at once
# Of the question's queries, every such one is asked what it reads from each head.
EVERY = 3
# The part of the least that a layer alone loses which is taken for what all have in common:
# rounding, and the finest codec in the others.
_COMMON = 0.95
REQUEST = "vllm-kvcrush-statistics"
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
        req_id=REQUEST,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(blocks,),
        num_computed_tokens=computed,
        lora_request=None,
        prefill_token_ids=tokens,
    )
    return _step([new], {REQUEST: len(tokens) - computed if count is None else count}, set())


def compacted(
    packings: Sequence[Packing],
    context: int,
    blocks: list[int],
    tail: list[int],
    block_size: int,
    count: int,
) -> SchedulerOutput:
    """Returns the scheduler's output of a step in which a request whose context was read goes on to
    read `count` tokens, after the context's blocks were compacted.

    Args:
        packings: of the codec to compact to; or of several, of which each layer and head gets the
            one that loses least, in as many blocks as the first takes.
        context: number of tokens of the context, all of whole blocks.
        blocks: ids of the context's blocks, and then of free ones to write to.
        tail: ids of blocks for the tokens to read.
        block_size: tokens of a block.
    """
    raw = context // block_size
    target = tuple(blocks[raw : raw + packings[0].blocks(context)])
    plan = Plan(
        0.5, context + count, block_size, packings=tuple(packings), least_loss=len(packings) > 1
    )
    output = _step([], {REQUEST: count}, set())
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=[REQUEST],
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[(tail,)],
        num_computed_tokens=[context],
        num_output_tokens=[0],
    )
    shift = context - len(target) * block_size
    output.kvcrush = StepCommands(
        [Compact(REQUEST, context, tuple(blocks[:raw]), 0, target, (), 0, shift)],
        {REQUEST: Admitted(_POLICY, plan)},
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


def attended(held: LayerKV, queries: Tensor, scale: float) -> Tensor:
    """Returns what queries read from the tokens of a layer, float32 [H, G * m, Dv].

    Args:
        held: the tokens, of H heads.
        queries: [m, G * H, D].
        scale: factor of q·k.
    """
    assert held.values is not None
    keys, values = held.keys.float(), held.values.float()
    q = queries.float().transpose(0, 1).reshape(len(keys), -1, keys.shape[-1])
    return (q @ keys.transpose(1, 2) * scale).softmax(-1) @ values


def divided(
    totals: Mapping[str, float], errors: Mapping[str, Tensor], known: str, by_layer: Sequence[float]
) -> dict[str, Tensor]:
    """Divides what codecs lose among layers and heads: to second order, a divergence is quadratic
    in the errors of what queries read, with a weight that depends on the layer. What a layer alone
    loses tells it, but in bfloat16 rounding hides most of that, so the weight is the geometric mean
    of the measured one and of one for all layers.

    Args:
        totals: by codec, its loss.
        errors: by codec, summed squares of these errors, float64 [L, H].
        known: the codec of which it was measured what each layer alone loses in it.
        by_layer: these losses.

    Returns:
        By codec, float64 [L, H], of which the sum is the codec's total.
    """
    alone = torch.tensor(by_layer, dtype=torch.float64).clamp(min=0)
    alone -= _COMMON * alone.min()
    error = errors[known].sum(1).clamp(min=1e-30)
    weights = (alone / alone.sum().clamp(min=1e-30) / error).clamp(min=1e-30).sqrt()
    found = {}
    for codec, total in totals.items():
        shares = weights.unsqueeze(1) * errors[codec]
        found[codec] = total * shares / shares.sum().clamp(min=1e-30)
    return found


def finished() -> SchedulerOutput:
    """Returns the scheduler's output of a step that only ends the request."""
    return _step([], {}, {REQUEST})


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
