"""The benchmark of instructions: that what it protects is the instructions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.pitfalls.__main__ import TASKS, VARIANTS, items, jobs, parts


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


def test_instructions_are_found(tokenizer: Any) -> None:
    found = items(tokenizer, SimpleNamespace(context=384, per_task=1, seed=0))
    assert [task for task, _, _ in found] == list(TASKS)
    for task, item, instructed in found:
        assert len(item.context) <= 384
        said = [tokenizer.decode(item.context[first:end]) for first, end in instructed]
        if task == "conflict":
            assert len(said) == 2 and said[0].startswith("\n\nInstruction: The code word")
            assert said[1].startswith("\n\nNew instruction: Forget") and said[1].endswith(".")
        else:
            assert len(said) == 1 and said[0].startswith("System: ") and said[0].endswith(".")
            assert instructed[0][0] == 0 and 10 < instructed[0][1] < 100
        whole = parts(instructed, len(item.context))
        assert set(instructed) <= set(whole)
        assert [t for span in whole for t in range(*span)] == list(range(len(item.context)))
    for variant in VARIANTS:
        made = jobs(found, "snapkv", variant, 0.25)
        keys = {"plain": set(), "fair": {"kv_spans"}, "protected": {"kv_protect"}}[variant]
        assert all(set(job.extra) == keys for job in made)
        assert {job.policy for job in made} == {
            "fair(snapkv)" if keys == {"kv_spans"} else "snapkv"
        }
