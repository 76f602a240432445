"""What all benchmarks share: rows, resuming, statistics."""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import pytest

from benchmarks import report


def namespace(path: pathlib.Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"json": path, "quick": True, "restart": False, **more})


def measured(log: list[str], step: str) -> dict[str, str]:
    log.append(step)
    return {"of": step}


def test_a_killed_run_goes_on_after_its_last_finished_step(tmp_path: pathlib.Path) -> None:
    path, log = tmp_path / "result.json", []
    first = report.Run("test", namespace(path))
    for step in ("a", "b"):
        first.step(step, lambda step=step: measured(log, step))
    with pytest.raises(SystemExit, match="another run writes"):
        report.Run("test", namespace(path))
    del first
    with (tmp_path / "result.partial.jsonl").open("a") as out:
        out.write('{"step": "c", "resu')  # killed while it wrote
    second = report.Run("test", namespace(path))
    assert second.has("b") and not second.has("c")
    for step in ("a", "b", "c"):
        assert second.step(step, lambda step=step: measured(log, step)) == {"of": step}
    assert log == ["a", "b", "c"]
    second.add("kl", 0.5, "nats", policy="kvcrush")
    second.finish()
    result = report.read(path)
    assert result["rows"] == [report.row("kl", 0.5, "nats", policy="kvcrush")]
    assert result["environment"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == [path], "nothing is left to resume"


@pytest.mark.parametrize("change", [{"quick": False}, {"restart": True}])
def test_other_settings_or_restart_measure_anew(
    tmp_path: pathlib.Path, change: dict[str, object]
) -> None:
    path, log = tmp_path / "result.json", []
    report.Run("test", namespace(path)).step("a", lambda: measured(log, "a"))
    report.Run("test", namespace(path, **change)).step("a", lambda: measured(log, "a"))
    assert log == ["a", "a"]


def test_other_code_measures_anew(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, log = tmp_path / "result.json", []
    report.Run("test", namespace(path)).step("a", lambda: measured(log, "a"))
    monkeypatch.setattr(report, "sources", lambda: "other")
    report.Run("test", namespace(path)).step("a", lambda: measured(log, "a"))
    assert log == ["a", "a"]


def test_every_row_has_every_column() -> None:
    row = report.row("peak_running", 3, "requests", n=2, budget=0.25)
    columns = "policy codec budget context task mode metric value low high unit n"
    assert sorted(row) == sorted(columns.split())
    with pytest.raises(ValueError, match="no such column: bugdet"):
        report.row("peak_running", 3, "requests", bugdet=0.25)


def test_a_file_of_another_schema_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0, "rows": []}))
    with pytest.raises(ValueError, match="schema 0"):
        report.read(path)


def test_the_interval_of_a_mean_holds_it_and_narrows() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(2.0, 1.0, 20), rng.normal(2.0, 1.0, 2000)
    for sample in (few, many):
        mean, low, high = report.interval(list(sample))
        assert low is not None and high is not None and low < mean < high
        assert mean == pytest.approx(sample.mean())
    # A bootstrap interval is close to the normal one: ± 1.96 σ / √n.
    assert (high - low) / 2 == pytest.approx(1.96 / 2000**0.5, rel=0.15)
    assert report.interval([3.0]) == (3.0, None, None)
    with pytest.raises(ValueError, match="no values"):
        report.interval([])


def test_the_median_comes_with_its_range() -> None:
    assert report.median([5.0, 1.0, 2.0]) == (2.0, 1.0, 5.0)
