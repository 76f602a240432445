"""Calibration on a tiny random model: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.unit import shares_oracle as oracle
from vllm_kvcrush import policies
from vllm_kvcrush.codecs import PACKED
from vllm_kvcrush.codecs.transform import calibrate as cal
from vllm_kvcrush.codecs.transform import losses
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform.bits import MAX_BITS, quantiser
from vllm_kvcrush.codecs.transform.points import TablesError
from vllm_kvcrush.codecs.transform.reference import encode_keys
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import model_config
from vllm_kvcrush.policies import heads, queries
from vllm_kvcrush.policies.choice import dry_run
from vllm_kvcrush.tools import cli
from vllm_kvcrush.tools import heads as tool
from vllm_kvcrush.tools import queries as query_tool


def make(folder, **change):
    """Saves a random model with 2 layers, 4 query and 2 KV heads of 16, and a tokenizer of
    bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 260,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        **change,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    with torch.no_grad():
        for layer in model.model.layers:  # keys that are worth coding
            layer.self_attn.k_proj.weight *= torch.logspace(1, -1, 32)[:, None]
    model.save_pretrained(folder)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters |= {"<bos>": 256, "<eos>": 257}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def short_excerpts(monkeypatch):
    monkeypatch.setattr(cal, "HELD_OUT", (256, 64, 4))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_calibrates_on_a_text(tiny, tmp_path, text):
    source, out = tmp_path / "text.txt", tmp_path / "out.safetensors"
    source.write_text(text[:3000], encoding="utf-8")
    labels = []

    def progress(iterable, label):
        labels.append(label)
        return iterable

    model = cal.calibrate(tiny, out, source, progress=progress)
    assert (model.layers, model.heads, model.kv_heads, model.size) == (2, 4, 2, 16)
    assert labels == ["taking statistics", "fitting tables", "measuring codecs"]
    for point in cal.POINTS:
        t = transform_tables.load(out, config(tiny), point.name)
        assert t.point == point
        assert t.words.sum() == round(point.key_bits * 2 * 2 * 16 / 32)
        assert t.value_bits.sum() == round(point.value_bits * 2 * 2), "shared out by gradients"
    # What each codec loses lies beside them, by layer and head.
    found = transform_tables.load_losses(out)
    assert found is not None and found.text == "4 excerpts of READMEs of openai and torch"
    assert set(found.total) == set(PACKED)
    assert all(own.shape == (2, 2) and (own >= 0).all() for own in found.loss.values())
    assert 0 < found.total["int8"] < found.total["int4"] and found.total["tc4"] < found.total["tc8"]
    # The tables fit the model: on other text its keys lose no more than their bits allow.
    probe = cal.Probe(tiny)
    tokens = probe.tokenizer.encode(text[40_000:41_000], add_special_tokens=False)
    _, keys, _ = probe.prefill(tokens)
    positions = torch.arange(len(tokens))
    losses = []
    for t in (transform_tables.load(out, config(tiny), p.name) for p in cal.POINTS):
        blank = torch.zeros(())
        loss = blank
        for layer in range(2):
            for head in range(2):
                loss = loss + encode_keys(keys[layer, head], positions, t, layer, head)[1].mean()
        # What keys lose without any bits: their components' variances.
        step = torch.tensor([quantiser(b).step for b in range(MAX_BITS + 1)])
        losses.append(loss / (t.cost / step[t.bits.long()].square()).sum())
    assert losses[0] < losses[1] < losses[2] < 0.3


def test_keys_lose_their_position_exactly(tiny):
    probe = cal.Probe(tiny)
    tokens = list(range(40, 90))
    _, near, values = probe.prefill(tokens)
    _, far, same = probe.prefill(tokens, 321)
    torch.testing.assert_close(values, same, atol=1e-4, rtol=1e-4)
    back = probe.rope.rotate(far, -torch.arange(321, 371))
    torch.testing.assert_close(
        probe.rope.rotate(near, -torch.arange(50)), back, atol=1e-3, rtol=1e-3
    )


def test_the_built_in_text_is_the_models_own_and_always_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cal, "SAMPLE_TOKENS", 40)
    samples = cal.Probe(tiny).samples(lambda iterable, label: iterable)
    assert samples == cal.Probe(tiny).samples(lambda iterable, label: iterable)
    assert len(samples) == cal.SAMPLES and {len(s) for s in samples} == {40}
    assert all(s[0] == 256 for s in samples)
    assert bytes(samples[1][1:5]).decode("latin-1") != ""
    openings = [cal.Probe(tiny).tokenizer.decode(s[1:]) for s in samples]
    wanted = cal.OPENINGS * (cal.SAMPLES // len(cal.OPENINGS))
    for opening, sample in zip(wanted, openings, strict=True):
        assert sample.startswith(opening)
    assert len({tuple(s[30:]) for s in samples}) == len(samples)
    out = tmp_path / "own.safetensors"
    cal.calibrate(tiny, out)
    again = tmp_path / "again.safetensors"
    cal.calibrate(tiny, again)
    assert out.read_bytes() == again.read_bytes()


def test_short_missing_and_binary_texts_are_refused(tiny, tmp_path):
    out, source = tmp_path / "out", tmp_path / "text"
    with pytest.raises(TablesError, match="cannot be read"):
        cal.calibrate(tiny, out, source)
    source.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(TablesError, match="UTF-8"):
        cal.calibrate(tiny, out, source)
    source.write_text("too short")
    with pytest.raises(TablesError, match="only 9 tokens: give at least 512"):
        cal.calibrate(tiny, out, source)
    assert not out.exists()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TablesError, match="is no model here"):
        cal.Probe(tmp_path)


def rewrite(folder, tmp_path, change):
    """Returns a copy of a model with a changed config.json."""
    other = tmp_path / "changed"
    shutil.copytree(folder, other)
    changed = {k: v for k, v in {**config(folder), **change}.items() if v is not None}
    (other / "config.json").write_text(json.dumps(changed))
    return other


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        # Llama 2's says nothing; the others are as older and newer transformers write them.
        ({"rope_parameters": None}, 1e4),
        ({"rope_parameters": None, "rope_scaling": None}, 1e4),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA_3}, None),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA_3}}, None),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
    ],
)
def test_rotary_embeddings_are_read_as_transformers_does(tiny, tmp_path, change, theta):
    folder = rewrite(tiny, tmp_path, change)
    read = model_config(folder)
    probe = cal.Probe(folder)  # which compares it with what the model does
    assert torch.equal(probe.rope.frequencies, Rope.from_config(read).frequencies)
    if theta is not None:
        plain = float(theta) ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        assert torch.allclose(probe.rope.frequencies, plain, rtol=1e-12)
    assert cal.output_path(folder) == transform_tables.default_path(probe.config)


def test_a_model_type_that_transformers_does_not_know_is_read_as_it_is(tiny, tmp_path):
    folder = rewrite(tiny, tmp_path, {"model_type": "of-tomorrow"})
    assert model_config(folder) == config(folder)
    with pytest.raises(TablesError, match="does not load in transformers"):
        cal.Probe(folder)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_weights_are_one_sentence(tiny, tmp_path, method, capsys):
    quantised = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 16}}
    folder = rewrite(tiny, tmp_path, quantised)
    with pytest.raises(TablesError, match=f"has {method} weights, which transformers does not"):
        cal.Probe(folder)
    assert cli.main(["calibrate", str(folder), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "calibrate the model that they were made from" in err
    assert "Traceback" not in err and err.rstrip().count("vllm-kvcrush: error: ") == 1


def test_a_model_is_found_by_its_name(tiny, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, *, local_files_only):
        asked.append((name, local_files_only))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert cal.Probe("someone/tiny").config == model_config(tiny)
    assert cal.output_path("someone/tiny") == cal.output_path(tiny)
    assert set(asked) == {("someone/tiny", True)}


def test_a_rope_that_differs_from_the_configuration_is_found(tmp_path):
    folder = make(tmp_path / "other")
    path = folder / "config.json"
    probe = cal.Probe(folder)
    probe.rope = Rope(probe.rope.frequencies * 1.01)
    with pytest.raises(TablesError, match="rotary embedding of other is not the one"):
        probe._verify()
    changed = json.loads(path.read_text())
    changed["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    path.write_text(json.dumps(changed))
    with pytest.raises(TablesError, match="'yarn'"):
        cal.Probe(folder)


def test_going_on_over_a_cache_is_going_on(tiny):
    probe = cal.Probe(tiny)
    context, question = list(range(30, 90)), list(range(100, 120))
    _, keys, values = probe.prefill(context)
    with torch.inference_mode():
        whole = probe.network(input_ids=torch.tensor([context + question])).logits[0]
        got = probe.log_probabilities(keys, values, len(context), question)
        kept = torch.ones(keys.shape[:3], dtype=torch.bool)
        kept[1, 0, 5:50] = False
        hidden = probe.log_probabilities(keys, values, len(context), question, kept)
    torch.testing.assert_close(got, whole[len(context) :].log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert (hidden - got).abs().max() > 1e-3
    # What is hidden could be anything.
    with torch.inference_mode():
        keys[1, 0, 5:50], values[1, 0, 5:50] = 7.0, -7.0
        again = probe.log_probabilities(keys, values, len(context), question, kept)
    torch.testing.assert_close(again, hidden)


def test_gradients_are_what_small_errors_cost(tiny):
    probe = cal.Probe(tiny)
    _, keys, values = probe.prefill(list(range(30, 70)))
    question = list(range(100, 112))

    def likelihood(k: torch.Tensor, v: torch.Tensor) -> float:
        with torch.inference_mode():
            logp = probe.log_probabilities(k, v, 40, question).double()
            return float(logp.gather(1, said).sum())

    with torch.inference_mode():
        logp = probe.log_probabilities(keys, values, 40, question)
    said = torch.multinomial(logp.exp(), 1, generator=torch.Generator().manual_seed(3))
    found = probe.gradients(keys, values, question, torch.Generator().manual_seed(3))
    for i, gradient in enumerate(found):
        assert gradient.shape == (keys, values)[i].shape
        step = 1e-2 * gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            moved = [keys, values]
            moved[i] = moved[i] + sign * step
            ends.append(likelihood(*moved))
        slope = (ends[0] - ends[1]) / 2e-2
        assert slope == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("n", [512, 513, 1500, 3584, 4096])
def test_excerpts_cover_the_text(n):
    texts = cal.excerpts(list(range(n)))
    assert 1 <= len(texts) <= cal.EXCERPTS
    assert texts[0][0][0] == 0
    ends = [context[-1] for context, _ in texts]
    assert max(*ends, *(q[0] for _, q in texts)) >= n - cal.QUESTION
    for context, question in texts:
        assert context == list(range(context[0], context[0] + len(context)))
        assert len(context) <= cal.CONTEXT and len(question) <= cal.QUESTION
        half = len(question) // 2
        assert question[:half] == list(range(context[-1] + 1, context[-1] + 1 + half))
        assert question[half:] == list(range(question[half], question[half] + half))
        assert set(question[half:]) <= set(context)


def test_scores_of_heads_are_those_of_the_models_own_attention(
    tiny, tmp_path, text, capsys, monkeypatch
):
    """`calibrate --heads`, against transformers' eager attention and the formulas."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "text.txt"
    source.write_text(text[:3000], encoding="utf-8")
    assert cli.main(["calibrate", str(tiny), "--heads", "--text", str(source)]) == 0
    out = capsys.readouterr().out.strip()
    assert out == str(heads.default_path(config(tiny))) == str(tool.output_path(tiny))
    assert cli.main(["calibrate", str(tiny), "--heads", "--out", out, "--text", str(source)]) == 0
    probe = cal.Probe(tiny)
    tokens = cal.tokens_of(probe, source.read_text(), source, cal._plain)
    eager = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    want = {kind: torch.zeros(2, 4).double() for kind in heads.KINDS}
    frequencies, found = probe.rope.frequencies.numpy(), tool.passages(tokens)
    assert len({first for _, first in found}) > 4 and {len(c) for c, _ in found} == {512}
    for context, first in found:
        passage = context[first : first + tool.PASSAGE]
        with torch.inference_mode():
            ids = torch.tensor([context + passage])
            attentions = eager(input_ids=ids, output_attentions=True).attentions
        q, k, _ = probe.prefill(context)
        q, k = (probe.rope.rotate(x.double(), -torch.arange(512)).mean(2).numpy() for x in (q, k))
        for layer in range(2):
            for head in range(4):
                rows = attentions[layer][0, head, 512:, :512].double().numpy()
                want["copying"][layer, head] += oracle.copying(rows, first, 10) / len(found)
                area = oracle.retrieval(
                    q[layer, head], k[layer, head // 2], frequencies, 16**-0.5, 500
                )
                want["retrieval"][layer, head] += area / len(found)
    for kind, scores in want.items():
        per_kv_head = scores.view(2, 2, 2).mean(2)
        torch.testing.assert_close(heads.load(out, kind), per_kv_head, rtol=1e-4, atol=1e-5)
    assert policies.get("duo", {"duo": {"pattern": out}}).made_for == (2, 2)
    assert cli.main(["calibrate", str(tiny), "--heads", "--text", str(tmp_path / "no")]) == 2
    assert "cannot be read as UTF-8 text" in capsys.readouterr().err


def test_losses_are_predicted_by_head(tiny, text):
    """The prediction from gradients is near what the model's output really loses, so that it says
    which heads errors are dear in."""
    probe = cal.Probe(tiny)
    tokens = probe.tokenizer.encode(text[:700], add_special_tokens=False)
    context, question = tokens[:384], tokens[384:640]
    _, keys, values = probe.prefill(context)
    generator = torch.Generator().manual_seed(3)
    gradients = probe.gradients(keys, values, question, generator)
    exact = probe.log_probabilities(keys, values, len(context), question)
    for head in range(2):
        noise = torch.zeros_like(keys)
        noise[1, head] = 0.2 * torch.randn(384, 16, generator=generator)
        own = losses.by_head((noise, noise), gradients, len(question))
        assert (own > 0).nonzero().tolist() == [[1, head]]
        other = probe.log_probabilities(keys + noise, values + noise, len(context), question)
        real = float(losses.divergence(exact, other).mean())
        assert real / 3 < float(own.sum()) < 3 * real


def test_losses_are_measured_on_the_rest_of_a_long_text(tiny, text, tmp_path):
    probe = cal.Probe(tiny)
    source = tmp_path / "long.txt"
    found, about = cal.held_out(probe, text[: cal.MOST_TOKENS + 3000], source)
    context, question, count = cal.HELD_OUT
    assert about == f"{count} excerpts of long.txt" and len(found) == count
    fitted = text[: cal.MOST_TOKENS]
    for own, after in found:
        assert (len(own), len(after)) == (context, question)
        assert probe.tokenizer.decode(own) not in fitted
        # A question goes on with the text, and then repeats a part of the context.
        assert str(after[question // 2 :])[1:-1] in str(own)
    assert cal.held_out(probe, fitted, source)[1].endswith("READMEs of openai and torch")


def test_an_older_file_of_tables_has_no_losses(tiny, tmp_path, monkeypatch):
    """It is still used, and the summary of a file says so."""
    monkeypatch.setattr(cal, "SAMPLE_TOKENS", 40)
    out = tmp_path / "tables.safetensors"
    cal.calibrate(tiny, out)
    save = transform_tables.save
    tables = [transform_tables.load(out, config(tiny), p.name) for p in cal.POINTS]
    whole = transform_tables.summary(out, 64, 2)
    save(out, whole.model, tables, "")
    assert transform_tables.load_losses(out) is None
    bare = transform_tables.summary(out, 64, 2)
    assert bare.losses is None and bare.packings == whole.packings and whole.losses is not None
    page = 64 * 2 * 16 * 2
    assert bare.packings == transform_tables.packings(out, config(tiny), page, 16, 1)


def test_query_statistics_are_those_of_the_models_queries(
    tiny, tmp_path, text, capsys, monkeypatch
):
    """`calibrate --queries`, against the projections of transformers' own hidden states."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "text.txt"
    source.write_text(text[:1500], encoding="utf-8")
    assert cli.main(["calibrate", str(tiny), "--queries", "--text", str(source)]) == 0
    out = capsys.readouterr().out.strip()
    assert out == str(queries.default_path(config(tiny))) == str(query_tool.output_path(tiny))
    found = queries.load(out)
    probe = cal.Probe(tiny)
    tokens = cal.tokens_of(probe, source.read_text(), source, cal._plain)
    size, sinks = query_tool.CONTEXT, query_tool.SINKS
    assert len(tokens) > size  # more than one context
    plain = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows: list[list[torch.Tensor]] = [[], []]
    for layer, module in enumerate(plain.model.layers):
        module.self_attn.q_proj.register_forward_hook(
            lambda _, __, made, layer=layer: rows[layer].append(made[0, sinks:].double())
        )
    with torch.inference_mode():
        for start in range(0, len(tokens), size):
            plain(input_ids=torch.tensor([list(tokens[start : start + size])]))
    for layer in range(2):
        own = torch.cat(rows[layer]).view(-1, 4, 16).transpose(0, 1)
        mean = own.mean(1)
        spread = (own - mean.unsqueeze(1)).mT @ (own - mean.unsqueeze(1)) / own.shape[1]
        torch.testing.assert_close(found.mean[layer].double(), mean, rtol=1e-3, atol=1e-4)
        got = found.deviations[layer].double()
        torch.testing.assert_close(got.mT @ got, spread, rtol=1e-3, atol=1e-4)
        norms = got.norm(dim=2)
        assert bool((norms[:, 1:] <= norms[:, :-1] + 1e-6).all())
    policy = policies.get("expected_attention", {"expected_attention": {"statistics": out}})
    assert policy.made_for == (2, 2) and policy.head_size == 16 and not policy.needs
    dry_run(policy)
    assert cli.main(["calibrate", str(tiny), "--queries", "--text", str(tmp_path / "no")]) == 2
    assert "cannot be read as UTF-8 text" in capsys.readouterr().err
