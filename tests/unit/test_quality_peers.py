"""The peers' parent side and pure parts; their environments are not needed here."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import peers
from benchmarks.quality.peers import kvpress_run, openvino_run


def job(**parts: Any) -> dict[str, Any]:
    mode = {
        "prompt": list(range(100)),
        "forced": [1, 2, 3, 4, 5],
        "scored": [False, False, True, True, True],
        "kept": {"0.5": 50},
        **parts,
    }
    items = [{"task": "needle", "index": 0, "modes": {"question_before": mode}}]
    return {"model": "none", "threads": 1, "presses": ["snapkv"], "items": items}


def child(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "child.py"
    path.write_text("import json, os, sys, time\njob = json.load(open(sys.argv[1]))\n" + code)
    return [sys.executable, "-I", str(path)]


def test_records_arrive_one_by_one(tmp_path: Path) -> None:
    # The child goes on only when the parent has seen its first record.
    seen = tmp_path / "seen"
    code = f"""
print(json.dumps({{"n": len(job["items"]), "threads": os.environ["OMP_NUM_THREADS"]}}), flush=True)
while not os.path.exists({str(seen)!r}): time.sleep(0.01)
print(json.dumps({{"n": 2}}), flush=True)
"""
    records = []

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        seen.touch()

    peers.stream("fake", child(tmp_path, code), job(), on_record, silence_s=60)
    assert records == [{"n": 1, "threads": "1"}, {"n": 2}]


def test_a_record_in_pieces(tmp_path: Path) -> None:
    code = """
text = json.dumps({"a": "b" * 100000}) + "\\n" + json.dumps({"c": 1}) + "\\n"
for i in range(0, len(text), 999):
    sys.stdout.write(text[i:i + 999]); sys.stdout.flush()
"""
    records: list[Any] = []
    peers.stream("fake", child(tmp_path, code), job(), records.append, silence_s=60)
    assert records == [{"a": "b" * 100000}, {"c": 1}]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "print('{}', flush=True); print('one\\n\\ntwo', file=sys.stderr); sys.exit(3)",
            "fake stopped with exit status 3 after 1 records: one / two",
        ),
        ("sys.exit(1)", "exit status 1 after 0 records: it printed no reason"),
        ("os.kill(os.getpid(), 9)", "fake was killed by SIGKILL after 0 records"),
        ("print('hello')", "fake printed b'hello' where a record should be"),
        ("print('[1]')", "where a record should be"),
        ("sys.stdout.write('{\"a\"'); sys.stdout.flush(); sys.exit(4)", "exit status 4"),
    ],
)
def test_a_child_that_fails(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(peers.PeerError, match=re.escape(message)):
        peers.stream("fake", child(tmp_path, code), job(), lambda record: None, silence_s=60)


def test_a_silent_child_is_stopped(tmp_path: Path) -> None:
    code = "print(json.dumps({'pid': os.getpid()}), flush=True); time.sleep(600)"
    records: list[Any] = []
    with pytest.raises(peers.PeerError, match="said nothing for 1 s"):
        peers.stream("fake", child(tmp_path, code), job(), records.append, silence_s=1)
    assert not Path(f"/proc/{records[0]['pid']}").exists()


def test_a_parent_that_fails_stops_the_child(tmp_path: Path) -> None:
    code = "print(json.dumps({'pid': os.getpid()}), flush=True); time.sleep(600)"
    pids = []

    def on_record(record: dict[str, Any]) -> None:
        pids.append(record["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peers.stream("fake", child(tmp_path, code), job(), on_record, silence_s=60)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_job_format() -> None:
    peers.check(job())
    for key in ("model", "threads", "items"):
        with pytest.raises(ValueError, match=f"the job lacks {key}"):
            peers.check({k: v for k, v in job().items() if k != key})
    with pytest.raises(ValueError, match=r"needle 0 \(question_before\) has not one mark"):
        peers.check(job(scored=[True]))
    lacking = job()
    del lacking["items"][0]["modes"]["question_before"]["kept"]
    with pytest.raises(ValueError, match=r"needle 0 \(question_before\) lacks kept"):
        peers.check(lacking)
    del lacking["items"][0]["index"]
    with pytest.raises(ValueError, match="an item of the job lacks index"):
        peers.check(lacking)


def test_an_unknown_peer() -> None:
    with pytest.raises(peers.PeerError, match="there are kvpress, openvino"):
        peers.set_up("other")
    script = str(peers.HERE / "setup.sh")
    done = subprocess.run([script, "other"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "which peer?" in done.stderr


def test_environments_live_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    assert peers.environment_root() == tmp_path / "peers"
    monkeypatch.delenv("VLLM_KVCRUSH_CACHE")
    assert peers.environment_root() == peers.ROOT / ".cache" / "peers"
    assert (peers.ROOT / "pyproject.toml").exists()


@pytest.mark.parametrize("name", peers.NAMES)
def test_requirements_are_pinned(name: str) -> None:
    lines = (peers.HERE / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    names = [pin.split("==")[0].lower() for pin in pins]
    assert len(set(names)) == len(names)
    assert {"kvpress": "torch", "openvino": "openvino-genai"}[name] in names


def test_compression_ratio_keeps_what_is_asked() -> None:
    for length in (5, 96, 1000, 1023, 4097, 8191):
        for kept in {*range(1, min(length, 300)), length // 2, length - 1}:
            ratio = kvpress_run.compression_ratio(length, kept)
            assert 0 <= ratio < 1
            assert int(length * (1 - ratio)) == kept  # as kvpress computes it
        assert kvpress_run.compression_ratio(length, length) == 0
        assert kvpress_run.compression_ratio(length, length + 7) == 0
    with pytest.raises(kvpress_run.JobError, match="at least 1 token"):
        kvpress_run.compression_ratio(10, 0)


def test_snapkv_window_fits() -> None:
    assert kvpress_run.window(1000, 500) == 64
    assert kvpress_run.window(40, 32) == 32  # more than is kept would keep a random part of it
    assert kvpress_run.window(40, 40) == 39  # SnapKVPress wants a longer prompt


def test_scored_steps() -> None:
    assert kvpress_run.scored_steps([7, 8, 9], [False, True, True]) == [1, 2]
    with pytest.raises(kvpress_run.JobError, match="uncompressed prompt"):
        kvpress_run.scored_steps([7, 8], [True, True])
    with pytest.raises(kvpress_run.JobError, match="no forced token"):
        kvpress_run.scored_steps([7, 8], [False, False])
    with pytest.raises(kvpress_run.JobError, match="2 forced tokens but 1 marks"):
        kvpress_run.scored_steps([7, 8], [False])


def test_measure() -> None:
    # Two words; probabilities 3/4 and 1/4, then 1/2 and 1/2 with the first word on top.
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    gold = torch.tensor([0, 1])
    result = kvpress_run.measure(logits, gold)
    assert result["nll"] == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert (result["token_accuracy"], result["exact"], result["n_scored"]) == (0.5, 0, 2)
    assert kvpress_run.measure(logits, torch.tensor([0, 0]))["exact"] == 1

    same = kvpress_run.measure(logits, gold, logits.log_softmax(-1))
    assert (same["agreement"], same["kl"]) == (1.0, 0.0)
    full = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]).log_softmax(-1)
    other = kvpress_run.measure(logits, gold, full)
    assert other["agreement"] == 0.5
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # full from compressed
    assert other["kl"] == pytest.approx(kl / 2)


def test_openvino_holds_no_more_than_the_engine() -> None:
    for kept in range(128, 4096, 32):
        for crush in (False, True):
            try:
                size, crush_blocks = openvino_run.sizes(kept, crush)
            except openvino_run.Unfit:
                assert kept <= 128 and crush
                continue
            assert size % 32 == 0 and size > openvino_run.START + openvino_run.RECENT
            assert size + 32 * crush_blocks + 32 == kept  # with the block being filled
            assert (crush_blocks > 0) == crush
    assert openvino_run.sizes(150, False) == (96, 0)
    assert openvino_run.sizes(1024, True) == (736, 8)
    with pytest.raises(openvino_run.Unfit, match="96 tokens leave no block"):
        openvino_run.sizes(96, False)


def test_openvino_plan() -> None:
    tasks, skipped = openvino_run.plan(job(kept={"0.5": 160, "none": 500}, prompt=[0] * 400))
    # Within the budget nothing is evicted: the same setting as the full cache.
    policies = {
        setting: [(t.head["policy"], t.head["budget"]) for t in group]
        for setting, group in tasks.items()
    }
    assert policies == {
        (0, 0): [
            ("openvino/full", None),
            ("openvino/evict", "none"),
            ("openvino/kvcrush", "none"),
        ],
        (128, 0): [("openvino/evict", "0.5")],
        (96, 1): [("openvino/kvcrush", "0.5")],
    }
    assert skipped == []
    assert tasks[(0, 0)][0].prompt == [0] * 400 + [1, 2]
    assert tasks[(0, 0)][0].answer == [3, 4, 5]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"scored": [False, True, False, True, True]}, "more than one answer"),
        ({"scored": [False, False, False, True, True]}, "its answer has 2 tokens"),
        ({"forced": [1] * 18, "scored": [False] + [True] * 17}, "its answer has 17 tokens"),
    ],
)
def test_openvino_says_why_it_skips(parts: dict[str, Any], reason: str) -> None:
    tasks, skipped = openvino_run.plan(job(kept={"0.5": 300}, prompt=[0] * 400, **parts))
    assert not tasks
    assert [r["policy"] for r in skipped] == ["openvino/full", "openvino/evict", "openvino/kvcrush"]
    for record in skipped:
        assert reason in record["skipped"]
        assert (record["task"], record["index"], record["codec"]) == ("needle", 0, "u8")


def test_openvino_refuses_a_model_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(openvino_run.JobError, match=r"no openvino_model\.xml"):
        openvino_run.model_directory(tmp_path)
    (tmp_path / "openvino_model.xml").touch()
    assert openvino_run.model_directory(tmp_path) == tmp_path
