"""What is told about policies, and that a stranger's package works as its page says."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from vllm_kvcrush import policies
from vllm_kvcrush.tools import cli
from vllm_kvcrush.tools.policies import describe, documented, page

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", policies.BUILT_IN)
def test_docstrings_have_what_the_page_needs(name: str) -> None:
    about = describe(name)
    assert about.title.endswith(".") and about.text
    assert about.source or name in ("composed", "fair") or "arXiv" in about.text[0]
    known = [own.name for own in fields(policies.class_of(name)) if own.init]
    assert [parameter for parameter, _, _ in about.parameters] == known
    for parameter, default, meaning in about.parameters:
        assert meaning.endswith("."), f"{parameter} is not explained"
        assert default, parameter


def test_what_is_parsed_of_a_docstring() -> None:
    about = describe("expected_attention")
    assert about.source == "arXiv 2510.00636"
    assert about.needs == "the last queries"
    assert about.cost.startswith("O(w n D)") and about.choose.startswith("where")
    assert about.parameters[1] == ("covariance", "true", "whether Σ counts.")
    assert describe("rerotate").parameters[0][1] == "streaming"
    with pytest.raises(ValueError, match="'nothing' is not a policy"):
        describe("nothing")


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policies", "tova"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("## `tova`") and "| policy |" not in alone
    assert cli.main(["policies"]) == 0
    every = capsys.readouterr().out
    assert every == page(documented()) and alone.strip() in every
    assert cli.main(["policies", "nothing"]) == 2
    assert "'nothing' is not a policy" in capsys.readouterr().err


def test_the_example_of_a_package_works(tmp_path: pathlib.Path) -> None:
    """Its files are written where an installer would put them, and another process finds them."""
    text = (ROOT / "docs" / "own_policy.md").read_text()
    project, code = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recency_policy.py").write_text(code)
    (entry,) = re.findall(r"^recency = \"(.*)\"$", project, re.MULTILINE)
    installed = tmp_path / "recency_policy-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: recency-policy\nVersion: 0.1\n"
    )
    (installed / "entry_points.txt").write_text(f"[vllm_kvcrush.policies]\nrecency = {entry}\n")
    script = """
import json
from vllm_kvcrush import policies
from vllm_kvcrush.policies.choice import dry_run
from vllm_kvcrush.tools.policies import describe
for text in ("recency", "kvcrush(recency(bucket=16))", "fair(recency)"):
    dry_run(policies.get(text))
print(json.dumps([describe("recency").parameters, "recency" in policies.names()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    parameters, known = json.loads(done.stdout)
    assert parameters == [["bucket", "64", "tokens that count as equally old."]] and known
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 22
