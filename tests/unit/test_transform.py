"""The transform codec against its own definitions: bounds, identities, files, arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush import transform as tc
from vllm_kvcrush.transform import Capacities, Layout, Point, Rope, Statistics, TablesError

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 300,
    "rope_theta": 10000.0,
}
L, H, G, D = 2, 2, 2, 16
TC4 = Point("tc4", "rotated", 3.0, 4, 0.02)
TC8 = Point("tc8", "unrotated", 1.5, 2, 0.02)


def fresh(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and queries of unequal channels with RoPE, values, positions."""
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


def tables(point: Point, most: int = tc.MAX_BITS) -> tc.Tables:
    keys, queries, values, positions = fresh(4000, 1)
    rope = Rope.from_config(CONFIG)
    keys, queries = rope.rotate(keys, -positions), rope.rotate(queries, -positions)
    return tc.fit(Statistics.of(keys, queries, values), point, rope, 4000, most)


@pytest.mark.parametrize(("bits", "known"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_quantisers_are_lloyd_max(bits, known):
    q = tc.quantiser(bits)
    assert q.levels.dtype == torch.int8 and q.levels.numel() == 2**bits
    assert q.levels.abs().max() == tc.MAX_INT8
    assert torch.equal(q.levels.flip(0).int(), -q.levels.int())
    # Rounding the levels to int8 costs next to nothing.
    assert known - 1e-4 <= q.distortion <= known * 1.003
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    y = (q.levels.double() * q.step)[torch.bucketize(x, q.thresholds)]
    assert (x - y).square().mean().item() == pytest.approx(q.distortion, rel=0.02)


@pytest.mark.parametrize(("bits", "known"), [(5, 0.003495), (6, 0.001040), (7, 0.0003043)])
def test_fine_quantisers_are_the_best_even_ones(bits, known):
    q = tc.quantiser(bits)
    assert q.levels.numel() == 2**bits and set(q.levels.int().diff().tolist()) == {2}
    assert q.distortion == pytest.approx(known, rel=2e-3)


@pytest.mark.parametrize("bits", range(tc.MAX_BITS + 1))
def test_pieces_add_up(bits):
    q, parts = tc.quantiser(bits), tc.pieces(bits)
    assert sum(width for width, _, _ in parts) == bits
    assert all(width <= 4 and len(levels) == 2**width for width, levels, _ in parts)
    code, total = torch.arange(2**bits), torch.zeros(2**bits, dtype=torch.float64)
    left = bits
    for width, levels, step in parts:
        left -= width
        assert levels.dtype == torch.int8
        total += levels.double()[(code >> left) % 2**width] * step
    torch.testing.assert_close(total, q.levels.double() * q.step)


def test_bits_are_pooled_by_gain_and_capped():
    variances = torch.tensor([[100.0, 1.0, 0.01], [10.0, 10.0, 1e-6]])
    bits = tc.pooled_bits(variances, 1.5)
    assert bits.sum() == 9 and bits.max() <= tc.MAX_BITS
    assert bits[0, 0] == bits.max() and bits[1, 2] == 0
    assert bits[1, 0] >= bits[1, 1] >= bits[0, 1] >= bits[0, 2]
    # No exchange of one bit lowers the error.
    d = torch.tensor([tc.quantiser(b).distortion for b in range(tc.MAX_BITS + 1)])
    gain = lambda v, b: v * (d[b] - d[b + 1])  # noqa: E731
    flat, given_bits = variances.flatten(), bits.flatten().long()
    could = max(gain(v, b) for v, b in zip(flat, given_bits, strict=True) if b < tc.MAX_BITS)
    has = min(gain(v, b - 1) for v, b in zip(flat, given_bits, strict=True) if b)
    assert could <= has
    assert torch.equal(tc.pooled_bits(torch.ones(4), 0.5), torch.tensor([1, 1, 0, 0]).byte())
    with pytest.raises(ValueError, match="between 0 and 4"):
        tc.pooled_bits(torch.ones(4), 4.5, most=4)


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
    y = tc.hadamard(x)
    torch.testing.assert_close(tc.hadamard(y), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    block = size & -size
    one = torch.zeros(size, dtype=torch.float64)
    one[0] = 1
    assert torch.allclose(tc.hadamard(one)[:block], torch.full((block,), block**-0.5).double())
    assert not tc.hadamard(one)[block:].any()


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.13), (3, 0.042), (4, 0.014)])
def test_value_error_is_that_of_the_quantiser(size, bits, bound):
    g = torch.Generator().manual_seed(bits)
    # Over the whole range of scales, with one channel that sticks out.
    v = torch.randn(600, size, generator=g) * torch.logspace(-2, 2, 600)[:, None]
    v[:, 3] *= 5
    back = tc.decode_values(*tc.encode_values(v, bits), bits)
    error = (back - v).square().sum(-1) / v.square().sum(-1)
    assert error.mean() < bound


def test_values_of_nothing_stay_nothing():
    codes, scales = tc.encode_values(torch.zeros(3, 16), 2)
    assert not scales.any()
    assert not tc.decode_values(codes, scales, 2).any()


@pytest.mark.parametrize("frame", tc.FRAMES)
def test_forward_and_inverse_match(frame):
    t = tables(dataclasses.replace(TC8, frame=frame))
    eye = torch.eye(D).expand(L, H, D, D)
    torch.testing.assert_close(t.forward @ t.inverse, eye, atol=1e-3, rtol=0)
    assert (t.bits.int().diff(dim=-1) <= 0).all()
    assert t.bits.long().sum() == round(1.5 * L * H * D)


@pytest.mark.parametrize("frame", tc.FRAMES)
def test_components_are_white_on_fresh_keys(frame):
    t = tables(dataclasses.replace(TC8, frame=frame))
    keys, _, _, positions = fresh(4000, 2)
    x = t.rope.rotate(keys, -tc.origins(frame, positions)) - t.key_mean[:, :, None]
    x = x @ t.forward.mT.double()
    second = x.mT @ x / x.shape[2]
    # Components that no query can see are not blown up to unit variance.
    seen = t.sigma > 1e-4 * t.sigma.amax(-1, keepdim=True)
    assert seen.float().mean() > 0.9
    eye = torch.eye(D, dtype=torch.float64).expand_as(second)
    both = seen[..., :, None] & seen[..., None, :]
    torch.testing.assert_close(second[both], eye[both], atol=0.12, rtol=0)


@pytest.mark.parametrize("frame", tc.FRAMES)
def test_more_bits_lose_less_and_the_loss_is_what_queries_see(frame):
    keys, queries, _, positions = fresh(4000, 3)
    g = torch.Generator().manual_seed(3)
    # Queries anywhere up to the horizon: from the key, or in "rotated" from the beginning.
    free = Rope.from_config(CONFIG).rotate(queries, -positions)
    far = torch.randint(4000, positions.shape, generator=g)
    places = far if frame == "rotated" else positions + far
    order = torch.randperm(4000, generator=g)
    errors = []
    for bits in (1.0, 2.0, 3.0, 4.0):
        t = tables(dataclasses.replace(TC8, frame=frame, key_bits=bits))
        q = t.rope.rotate(free[:, :, order], places).view(L, H, G, -1, D)
        expected = seen = 0.0
        for layer in range(L):
            for head in range(H):
                at = t, layer, head
                codes, loss = tc.encode_keys(keys[layer, head], positions, *at)
                back = tc.decode_keys(codes, positions, *at, torch.float64)
                e = keys[layer, head] - back
                expected += loss.mean().item()
                seen += (q[layer, head] * e).sum(-1).square().sum(0).mean().item()
        errors.append(seen)
        assert seen == pytest.approx(expected, rel=0.1)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_the_transform_beats_plain_channels_at_equal_bits():
    keys, queries, _, positions = fresh(600, 4)
    t = tables(TC8)
    plain = tc.online(keys, queries, positions, positions, TC8, t.rope)
    losses = []
    for some in (t, plain):
        codes, _ = tc.encode_keys(keys[0, 0], positions, some, 0, 0)
        e = keys[0, 0] - tc.decode_keys(codes, positions, some, 0, 0, torch.float64)
        losses.append((queries[0, :G].reshape(-1, D) @ e.mT).square().mean())
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("point", [TC4, TC8, dataclasses.replace(TC8, frame="tile")])
def test_encoding_again_changes_nothing(point):
    t = tables(point)
    keys, _, values, positions = fresh(200, 5)
    codes, _ = tc.encode_keys(keys[1, 1], positions, t, 1, 1)
    back = tc.decode_keys(codes, positions, t, 1, 1, torch.float64)
    again, _ = tc.encode_keys(back, positions, t, 1, 1)
    assert torch.equal(again, codes)
    value_codes, scales = tc.encode_values(values[1, 1], point.value_bits)
    back = tc.decode_values(value_codes, scales, point.value_bits, torch.float64)
    assert torch.equal(tc.encode_values(back, point.value_bits)[0], value_codes)


@pytest.mark.parametrize("frame", ["rotated", "tile"])
def test_absorbed_queries_give_the_logits_of_decoded_keys(frame):
    t = tables(dataclasses.replace(TC4, frame=frame))
    keys, queries, _, positions = fresh(tc.TILE, 6)
    positions = positions + 777
    at = t, 0, 1
    codes, _ = tc.encode_keys(keys[0, 1], positions, *at)
    q = queries[0, 2 * G - 1]
    plain = q @ tc.decode_keys(codes, positions, *at, torch.float64).mT
    turned = t.rope.rotate(q, -tc.origins(frame, positions)[:1].expand(len(q)))
    absorbed = turned @ t.inverse[0, 1].double()
    x = tc.values_of(codes, t.bits[0, 1], torch.float64)
    logits = absorbed @ x.mT + (turned @ t.key_mean[0, 1].double())[:, None]
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


def test_components_without_bits_need_no_transform():
    t = tables(TC8)
    keys, _, _, positions = fresh(50, 8)
    codes, _ = tc.encode_keys(keys[0, 0], positions, t, 0, 0)
    used = int((t.bits[0, 0] > 0).sum())
    assert 0 < used < D
    inverse = t.inverse.clone()
    inverse[..., used:] = torch.nan
    cut = dataclasses.replace(t, inverse=inverse)
    x = tc.values_of(codes, t.bits[0, 0])[:, :used] @ cut.inverse[0, 0, :, :used].mT
    back = t.rope.rotate(x + t.key_mean[0, 0], positions)
    torch.testing.assert_close(back, tc.decode_keys(codes, positions, t, 0, 0))


@pytest.mark.parametrize("point", [TC4, TC8])
def test_pages_hold_sinks_and_the_worst_keys_in_int8(point):
    t = tables(point)
    keys, _, values, positions = fresh(160, 9)
    keys[0, 0, 77] *= 30  # unlike anything in calibration
    page = tc.encode_page(keys[0, 0], values[0, 0], positions, t, 0, 0, exceptions=8)
    assert page.slots.tolist()[:4] == [0, 1, 2, 3] and 77 in page.slots
    assert len(page.slots) == 8
    k, v = tc.decode_page(page, t, 0, 0, torch.float64)
    exact = page.slots
    bound = keys[0, 0, exact].abs().amax(-1, keepdim=True) / 127 * 0.51
    assert ((k[exact] - keys[0, 0, exact]).abs() <= bound).all()
    bound = values[0, 0, exact].abs().amax(-1, keepdim=True) / 127 * 0.51
    assert ((v[exact] - values[0, 0, exact]).abs() <= bound).all()
    few = tc.encode_page(keys[0, 0, :3], values[0, 0, :3], positions[:3], t, 0, 0, exceptions=8)
    assert few.slots.tolist() == [0, 1, 2]
    late = tc.encode_page(keys[0, 0, 4:], values[0, 0, 4:], positions[4:], t, 0, 0, exceptions=1)
    assert late.slots.tolist() == [73]


@pytest.mark.parametrize("frame", ["rotated", "unrotated"])
def test_mass_bias_restores_the_mass_of_coded_tokens(frame):
    t = tables(dataclasses.replace(TC8, frame=frame, key_bits=1.0))
    keys, queries, _, positions = fresh(2000, 10)
    scale = 0.01
    before, after = [], []
    lost = t.lost(4000)
    for head in range(H):
        codes, _ = tc.encode_keys(keys[0, head], positions, t, 0, head)
        back = tc.decode_keys(codes, positions, t, 0, head, torch.float64)
        q = queries[0, head * G, -50:]
        mass = (scale * q @ keys[0, head].mT).logsumexp(-1)
        coded = (scale * q @ back.mT).logsumexp(-1)
        seen = q if frame == "rotated" else t.rope.rotate(q, -positions[-50:])
        before.append(mass - coded)
        after.append(mass - coded - tc.mass_bias(seen, lost[0, head], scale))
    before, after = torch.cat(before), torch.cat(after)
    assert before.mean() > 1e-3
    assert after.mean().abs() < before.mean() / 2


@pytest.mark.parametrize("frame", ["rotated", "unrotated"])
def test_online_tables_come_from_the_request_alone(frame):
    point = dataclasses.replace(TC8, frame=frame, key_bits=2.0)
    keys, queries, _, positions = fresh(300, 11)
    rope = Rope.from_config(CONFIG)
    t = tc.online(keys, queries[:, :, -32:], positions, positions[-32:], point, rope)
    assert (t.bits.long().sum(-1) == round(2.0 * D)).all()
    assert (t.bits.int().diff(dim=-1) <= 0).all()
    torch.testing.assert_close(t.forward @ t.inverse, torch.eye(D).expand(L, H, D, D))
    codes, _ = tc.encode_keys(keys[0, 0], positions, t, 0, 0)
    back = tc.decode_keys(codes, positions, t, 0, 0, torch.float64)
    e = (queries[0, :G].reshape(-1, D) @ (back - keys[0, 0]).mT).square().mean()
    centred = keys[0, 0] - keys[0, 0].mean(0)
    assert e < 0.2 * (queries[0, :G].reshape(-1, D) @ centred.mT).square().mean()


# -- page arithmetic ------------------------------------------------------------------------------


def test_a_page_by_hand():
    layout = Layout(key_bits=96, value_bits=2, key_size=64, value_size=64, exceptions=0.02)
    assert layout.tile_bytes == (96 + 128) * 4 + 32
    assert layout.exception_bytes == 64 + 64 + 4 + 2
    capacity = layout.capacity(16384)
    assert capacity == 512
    assert 32 + 16 * 928 + 11 * 134 <= 16384 < 32 + 17 * 928 + 11 * 134
    assert dataclasses.replace(layout, listed=True).tile_bytes == 928 + 64


@settings(max_examples=200, deadline=None)
@given(
    key_bits=st.integers(0, 512),
    value_bits=st.integers(1, 4),
    size=st.sampled_from([64, 80, 128, 256]),
    exceptions=st.floats(0, 0.1),
    page=st.integers(12_000, 1 << 19),
    listed=st.booleans(),
)
def test_capacity_is_the_most_that_fits(key_bits, value_bits, size, exceptions, page, listed):
    layout = Layout(key_bits, value_bits, size, size, exceptions, listed)

    def size_of(tokens):
        exact = max(4, math.ceil(exceptions * tokens)) * layout.exception_bytes
        return 32 + tokens // 32 * layout.tile_bytes + exact

    capacity = layout.capacity(page)
    assert capacity % 32 == 0 and capacity > 0
    assert size_of(capacity) <= page < size_of(capacity + 32)
    # No room is left for one exception more.
    slots, spare = layout.slots(page), page - 32 - capacity // 32 * layout.tile_bytes
    assert slots >= max(4, math.ceil(exceptions * capacity)) or slots == capacity
    assert slots == capacity or 0 <= spare - slots * layout.exception_bytes < layout.exception_bytes


def test_a_page_too_small_is_refused():
    with pytest.raises(TablesError, match="--block-size"):
        Layout(192, 4, 64, 64, 0.02).capacity(1500)


@settings(max_examples=100, deadline=None)
@given(
    held=st.lists(st.integers(1, 30).map(lambda x: 32 * x), min_size=1, max_size=12),
    tokens=st.integers(0, 100_000),
)
def test_pages_needed_counts_every_head(held, tokens):
    c = Capacities(tuple(held), 4096, (4,) * len(held))
    assert tc.pages_needed(tokens, c) == sum(math.ceil(tokens / x) for x in held)
    assert c.blocks(tokens) == math.ceil(c.pages(tokens) / len(held))
    assert c.bytes(tokens) == c.blocks(tokens) * len(held) * 4096 + 7 * c.pages(tokens)
    assert c.pages(tokens) <= c.pages(tokens + 1)


def test_capacities_follow_each_heads_bits():
    t = tables(TC8)
    c = tc.capacities(t, D, 8192)
    assert len(c.tokens) == L * H
    sums = t.bits.long().sum(-1).flatten().tolist()
    layouts = [Layout(b, 2, D, D, 0.02) for b in sums]
    assert c.tokens == tuple(x.capacity(8192) for x in layouts)
    assert c.slots == tuple(x.slots(8192) for x in layouts)
    equal = tc.online_capacities(TC8, L * H, D, D, 8192)
    assert set(equal.tokens) == {Layout(round(1.5 * D), 2, D, D, 0.02).capacity(8192)}
    # Raw pages of 64 bfloat16 tokens: everything counted, about as the bits say.
    ratio = equal.ratio(20_000, L * H * 2 * D * 2)
    assert 0.8 * 512 / (24 + 32 + 8) < ratio < 512 / (24 + 32 + 8)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tables.safetensors"
    both = [tables(TC4), tables(TC8)]
    tc.save(path, tc.Model.from_config(CONFIG, "tiny"), both, "digest of a text")
    return path, both


def test_files_give_back_what_was_saved(saved):
    path, both = saved
    for mine in both:
        read = tc.load(path, CONFIG, mine.point.name)
        assert read.point == mine.point
        for name in ("key_mean", "forward", "inverse", "sigma", "bits"):
            assert torch.equal(getattr(read, name), getattr(mine, name))
        assert torch.equal(read.rope.frequencies, mine.rope.frequencies)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # The other way in which transformers writes the same model.
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    tc.load(path, {**new, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "tc8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "tiny .layers 2 instead of 3"),
        ({"num_key_value_heads": 4}, "kv_heads 2 instead of 4"),
        ({"head_dim": 32}, "size 16 instead of 32"),
        ({"vocab_size": 301}, "vocabulary"),
        ({"rope_theta": 20000.0}, "rope"),
    ],
)
def test_tables_of_another_model_are_refused(saved, change, message):
    with pytest.raises(TablesError, match=message) as caught:
        tc.load(saved[0], {**CONFIG, **change}, "tc8")
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
            tc.load(bad, CONFIG, "tc8")
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(TablesError, match="is damaged"):
        tc.load(bad, CONFIG, "tc8")
    save_file({"x": torch.zeros(3)}, bad)
    with pytest.raises(TablesError, match="holds no transform tables"):
        tc.load(bad, CONFIG, "tc8")
    with pytest.raises(TablesError, match="does not exist"):
        tc.load(tmp_path / "nowhere", CONFIG, "tc8")
    with pytest.raises(TablesError, match="no tables for tc16, only for tc4, tc8"):
        tc.load(path, CONFIG, "tc16")


def test_other_versions_are_refused(saved, monkeypatch):
    monkeypatch.setattr(tc, "VERSION", 2)
    with pytest.raises(TablesError, match="version 1 of the tables, this release reads 2"):
        tc.load(saved[0], CONFIG, "tc8")


def test_a_config_that_is_no_text_model_is_refused():
    broken = json.loads(json.dumps(CONFIG))
    del broken["vocab_size"]
    with pytest.raises(TablesError, match="no vocab_size"):
        tc.Model.from_config(broken)
