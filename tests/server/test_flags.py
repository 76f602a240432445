"""What `vllm serve` says about wrong flags: one sentence, before any engine starts."""

from __future__ import annotations

import pathlib

import pytest

from tests.server.conftest import serve

BASE = ["--dtype=float32", "--enforce-eager", "--max-model-len=2048", "--port=1"]
CASES = {
    "--kv-policy=h3o": "--kv-policy='h3o' is not a policy",
    "--kv-policy=kvcrush --kv-budget=2.5": "--kv-budget='2.5' is not a KV budget",
    "--kv-budget=0.5": "add --kv-policy=kvcrush",
    "--kv-policy=kvcrush --kv-policy-config.kvcrush.anchor=up": (
        "--kv-policy-config.kvcrush.anchor='up' is not one of"
    ),
    '--additional-config={"kvcrush":{"policy":"kvcrush","bugdet":0.5}}': "no key 'bugdet'",
    "--kv-policy=kvcrush --kv-canary=0.1 --logprobs-mode=raw_logits": (
        "--kv-canary and --logprobs-mode=raw_logits, which gives no log-probabilities"
    ),
    "--kv-policy=kvcrush --kv-canary=5": "--kv-canary='5' is not a share of requests",
    "--kv-policy=kvcrush --kv-cache-dtype=fp8 --enable-dbo": "quantised KV cache",
}


def check(status: object, said: str, sentence: str) -> None:
    assert status == 2, said[-2000:]
    last = [line for line in said.splitlines() if line.strip()][-1]
    assert sentence in last, said[-2000:]
    assert "Traceback" not in said and "EngineCore" not in said


@pytest.mark.parametrize("flags", CASES)
def test_wrong_flags_are_one_sentence(
    model_path: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Makes, in this process, the calls that `vllm serve` makes before it starts an engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers().add_parser("serve"))
    with pytest.raises(SystemExit) as ended:
        args = parser.parse_args(["serve", model_path, *BASE, *flags.split()])
        args.model = args.model_tag
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    check(ended.value.code, capsys.readouterr().err, CASES[flags])


@pytest.mark.server
def test_the_command_ends_with_the_sentence(model_path: str, tmp_path: pathlib.Path) -> None:
    """The error is in what is checked last, the configuration of the whole engine."""
    flags, sentence = list(CASES.items())[-1]
    log = tmp_path / "log.txt"
    process = serve(model_path, log, *BASE, *flags.split())
    check(process.wait(240), log.read_text(), sentence)
