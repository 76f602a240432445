"""The transform codec against its own definitions: bounds, identities, files, arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs import CODECS, FITTED, layout
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform.bits import (
    MAX_BITS,
    PIECE_BITS,
    QUAD,
    VALUE_BITS,
    WORD_BITS,
    head_bits,
    pieces,
    pooled_bits,
    quantiser,
)
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.points import (
    OperatingPoint,
    TablesError,
    even_value_bits,
    even_words,
)
from vllm_kvcrush.codecs.transform.reference import (
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    hadamard,
    origins,
)
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import HeadTables, ModelShape, Tables
from vllm_kvcrush.plan import Packing

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "vocab_size": 300,
    "rope_theta": 10000.0,
}
L, H, G, D = 2, 2, 2, 32
TC4 = OperatingPoint("tc4", False, 3.0, 4, 0.02)
TC6 = OperatingPoint("tc6", True, 2.0, 3, 0.02)
TC8 = OperatingPoint("tc8", True, 1.5, 2, 0.02)

both_frames = pytest.mark.parametrize("local", [False, True])


def fresh(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns keys and queries of unequal channels with RoPE, values, and positions."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(L, H, D, D, generator=torch.Generator().manual_seed(7)).double()
    mix = mix * torch.logspace(1, -1.5, D, dtype=torch.float64)
    mean = torch.linspace(-4, 4, D, dtype=torch.float64)
    k = torch.randn(L, H, n, D, generator=g).double() @ mix + mean
    q = torch.randn(L, H * G, n, D, generator=g).double() * torch.linspace(0.2, 2, D).double()
    v = torch.randn(L, H, n, D, generator=g).double()
    positions = torch.arange(n)
    rope = Rope.from_config(CONFIG)
    return rope.rotate(k, positions), rope.rotate(q, positions), v, positions


def tables(point: OperatingPoint, most: int = MAX_BITS, even: bool = False) -> Tables:
    keys, queries, _, positions = fresh(4000, 1)
    rope = Rope.from_config(CONFIG)
    keys, queries = rope.rotate(keys, -positions), rope.rotate(queries, -positions)
    return fit(Statistics.of(keys, queries), point, rope, 4000, most, even)


def steps(t: Tables) -> torch.Tensor:
    """Returns the distance between two codes of each component, in its standard deviations."""
    step = [quantiser(b).step for b in range(MAX_BITS + 1)]
    return torch.tensor(step, dtype=torch.float64)[t.bits.long()]


# Max, Quantizing for minimum distortion, 1960, table II.
@pytest.mark.parametrize(
    ("bits", "step", "distortion"),
    [
        (1, 1.596, 0.3634),
        (2, 0.9957, 0.1188),
        (3, 0.5860, 0.03744),
        (4, 0.3352, 0.01154),
        (5, 0.1881, 0.003495),
    ],
)
def test_quantisers_are_the_best_even_ones(bits, step, distortion):
    q = quantiser(bits)
    assert q.middle == (2**bits - 1) / 2
    assert q.step == pytest.approx(step, rel=5e-4)
    assert q.distortion == pytest.approx(distortion, rel=5e-4)


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
def test_distortion_is_what_a_gaussian_loses_and_other_steps_lose_more(bits):
    q = quantiser(bits)
    x = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    mass = torch.exp(-x * x / 2)
    mass /= mass.sum()

    def loss(step):
        codes = (x / step + q.middle).round().clamp(0, 2 * q.middle)
        return ((x - step * (codes - q.middle)).square() * mass).sum().item()

    assert loss(q.step) == pytest.approx(q.distortion, rel=1e-4)
    if bits:
        assert loss(q.step) < min(loss(0.98 * q.step), loss(1.02 * q.step))


def test_distortion_falls_convexly():
    """Bits are allocated by the gain of each, which relies on it."""
    errors = torch.tensor([quantiser(b).distortion for b in range(MAX_BITS + 1)])
    gains = -errors.diff()
    assert (gains > 0).all() and (gains.diff() < 0).all()
    assert quantiser(0) == (1.0, 0.0, 1.0)
    for bits in (-1, MAX_BITS + 1):
        with pytest.raises(ValueError, match=r"not one of 0\.\.8"):
            quantiser(bits)


quad_bits = st.lists(st.integers(0, MAX_BITS), min_size=1, max_size=64).map(
    # The last quads make the words whole.
    lambda quads: quads + (lambda rest: [min(8, rest)] if rest else [])(-sum(quads) % WORD_BITS)
)


@settings(max_examples=200, deadline=None)
@given(quads=quad_bits, seed=st.integers(0, 2**16))
def test_pieces_fill_words_and_rebuild_every_code(quads, seed):
    bits = torch.tensor(quads).repeat_interleave(QUAD)
    found = pieces(bits)
    words = int(bits.sum()) // 32
    # Every bit of every byte of every word once.
    assert all(1 <= p.bits <= PIECE_BITS for p in found)
    places = [(p.word, b) for p in found for b in range(p.first, p.first + p.bits)]
    assert sorted(places) == list(itertools.product(range(words), range(WORD_BITS)))
    # A code's bits once each, in as few fields as may be but for one cut in each word.
    for quad, width in enumerate(quads):
        own = [b for p in found if p.quad == quad for b in range(p.weight, p.weight + p.bits)]
        assert sorted(own) == list(range(width))
    assert len(found) <= sum(-(-width // PIECE_BITS) for width in quads) + words
    # Fields of equal weight are neighbours.
    weights = [p.weight for p in found]
    assert weights == sorted(weights, reverse=True)
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(len(bits), generator=generator) * 2**bits).long()
    packed = torch.zeros(words, QUAD, dtype=torch.long)  # a word's bytes: a quad's components
    for p in found:
        field = codes.view(-1, QUAD)[p.quad] >> p.weight & (1 << p.bits) - 1
        packed[p.word] |= field << p.first
    assert (packed < 256).all()
    back = torch.zeros(len(quads), QUAD, dtype=torch.long)
    for p in found:
        back[p.quad] += (packed[p.word] >> p.first & (1 << p.bits) - 1) << p.weight
    assert torch.equal(back.flatten(), codes)


def error_of(variances, bits):
    """Returns the error with these bits."""
    d = torch.tensor([quantiser(b).distortion for b in range(MAX_BITS + 1)]).double()
    return float((variances.double() * d[bits.long()]).sum())


@pytest.mark.parametrize("shape", [(3, 2, 64), (2, 2, 80), (1, 1, 24), (4, 8)])
@pytest.mark.parametrize("mean", [0.0, 0.5, 1.5, 3.25, 8.0])
def test_pooled_bits_fill_words(shape, mean):
    g = torch.Generator().manual_seed(1)
    variances = (3 * torch.randn(shape, generator=g)).exp().sort(-1, descending=True).values
    bits = pooled_bits(variances, mean)
    assert bits.shape == variances.shape and bits.dtype == torch.uint8
    heads = bits.long().flatten(0, -2)
    assert (heads.sum(-1) % 32 == 0).all()
    assert heads.sum() == 32 * round(mean * variances.numel() / 32)
    quads = heads.view(len(heads), -1, QUAD)
    assert (quads == quads[..., :1]).all()
    assert (heads.diff(dim=-1) <= 0).all() and bits.max() <= MAX_BITS
    for head in heads:
        pieces(head)  # they do fill them


@settings(max_examples=60, deadline=None)
@given(data=st.data(), heads=st.integers(1, 3), quads=st.integers(1, 3), most=st.integers(1, 8))
def test_pooled_bits_lose_least_of_all_that_fill_words(data, heads, quads, most):
    logs = st.lists(st.floats(-12, 12), min_size=4 * quads, max_size=4 * quads)
    rows = [sorted(data.draw(logs), reverse=True) for _ in range(heads)]
    variances = torch.tensor(rows, dtype=torch.float64).exp()
    mean = data.draw(st.floats(0, most))
    bits = pooled_bits(variances, mean, most)
    assert bits.max() <= most
    # Each head's least error with so many words, by trying everything; then over all heads.
    best = []
    for row in variances:
        least = {}
        for tried in itertools.product(range(most + 1), repeat=quads):
            if sum(tried) % WORD_BITS == 0:
                error = error_of(row, torch.tensor(tried).repeat_interleave(QUAD))
                words = sum(tried) // WORD_BITS
                least[words] = min(error, least.get(words, math.inf))
        best.append(least)
    wanted = min(round(mean * variances.numel() / 32), sum(max(least) for least in best))
    assert bits.long().sum() == 32 * wanted
    optimum = min(
        sum(least[w] for least, w in zip(best, share, strict=True))
        for share in itertools.product(*best)
        if sum(share) == wanted
    )
    assert error_of(variances, bits) == pytest.approx(optimum, rel=1e-6)


def test_the_first_of_equal_components_get_the_bits():
    bits = pooled_bits(torch.ones(2, 16), 1.0)
    assert bits[0].tolist() == [2] * 16 and not bits[1].any()
    assert pooled_bits(torch.ones(1, 32), 1.0)[0].tolist() == [1] * 32
    for mean in (4.5, -0.1):
        with pytest.raises(ValueError, match="between 0 and 4"):
            pooled_bits(torch.ones(1, 8), mean, most=4)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_is_that_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_theta": 5e5, "rope_type": kind}
    if kind != "default":
        rope["factor"] = 8.0
    if kind == "llama3":
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
    x = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([0, 1, 5, 31, 100, 511, 512, 4000, 8191])
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    mine = Rope.from_config(config.to_dict())
    torch.testing.assert_close(mine.rotate(x, positions)[0], theirs[0], atol=5e-3, rtol=0)
    torch.testing.assert_close(
        mine.rotate(mine.rotate(x.double(), positions), -positions), x.double()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_parameters": {"full": {"rope_theta": 1e4}, "local": {}}}, "differ by layer"),
        ({"head_dim": 15}, "all channels"),
    ],
)
def test_other_ropes_are_refused(change, message):
    with pytest.raises(TablesError, match=message):
        Rope.from_config({**CONFIG, **change})


def test_moments_after_turning_are_those_of_turned_keys():
    rope = Rope.from_config(CONFIG)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 50, D, generator=g, dtype=torch.float64) + 1
    positions = torch.tensor([0, 3, 17, 400])
    mean, second = rope.spread(x.mean(1), x.mT @ x / 50, positions)
    turned = torch.cat([rope.rotate(x, p.expand(50)) for p in positions], 1)
    torch.testing.assert_close(mean, turned.mean(1))
    torch.testing.assert_close(second, turned.mT @ turned / turned.shape[1])


@pytest.mark.parametrize("size", [16, 24, 64, 80, 96, 112, 128])
def test_hadamard_is_its_own_inverse(size):
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    y = hadamard(x)
    torch.testing.assert_close(hadamard(y), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    block = size & -size
    one = torch.zeros(size, dtype=torch.float64)
    one[0] = 1
    assert torch.allclose(hadamard(one)[:block], torch.full((block,), block**-0.5).double())
    assert not hadamard(one)[block:].any()


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.145), (3, 0.042), (4, 0.014)])
def test_value_error_is_that_of_the_quantiser(size, bits, bound):
    g = torch.Generator().manual_seed(bits)
    # Over the whole range of scales, with one channel that sticks out.
    v = torch.randn(600, size, generator=g) * torch.logspace(-2, 2, 600)[:, None]
    v[:, 3] *= 5
    codes, scales = encode_values(v, bits)
    back = decode_values(codes, scales, bits)
    error = (back - v).square().sum(-1) / v.square().sum(-1)
    assert error.mean() < bound
    # It is as long as before, to the step of scales.
    longer = (back.norm(dim=-1) / v.norm(dim=-1))[(scales > 1) & (scales < 255)]
    assert longer.log2().abs().max() < 1 / 31 and longer.mean().item() == pytest.approx(1, abs=3e-3)


def test_values_of_nothing_stay_nothing():
    codes, scales = encode_values(torch.zeros(3, 16), 2)
    assert not scales.any()
    assert not decode_values(codes, scales, 2).any()


@both_frames
def test_forward_and_inverse_match(local):
    t = tables(dataclasses.replace(TC8, local=local))
    eye = torch.eye(D).expand(L, H, D, D)
    torch.testing.assert_close(t.forward @ t.inverse, eye, atol=1e-3, rtol=0)
    assert (t.bits.int().diff(dim=-1) <= 0).all()
    assert t.bits.long().sum() == 32 * round(1.5 * L * H * D / 32)
    assert torch.equal(32 * t.words, t.bits.long().sum(-1))


@both_frames
def test_components_are_white_on_fresh_keys(local):
    t = tables(dataclasses.replace(TC8, local=local))
    keys, _, _, positions = fresh(4000, 2)
    x = t.rope.rotate(keys, -origins(positions)) if local else keys
    x = (x - t.key_mean[:, :, None]) @ t.forward.mT.double() * steps(t)[:, :, None]
    second = x.mT @ x / x.shape[2]
    # Components that no query can see are not blown up to unit variance.
    sigma = t.cost.double().sqrt() / steps(t)
    seen = sigma > 1e-4 * sigma.amax(-1, keepdim=True)
    assert seen.float().mean() > 0.9
    eye = torch.eye(D, dtype=torch.float64).expand_as(second)
    both = seen[..., :, None] & seen[..., None, :]
    torch.testing.assert_close(second[both], eye[both], atol=0.12, rtol=0)


@both_frames
def test_more_bits_lose_less_and_the_loss_is_what_queries_see(local):
    keys, queries, _, positions = fresh(4000, 3)
    g = torch.Generator().manual_seed(3)
    # Queries anywhere up to the horizon: from the key, or rotated ones from the beginning.
    free = Rope.from_config(CONFIG).rotate(queries, -positions)
    far = torch.randint(4000, positions.shape, generator=g)
    places = positions + far if local else far
    order = torch.randperm(4000, generator=g)
    errors = []
    for bits in (1.0, 2.0, 3.0, 4.0):
        t = tables(dataclasses.replace(TC8, local=local, key_bits=bits))
        q = t.rope.rotate(free[:, :, order], places).view(L, H, G, -1, D)
        expected = seen = 0.0
        for layer in range(L):
            for head in range(H):
                at = t, layer, head
                codes, loss = encode_keys(keys[layer, head], positions, *at)
                back = decode_keys(codes, positions, *at, torch.float64)
                e = keys[layer, head] - back
                expected += loss.mean().item()
                seen += (q[layer, head] * e).sum(-1).square().sum(0).mean().item()
        errors.append(seen)
        assert seen == pytest.approx(expected, rel=0.1)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("point", [TC4, TC6, TC8])
def test_encoding_keys_again_changes_nothing(point):
    t = tables(point)
    keys, _, _, positions = fresh(200, 5)
    for layer, head in itertools.product(range(L), range(H)):
        at = t, layer, head
        codes, loss = encode_keys(keys[layer, head], positions, *at)
        back = decode_keys(codes, positions, *at, torch.float64)
        again, more = encode_keys(back, positions, *at)
        assert torch.equal(again, codes)
        assert (more <= 1e-6 * loss.mean()).all()
        top = 2 ** t.bits[layer, head].long() - 1
        assert (codes.long() <= top).all()


@pytest.mark.parametrize("point", [TC4, TC6, TC8])
def test_keys_that_others_are_added_to_keep_their_codes(point):
    """Compactions that evict nothing change no strip's first token, full or not."""
    t = tables(point)
    keys, _, _, positions = fresh(60, 13)
    keys = keys[0, 1].clone()
    first, _ = encode_keys(keys[:41], positions[:41], t, 0, 1)
    keys[:41] = decode_keys(first, positions[:41], t, 0, 1, torch.float64)
    again, _ = encode_keys(keys, positions, t, 0, 1)
    assert torch.equal(again[:41], first)


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("bits", [2, 4])
def test_encoding_values_again_changes_next_to_nothing(size, bits):
    g = torch.Generator().manual_seed(size)
    values = torch.randn(4000, size, generator=g, dtype=torch.float64)
    codes, scales = encode_values(values, bits)
    back = decode_values(codes, scales, bits, torch.float64)
    again, other = encode_values(back, bits)
    # The scale follows from the codes, and the codes from the norm, which the scale rounds.
    changed = (again != codes).any(-1) | (other != scales)
    assert changed.double().mean() < (0.01 if bits == 4 else 1e-9)
    twice = decode_values(again, other, bits, torch.float64)
    once = (back - values).square().sum()
    assert (twice - values).square().sum() < 1.02 * once


def test_strips_start_at_their_first_token():
    positions = torch.tensor([*range(5, 21), 40, 90, 91])
    assert origins(positions).tolist() == [5] * 16 + [40] * 3
    assert origins(positions[:0]).tolist() == []


def test_local_keys_look_alike_wherever_they_stand():
    t = tables(TC8)
    keys, _, _, positions = fresh(100, 12)
    codes, loss = encode_keys(keys[1, 0], positions, t, 1, 0)
    far = t.rope.rotate(keys[1, 0], torch.full((100,), 3000))
    again, other = encode_keys(far, positions + 3000, t, 1, 0)
    assert torch.equal(again, codes)
    torch.testing.assert_close(other, loss)


@both_frames
def test_absorbed_queries_give_the_logits_of_decoded_keys(local):
    t = tables(dataclasses.replace(TC4, local=local))
    keys, queries, _, positions = fresh(32, 6)
    positions = positions + 777
    at = t, 0, 1
    codes, _ = encode_keys(keys[0, 1], positions, *at)
    q = queries[0, 2 * G - 1]
    plain = q @ decode_keys(codes, positions, *at, torch.float64).mT
    # Each key's query: the same one, or one for each strip.
    each = q[:, None].expand(-1, len(positions), -1)
    each = t.rope.rotate(each, -origins(positions)) if local else each
    absorbed = each @ t.inverse[0, 1].double()
    x = codes.double() - (2 ** t.bits[0, 1].double() - 1) / 2
    logits = (absorbed * x).sum(-1) + each @ t.key_mean[0, 1].double()
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


def test_components_without_bits_need_no_transform():
    t = tables(TC8)
    keys, _, _, positions = fresh(50, 8)
    codes, _ = encode_keys(keys[0, 0], positions, t, 0, 0)
    used = int((t.bits[0, 0] > 0).sum())
    assert 0 < used < D
    assert not codes[:, used:].any()
    x = codes[:, :used].float() - (2 ** t.bits[0, 0, :used].float() - 1) / 2
    back = x @ t.inverse[0, 0, :, :used].mT + t.key_mean[0, 0]
    back = t.rope.rotate(back, origins(positions))
    torch.testing.assert_close(back, decode_keys(codes, positions, t, 0, 0))


@pytest.mark.parametrize("point", [TC4, TC6, TC8])
def test_pages_hold_sinks_and_the_worst_keys_in_int8(point):
    t = tables(point)
    keys, _, values, positions = fresh(160, 9)
    keys[0, 0, 77] *= 30  # unlike anything in calibration
    keys, values = keys[0, 0], values[0, 0]
    exact_keys, exact_values = CODECS["int8"].kept(keys, values, torch.float64)

    def exceptions(first, end, most):
        here = slice(first, end)
        own = HeadTables(t, 0, 0, most)
        k, v = CODECS[point.name].kept(
            keys[here], values[here], torch.float64, positions[here], own
        )
        exact = (v == exact_values[here]).all(-1)
        assert torch.equal(exact, (k == exact_keys[here]).all(-1))
        bound = keys[here].abs().amax(-1, keepdim=True) / 127 * 0.51
        assert ((k - keys[here]).abs() <= bound)[exact].all()
        return (exact.nonzero()[:, 0] + first).tolist()

    found = exceptions(0, 160, 8)
    assert found[:4] == [0, 1, 2, 3] and 77 in found and len(found) == 8
    # All of the others lose less than any of those that are none.
    _, loss = encode_keys(keys, positions, t, 0, 0)
    others = [i for i in range(160) if i not in found]
    assert loss[found[4:]].min() >= loss[others].max()
    assert exceptions(0, 3, 8) == [0, 1, 2]
    assert exceptions(4, 160, 1) == [77]
    assert exceptions(4, 160, 0) == []


@both_frames
def test_even_tables_give_every_head_the_same_words(local):
    point = dataclasses.replace(TC8, local=local)
    t = tables(point, even=True)
    assert (t.words == even_words(point, D)).all()
    assert even_words(point, D) * 32 >= point.key_bits * D
    assert (t.bits.int().diff(dim=-1) <= 0).all()
    torch.testing.assert_close(t.forward @ t.inverse, torch.eye(D).expand(L, H, D, D))


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tables.safetensors"
    made = [tables(TC4), tables(TC6), tables(TC8)]
    transform_tables.save(path, ModelShape.from_config(CONFIG, "tiny"), made, "digest of a text")
    return path, made


def test_files_give_back_what_was_saved(saved):
    path, made = saved
    for mine in made:
        read = transform_tables.load(path, CONFIG, mine.point.name)
        assert read.point == mine.point
        for name in ("key_mean", "forward", "inverse", "cost", "bits"):
            assert torch.equal(getattr(read, name), getattr(mine, name))
        assert torch.equal(read.rope.frequencies, mine.rope.frequencies)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # The other way in which transformers writes the same model.
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    transform_tables.load(
        path, {**new, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "tc8"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "tiny .layers 2 instead of 3"),
        ({"num_key_value_heads": 4}, "kv_heads 2 instead of 4"),
        ({"head_dim": 64}, "size 32 instead of 64"),
        ({"vocab_size": 301}, "vocabulary"),
        ({"rope_theta": 20000.0}, "rope"),
    ],
)
def test_tables_of_another_model_are_refused(saved, change, message):
    with pytest.raises(TablesError, match=message) as caught:
        transform_tables.load(saved[0], {**CONFIG, **change}, "tc8")
    assert str(caught.value).count(". ") == 0 and "calibrate" in str(caught.value)


def test_files_that_are_no_tables_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    path, _ = saved
    whole = path.read_bytes()
    cases = {
        "does not exist": None,
        "damaged": whole[: len(whole) // 2],
        "damaged or no": b"not a safetensors file at all, but some text" * 3,
    }
    for message, content in cases.items():
        bad = tmp_path / "bad"
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(TablesError, match=message):
            transform_tables.load(bad, CONFIG, "tc8")
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(TablesError, match="is damaged"):
        transform_tables.load(bad, CONFIG, "tc8")
    save_file({"x": torch.zeros(3)}, bad)
    with pytest.raises(TablesError, match="holds no transform tables"):
        transform_tables.load(bad, CONFIG, "tc8")
    with pytest.raises(TablesError, match="does not exist"):
        transform_tables.load(tmp_path / "nowhere", CONFIG, "tc8")
    with pytest.raises(TablesError, match="no tables for tc16, only for tc4, tc6, tc8"):
        transform_tables.load(path, CONFIG, "tc16")


def test_other_versions_are_refused(saved, monkeypatch):
    now = transform_tables.VERSION
    monkeypatch.setattr(transform_tables, "VERSION", now + 1)
    with pytest.raises(TablesError, match=f"version {now} of the tables, this release reads"):
        transform_tables.load(saved[0], CONFIG, "tc8")


def test_a_config_that_is_no_text_model_is_refused():
    broken = json.loads(json.dumps(CONFIG))
    del broken["vocab_size"]
    with pytest.raises(TablesError, match="no vocab_size"):
        ModelShape.from_config(broken)


def test_packings_count_every_heads_pages(saved):
    path, made = saved
    page = 64 * 2 * D * 4
    found = transform_tables.packings(path, CONFIG, page, D, 1)
    assert tuple(found) == FITTED
    for t in made:
        rooms = [
            layout.fitted_capacity(page, w, t.point.value_bits, D, D, t.point.exceptions)[0]
            for w in t.words.flatten().tolist()
        ]
        (rank,) = found[t.point.name]
        assert sorted(r for room, heads in rank for r in [room] * heads) == sorted(rooms)
        assert [room for room, _ in rank] == sorted(set(rooms))
        # What a block holds follows from all heads together.
        packing = Packing(t.point.name, found[t.point.name])
        for tokens in (1, 100, 1000, 12345):
            needed = sum(-(-tokens // room) for room in rooms)
            assert packing.blocks(tokens) == -(-needed // (L * H))
    assert any(len(rank) > 1 for (rank,) in found.values()), "heads with equal bits show little"
    # Fewer words, more tokens; a value of half the size takes half of the room.
    wide = transform_tables.packings(path, CONFIG, page, D // 2, 1)
    assert wide["tc4"][0][0][0] > found["tc4"][0][0][0]


def test_packings_share_the_heads_out(saved):
    path, made = saved
    page = 64 * 2 * D * 4
    for codec, ranks in transform_tables.packings(path, CONFIG, page, D, 2).items():
        t = next(t for t in made if t.point.name == codec)
        for rank, counts in enumerate(ranks):
            rooms = sorted(
                layout.fitted_capacity(page, w, t.point.value_bits, D, D, 0.02)[0]
                for w in t.words[:, rank].tolist()
            )
            assert sorted(r for room, heads in counts for r in [room] * heads) == rooms
    with pytest.raises(TablesError, match="2 KV heads do not divide over 4 ranks: use int8"):
        transform_tables.packings(path, CONFIG, page, D, 4)


def test_packings_need_pages_that_hold_something(saved):
    path, made = saved
    with pytest.raises(TablesError, match="200 bytes is too small for tc4: use a larger --block"):
        transform_tables.packings(path, CONFIG, 200, D, 1)
    transform_tables.save(path, ModelShape.from_config(CONFIG, "tiny"), made[:1], "")
    with pytest.raises(TablesError, match="no tables for tc6, only for tc4"):
        transform_tables.packings(path, CONFIG, 1 << 13, D, 1)


def test_a_full_disk_is_told_and_leaves_the_old_file(saved):
    path, made = saved
    before = path.read_bytes()
    # To safetensors this is what a full disk is: a write that fails.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(TablesError, match=r"Could not write .*tables.safetensors \(.*--out"):
            transform_tables.save(path, ModelShape.from_config(CONFIG, "tiny"), made, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_the_default_place_is_that_of_the_models_shape(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    place = transform_tables.default_path(CONFIG)
    assert place.parent == tmp_path / "tables" and place.suffix == ".safetensors"
    same = {
        **{k: v for k, v in CONFIG.items() if k != "rope_theta"},
        **{"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "head_dim": D},
        **{"_name_or_path": "elsewhere", "model_type": "other", "torch_dtype": "bfloat16"},
    }
    assert transform_tables.default_path(same) == place
    changes = (
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        {"vocab_size": 301},
        {"rope_theta": 2e4},
    )
    others = {transform_tables.default_path({**CONFIG, **change}) for change in changes}
    assert len(others) == len(changes) and place not in others
    with pytest.raises(TablesError, match="'yarn'"):
        transform_tables.default_path(
            {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
        )


@pytest.mark.parametrize("local", [False, True])
def test_gradients_decide_what_is_lost(local):
    """With gradients, errors cost less along them than where only logits counted."""
    keys, queries, _, positions = fresh(4000, 1)
    rope = Rope.from_config(CONFIG)
    keys, queries = rope.rotate(keys, -positions), rope.rotate(queries, -positions)
    g = torch.Generator().manual_seed(5)
    scale = torch.logspace(-2, 1, L * H, dtype=torch.float64).view(L, H, 1, 1)
    slope = torch.linspace(3, 0.1, D, dtype=torch.float64)
    gradients = scale * slope * torch.randn(L, H, 4000, D, generator=g).double()
    values = torch.randn(L, H, 4000, D, generator=g).double()
    moments = Statistics.of(keys, queries, gradients, (values, scale * values.flip(2)))
    point = OperatingPoint("tc8", local, 1.5, 2.5, 0.0)
    costs, made = [], []
    for own in (moments, Statistics.of(keys, queries)):
        t = fit(own, point, rope, 4000)
        cost = 0.0
        for layer in range(L):
            for head in range(H):
                k = rope.rotate(keys[layer, head], positions)
                codes, _ = encode_keys(k, positions, t, layer, head)
                back = decode_keys(codes, positions, t, layer, head, torch.float64)
                wrong = rope.rotate(back - k, -positions)
                cost += (wrong * gradients[layer, head]).sum(-1).square().mean().item()
        costs.append(cost)
        made.append(t)
    assert costs[0] < 0.5 * costs[1]
    with_gradients, without = made
    assert with_gradients.value_bits.double().mean() == 2.5
    order = with_gradients.value_bits.flatten().tolist()
    assert order == sorted(order) and order[0] < order[-1], "costly heads come last"
    assert without.value_bits.eq(even_value_bits(point)).all()


@given(
    costs=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_head_bits_are_as_many_as_asked(costs, share):
    few, most = VALUE_BITS
    spare = round(share * (most - few) * len(costs))
    found = head_bits(torch.tensor([costs]), few + spare / len(costs))
    assert found.dtype == torch.uint8 and found.shape == (1, len(costs))
    assert found.min() >= few and found.max() <= most
    assert found.sum() == few * len(costs) + spare
    for a, cost in enumerate(costs):
        for b, other in enumerate(costs):
            assert not (cost > other and found[0, a] < found[0, b])
