"""What an engine launches, compiled for sm_90 and not run: that it compiles, that nothing spills,
and that no length, batch or request makes Triton compile again while serving; and a sample of all
builds. These kernels are not interpreted, so they need a process of their own, which
tests/unit/test_gpu.py starts."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from typing import Any

import pytest

from benchmarks.gpu import __main__ as table
from benchmarks.gpu import disassembly, launches
from tests.gpu.cache import POSITIONS, tables_of
from tests.pairwise import FULL
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

TARGET = "sm_90"
SHAPES = {"llama": (32, 8, 128), "smol": (9, 3, 64)}
MOST_ROWS = 64  # of a program: what a program adds up, [rows, head size], lies in registers


@functools.cache
def model(shape: str, index: int = 1) -> launches.Model:
    """Returns a model with a layer whose cache has room for all codecs."""
    heads, kv_heads, size = SHAPES[shape]
    tables = tables_of(size, kv_heads)
    angles = Angles(tables["tc4"].rope, POSITIONS)
    page_bytes = launches.BLOCK_SIZE * 2 * size * 2
    own = {c: LayerTable(tables[c], 1, range(kv_heads), page_bytes, size, angles) for c in FITTED}
    return launches.Model(heads, kv_heads, size, index=index, tables=own)


def check(found: list[launches.Launch]) -> None:
    """Asserts that no kernel spills, and that each fits on a processor."""
    for launch in {launch.hash: launch for launch in found}.values():
        facts = disassembly.facts(launch.kernel, TARGET)
        said = f"{launch.name} {launch.constants}"
        assert not facts.spills, f"{said} spills {facts.spills} bytes"
        assert facts.blocks >= 1, f"{said} does not fit a processor"


STEPS = [
    *([1] * batch for batch in (1, 2, 7, 64, 257)),
    *([chunk] for chunk in (2, 5, 16, 17, 128, 512, 2048, 8192)),
    [1] * 63 + [512],
    [1] * 63 + [2048],
    [300, 1, 1, 7],
]


def sample(few: list[Any], more: list[Any]) -> list[Any]:
    """Returns what `make test` compiles, and what `make test-all` does besides: compiling takes
    minutes."""
    return few + (more if FULL else [])


@pytest.mark.parametrize(
    ("shape", "codecs"),
    sample(
        [("llama", ("int8", "tc4")), ("smol", ("int8", "raw"))],  # the first is `auto`'s mostly
        [("llama", ()), ("llama", ("int4",))],
    ),
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "tail",
)
def test_steps(shape: str, codecs: tuple[str, ...]) -> None:
    """The steps are decode, chunks of any length, and both together. They need at most decode and
    prefill kernels, each with a row's context split or whole, and one that merges."""
    with launches.compiled(TARGET) as found:
        for rows in STEPS:
            model(shape).step(rows, codecs)
        # Another layer's tables start at other addresses.
        model(shape, 0).step([1], codecs)
    check(found)
    attention = [launch for launch in found if launch.name == "attention_kernel"]
    assert len(attention) == len(STEPS) + 1
    assert max(launch.constants["TILES"].rows for launch in attention) <= MOST_ROWS
    kinds = {(x.constants["UNIFORM"], x.constants["SPLIT"]) for x in attention}
    assert len({launch.hash for launch in attention}) == len(kinds) <= 4
    for name in ("merge_kernel", "store_kernel", "tap_kernel", "shift_kernel"):
        assert len({launch.hash for launch in found if launch.name == name}) == 1


@pytest.mark.parametrize("codecs", sample([("int4", "int8", "raw")], [("raw",), ("int8", "tc4")]))
def test_steps_with_log_biases(codecs: tuple[str, ...]) -> None:
    """What a server compiles whose policies may merge: biases are found by their addresses."""
    with launches.compiled(TARGET) as found:
        model("llama").step([1] * 64, codecs, biased=True)
        model("llama").step([300, 1], codecs, biased=True)
    check(found)
    attention = [launch for launch in found if launch.name == "attention_kernel"]
    assert [launch.constants["BIAS"] for launch in attention] == [True, True]


@pytest.mark.parametrize("codec", sample(["raw", "tc6"], ["int8", "int4"]))
def test_compactions(codec: str) -> None:
    """Gathering, encoding and scoring are launched for requests of several sizes."""
    layer = model("llama")
    with launches.compiled(TARGET) as found:
        layer.compact((codec,), (codec,), 64)
        layer.score((codec,), 64, 32)
        first = {launch.hash for launch in found}
        layer.compact((codec,) * 5, (codec,) * 3, 700)
        layer.score((codec,) * 6, 41, 32)
        layer.compact((codec,) * 40, (codec,), 1)
    check(found)
    assert {launch.hash for launch in found} == first


def test_a_sample_of_all_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """`python -m benchmarks.gpu` fails where a kernel spills or has no tensor core instruction or
    no wide load."""
    result = tmp_path / "compiled.json"
    targets = ["--targets", "sm_90,gfx942"]
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", *targets, "--json", str(result)])
    table.main()
    rows = json.loads(result.read_text())["rows"]
    assert {r["target"] for r in rows} == {"sm_90", "gfx942"} and len(rows) == 28
    assert all(r["spills"] == 0 for r in rows)
