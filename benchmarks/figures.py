"""Draws pictures and fills tables from result files: README shows no figure that no file holds.

    python -m benchmarks.figures

draws `docs/figures/*.svg` from `benchmarks/results/*.json`, fills the tables between
`<!-- NAME -->` and `<!-- /NAME -->` in README.md and benchmarks/README.md from the same files,
writes `benchmarks/results/gpu_compile.md`, and draws `docs/plan.svg` from the plan itself. A test
fails when any of them disagree.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.plan_picture import picture as plan_picture
from benchmarks.report import RESULTS, ROOT, Row, read, table

FIGURES = ROOT / "docs" / "figures"
GPU_PAGE = RESULTS / "gpu_compile.md"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "gpu.md")
OURS = (
    "auto",
    "int8",
    "int4",
    "tc4",
    "tc6",
    "tc8",
    "mikv",
    "kvcrush",
    "snapkv",
    "h2o",
    "streaming",
)
MODE_NAMES = {"question_before": "question seen before", "question_after": "question after"}


def rows(path: pathlib.Path, **where: Any) -> list[Row]:
    """Rows of a result file whose columns have these values."""
    return [r for r in read(path)["rows"] if all(r[k] == v for k, v in where.items())]


def digest(path: pathlib.Path) -> str:
    """What a picture says that it was drawn from."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


# -- pictures -----------------------------------------------------------------------------------


def draw(name: str, result: pathlib.Path, target: pathlib.Path) -> pathlib.Path | None:
    """Draws benchmark `name` from `result` as SVG; None if nothing is to be drawn from it."""
    import matplotlib.pyplot

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvcrush", "font.size": 9})
    figure = DRAW[name](result)
    if figure is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None, "Description": digest(result)})
    matplotlib.pyplot.close(figure)
    return target


def _panels(count: int, sharey: bool = True) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(4.4 * count, 3.6), sharey=sharey, layout="constrained", squeeze=False
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#ddd", linewidth=0.6)
    return figure, list(axes[0])


def _quality(result: pathlib.Path) -> Any:
    """Gold NLL against bytes held, one line a policy, the full cache as a line across."""
    found = rows(result, task="all")
    places = sorted({(r["context"], r["mode"]) for r in found if r["metric"] == "delta_nll"})
    if not places:
        return None
    figure, axes = _panels(len(places))
    for axis, (context, mode) in zip(axes, places, strict=True):
        here = [r for r in found if r["context"] == context and r["mode"] == mode]
        value = {(r["policy"], r["budget"], r["metric"]): r for r in here}
        names = sorted({r["policy"] for r in here if r["budget"] != 1.0}, key=_ours_first)
        for name in names:
            points = sorted(
                (
                    (100 / value[name, b, "bytes_ratio"]["value"], r)
                    for (p, b, metric), r in value.items()
                    if p == name and metric == "delta_nll" and b != 1.0
                ),
                key=lambda point: point[0],
            )
            if not points:
                continue
            x, y = [p for p, _ in points], [r["value"] for _, r in points]
            style = PEER_STYLE if "/" in name else {"linewidth": 1.8, "marker": "o"}
            (line,) = axis.plot(x, y, label=name, markersize=4, **style)
            if "/" not in name and all(r["low"] is not None for _, r in points):
                low, high = [r["low"] for _, r in points], [r["high"] for _, r in points]
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.axhline(0, color="#444", linewidth=1, label="full cache")
        axis.set_title(f"{context} tokens, {MODE_NAMES[mode]} compaction", fontsize=8)
        axis.set_xlabel("KV bytes held, % of raw (metadata counted)")
    axes[0].set_ylabel("gold NLL lost, nats a token")
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


PEER_STYLE = {"linewidth": 0.9, "linestyle": "--", "marker": "."}


def _ours_first(name: str) -> tuple[bool, int, str]:
    # Peers' names are PROJECT/METHOD.
    return ("/" in name, OURS.index(name) if name in OURS else len(OURS), name)


def _serving(result: pathlib.Path) -> Any:
    """Peak running requests and tokens a second of each workload, plain and policy."""
    metrics = (("peak_running", "peak running requests"), ("output_tokens_per_s", "tokens / s"))
    found = rows(result)
    figure, axes = _panels(len(metrics), sharey=False)
    loads = list(
        dict.fromkeys((r["task"], r["mode"]) for r in found if r["metric"] == "peak_running")
    )
    for axis, (metric, title) in zip(axes, metrics, strict=True):
        for offset, plain in ((-0.2, True), (0.2, False)):
            chosen = {
                (r["task"], r["mode"]): r["value"]
                for r in reversed(found)  # of several budgets, the row about all comes first
                if r["metric"] == metric and (r["policy"] == "none") == plain
            }
            axis.bar(
                [i + offset for i in range(len(loads))],
                [chosen[load] for load in loads],
                0.4,
                color="#b55" if plain else "#26a",
                label="plain vLLM" if plain else "with the policy",
            )
        axis.set_title(title)
        labels = [f"{task}\n{mode}".replace("_", " ") for task, mode in loads]
        axis.set_xticks(range(len(loads)), labels, fontsize=6, rotation=30, ha="right")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _overhead(result: pathlib.Path) -> Any:
    """Share of a request's time that its compactions take, by prompt length."""
    found = rows(result, metric="compaction_share")
    figure, (axis,) = _panels(1)
    for name in dict.fromkeys(r["policy"] for r in found):
        mine = sorted((r for r in found if r["policy"] == name), key=lambda r: r["context"])
        x, y = [r["context"] for r in mine], [100 * r["value"] for r in mine]
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.axhline(0.5, color="#444", linewidth=1, linestyle=":", label="published claim, 0.5 %")
    axis.set(xlabel="prompt tokens", ylabel="% of the request in compactions", ylim=(0, None))
    axis.legend(fontsize=7, frameon=False)
    return figure


def _kernels(result: pathlib.Path) -> Any:
    """Speed-up over vLLM's bf16 kernel by context length, one panel a shape and thread count."""
    found = rows(result, metric="speedup_vs_vllm_bf16", task="decode")
    modes = list(dict.fromkeys(r["mode"] for r in found))
    if not modes:
        return None
    figure, axes = _panels(len(modes))
    for axis, mode in zip(axes, modes, strict=True):
        here = [r for r in found if r["mode"] == mode]
        for name in dict.fromkeys(r["policy"] for r in here):
            mine = sorted((r for r in here if r["policy"] == name), key=lambda r: r["context"])
            x, y = [r["context"] for r in mine], [r["value"] for r in mine]
            axis.plot(x, y, marker="o", markersize=4, label=name)
        axis.set(xlabel="context tokens", xscale="log", yscale="log")
        axis.set_title(mode.replace(",", ", "), fontsize=8)
        contexts = sorted({r["context"] for r in here})
        axis.set_xticks(contexts, [str(c) for c in contexts])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("× faster than vLLM's bf16 kernel")
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


DRAW: dict[str, Callable[[pathlib.Path], Any]] = {
    "quality": _quality,
    "serving": _serving,
    "overhead": _overhead,
    "kernels": _kernels,
}


# -- tables -------------------------------------------------------------------------------------


def fill(page: str, parts: dict[str, str]) -> str:
    """`page` with every part between its markers. Raises ValueError for a marker without part."""

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name not in parts:
            raise ValueError(f"no table is called {name}")
        return f"<!-- {name} -->\n{parts[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", put, page, flags=re.DOTALL)


def outdated(page: pathlib.Path, parts: dict[str, str]) -> bool:
    """Whether a page's tables are not those of the results."""
    text = page.read_text()
    return fill(text, parts) != text


def undrawn(names: Iterable[str] = DRAW) -> list[str]:
    """Pictures that were drawn from other results than the committed ones."""
    missing = []
    for name in names:
        target = FIGURES / f"{name}.svg"
        if not target.exists() or digest(RESULTS / f"{name}.json") not in target.read_text():
            missing.append(target.name)
    return missing


def _value(found: list[Row], digits: int = 2, sign: bool = False) -> str:
    """The single row's value with its interval; a dash if there is none."""
    if not found:
        return "–"
    (r,) = found
    form = f"{'+' if sign else ''}.{digits}f"
    text = f"{r['value']:{form}}"
    if r["low"] is not None:
        text += f" ({r['low']:{form}} to {r['high']:{form}})"
    return text


def _machine(path: pathlib.Path) -> str:
    env = read(path)["environment"]
    return f"SmolLM2-135M in float32, vLLM {env['vllm']}, {env['cores']} cores ({env['cpu']})"


def _measured_on(path: pathlib.Path) -> str:
    result = read(path)
    isa = result["environment"]["isa"]
    return f"{_machine(path).removesuffix(')')}, {isa}); `{result['command']}`."


# README's rows: policy, budget, and the file that has it.
PICKED = (
    ("auto", 0.25, "bits"),
    ("auto", 0.125, "bits"),
    ("int4", 0.25, "bits"),
    ("auto", 0.25, "long"),
    ("auto", 0.125, "long"),
    ("tc8", 0.125, "long"),
    ("kvcrush", 0.5, "quality"),
    ("kvpress/keydiff", 0.5, "quality"),
)


def summary() -> str:
    """README's table: what some policies hold, and what they lose."""
    lines, machines = [], set()
    for name in ("bits", "long", "quality"):
        path = RESULTS / f"{name}.json"
        machines.add(_machine(path))
        found = rows(path, task="all", mode="question_after")
        contexts = sorted({r["context"] for r in found})
        for policy, budget in ((p, b) for p, b, where in PICKED if where == name):
            for context in contexts:
                at = {
                    r["metric"]: r
                    for r in found
                    if (r["policy"], r["budget"], r["context"]) == (policy, budget, context)
                }
                assert at, f"{path.name} has no {policy} at {budget}"
                lines.append(
                    [
                        f"`{policy}`",
                        f"{budget:g}",
                        str(context),
                        str(at["delta_nll"]["n"]),
                        f"{at['bytes_ratio']['value']:.1f}",
                        _value([at["delta_nll"]], 3, sign=True),
                        f"{at['agreement']['value']:.0%}",
                    ]
                )
    header = ["policy", "budget", "context", "items", "× less KV memory", "loss", "same next token"]
    assert len(machines) == 1, "README's rows are from several set-ups"
    text = (
        f"{machines.pop()}. The question comes after the compaction, which is "
        "the hardest case. *Loss*: negative log-likelihood of the gold answers, nats a token, over "
        "that of the full cache, with 95 % intervals. Memory is what requests held while they "
        "answered, metadata included, against raw float32."
    )
    return table(header, lines) + "\n\n" + text


def bits() -> str:
    """What fewer bits lose: the quality benchmark on policies that keep every token."""
    from benchmarks.quality.summary import tables

    paths = [RESULTS / f"{name}.json" for name in ("bits", "long", "longest")]
    return "\n\n".join(f"{_measured_on(p)}\n\n{tables(read(p)['rows'])}" for p in paths)


def capacity() -> str:
    """One sentence about a fixed pool, for README."""
    path = RESULTS / "serving.json"
    loads = {r["mode"]: r for r in rows(path, task="long_prompt", metric="ratio_peak_running")}
    mode, ratio = max(loads.items(), key=lambda pair: pair[1]["value"])
    where = {"task": "long_prompt", "mode": mode}
    (plain,) = rows(path, metric="peak_running", policy="none", **where)
    (ours,) = [r for r in rows(path, metric="peak_running", **where) if r["policy"] != "none"]
    (speed,) = rows(path, metric="ratio_output_tokens_per_s", **where)
    return (
        f"In one fixed pool, with {ratio['context']} prompt tokens a request, "
        f"{ours['value']:.0f} requests run at once with `{ours['policy']}` at {ours['budget']:g} "
        f"where plain vLLM runs {plain['value']:.0f}: **{ratio['value']:.1f} times as many**, and "
        f"{speed['value']:.2f} times the output tokens a second."
    )


def quality() -> str:
    """All of the quality benchmark's tables."""
    from benchmarks.quality.summary import tables

    path = RESULTS / "quality.json"
    found = read(path)["rows"]
    lines = [
        [
            r["policy"],
            r["metric"].removeprefix("delta_nll_vs_"),
            r["mode"],
            f"{r['budget']:g}",
            str(r["n"]),
            _value([r], 3, sign=True),
            "none"
            if r["low"] is None or r["low"] <= 0 <= r["high"]
            else "better"
            if r["value"] < 0
            else "worse",
        ]
        for r in found
        if r["metric"].startswith("delta_nll_vs_")
    ]
    header = ["policy", "against", "mode", "budget", "items", "NLL difference (95 %)", "is"]
    parts = [_measured_on(path), tables(found), "\n### Paired by item\n", table(header, lines)]
    return "\n".join(parts)


def serving() -> str:
    """The serving benchmark's table."""
    from benchmarks.serving.results import markdown

    path = RESULTS / "serving.json"
    return f"{_measured_on(path)}\n\n{markdown(read(path)['rows'])}"


def pressure() -> str:
    """The table of what `--kv-pressure` gives up at rising load."""
    from benchmarks.serving.pressure import WHAT

    path = RESULTS / "pressure.json"
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in read(path)["rows"]:
        found.setdefault((row["task"], row["mode"]), {})[row["metric"]] = row["value"]
    lines = [
        [
            task.removeprefix("closed-"),
            WHAT[mode],
            f"{own['peak_running']:.0f}",
            f"{own['preemptions']:.0f}",
            f"{own['output_tokens_per_s']:.1f}",
            f"{own['left_whole']:.0%}",
            f"{own['delta_nll']:+.4f}",
            f"{own['bytes_ratio']:.2f}",
        ]
        for (task, mode), own in found.items()
    ]
    head = ["requests", "engine", "at once", "preempted", "tokens/s", "whole", "loss", "× less KV"]
    return f"{_measured_on(path)}\n\n{table(head, lines)}"


def overhead() -> str:
    """Share of compaction by prompt length, and the cost of an idle plugin."""
    path = RESULTS / "overhead.json"
    found = rows(path, metric="compaction_share")
    names = list(dict.fromkeys(r["policy"] for r in found))
    lines = []
    for context in sorted({r["context"] for r in found}):
        cells = [str(context)]
        for name in names:
            here = [r for r in found if (r["context"], r["policy"]) == (context, name)]
            cells.append(f"{here[0]['value']:.2%}" if here else "–")
        lines.append(cells)
    idle = [[r["mode"], _value([r], 4)] for r in rows(path, metric="ratio_tpot_s")]
    times = rows(path, metric="tpot_s", task="decode")
    steps = []
    for r in times:
        batch, _, plain = r["mode"].removeprefix("batch=").partition(",")
        same = ("mode", "policy", "context", "budget")
        won = [
            o
            for o in rows(path, metric="ratio_output_tokens_per_s", task="decode")
            if all(o[k] == r[k] for k in same)
        ]
        name = "plain vLLM" if plain else "our kernels"
        if r["policy"] != "none":
            name = f"{r['policy']} {r['budget']:g}"
        ratio = _value(won) if won else "1"
        steps.append([batch, str(r["context"]), name, f"{1000 * r['value']:.0f} ms", ratio])
    return "\n".join(
        [
            _measured_on(path),
            "",
            table(["prompt tokens", *names], lines),
            "",
            table(["decode step against plain vLLM", "ratio (95 %)"], idle),
            "",
            table(["requests", "context", "policy", "a step", "tokens/s over plain's"], steps),
        ]
    )


def kernels() -> str:
    """Speed-up over vLLM's bf16 kernel, and share of the memory's speed."""
    path = RESULTS / "kernels.json"
    found = rows(path)
    modes = list(dict.fromkeys(r["mode"] for r in found if r["metric"] == "bandwidth_share"))
    parts = [_measured_on(path)]
    for mode in modes:
        here = [r for r in found if r["mode"] == mode and r["task"] == "decode"]
        contexts = sorted({r["context"] for r in here})
        lines = []
        for name in dict.fromkeys(r["policy"] for r in here):
            cells = [name]
            for context in contexts:
                at = {
                    r["metric"]: r["value"]
                    for r in here
                    if r["policy"] == name and r["context"] == context
                }
                speed = at.get("speedup_vs_vllm_bf16", 1.0)
                cells.append(f"{speed:.1f} × ({at['bandwidth_share']:.0%})")
            lines.append(cells)
        parts.append(f"\n{mode}\n")
        parts.append(table(["kernel", *(f"{c} tokens" for c in contexts)], lines))
    return "\n".join(parts)


def gpu_floor() -> str:
    """docs/gpu.md's table: by how much packed pages lower the floor of a decode step."""
    from benchmarks.gpu.model import DEVICES
    from benchmarks.gpu.tables import floors

    found = floors(read(GPU_PAGE.with_suffix(".json"))["rows"])
    times = {(f["codec"], f["device"]): f["times_floor"] for f in found if f["context"] == 32768}
    lines = [
        [f"`{codec}`, times faster", *(f"{times[codec, device]:.2f}" for device in DEVICES)]
        for codec in ("int8", "int4")
    ]
    return table(["", *DEVICES], lines)


def gpu_memory() -> str:
    """docs/gpu.md's table of what a large model's ranks hold."""
    from benchmarks.gpu import memory

    return memory.table()


def gpu_metadata() -> str:
    """docs/gpu.md's table: host time of a decode step's metadata, by block size and requests."""
    found: dict[str, dict[str, float]] = {}
    for row in read(RESULTS / "directory.json")["rows"]:
        case, _, way = row["mode"].rpartition(",")
        found.setdefault(case, {})[way] = row["value"] * 1e3
    head = ["blocks of, requests", "built anew", "resident", "no compressed pages", "a compaction"]
    ways = ("rebuilt", "resident", "plain", "written")
    lines = []
    for case, times in found.items():
        size, requests = re.findall(r"\d+", case)
        cells = (f"{t:,.0f}" if (t := times[way]) >= 100 else f"{t:.2g}" for way in ways)
        lines.append([f"{size} tokens, {requests}", *cells])
    return table(head, lines)


PARTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        *(summary, capacity, quality, bits, serving, pressure, overhead, kernels),
        *(gpu_floor, gpu_metadata, gpu_memory),
    )
}


def gpu_page() -> str:
    """What GPU_PAGE says: tables of what the GPU kernels compile to."""
    from benchmarks.gpu.tables import page

    return page(read(GPU_PAGE.with_suffix(".json")))


def parts() -> dict[str, str]:
    """All generated texts by name."""
    return {name: make() for name, make in PARTS.items()}


def main() -> None:
    """Rewrites pictures and tables."""
    (ROOT / "docs" / "plan.svg").write_text(plan_picture())
    GPU_PAGE.write_text(gpu_page())
    for name in DRAW:
        draw(name, RESULTS / f"{name}.json", FIGURES / f"{name}.svg")
    filled = parts()
    for page in PAGES:
        page.write_text(fill(page.read_text(), filled))
    print("\n".join(f"{page.relative_to(ROOT)} is up to date" for page in PAGES))


if __name__ == "__main__":
    main()
