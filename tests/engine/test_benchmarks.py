"""The quality benchmark, end to end and tiny: items and a user's data through vLLM."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine
ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns a folder as RULER writes it, with one item."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "niah_single_1").mkdir()
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 12
    needle = "One of the special magic numbers for owl is: 7412853. "
    question = (
        "What is the special magic number for owl mentioned in the provided text? The special "
        "magic number for owl mentioned in the provided text is"
    )
    line = {"index": 0, "input": noise + needle + noise + question, "outputs": ["7412853"]}
    path = folder / "niah_single_1" / "validation.jsonl"
    path.write_text(json.dumps({**line, "length": 500}) + "\n")
    return folder


def run(
    tmp_path: pathlib.Path, ruler: pathlib.Path, *more: str
) -> subprocess.CompletedProcess[str]:
    flags = "--contexts 400 --per-task 1 --tasks needle_single,repeat --policies snapkv,kvcrush"
    return subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.quality", "--quick", *flags.split()),
            *("--budgets", "0.5,128", "--ruler", str(ruler), "--pool-tokens", "8192"),
            *("--json", str(tmp_path / "quality.json"), *more),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


def test_quality_of_two_policies_through_vllm(
    tmp_path: pathlib.Path, ruler: pathlib.Path, model_path: str
) -> None:
    done = run(tmp_path, ruler)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    by = {
        (r["policy"], r["budget"], r["mode"], r["task"], r["metric"]): r["value"]
        for r in rows
        if r["context"] == 400 or r["task"].startswith("ruler/")
    }
    for mode in ("question_before", "question_after"):
        for policy in ("snapkv", "kvcrush"):
            for budget, least in ((0.5, 1.6), (128, 2.2)):
                ratio = by[policy, budget, mode, "all", "bytes_ratio"]
                assert least < ratio < 4, "held blocks, against those of the full cache"
                assert by[policy, budget, mode, "all", "kl"] > 0
                assert 0 <= by[policy, budget, mode, "all", "agreement"] < 1
                delta = by[policy, budget, mode, "repeat", "delta_nll"]
                assert delta > 0, "an earlier passage is lost when most of it is evicted"
            assert by[policy, 0.5, mode, "ruler/niah_single_1", "score"] in (0.0, 1.0)
        assert by["none", 1.0, mode, "all", "delta_nll"] == 0
        assert by["none", 1.0, mode, "all", "bytes_ratio"] == 1
        assert by["none", 1.0, mode, "needle_single", "token_accuracy"] > 0.5
    assert "### KVCrush against the others" in done.stdout
