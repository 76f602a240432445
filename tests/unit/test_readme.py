"""README says what was measured."""

from benchmarks import readme


def test_readme_and_picture_agree_with_their_sources() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.fill(text) == text, "run python -m benchmarks.readme"
    drawn = (readme.ROOT / "docs" / "plan.svg").read_text()
    assert drawn == readme.picture(), "run python -m benchmarks.readme"
    assert "peak running" in readme.admission()
