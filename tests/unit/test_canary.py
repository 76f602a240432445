"""The quality canary's front end: who is drawn, what clients see, what is compared, and that it
never takes more than idle time. The engine is a stand-in; vLLM's output processor is the real one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from tests.unit.test_params import MODEL, report, value, vllm_config
from vllm_kvcrush import server
from vllm_kvcrush.engine import canaries as scheduled
from vllm_kvcrush.server import canary, canary_metrics, params
from vllm_kvcrush.server.canary import Difference, Scored, compare

server.install(active=True)

SETTINGS = {"policy": "kvcrush", "budget": 0.25, "canary": 1.0, "allow": ["kvcrush", "h2o", "none"]}
PROMPT = list(range(100, 200))
# Of the reports in these tests: tokens when a request was first compacted.
COMPACTED = 64


def logprob(token: int, position: int) -> float:
    """What the stand-in's compressed model says of a token."""
    return -0.5 - (token * 7 + position) % 5 / 8


class Core:
    """Stands for the engine.

    Attributes:
        sent, aborted: canaries that came, and ids that were aborted.
        answer: makes the answer to a canary, or returns None for none.
    """

    def __init__(self, processor: OutputProcessor):
        self.processor = processor
        self.sent: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.answer: Callable[[EngineCoreRequest], EngineCoreOutput | None] = self.scores

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.sent.append(request)
        if (output := self.answer(request)) is not None:
            asyncio.get_running_loop().call_soon(self.processor.process_outputs, [output])

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def scores(self, request: EngineCoreRequest, less: float = 0.0) -> EngineCoreOutput:
        """Answers what an engine with exact KV would, which finds each token by `less` nats less
        likely."""
        tokens = request.prompt_token_ids
        assert tokens is not None and request.sampling_params is not None
        rows = [[logprob(t, i) - less, -0.25] for i, t in enumerate(tokens)][1:]
        tensors = LogprobsTensors(
            torch.tensor([[t, t % 3] for t in tokens[1:]]),
            torch.tensor(rows),
            torch.zeros(len(rows)),
        )
        # Rows that the prefix cache had are never written.
        tensors.logprobs[: -scheduled.scored(request.sampling_params.extra_args)] = math.nan
        return EngineCoreOutput(
            request.request_id,
            [3],
            new_prompt_logprobs_tensors=tensors,
            finish_reason=FinishReason.LENGTH,
        )

    @staticmethod
    def gives_way(request: EngineCoreRequest) -> EngineCoreOutput:
        return EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)


class Front:
    """A front end with canaries."""

    def __init__(self, **settings: Any):
        self.config = vllm_config(SETTINGS | settings, num_gpu_blocks=500)
        self.processor = OutputProcessor(None, log_stats=False)
        self.core = Core(self.processor)
        engine = Namespace(output_processor=self.processor, engine_core=self.core)
        canary.attach(engine, self.config)
        self.canaries: canary.Canaries | None = vars(self.processor).get(canary._CANARIES)

    def add(
        self, request_id: str = "r", prompt: list[int] = PROMPT, n: int = 1, **given: Any
    ) -> EngineCoreRequest:
        """Adds a request and returns what the engine gets of it."""
        fields = {k: given.pop(k) for k in ("lora_request", "prompt_embeds") if k in given}
        kinds = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
        kind = kinds[given.pop("stream", False)]
        extra = {k: given.pop(k) for k in ("kv_policy", "kv_budget") if k in given}
        request = EngineCoreRequest(
            request_id=request_id,
            external_req_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(
                n=n, detokenize=False, output_kind=kind, max_tokens=999, extra_args=extra, **given
            ),
            pooling_params=None,
            arrival_time=0.0,
            cache_salt="salt",
            data_parallel_rank=None,
            **{"lora_request": None, **fields},
        )
        parent = ParentRequest(request) if n > 1 else None
        if parent is not None:
            request.request_id, request.sampling_params = parent.get_child_info(0)
        self.processor.add_request(request, None, parent)
        return request

    def step(
        self,
        request: EngineCoreRequest,
        token: int,
        position: int,
        end: FinishReason | None = None,
        kv: Any = None,
        width: int | None = None,
    ) -> Any:
        """Hands over what the engine samples for a request; returns its RequestOutput, if any."""
        assert request.sampling_params is not None
        asked = request.sampling_params.num_logprobs
        rows = None
        if asked is not None:
            width = asked if width is None else width
            best = [token % 3, *range(1000, 1000 + width)][:width]
            rows = LogprobsLists(
                np.array([[token, *best]]),
                np.array([[logprob(token, position), *[-0.25] * width]]),
                np.array([1]),
            )
        output = EngineCoreOutput(
            request.request_id,
            [token],
            new_logprobs=rows,
            finish_reason=end,
            kv_transfer_params=kv,
        )
        made = self.processor.process_outputs([output]).request_outputs
        return made[0] if made else None

    def run(
        self,
        request: EngineCoreRequest,
        tokens: int = 40,
        end: FinishReason | None = FinishReason.LENGTH,
        compactions: int = 1,
        prompt: int = len(PROMPT),
    ) -> list[Any]:
        """Runs a request to its end and returns its RequestOutputs."""
        outputs = []
        for i in range(tokens):
            kv = report(40, prompt, compactions) if i == 0 else None
            last = end if i == tokens - 1 else None
            outputs.append(self.step(request, 200 + i, prompt + i, last, kv))
        return [output for output in outputs if output is not None]

    async def compared(self) -> None:
        """Waits until no canary is due."""
        assert self.canaries is not None
        while self.canaries._task is not None:
            await asyncio.sleep(0.001)


class Counts:
    """What the counters of canaries gained since this was made."""

    def __init__(self) -> None:
        self.before = self.now()

    @staticmethod
    def now() -> dict[str, float]:
        skipped = canary_metrics.skipped()
        found = {f"skipped {r}": value(skipped, MODEL, r) for r in canary_metrics.SKIPPED}
        for policy in ("kvcrush", "h2o"):
            found[f"tokens {policy}"] = value(canary_metrics.tokens(), MODEL, policy)
            found[f"agreements {policy}"] = value(canary_metrics.agreements(), MODEL, policy)
            for direction in canary_metrics.DIRECTIONS:
                found[f"{direction} {policy}"] = value(
                    canary_metrics.nats(), MODEL, policy, direction
                )
            histogram = canary_metrics.difference().labels(MODEL, policy)
            found[f"sum {policy}"] = histogram._sum.get()
        return found

    @property
    def gained(self) -> dict[str, float]:
        now = self.now()
        return {k: pytest.approx(v - self.before[k]) for k, v in now.items() if v != self.before[k]}


@pytest.fixture
def counts() -> Counts:
    Front()  # makes the series
    return Counts()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "QUIET", 0.01)
    monkeypatch.setattr(canary, "PATIENCE", 0.3)


def alive(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


# Comparing

sayings = st.lists(
    st.tuples(st.floats(-20, 0), st.floats(-20, 0), st.booleans()), min_size=1, max_size=32
)


@given(sayings)
def test_differences_add_up(said: list[tuple[float, float, bool]]) -> None:
    compressed = [Scored(i, a, 1) for i, (a, _, _) in enumerate(said)]
    exact = [Scored(i, b, 1 if same else 2) for i, (_, b, same) in enumerate(said)]
    found = compare(compressed, exact)
    assert found.tokens == len(said) and found.agreements == sum(same for _, _, same in said)
    assert found.lost >= 0 and found.gained >= 0
    assert found.lost - found.gained == pytest.approx(sum(a - b for a, b, _ in said))
    assert found.lost + found.gained == pytest.approx(sum(abs(a - b) for a, b, _ in said))
    assert compare(exact, compressed) == (found.tokens, found.agreements, found.gained, found.lost)
    assert compare(exact, exact) == Difference(len(said), len(said), 0, 0)


@pytest.mark.parametrize(
    ("compressed", "exact"),
    [
        ([Scored(1, -1, 1)], [Scored(2, -1, 1)]),
        ([Scored(1, -1, 1)], [Scored(1, math.nan, 1)]),
        ([Scored(1, -1, 1)], [Scored(1, -math.inf, 1)]),
        ([Scored(1, -1, 1)], []),
        ([], []),
    ],
)
def test_what_cannot_be_compared_is_an_error(compressed: Any, exact: Any) -> None:
    with pytest.raises(ValueError, match=r"log-probabilities|shorter"):
        compare(compressed, exact)


# What clients see


@pytest.mark.parametrize("asked", [None, 0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_sees_what_it_asked_for(asked: int | None, stream: bool) -> None:
    async def drawn_and_not() -> None:
        seen = []
        for share in (1.0, 0.0):
            front = Front(canary=share)
            request = front.add(stream=stream, logprobs=asked)
            outputs = [front.step(request, 200 + i, i) for i in range(3)]
            outputs.append(front.step(request, 9, 3, FinishReason.STOP))
            seen.append([(o and o.outputs, o and o.kv_tokens_details) for o in outputs[-1:]])
            seen[-1] += [o.outputs for o in outputs if o is not None]
            wanted = max(asked or 0, 1) if share else asked
            assert request.sampling_params and request.sampling_params.logprobs == wanted
        assert seen[0] == seen[1]

    alive(drawn_and_not)


def test_a_client_sees_its_tokens_whatever_the_engine_sends(counts: Counts) -> None:
    """In a batch with requests for given tokens vLLM has no best tokens; and what nobody can read
    is no reason to fail."""

    async def odd() -> None:
        for rows in (
            LogprobsLists(np.array([[7, 0]]), np.array([[-1.0, -np.inf]]), np.array([1])),
            LogprobsLists(np.array([[7, 0]]), np.array([[-1.0, np.nan]]), np.array([1])),
            LogprobsLists(np.array([[7]]), np.array([[-1.0]]), np.array([1])),
            LogprobsLists(np.array([[8, 8]]), np.array([[-1.0, -1.0]]), np.array([1])),
            LogprobsLists(np.array([7]), np.array([1.0]), np.array([1])),
            None,
        ):
            front = Front()
            request = front.add(stream=True)
            front.run(request, 5, end=None)
            for end in (None, FinishReason.STOP):
                output = EngineCoreOutput("r", [7], new_logprobs=rows, finish_reason=end)
                (made,) = front.processor.process_outputs([output]).request_outputs
                assert list(made.outputs[0].token_ids) == [7] and made.outputs[0].logprobs is None
            assert not front.processor.request_states and not front.core.sent

    alive(odd)
    assert counts.gained == {"skipped logprobs": 6}


# Who is drawn


def test_off_means_off() -> None:
    front = Front(canary=0)
    assert front.canaries is None
    request = front.add()
    assert request.sampling_params and request.sampling_params.logprobs is None


@pytest.mark.parametrize("asked", [{"kv_policy": "none"}, {"kv_budget": 1.0}])
def test_whoever_is_not_compressed_is_never_drawn(asked: dict[str, Any], counts: Counts) -> None:
    front = Front()
    request = front.add(**asked)
    assert request.sampling_params and request.sampling_params.logprobs is None
    assert front.canaries and not front.canaries._drawn and not counts.gained


def test_the_share_is_kept_to() -> None:
    front = Front(canary=0.25)
    assert front.canaries
    front.canaries._random.seed(5)
    for i in range(2000):
        front.add(str(i))
    assert 400 < len(front.canaries._drawn) < 600


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"n": 2}, "choices"),
        ({"structured_outputs": StructuredOutputsParams(json_object=True)}, "structured"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprob_token_ids": [4, 5]}, "logprobs"),
        ({"lora_request": LoRARequest("adapter", 1, "/nowhere")}, "lora"),
        ({"prompt_embeds": torch.zeros(100, 2)}, "input"),
    ],
)
def test_what_is_not_comparable_is_left_out(
    asked: dict[str, Any], reason: str, counts: Counts
) -> None:
    front = Front()
    before = asked.get("logprobs")
    request = front.add(**asked)
    assert request.sampling_params and request.sampling_params.logprobs == before
    assert front.canaries and not front.canaries._drawn
    assert counts.gained == {f"skipped {reason}": 1}


def test_a_failure_costs_no_request(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(canary, "_unfit", lambda request, state: 1 / 0)
    front = Front()
    request = front.add()
    assert request.sampling_params and request.sampling_params.logprobs is None
    (output,) = front.run(request)
    assert len(output.outputs[0].token_ids) == 40 and not front.core.sent
    assert counts.gained == {"skipped error": 1}


def test_no_client_can_mark_a_canary() -> None:
    config = vllm_config(SETTINGS)
    with pytest.raises(VLLMValidationError, match="kv_canary is not a parameter"):
        params.Front(config).check(SamplingParams(extra_args={"kv_canary": 3}))
    assert scheduled.scored(None) == scheduled.scored({}) == scheduled.scored([1]) == 0
    assert scheduled.scored({"kv_canary": "3"}) == 0 and scheduled.scored({"kv_canary": 3}) == 3


# What is compared


@pytest.mark.parametrize("less", [0.0, 0.5, -0.125])
def test_a_request_is_compared(less: float, counts: Counts) -> None:
    async def one() -> None:
        front = Front()
        front.core.answer = lambda request: front.core.scores(request, less)
        front.run(front.add())
        await front.compared()
        (sent,) = front.core.sent
        assert sent.prompt_token_ids == PROMPT + list(range(200, 240))
        assert sent.cache_salt == "salt" and sent.lora_request is None
        given = sent.sampling_params
        assert given and given.extra_args == {"kv_canary": 32} and given.max_tokens == 1
        assert given.prompt_logprobs == 1 and given.skip_reading_prefix_cache is False
        assert not front.processor.request_states and not front.processor.external_req_ids

    alive(one)
    wanted = {"tokens kvcrush": 32, "agreements kvcrush": 32}
    if less:
        wanted |= {("lost" if less > 0 else "gained") + " kvcrush": 32 * abs(less)}
        wanted |= {"sum kvcrush": abs(less)}
    assert counts.gained == wanted


@pytest.mark.parametrize(
    ("prompt", "tokens", "scored"),
    [
        # Of 64 tokens the first token with compressed KV is the one at 65.
        (60, 20, range(65, 80)),
        (64, 20, range(65, 84)),
        (64, 3, range(65, 67)),
        (100, 3, range(100, 103)),
        (63, 40, range(71, 103)),
        # A canary is one token longer.
        (80, 20, range(80, 99)),
        (81, 20, range(81, 99)),
    ],
)
def test_only_tokens_under_compressed_kv_are(
    prompt: int, tokens: int, scored: range, counts: Counts
) -> None:
    async def one() -> None:
        front = Front()
        if scored.stop == 99:
            front.config.model_config.max_model_len = 100
        request = front.add(prompt=list(range(prompt)))
        front.run(request, tokens, prompt=prompt)
        await front.compared()
        (sent,) = front.core.sent
        assert sent.prompt_token_ids and len(sent.prompt_token_ids) == scored.stop
        given = sent.sampling_params
        assert given and given.extra_args == {"kv_canary": len(scored)}

    alive(one)
    assert counts.gained == {"tokens kvcrush": len(scored), "agreements kvcrush": len(scored)}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"compactions": 0}, "uncompacted"),
        ({"tokens": 1}, "short"),
        ({"end": FinishReason.ERROR}, "aborted"),
        ({"end": FinishReason.ABORT}, "aborted"),
    ],
)
def test_what_teaches_nothing_is_left_out(how: Any, reason: str, counts: Counts) -> None:
    async def one() -> None:
        front = Front()
        front.run(front.add(), **how)
        assert not front.core.sent and front.canaries and not front.canaries._drawn

    alive(one)
    assert counts.gained == {f"skipped {reason}": 1}


def test_what_a_client_left_is_forgotten(counts: Counts) -> None:
    async def one() -> None:
        front = Front()
        request = front.add()
        front.run(request, 5, end=None)
        front.processor.abort_requests(["r"], internal=True)
        assert front.canaries and not front.canaries._drawn
        # What is on its way is nobody's any more.
        front.step(request, 5, 105)

    alive(one)
    assert counts.gained == {"skipped aborted": 1}


def test_a_copy_must_fit_into_the_pool(counts: Counts) -> None:
    async def one() -> None:
        front = Front()
        front.config.cache_config.num_gpu_blocks = 9  # eight of 16 tokens
        front.run(front.add())
        assert not front.core.sent

    alive(one)
    assert counts.gained == {"skipped pool": 1}


# When


def test_nobody_waits_for_a_canary(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy() -> None:
        front = Front()
        other = front.add("other", kv_policy="none")
        front.run(front.add())
        await asyncio.sleep(0.05)
        assert not front.core.sent  # somebody runs
        front.step(other, 5, 100, FinishReason.LENGTH)
        await asyncio.sleep(0.001)
        assert not front.core.sent  # and ended this very moment
        await front.compared()
        assert len(front.core.sent) == 1
        # Nor for ever: then it is dropped.
        front.add("other", kv_policy="none")
        front.run(front.add())
        await front.compared()
        assert len(front.core.sent) == 1

    alive(busy)
    assert counts.gained == {
        "tokens kvcrush": 32,
        "agreements kvcrush": 32,
        "skipped busy": 1,
    }


def test_a_canary_that_gave_way_is_tried_again(counts: Counts) -> None:
    async def twice() -> None:
        front = Front()
        answers = [front.core.gives_way, front.core.scores]
        front.core.answer = lambda request: answers.pop(0)(request)
        front.run(front.add())
        await front.compared()
        first, second = front.core.sent
        assert first.request_id != second.request_id
        assert first.prompt_token_ids == second.prompt_token_ids
        front.core.answer = front.core.gives_way
        front.run(front.add())
        await front.compared()
        assert len(front.core.sent) == 2 + canary.TRIES

    alive(twice)
    assert counts.gained == {
        "tokens kvcrush": 32,
        "agreements kvcrush": 32,
        "skipped busy": 1,
    }


def test_few_wait_and_one_runs(counts: Counts) -> None:
    async def many() -> None:
        front = Front()
        for i in range(canary.MOST_WAITING + 5):
            front.run(front.add(str(i), kv_policy="h2o"))
        # The task has not begun yet.
        await front.compared()
        assert len(front.core.sent) == canary.MOST_WAITING

    alive(many)
    assert counts.gained == {
        "tokens kvcrush": 32 * canary.MOST_WAITING,  # the engine's report says kvcrush
        "agreements kvcrush": 32 * canary.MOST_WAITING,
        "skipped busy": 5,
    }


def test_a_canary_without_an_answer_is_ended(counts: Counts) -> None:
    async def silent() -> None:
        front = Front()
        front.core.answer = lambda request: None
        front.run(front.add())
        await front.compared()
        (sent,) = front.core.sent
        assert front.core.aborted == [sent.request_id]
        # An answer that comes late is nobody's.
        front.processor.process_outputs([front.core.scores(sent)])

    alive(silent)
    assert counts.gained == {"skipped slow": 1}


def test_nothing_of_the_text_is_told(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even by an error that quotes it."""
    logger = logging.getLogger("tests.kvcrush")
    monkeypatch.setattr(canary, "logger", logger)

    async def failing() -> None:
        front = Front()

        def fails(request: EngineCoreRequest) -> None:
            raise RuntimeError(f"cannot send {request.prompt_token_ids} my secret")

        front.core.answer = fails
        front.run(front.add())
        await front.compared()
        # The next one works.
        front.core.answer = front.core.scores
        front.run(front.add())
        await front.compared()

    with caplog.at_level(logging.DEBUG):
        alive(failing)
    told = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert told == ["A quality canary failed: RuntimeError"]
    assert counts.gained == {
        "tokens kvcrush": 32,
        "agreements kvcrush": 32,
        "skipped error": 1,
    }
