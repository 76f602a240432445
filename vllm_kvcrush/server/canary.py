"""The quality canary (`--kv-canary`): what compression costs the requests that a server gets.

Some compressed requests are drawn by chance. The engine tells the log-probabilities of their
tokens, which their clients do not see unless they asked. When such a request has ended and the
server is idle, a request of our own, the canary, reads the same tokens with exact KV; the
log-probabilities of the last ones are compared, and /metrics gets the differences. Tokens are kept
in memory until then, for two minutes at most, and nowhere else.

A canary takes idle time only: it is sent when this process has had no request for a moment, and
the scheduler (engine/canaries.py) ends it as soon as anybody else is there. vLLM's output processor
never sees it, so it is in no statistics of the server's requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_kvcrush.config import CANARY_KEY, NONE, Settings
from vllm_kvcrush.plan import cdiv
from vllm_kvcrush.server import Method, canary_metrics, configured, params, usage, wrap
from vllm_kvcrush.spec import parse

# Most tokens of a request that are compared, and the fewest that say anything.
MOST, FEWEST = 32, 2
# Seconds without a request after which the server counts as idle.
QUIET = 0.5
# Seconds for which a request that has ended waits for its canary, and a canary for its answer.
PATIENCE = 60.0
# Most requests that wait; how often one is tried whose canary had to give way.
MOST_WAITING, TRIES = 8, 3
# Attribute of an OutputProcessor: its Canaries.
_CANARIES = "_kvcrush_canaries"
_ENDS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)

logger = logging.getLogger("vllm.kvcrush")


class Scored(NamedTuple):
    """What a model says of one token: its log-probability in nats, and the most likely token."""

    token: int
    logprob: float
    best: int


class Difference(NamedTuple):
    """How compressed KV and exact KV differ over some tokens.

    Attributes:
        tokens: how many there are.
        agreements: for how many of them the most likely token is the same.
        lost, gained: sums of nats by which exact KV finds a token less, or more, likely.
    """

    tokens: int
    agreements: int
    lost: float
    gained: float


def compare(compressed: Sequence[Scored], exact: Sequence[Scored]) -> Difference:
    """Compares what is said of the same tokens. Raises ValueError for other tokens, and for
    log-probabilities that are not finite."""
    pairs = list(zip(compressed, exact, strict=True))
    if not pairs or any(c.token != e.token for c, e in pairs):
        raise ValueError("log-probabilities of other tokens")
    less = [c.logprob - e.logprob for c, e in pairs]
    if not all(map(math.isfinite, less)):
        raise ValueError("log-probabilities that are not finite")
    return Difference(
        len(pairs),
        sum(c.best == e.best for c, e in pairs),
        sum(x for x in less if x > 0),
        sum(-x for x in less if x < 0),
    )


@dataclass
class Sample:
    """A running request that was drawn.

    Attributes:
        state: vLLM's state of the request in this process.
        asked: how many log-probabilities per token its client asked for, or None.
        cache_salt, data_parallel_rank: as its client gave them.
        tokens: its output so far.
        scored: what the engine said of the newest of them, with compressed KV.
        ended: why the engine ended it, or None.
        unreadable: whether the engine sent something else for a token.
    """

    state: RequestState
    asked: int | None
    cache_salt: str | None = None
    data_parallel_rank: int | None = None
    tokens: list[int] = field(default_factory=list)
    scored: deque[Scored] = field(default_factory=lambda: deque(maxlen=MOST))
    ended: FinishReason | None = None
    unreadable: bool = False

    def strip(self, output: EngineCoreOutput) -> Any:
        """Returns the log-probabilities in an output of the engine, and leaves those in it that the
        request's client asked for: vLLM does not expect others."""
        rows: Any = output.new_logprobs
        if rows is not None and (self.asked or 0) < 1:
            output.new_logprobs = None if self.asked is None else _without_best(rows)
        return rows

    def read(self, output: EngineCoreOutput, rows: Any) -> None:
        """Remembers the tokens of an output, and the log-probabilities that `strip` returned."""
        self.ended = output.finish_reason
        self.tokens += output.new_token_ids
        found = [] if rows is None else _rows(rows.logprob_token_ids, rows.logprobs)
        self.scored += found
        # In a batch with requests for given tokens vLLM tells of these instead of the best ones.
        wrong = [row.token for row in found] != output.new_token_ids
        self.unreadable |= wrong or any(math.isinf(row.logprob) for row in found)


def _without_best(rows: Any) -> Any:
    return rows._replace(
        logprob_token_ids=rows.logprob_token_ids[:, :1], logprobs=rows.logprobs[:, :1]
    )


def _rows(ids: Any, logprobs: Any) -> list[Scored]:
    """Returns rows of [tokens, 1 + n] ids and log-probabilities: the token's own come first, then
    those of the n most likely tokens."""
    found = []
    for own, values in zip(ids[:, :2].tolist(), logprobs[:, :2].tolist(), strict=True):
        # The most likely token is at least as likely as the token itself.
        told = len(own) == 2 and values[1] >= values[0]
        found.append(Scored(own[0], values[0] if told else -math.inf, own[-1]))
    return found


@dataclass(frozen=True)
class Due:
    """A request that has ended and waits for its canary.

    Attributes:
        tokens: prompt and output, up to the last token that is compared.
        compressed: what was said of the last ones, which are compared.
        policy: label of the request's policy.
        cache_salt, data_parallel_rank: see Sample.
        until: when it is given up, by the monotonic clock.
    """

    tokens: list[int]
    compressed: list[Scored]
    policy: str
    cache_salt: str | None
    data_parallel_rank: int | None
    until: float

    def request(self) -> EngineCoreRequest:
        """Returns the canary."""
        canary_id = f"kvcrush-canary-{uuid.uuid4().hex}"
        return EngineCoreRequest(
            request_id=canary_id,
            external_req_id=canary_id,
            prompt_token_ids=self.tokens,
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=1,
                detokenize=False,
                # Its blocks are exact, and end before the tokens that are scored.
                skip_reading_prefix_cache=False,
                extra_args={CANARY_KEY: len(self.compressed)},
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=self.cache_salt,
            data_parallel_rank=self.data_parallel_rank,
        )


def due(sample: Sample, max_model_len: int) -> Due | str:
    """Returns what is to be scored of a request that has ended, or why nothing is.

    Only tokens after its first compaction are: those before it had exact KV. The step that follows
    a compaction at n tokens computes the token at position n and samples the one after it.
    """
    held = usage.details(sample.state)
    if sample.ended not in (None, *_ENDS):  # None: the front end ended it, at a stop string
        return "aborted"
    if not held["compactions"]:
        return "uncompacted"
    tokens = [*(sample.state.prompt_token_ids or ()), *sample.tokens]
    first = max(held["first_compaction"] + 1, len(tokens) - len(sample.scored))
    # The canary itself samples one token.
    end = min(len(tokens), max_model_len - 1)
    if end - first < FEWEST:
        return "short"
    if sample.unreadable:
        return "logprobs"
    start = len(tokens) - len(sample.scored)
    return Due(
        tokens[:end],
        list(sample.scored)[first - start : end - start],
        parse(held["policy"]).name,
        sample.cache_salt,
        sample.data_parallel_rank,
        time.monotonic() + PATIENCE,
    )


class Canaries:
    """Draws requests of one front end, and compares them when nobody needs the engine.

    Args:
        vllm_config: the engine's configuration.
        processor: vLLM's output processor, which knows the requests of this process.
        core: vLLM's client of the engine core.
    """

    def __init__(self, vllm_config: Any, processor: OutputProcessor, core: Any):
        self._config = vllm_config
        self._settings = Settings.from_dict(configured(vllm_config))
        self._model_name = str(vllm_config.model_config.served_model_name)
        self._processor = processor
        self._core = core
        # Not Python's own generator, which vLLM seeds alike in every process.
        self._random = random.Random()
        self._drawn: dict[str, Sample] = {}
        self._due: deque[Due] = deque()
        # The canary that runs, and what its answer is handed to.
        self._sent: tuple[str, asyncio.Future[EngineCoreOutput]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._active_at = time.monotonic()
        policies = {parse(name).name for name in self._settings.allow if name != NONE}
        canary_metrics.prepare(self._model_name, policies)

    # Requests of clients

    def draw(self, request: EngineCoreRequest) -> None:
        """Decides whether a request that goes to the engine now is compared later."""
        self._active_at = time.monotonic()
        if self._random.random() >= self._settings.canary:
            return
        try:
            if reason := self._try_draw(request):
                self._skip(reason)
        except Exception as error:  # never at the cost of the request
            self._fail(error)

    def _try_draw(self, request: EngineCoreRequest) -> str | None:
        """Returns why the request cannot be compared, or None."""
        asked = request.sampling_params
        if asked is None or request.request_id in self._drawn:
            return None
        block_size = self._config.cache_config.block_size
        max_model_len = self._config.model_config.max_model_len
        kv = self._settings.resolved(asked.extra_args, block_size, max_model_len)
        if not kv.active:
            return None
        state = self._processor.request_states[request.request_id]
        if reason := _unfit(request, state):
            return reason
        self._drawn[request.request_id] = Sample(
            state, asked.logprobs, request.cache_salt, request.data_parallel_rank
        )
        if (asked.logprobs or 0) < 1:
            # The engine tells more than vLLM's state of the request, which is made, expects.
            request.sampling_params = asked.clone()
            request.sampling_params.logprobs = 1
        return None

    def before(self, outputs: Sequence[EngineCoreOutput]) -> Sequence[EngineCoreOutput]:
        """Takes what is ours out of the engine's outputs, and returns the others."""
        if self._sent is not None:
            canary_id, answer = self._sent
            for output in outputs:
                if output.request_id == canary_id and not answer.done():
                    answer.set_result(output)
            outputs = [output for output in outputs if output.request_id != canary_id]
        for output in outputs:
            if (sample := self._drawn.get(output.request_id)) is not None:
                rows = sample.strip(output)
                try:
                    sample.read(output, rows)
                except Exception:  # never at the cost of the request
                    sample.unreadable = True
        if outputs:
            self._active_at = time.monotonic()
        return outputs

    def after(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Looks for requests that ended with these outputs, in the engine or at a stop string."""
        for output in outputs:
            known = output.request_id in self._processor.request_states
            if not known and (sample := self._drawn.pop(output.request_id, None)) is not None:
                try:
                    self._ended(sample)
                except Exception as error:
                    self._fail(error)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests whose clients left."""
        for request_id in request_ids:
            if self._drawn.pop(request_id, None) is not None:
                self._skip("aborted")

    def _ended(self, sample: Sample) -> None:
        found = due(sample, self._config.model_config.max_model_len)
        if isinstance(found, str):
            return self._skip(found)
        pool = params.pool_blocks(self._config)
        if pool is not None and cdiv(len(found.tokens) + 1, self._block_size) > pool:
            return self._skip("pool")
        if len(self._due) >= MOST_WAITING:
            return self._skip("busy")
        self._due.append(found)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    @property
    def _block_size(self) -> int:
        return int(self._config.cache_config.block_size)

    # Canaries

    async def _work(self) -> None:
        try:
            while self._due:
                try:
                    await self._compare(self._due.popleft())
                except Exception as error:
                    self._fail(error)
        finally:
            self._task = None

    async def _compare(self, waiting: Due) -> None:
        for tried in range(TRIES):
            # Others may be busy of whom this process knows only that a canary gave way.
            if not await self._idle(waiting.until, QUIET * 4**tried):
                break
            answer = await self._answer(waiting.request())
            if answer is None:
                return self._skip("slow")
            if (rows := answer.new_prompt_logprobs_tensors) is not None:
                count = len(waiting.compressed)
                exact = _rows(rows.logprob_token_ids[-count:], rows.logprobs[-count:])
                return self._observe(waiting.policy, compare(waiting.compressed, exact))
            self._active_at = time.monotonic()
        self._skip("busy")

    async def _idle(self, until: float, quiet: float) -> bool:
        """Waits until this process has had no request for `quiet` seconds. Returns False if that
        does not come in time."""
        while (now := time.monotonic()) < until:
            unfinished = self._processor.get_num_unfinished_requests()
            if not unfinished and now - self._active_at >= quiet:
                return True
            await asyncio.sleep(QUIET / 5)
        return False

    async def _answer(self, request: EngineCoreRequest) -> EngineCoreOutput | None:
        """Sends a canary and returns what the engine answers, which has no log-probabilities if the
        canary had to give way; None if there is no answer in time."""
        started = time.monotonic()
        answer: asyncio.Future[EngineCoreOutput] = asyncio.get_running_loop().create_future()
        self._sent = request.request_id, answer
        try:
            await self._core.add_request_async(request)
            return await asyncio.wait_for(answer, PATIENCE)
        except TimeoutError:
            await self._core.abort_requests_async([request.request_id])
            return None
        finally:
            self._sent = None
            taken = time.monotonic() - started
            canary_metrics.seconds().labels(self._model_name).inc(taken)

    def _observe(self, policy: str, found: Difference) -> None:
        labels = self._model_name, policy
        mean = (found.lost + found.gained) / found.tokens
        canary_metrics.difference().labels(*labels).observe(mean)
        canary_metrics.tokens().labels(*labels).inc(found.tokens)
        canary_metrics.agreements().labels(*labels).inc(found.agreements)
        for direction in canary_metrics.DIRECTIONS:
            canary_metrics.nats().labels(*labels, direction).inc(getattr(found, direction))

    def _skip(self, reason: str) -> None:
        canary_metrics.skipped().labels(self._model_name, reason).inc()

    def _fail(self, error: Exception) -> None:
        # An error's message may quote what a client sent.
        logger.warning("A quality canary failed: %s", type(error).__name__)
        self._skip("error")


def _unfit(request: EngineCoreRequest, state: RequestState) -> str | None:
    """Returns why the tokens of a request could not be compared like with like, or None."""
    asked = request.sampling_params
    assert asked is not None
    if state.parent_req is not None:
        return "choices"
    if asked.structured_outputs is not None:
        return "structured"  # the grammar's mask is in the log-probabilities
    if asked.logprob_token_ids or (asked.logprobs or 0) < 0:
        return "logprobs"
    if request.prompt_embeds is not None or request.mm_features or request.resumable:
        return "input"
    if request.lora_request is not None:
        return "lora"  # it may be unloaded until then
    return None


# Where it looks on


def attach(engine: Any, vllm_config: Any) -> None:
    """Lets an `AsyncLLM` draw requests, if `--kv-canary` says so."""
    raw = configured(vllm_config)
    if raw is None or not Settings.from_dict(raw).canary:
        return
    wrap(OutputProcessor, "add_request", _drawing)
    wrap(OutputProcessor, "process_outputs", _reading)
    wrap(OutputProcessor, "abort_requests", _forgetting)
    processor = engine.output_processor
    # It holds no reference to the engine, which ends when nobody holds one.
    setattr(processor, _CANARIES, Canaries(vllm_config, processor, engine.engine_core))


def _drawing(original: Method) -> Method:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        canaries = vars(self).get(_CANARIES)
        if canaries is not None:
            canaries.draw(request)

    return add_request


def _reading(original: Method) -> Method:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        canaries = vars(self).get(_CANARIES)
        if canaries is None:
            return original(self, engine_core_outputs, *args, **kwargs)
        outputs = canaries.before(engine_core_outputs)
        result = original(self, outputs, *args, **kwargs)
        canaries.after(outputs)
        return result

    return process_outputs


def _forgetting(original: Method) -> Method:
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = original(self, *args, **kwargs)
        canaries = vars(self).get(_CANARIES)
        if canaries is not None:
            canaries.abort(aborted)
        return aborted

    return abort_requests
