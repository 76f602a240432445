"""Policies that keep unequal numbers of tokens, that merge, and that know spans, on the real
model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.conftest import DECODE_INTERVAL, METHODS, Engine, on_tiny_model
from tests.hf_reference import Kept, Reference
from tests.ledger import Ledger
from tests.pairwise import pairwise
from vllm_kvcrush import policies
from vllm_kvcrush.policies.keepkv import KeepKV

pytestmark = pytest.mark.engine
NEW = DECODE_INTERVAL + 8


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    return Reference(model_path)


class Watch:
    """Records what each compaction leaves in every layer, as `hf_reference` wants it."""

    def __init__(self, engine: Engine, contents: bool):
        self.kept: dict[int, list[Kept]] = {}
        # Blocks of the region, and tokens of each head, by compaction and layer.
        self.counts: list[tuple[int, list[int]]] = []
        self._engine, self._contents = engine, contents
        self._width = 0  # of the padded region in the reference's cache
        self._region: list[list[int]] = []
        self._now: dict[int, Tensor] = {}
        self._run = engine.runner._compact
        engine.runner.on_select = lambda _, layer, slots: self._now.update({layer: slots})
        engine.runner._compact = self._compact

    def _compact(self, command: Any) -> None:
        runner = self._engine.runner
        self._now = {}
        before, self._region = self._region, []
        self._run(command)
        region = runner._requests[command.request_id].region
        width = max(slots.shape[1] for slots in self._now.values())
        nothing = torch.zeros(0, dtype=torch.int32)
        for layer, slots in sorted(self._now.items()):
            held = (slots >= 0).sum(1).tolist()
            self._region.append(held)
            old = before[layer] if before else [0] * len(slots)
            new = (len(command.source) - command.compressed) * self._engine.manager.block_size
            columns = torch.zeros(len(slots), width, dtype=torch.int64)
            extra = torch.full((len(slots), width), -torch.inf)
            for head, own in enumerate(slots):
                real = own[: held[head]]
                moved = real - old[head] + self._width
                columns[head, : held[head]] = torch.where(real < old[head], real, moved)
                extra[head, : held[head]] = 0.0
                if region.log_bias is not None:
                    extra[head, : held[head]] = region.biases(layer)[head]
            first = self._width + new
            tail = torch.arange(first, first + command.tail_tokens).expand(len(slots), -1)
            keys = values = None
            if self._contents:
                own_layer = runner._layers[layer]
                source = own_layer.source(region, nothing, 0, command.computed)
                found = own_layer.held(source, held)
                keys, values = (torch.zeros(len(slots), width, 64) for _ in range(2))
                keys[:, : max(held)], values[:, : max(held)] = found.keys, found.values
            self.kept.setdefault(command.computed, []).append(
                Kept(torch.cat((columns, tail), 1), extra, keys, values)
            )
        self.counts += [(len(command.target), held) for held in self._region]
        self._width = width

    def forget(self) -> None:
        """Forgets everything, for another request."""
        self.kept, self.counts, self._width, self._region = {}, [], 0, []

    def close(self) -> None:
        self._engine.runner.on_select = None
        self._engine.runner._compact = self._run


@pytest.fixture
def watch(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Watch]:
    watch = Watch(engine, getattr(request, "param", False))
    yield watch
    watch.close()


@pytest.mark.parametrize("policy", ["adakv", "adakv(h2o, floor=0)"])
def test_heads_keep_unequal_numbers_of_raw_tokens(
    engine: Engine, ids: list[int], reference: Reference, watch: Watch, policy: str
) -> None:
    """AdaKV on raw pages: the tokens are those that transformers gives with the same unequal heads,
    over several compactions of a prompt in chunks and while decoding."""
    prompt = ids[100:524]
    (output,) = engine.generate([prompt], engine.params(NEW, kv_policy=policy, kv_budget=160))
    tokens = list(output.outputs[0].token_ids)
    assert tokens == reference.greedy(prompt, tokens, watch.kept)
    assert len(watch.kept) >= 3
    for blocks, counts in watch.counts:
        # Whole pages, and in each layer as many as equal heads would have had, up to rounding.
        assert all(count % 32 == 0 and count >= 32 for count in counts)
        assert abs(sum(counts) - len(counts) * blocks * 32) <= 2 * 32
    assert any(len(set(counts)) > 1 for _, counts in watch.counts), "every head kept as many"
    assert output.kv_tokens_details["kv_bytes_held"] < output.kv_tokens_details["kv_bytes_raw"]
    engine.assert_idle()


@pytest.mark.parametrize("watch", [True], indirect=True)
@pytest.mark.parametrize("policy", ["keepkv(threshold=0.5)", "keepkv(adakv, threshold=0.5)"])
def test_dropped_tokens_are_merged_with_a_bias(
    engine: Engine,
    ids: list[int],
    reference: Reference,
    watch: Watch,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KeepKV: kept slots carry the votes of what was merged into them, and attention counts them,
    also where votes are so uneven that they change the text."""
    prompt = ids[100:524]
    tokens = engine.tokens(prompt, NEW, kv_policy=policy, kv_budget=160)
    assert tokens == reference.greedy(prompt, tokens, watch.kept)
    last = watch.kept[max(watch.kept)]
    votes = torch.cat([own.extra[own.extra.isfinite()] for own in last])
    assert (votes != 0).float().mean() > 0.1, "nothing was merged"

    merge = KeepKV.merge
    draw = torch.Generator().manual_seed(7)

    def uneven(self: KeepKV, *args: Any) -> Any:
        merged = merge(self, *args)
        more = 3 * torch.randn(merged.log_bias.shape, generator=draw)
        return merged._replace(log_bias=merged.log_bias + more)

    monkeypatch.setattr(KeepKV, "merge", uneven)
    watch.forget()
    engine.reset()
    turned = engine.tokens(prompt, NEW, kv_policy=policy, kv_budget=160)
    assert turned == reference.greedy(prompt, turned, watch.kept)
    assert turned != tokens


@pytest.mark.parametrize("watch", [True], indirect=True)
def test_sinks_are_rotated_next_to_what_stays(
    engine: Engine, ids: list[int], reference: Reference, watch: Watch
) -> None:
    """StreamingLLM's positions, over several compactions: attention reads the rotated keys, and
    they are those of the sinks, directly before the first other token."""
    prompt = ids[100:524]
    tokens = engine.tokens(prompt, NEW, kv_policy="rerotate", kv_budget=160)
    assert tokens == reference.greedy(prompt, tokens, watch.kept)
    rope = engine.runner._rope
    starts = sorted(watch.kept)
    assert len(starts) >= 3
    rotated = {}
    for computed in starts:
        first = watch.kept[computed][5].keys
        assert first is not None
        rotated[computed] = first[:, :4]
    # What differs between two compactions is a rotation by the tokens that went in between.
    for before, after in itertools.pairwise(starts):
        turn = torch.full((4,), after - before)
        got = rope.rotate(rotated[before].double(), turn)
        if before != starts[0]:  # the tail of the first one had another length
            torch.testing.assert_close(got, rotated[after].double(), rtol=1e-4, atol=1e-3)


def spans_of(policy: str) -> dict[str, Any]:
    """Returns spans for policies that treat them."""
    treats = policies.get(policy).uses_spans
    return {"kv_spans": [[4, 40], [40, 80], [90, 130], [130, 150]]} if treats else {}


def test_every_method_chooses_on_the_real_model(
    engine: Engine, ledger: Ledger, ids: list[int]
) -> None:
    """All in one batch, over several compactions each: none fails, and all hold their budget."""
    prompts = [ids[160 * i : 160 * (i + 1)] for i in range(len(METHODS))]
    params = [engine.params(NEW, kv_policy=m, kv_budget=96, **spans_of(m)) for m in METHODS]
    outputs = engine.generate(prompts, params)
    for method, output in zip(METHODS, outputs, strict=True):
        details = output.kv_tokens_details
        assert details["compactions"] >= 2 and "policy_failures" not in details, method
        assert details["held"] <= 128 and details["policy"].startswith(method.partition("(")[0])
    assert not ledger.failures.total()


@on_tiny_model
def test_every_method_with_every_codec_and_wrapper(
    engine: Engine, ledger: Ledger, ids: list[int]
) -> None:
    """Combinations in which every pair occurs, in one batch."""
    codecs = ("", "@int8", "@int4", "@tc4", "@tc6", "@tc8", "@int8+tc4+tc6+tc8")
    wrappers = ("{}", "kvcrush({})", "fair({})", "fair(kvcrush({}))")
    asked = [
        wrapper.format(method) + codec
        for method, wrapper, codec in pairwise(method=METHODS, wrapper=wrappers, codec=codecs)
    ]
    prompts = [ids[150 * i : 150 * i + 330] for i in range(len(asked))]
    params = [engine.params(NEW, kv_policy=p, kv_budget=96, **spans_of(p)) for p in asked]
    outputs = engine.generate(prompts, params)
    for policy, output in zip(asked, outputs, strict=True):
        details = output.kv_tokens_details
        assert details["compactions"] >= 2 and "policy_failures" not in details, policy
    assert not ledger.failures.total()


@pytest.mark.parametrize(
    ("policy", "differ"),
    [
        ("pyramidkv", "layers"),
        ("cake", "layers"),
        ("d2o", "layers"),
        ("duo", "heads"),
        ("surfacelogic", "heads"),
        ("cam(snapkv)", "values"),
        ("adakv(composed(snapkv, other=h2o))", "heads"),
    ],
)
def test_methods_that_divide_layers_or_merge(
    engine: Engine, ids: list[int], reference: Reference, watch: Watch, policy: str, differ: str
) -> None:
    """Each method by its name in one request: the text is what transformers gives with what each
    layer and head was left with, and all pages that the plan has are used."""
    prompt, new = ids[100:524], 6
    tokens = engine.tokens(prompt, new, kv_policy=policy, kv_budget=160)
    assert tokens == reference.greedy(prompt, tokens, watch.kept)
    assert len(watch.kept) >= 2
    for first in range(0, len(watch.counts), engine.layers):
        event = watch.counts[first : first + engine.layers]
        blocks, heads = event[0][0], len(event[0][1])
        sums = [sum(counts) for _, counts in event]
        assert sum(sums) == blocks * 32 * heads * engine.layers, "pages are unused"
        if differ == "layers":
            assert max(sums) >= min(sums) + 64, "every layer kept as many"
        elif differ == "heads":
            assert any(len(set(counts)) > 1 for _, counts in event), "every head kept as many"
        else:
            assert {count for _, counts in event for count in counts} == {blocks * 32}
    engine.assert_idle()


def test_merging_nothing_is_the_base(engine: Engine, ids: list[int]) -> None:
    prompt = ids[800:1224]
    alone = engine.tokens(prompt, NEW, kv_policy="snapkv", kv_budget=160)
    engine.reset()
    assert engine.tokens(prompt, NEW, kv_policy="keepkv(snapkv, threshold=1)") != []
    engine.reset()
    merged = engine.tokens(prompt, NEW, kv_policy="keepkv(snapkv, threshold=1)", kv_budget=160)
    assert merged == alone


@on_tiny_model
@pytest.mark.parametrize(
    "policy",
    [
        *("fair", "fair(kvcrush(h2o, ratio=0.25))@int8", "fair(pyramidkv)", "fair(cake)"),
        *("fair(duo)", "fair(surfacelogic)", "fair(d2o)", "fair(cam)", "fair(composed)"),
    ],
)
def test_every_span_keeps_its_share(
    engine: Engine, ledger: Ledger, ids: list[int], policy: str
) -> None:
    """Fair eviction: the same share of each span stays, in every head, and protected tokens
    stay."""
    spans, protect = [[0, 100], [100, 160], [160, 400]], [[110, 120]]
    kept: list[list[int]] = []

    def record(command: Any, layer: int, slots: Tensor) -> None:
        if command.compressed == 0:  # positions are slots
            kept.extend(own[own >= 0].tolist() for own in slots)

    selected = engine.runner.on_select
    engine.runner.on_select = lambda *given: (selected(*given), record(*given))
    budget = 160 if "@" not in policy else 96
    params = engine.params(
        NEW, kv_policy=policy, kv_budget=budget, kv_spans=spans, kv_protect=protect
    )
    (output,) = engine.generate([ids[100:524]], params)
    assert output.kv_tokens_details["compactions"] >= 2
    assert sum(ledger.compactions.values()) >= 2 and not ledger.failures.total()
    candidates = max(max(own) for own in kept) + 1
    for own in kept:
        assert set(range(110, 120)) <= set(own), "protected tokens are gone"
        for index, (first, end) in enumerate(spans):
            last = min(end, candidates) if index < len(spans) - 1 else candidates
            there = last - first
            got = sum(first <= position < last for position in own)
            assert abs(got - there * len(own) / candidates) <= 11, (first, end, got)


@on_tiny_model
@pytest.mark.parametrize("budget", [0.15, 0.2, 0.25, 0.3])
def test_two_tiers_of_tokens_with_known_positions(
    engine: Engine, ledger: Ledger, ids: list[int], budget: float
) -> None:
    """Where tokens are protected their true positions are kept, which differ from those that
    fitted pages have: a token whose tier changes must be in order by the latter."""
    params = engine.params(4 * NEW, kv_policy="mikv", kv_budget=budget, kv_protect=[[195, 212]])
    engine.generate([ids[100:700], ids[900:1800]], params)
    assert sum(ledger.compactions.values()) >= 8 and not ledger.failures.total()
    assert ledger.drift and any(len(codecs) == 2 for _, codecs in ledger.compactions)
    engine.assert_idle()


@on_tiny_model
@pytest.mark.parametrize(
    "policy",
    [
        *("adakv", "adakv@int4", "keepkv(adakv)@int8", "fair(adakv(keepkv))@tc4"),
        *("adakv(streaming)", "d2o@int8", "cam(pyramidkv(adakv))@tc4"),
    ],
)
def test_ledgers_of_wrapped_policies(
    engine: Engine, ledger: Ledger, ids: list[int], policy: str
) -> None:
    """Whatever policies wrap each other, and whatever the codecs, pages hold what was kept, and
    requests of different policies share a batch."""
    prompts = [ids[100:700], ids[800:864], ids[900:1300]]
    budgets: list[Any] = [0.25, 160, 96]
    params = [engine.params(100, kv_policy=policy, kv_budget=b) for b in budgets]
    engine.generate(prompts, params)
    assert sum(ledger.compactions.values()) >= 8 and not ledger.failures.total()
    if "streaming" not in policy and "@" not in policy:  # else nothing need be dropped
        assert ledger.unequal
    engine.assert_idle()


@on_tiny_model
def test_what_a_client_may_not_ask_for(engine: Engine, ids: list[int]) -> None:
    from vllm.exceptions import VLLMValidationError

    refused = {
        "kvcrush(snapkv, ratio=0.25": "lacks ','",
        "kvcrush(ratio=0.9)": "kvcrush.ratio=0.9 is not from 0 to 0.5",
        "kvcrush(anchor=mean)": "kvcrush.anchor is not for clients to set",
        "fair(none)": "choose one of",
        "a(b(c(d(e))))": "more than 4 deep",
        "snapkv@int2": "codec 'int2'",
        "snapkv(h2o)": "wraps no other policy",
    }
    for policy, why in refused.items():
        with pytest.raises(VLLMValidationError, match="kv_policy") as caught:
            engine.generate([ids[:64]], engine.params(4, kv_policy=policy))
        assert why in str(caught.value), str(caught.value)
    with pytest.raises(VLLMValidationError, match="kv_spans has no effect"):
        engine.generate([ids[:64]], engine.params(4, kv_policy="snapkv", kv_spans=[[0, 9]]))
    with pytest.raises(VLLMValidationError, match="protected tokens"):
        engine.generate([ids[:64]], engine.params(4, kv_budget=128, kv_protect=[[0, 500]]))
    engine.assert_idle()


def test_kvzip_keeps_what_the_model_looks_at_when_it_repeats(
    engine: Engine, ids: list[int], reference: Reference, model_path: str
) -> None:
    """Scores of the first compaction are the greatest attention that transformers gives over the
    repeated context; a request that runs beside it notices nothing."""
    from transformers import AutoTokenizer

    prompt, other, new = ids[100:524], ids[700:800], DECODE_INTERVAL + 8
    alone = engine.tokens(other, new, kv_policy="none")
    with engine.moves() as moves:
        mine, its = engine.generate(
            [prompt, other],
            [
                engine.params(new, kv_policy="kvzip", kv_budget=160),
                engine.params(new, kv_policy="none"),
            ],
        )
    assert list(its.outputs[0].token_ids) == alone
    assert len(moves) >= 3 and "policy_failures" not in mine.kv_tokens_details

    first = moves[0]
    computed, (start, end) = first._command.computed, first.new
    assert start == 0 and 0 < end < computed <= len(prompt)
    told = AutoTokenizer.from_pretrained(model_path).encode("\n\nRepeat the previous context:")
    reference.model.set_attn_implementation("eager")
    with torch.inference_mode():
        read = torch.tensor([[*prompt[:computed], *told, *prompt[:end]]])
        weights = reference.model(input_ids=read, output_attentions=True).attentions
    for layer, found in enumerate(weights):
        heads = len(first.repeated[layer])
        want = found[0, :, computed:, :end].unflatten(0, (heads, -1)).amax((1, 2))
        torch.testing.assert_close(first.repeated[layer], want, rtol=1e-3, atol=1e-5)
    # Afterwards only newer tokens are repeated, and the others have the score that they had.
    second = moves[1]
    held = first.kept_state["greatest"][0].shape[1]
    for layer, own in second.repeated.items():
        assert not own[:, :held].any() and bool((own[:, held:] > 0).all())
        assert set(second.kept_state["greatest"][layer][0].tolist()) <= {
            *first.kept_state["greatest"][layer][0].tolist(),
            *own[0, held:].tolist(),
        }


def test_kvzip_in_wrappers_that_divide_and_that_order(engine: Engine, ids: list[int]) -> None:
    asked = ("adakv(kvzip)", "fair(kvzip)@int8", "kvcrush(kvzip)@tc4")
    prompts = [ids[150 * i : 150 * i + 330] for i in range(len(asked))]
    params = [engine.params(NEW, kv_policy=p, kv_budget=96, **spans_of(p)) for p in asked]
    for policy, output in zip(asked, engine.generate(prompts, params), strict=True):
        details = output.kv_tokens_details
        assert details["compactions"] >= 2 and "policy_failures" not in details, policy


def test_kvzip_where_the_model_cannot_read_more_keeps_the_newest(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.runner, "max_num_tokens", 4)
    (output,) = engine.generate([ids[100:430]], engine.params(2, kv_policy="kvzip", kv_budget=96))
    assert output.kv_tokens_details["policy_failures"] >= 1
