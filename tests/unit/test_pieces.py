"""What the workers of `make test` run as one piece."""

from __future__ import annotations

import pathlib

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("fixture", "piece"), [("engine", "demo engine"), ("server", "server")])
def test_what_is_shared_is_started_once(fixture: str, piece: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob(f"{fixture}/test_*.py")
        if f"{fixture}: {fixture.capitalize()}" in path.read_text()
    }
    assert users == {path for path, name in conftest.SHARING.items() if name == piece}


def test_pieces_of_tests() -> None:
    engine = "tests/engine/test_engine.py::test_blocks_come_free_when_the_prompt_ends"
    assert conftest.group(engine) == "demo engine"
    assert conftest.group(f"{engine}[tiny_engine]") == "tiny engine"
    assert conftest.group("tests/unit/test_gpu.py::test_kernels[compiled]").endswith("[compiled]")
    assert conftest.group("tests/unit/test_plan.py::test_bound[1]") == "tests/unit/test_plan.py"
    for path in (*conftest.SHARING, *conftest.APART):
        assert (ROOT / path).is_file()
