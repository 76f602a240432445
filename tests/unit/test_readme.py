"""The pages say what was measured."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks import figures, plan_picture


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda p: str(p.relative_to(figures.ROOT)))
def test_tables_are_those_of_the_committed_results(page: pathlib.Path) -> None:
    assert not figures.outdated(page, figures.parts()), "run make figures"


def test_pictures_were_drawn_from_the_committed_results() -> None:
    assert figures.undrawn() == [], "run make figures"
    drawn = (figures.ROOT / "docs" / "plan.svg").read_text()
    assert drawn == plan_picture.picture(), "run make figures"


def test_a_changed_figure_is_noticed(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((figures.ROOT / "README.md").read_text().replace("times as many", "times"))
    assert figures.outdated(page, figures.parts())


def test_every_marker_is_known() -> None:
    with pytest.raises(ValueError, match="no table is called speed"):
        figures.fill("<!-- speed -->\nfast\n<!-- /speed -->", figures.parts())


@pytest.mark.parametrize("name", figures.DRAW)
def test_every_result_can_be_drawn(name: str, tmp_path: pathlib.Path) -> None:
    result = figures.RESULTS / f"{name}.json"
    drawn = figures.draw(name, result, tmp_path / "picture.svg")
    assert drawn is not None and figures.digest(result) in drawn.read_text()
