"""What the table of compiled kernels says about those that went wrong; nothing is compiled here."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from benchmarks import report
from benchmarks.gpu import __main__ as table
from benchmarks.gpu import builds, child, disassembly

GOOD = disassembly.Facts(
    registers=99, spills=0, shared_bytes=1024, instructions=500, tensor_core_instructions=8,
    wide_loads=4, async_loads=4, loop_instructions=200, blocks=2, occupancy=0.25,
)  # fmt: skip


def row(monkeypatch: pytest.MonkeyPatch, target: str, **facts: Any) -> dict[str, Any]:
    monkeypatch.setattr(builds.Build, "compile", lambda self, target: None)
    monkeypatch.setattr(disassembly, "facts", lambda kernel, target: GOOD)
    scores = next(b for b in builds.others(64, 3, "bf16") if b.kernel == "scores")
    return table.compiled(scores, target) | facts


def test_bad_code_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in builds.TARGETS:
        assert table.problems(row(monkeypatch, target)) == []
        for facts, problem in (
            ({"spills": 8}, "spills 8 bytes"),
            ({"blocks": 0}, "does not fit a processor"),
            ({"tensor_core_instructions": 0}, "has no tensor core instruction"),
        ):
            assert table.problems(row(monkeypatch, target, **facts)) == [problem]
    narrow = row(monkeypatch, "sm_90", wide_loads=0)
    assert table.problems(narrow) == ["has no 128-bit load in its loops"]
    # What does not multiply may read less than that at a time.
    assert table.problems(narrow | {"kernel": "store", "tensor_core_instructions": 0}) == []


def test_a_compiler_that_dies_leaves_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: builds.Build, target: str) -> None:
        os.write(2, b"# Machine code\n\n*** Bad machine code: Found no use ***\n- function: f\n")
        os.write(2, b"LLVM ERROR: Found 8 machine code errors.\n")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(builds.Build, "compile", die)
    build = builds.attention("int4", 128, 4, "bf16", True, "sm_90")
    found = table.compiled(build, "sm_90")
    assert found["registers"] is None and found["kernel"] == "decode"
    assert table.problems(found) == ["does not compile: Bad machine code: Found no use"]
    assert "| does not compile |" in table.compile_table([found])
    assert table.floors([found]) == []


def test_why_a_call_gave_nothing() -> None:
    def fail() -> None:
        raise ValueError("no such thing\nand more")

    assert child.call(lambda: 3) == (3, None)
    assert child.call(fail) == (None, "ValueError: no such thing")
    assert child.call(lambda: os._exit(7)) == (None, "exit status 7")


def test_problems_end_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The result is written nevertheless."""
    bad = row(monkeypatch, "sm_90", spills=16)
    monkeypatch.setattr(table, "compiled", lambda build, target: bad)
    path = tmp_path / "compiled.json"
    arguments = ["gpu", "--quick", "--targets", "sm_90", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="for sm_90 spills 16 bytes"):
        table.main()
    assert {r["spills"] for r in report.read(path)["rows"]} == {16}


def test_builds_that_are_not_asked_for_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def compiled(build: builds.Build, target: str) -> dict[str, Any]:
        made.append(build.name)
        own: dict[str, Any] = {"kernel": build.kernel, "codec": build.codec}
        own |= {"head_size": build.size, "group": build.group, "dtype": build.dtype}
        own |= {"tile": build.tile or None}
        return good | own

    good = row(monkeypatch, "sm_90")
    monkeypatch.setattr(table, "compiled", compiled)
    path = tmp_path / "compiled.json"
    arguments = ["gpu", "--quick", "--targets", "sm_90", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "scores"])
    with pytest.raises(SystemExit):
        table.main()
    assert "a file that has the other rows" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    rows, every = report.read(path)["rows"], list(made)
    made.clear()
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "scores tc"])
    table.main()
    assert made == [name for name in every if name.startswith("scores tc")]
    assert report.read(path)["rows"] == rows
    # For a target that the file lacks, no others come.
    arguments[arguments.index("sm_90")] = "sm_90,gfx942"
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "scores tc"])
    table.main()
    assert len(report.read(path)["rows"]) == len(rows) + len(made) // 3
