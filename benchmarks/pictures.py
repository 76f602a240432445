"""Pictures whose lines and bars carry their names themselves, so that none needs a legend."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.report import Row, read

MODE_NAMES = {"question_before": "question seen before", "question_after": "question after"}
# What a figure shows where a file holds more: what we recommend, what evicts, and the best peers.
SHOWN = (
    *("auto", "int4", "tc4", "tc6", "tc8", "surfacelogic(keydiff)@tc8"),
    *("surfacelogic(keydiff)", "kvcrush", "snapkv"),
)
MOST_LINES = 8
BLUES = {"auto": "#08306b", "int4": "#2171b5", "tc4": "#4292c6", "tc6": "#6baed6", "tc8": "#9ecae1"}
EVICTING_TOO = "#6a51a3"
EVICTING = ("#a63603", "#e6550d", "#fd8d3c", "#d6a25a")
PEERS = ("#2d6a2d", "#74a574", "#8a8a8a", "#b0b0b0")


class End(NamedTuple):
    """The right end of a line, which gets a name beside the picture."""

    x: float
    y: float
    name: str
    color: Any


def rows(path: pathlib.Path, **where: Any) -> list[Row]:
    """Rows of a result file whose columns have these values."""
    return [r for r in read(path)["rows"] if all(r[k] == v for k, v in where.items())]


def beside(result: pathlib.Path) -> list[pathlib.Path]:
    """Returns a result file and those of other processors beside it, `kernels_NAME.json`."""
    return [result, *sorted(result.parent.glob(f"{result.stem}_*.json"))]


def panels(
    count: int, sharey: bool = True, width: float = 4.4, height: float = 3.6, lines: int = 1
) -> Any:
    """Returns a figure of `count` panels in so many lines, and their axes line by line."""
    import matplotlib.pyplot as plt

    columns = -(-count // lines)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(width * columns, height * lines),
        sharey=sharey,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#ddd", linewidth=0.6)
    return figure, list(axes.flat)


def name_ends(axis: Any, ends: Sequence[End], size: float = 8) -> None:
    """Writes each line's name right of the panel, at the height of its end, or as near to it as
    the other names leave room, with a thin line that leads there."""
    box = axis.get_window_extent()
    at = {end: axis.transData.transform((end.x, end.y))[1] for end in ends}
    line = 1.25 * size * axis.figure.dpi / 72
    order = sorted(ends, key=lambda end: at[end])
    heights = spread([at[end] for end in order], line, box.y0, box.y1)
    for end, height in zip(order, heights, strict=True):
        axis.annotate(
            end.name,
            (end.x, end.y),
            (1.03, (height - box.y0) / box.height),
            textcoords="axes fraction",
            color=end.color,
            fontsize=size,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "linewidth": 0.5,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns ascending `heights` moved as little as needed to lie `gap` apart, from `low` to
    `high` where they all find room there."""
    groups: list[list[float]] = []  # middles of names that touch each other, as (sum, count)
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and _edge(groups[-2], gap, 1) > _edge(groups[-1], gap, -1):
            last = groups.pop()
            groups[-1] = [groups[-1][0] + last[0], groups[-1][1] + last[1]]
    found = [
        total / count + gap * (i - (count - 1) / 2)
        for total, count in groups
        for i in range(int(count))
    ]
    for i in reversed(range(len(found))):
        found[i] = min(found[i], high - gap * (len(found) - 1 - i))
    for i in range(len(found)):
        found[i] = max(found[i], low + gap * i)
    return found


def _edge(group: Sequence[float], gap: float, side: int) -> float:
    total, count = group
    return total / count + side * gap * count / 2


# -- quality ------------------------------------------------------------------------------------


def quality(result: pathlib.Path) -> Any:
    """Draws gold NLL lost against how many times less memory was held, a panel for each context and
    mode; None if the file has no losses."""
    found = rows(result, task="all")
    places = sorted({(r["context"], r["mode"]) for r in found if r["metric"] == "delta_nll"})
    if not places:
        return None
    figure, axes = panels(len(places), width=4.6 if len(places) > 1 else 6.6)
    for axis, (context, mode) in zip(axes, places, strict=True):
        here = [r for r in found if r["context"] == context and r["mode"] == mode]
        value = {(r["policy"], r["budget"], r["metric"]): r["value"] for r in here}
        ends = []
        for name, style in _styles({p for p, b, _ in value if b != 1.0}).items():
            points = sorted(
                (value[name, b, "bytes_ratio"], y)
                for (p, b, metric), y in value.items()
                if p == name and metric == "delta_nll" and b != 1.0
            )
            if points:
                axis.plot(*zip(*points, strict=True), markersize=3.5, **style)
                ends.append(End(*points[-1], name, style["color"]))
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.8)
        axis.set_ylim(min(-0.1, *(e.y for e in ends)), None)
        axis.axhline(0, color="#444", linewidth=1)
        axis.set_title(f"{context:,} tokens, {MODE_NAMES[mode]} compaction", fontsize=9)
        axis.set_xlabel("× less KV memory, metadata counted")
        ticks = [t for t in (1, 2, 4, 8, 16, 32) if t <= 1.3 * max(e.x for e in ends)]
        axis.set_xticks(ticks, [f"{t}×" for t in ticks])
        axis.set_xticks([], minor=True)
        axis.set_yticks(losses := [-0.1, 0, 0.1, 0.3, 1, 3], [f"{t:g}" for t in losses])
        axis.set_yticks([], minor=True)
        figure.draw_without_rendering()
        name_ends(axis, ends)
    axes[0].set_ylabel("loss: gold NLL over the full cache's, nats a token")
    return figure


def _styles(found: set[str]) -> dict[str, dict[str, Any]]:
    """Returns how to draw each policy's line, in the order in which they are drawn."""
    peers = sorted(name for name in found if "/" in name and not name.endswith("/full"))
    ours = sorted(found - set(peers) - {name for name in found if "/" in name})
    if len(ours) > MOST_LINES:
        ours = [name for name in SHOWN if name in found]
    styles: dict[str, dict[str, Any]] = {}
    for name, color in zip(peers, (*PEERS, *["#bbb"] * len(peers)), strict=False):
        styles[name] = {"color": color, "linewidth": 1, "linestyle": "--", "marker": "."}
    for name in (name for name in ours if "@" in name):
        styles[name] = {"color": EVICTING_TOO, "linewidth": 1.4, "marker": "D"}
    evicting = [name for name in ours if name not in BLUES and name not in styles]
    for name, color in zip(evicting, (*EVICTING, *["#c99"] * len(evicting)), strict=False):
        styles[name] = {"color": color, "linewidth": 1.4, "marker": "s"}
    for name in reversed([name for name in BLUES if name in ours]):
        styles[name] = {"color": BLUES[name], "linewidth": 1.4, "marker": "o"}
    if "auto" in styles:
        styles["auto"] |= {"linewidth": 2.6, "zorder": 5}
    return styles


# -- kernels ------------------------------------------------------------------------------------

SHAPES = {"smol": "9/3 heads of 64", "llama": "32/8 heads of 128"}


def kernels(result: pathlib.Path) -> Any:
    """Draws the speed-up over vLLM's bf16 kernel, one thread: for each processor a line of panels
    for decode and prefill, with a row for each kernel; None if there are no figures."""
    places = [
        (path, task, found)
        for path in beside(result)
        for task in ("decode", "prefill")
        if (found := _of_one_thread(path, task))
    ]
    if not places:
        return None
    lines = len({path for path, _, _ in places})
    figure, axes = panels(len(places), sharey=False, width=5.2, height=3.9, lines=lines)
    for axis, (path, task, found) in zip(axes, places, strict=True):
        env = read(path)["environment"]
        shapes = [s for s in SHAPES if any(s == shape for shape, _ in found)]
        names = list(dict.fromkeys(name for _, name in found))[::-1]
        for nth, shape in enumerate(shapes):
            at = [i + 0.18 - 0.36 * nth for i in range(len(names))]
            speeds = [found.get((shape, name), 0.0) for name in names]
            color = ("#2171b5", "#b8560a")[nth % 2]
            bars = axis.barh(at, [s - 1 for s in speeds], 0.34, left=1, color=color)
            axis.bar_label(bars, [f"{s:.1f}" for s in speeds], fontsize=6.5, padding=2, color=color)
            axis.text(
                0.99,
                0.97 - 0.06 * nth,
                SHAPES[shape],
                color=color,
                transform=axis.transAxes,
                ha="right",
                fontsize=8,
            )
        axis.axvline(1, color="#444", linewidth=1)
        axis.set_yticks(range(len(names)), [_kernel_name(n) for n in names], fontsize=8)
        axis.set_xscale("log", base=2)
        high = max(found.values())
        ticks = [
            t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if min(found.values()) / 2 < t < 2 * high
        ]
        axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axis.set_xlim(min(0.45, min(found.values()) * 0.65), high * 1.5)
        axis.grid(False)
        axis.set_title(f"{task}: {env['cpu']} ({env['isa']})", fontsize=9)
    figure.supxlabel("times vLLM's bf16 kernel over all tokens, one thread", fontsize=9)
    return figure


def _kernel_name(name: str) -> str:
    own = name.removeprefix("kvcrush-").replace("-evicted-4x", ", ¼ of the tokens")
    return own.replace("vllm-", "vLLM ").replace("torch-sdpa-", "torch SDPA ")


def _of_one_thread(path: pathlib.Path, task: str) -> dict[tuple[str, str], float]:
    """Returns speed-ups by shape and kernel, at the longest context."""
    found = [
        r
        for r in rows(path, metric="speedup_vs_vllm_bf16", task=task)
        if r["mode"].endswith("threads=1")
    ]
    longest = max((r["context"] for r in found), default=0)
    return {
        (r["mode"].split(",")[0], r["policy"]): r["value"] for r in found if r["context"] == longest
    }
