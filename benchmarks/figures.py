"""Draws pictures and fills tables from result files: README shows no figure that no file holds.

    python -m benchmarks.figures

draws `docs/figures/*.svg` from `benchmarks/results/*.json`, fills the tables between
`<!-- NAME -->` and `<!-- /NAME -->` in README.md and benchmarks/README.md from the same files,
writes `benchmarks/results/gpu_compile.md` and `docs/policies.md`, and draws `docs/plan.svg` from
the plan itself. A test fails when any of them disagree.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.pictures import SHOWN, beside, panels, rows
from benchmarks.pictures import kernels as kernels_picture
from benchmarks.pictures import quality as quality_picture
from benchmarks.plan_picture import picture as plan_picture
from benchmarks.report import RESULTS, ROOT, Row, read, table

FIGURES = ROOT / "docs" / "figures"
GPU_PAGE = RESULTS / "gpu_compile.md"
POLICIES_PAGE = ROOT / "docs" / "policies.md"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "gpu.md")


def digest(path: pathlib.Path) -> str:
    """Returns what a picture says that it was drawn from: a result file and those beside it."""
    return ", ".join(
        f"{p.name} sha256 {hashlib.sha256(p.read_bytes()).hexdigest()[:16]}" for p in beside(path)
    )


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


def _serving(result: pathlib.Path) -> Any:
    """Draws peak running requests and tokens a second of each workload, plain and with the
    policy."""
    metrics = (("peak_running", "peak running requests"), ("output_tokens_per_s", "tokens / s"))
    found = rows(result)
    figure, axes = panels(len(metrics), sharey=False)
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
    """Draws the share of a request's time that its compactions take, by prompt length."""
    found = rows(result, metric="compaction_share")
    figure, (axis,) = panels(1)
    for name in dict.fromkeys(r["policy"] for r in found):
        mine = sorted((r for r in found if r["policy"] == name), key=lambda r: r["context"])
        x, y = [r["context"] for r in mine], [100 * r["value"] for r in mine]
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.axhline(0.5, color="#444", linewidth=1, linestyle=":", label="published claim, 0.5 %")
    axis.set(xlabel="prompt tokens", ylabel="% of the request in compactions", ylim=(0, None))
    axis.legend(fontsize=7, frameon=False)
    return figure


DRAW: dict[str, Callable[[pathlib.Path], Any]] = {
    "quality": quality_picture,
    "serving": _serving,
    "overhead": _overhead,
    "kernels": kernels_picture,
}


# -- tables -------------------------------------------------------------------------------------


def fill(page: str, parts: dict[str, str]) -> str:
    """Returns `page` with every part between its markers. Raises ValueError for a marker without
    part."""

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name not in parts:
            raise ValueError(f"no table is called {name}")
        return f"<!-- {name} -->\n{parts[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", put, page, flags=re.DOTALL)


def outdated(page: pathlib.Path, parts: dict[str, str]) -> bool:
    """Returns whether a page's tables are not those of the results."""
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
    """Returns the single row's value with its interval; a dash if there is none."""
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
    ("auto", 0.0625, "quality"),
    ("surfacelogic(keydiff)@tc8", 0.0625, "quality"),
    ("surfacelogic(keydiff)", 0.25, "quality"),
    ("kvcrush", 0.25, "quality"),
    ("snapkv", 0.25, "quality"),
    ("kvpress/keydiff", 0.25, "quality"),
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
    """Returns the table of what fewer bits lose: the quality benchmark on policies that keep every
    token."""
    from benchmarks.quality.summary import tables

    paths = [RESULTS / f"{name}.json" for name in ("bits", "long", "longest")]
    return "\n\n".join(f"{_measured_on(p)}\n\n{tables(read(p)['rows'])}" for p in paths)


def codecs() -> str:
    """Returns the table of what contents of pages lose by their bytes, offline."""
    path = RESULTS / "codecs.json"
    found = [r for r in rows(path) if r["task"] is None]
    lines = []
    for name in dict.fromkeys(r["codec"] for r in found):
        own = [r for r in found if r["codec"] == name]
        held = {r["budget"]: r["value"] for r in own if r["metric"] == "bytes_ratio"}
        cells = [_value([r], 3) for m in ("delta_nll", "kl") for r in own if r["metric"] == m]
        lines.append([f"`{name}`", f"{held[16]:.1f}", f"{held[32]:.1f}", *cells])
    head = ["content", "× less than bfloat16", "× less than float32", "loss", "KL"]
    return f"{_measured_on(path)}\n\n{table(head, lines)}"


def capacity() -> str:
    """Returns one sentence about a fixed pool, for README."""
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
    """Returns the tables of what README's picture shows, and of all that was measured with it: what
    evicts on top of fewer bits."""
    from benchmarks.quality.overview import overview
    from benchmarks.quality.summary import tables

    path = RESULTS / "quality.json"
    found = read(path)["rows"]
    shown = [r for r in found if r["policy"] in {"none", *SHOWN} or "/" in r["policy"]]
    return "\n".join(
        [
            _measured_on(path),
            tables(shown),
            "\n### One line each\n",
            "Lost nats a token; behind each codec's name its budget.\n",
            overview(found),
        ]
    )


def methods() -> str:
    """Returns one line for every method."""
    from benchmarks.quality.overview import overview

    paths = beside(RESULTS / "methods.json")
    found = [row for path in paths for row in read(path)["rows"]]
    return "\n\n".join([*map(_measured_on, paths), overview(found)])


def serving() -> str:
    """Returns the serving benchmark's table."""
    from benchmarks.serving.results import markdown

    path = RESULTS / "serving.json"
    return f"{_measured_on(path)}\n\n{markdown(read(path)['rows'])}"


def pressure() -> str:
    """Returns the table of what `--kv-pressure` gives up at rising load."""
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
    """Returns the tables of compaction's share by prompt length and of the cost of an idle
    plugin."""
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


def first() -> str:
    """Returns the table of seconds to the first token and of decode steps against plain vLLM's."""
    path = RESULTS / "first.json"
    env, found = read(path)["environment"], rows(path)
    dtype, _, batch = found[-1]["mode"].partition(",batch=")
    lines = []
    for context, policy in dict.fromkeys((r["context"], r["policy"]) for r in found):
        own = {
            r["metric"]: _value([r])
            for r in found
            if r["context"] == context and r["policy"] == policy
        }
        name = "plain vLLM" if policy == "none" else policy
        lines.append([str(context), name])
        for metric in ("ttft_s", "tpot_s"):
            seconds = next(
                r["value"]
                for r in found
                if (r["metric"], r["context"], r["policy"]) == (metric, context, policy)
            )
            lines[-1] += [f"{seconds:.3g} s", own.get(f"ratio_{metric}", "1")]
    head = ["prompt", "request", "first token", "over plain's", f"step of {batch}", "over plain's"]
    return (
        f"SmolLM2-135M in {dtype}, vLLM {env['vllm']}, {env['cores']} cores ({env['cpu']}, "
        f"{env['isa']}); `{read(path)['command']}`.\n\n{table(head, lines)}"
    )


def kernels() -> str:
    """Returns tables of speed-ups over vLLM's bf16 kernel, a column for each processor, with the
    share of the memory's speed in decode."""
    paths = beside(RESULTS / "kernels.json")
    parts, heads = [], []
    for path in paths:
        result = read(path)
        env = result["environment"]
        heads.append(f"{env['cpu']}, {env['isa']}")
        parts.append(
            f"- {heads[-1]}: {env['cores']} cores, vLLM {env['vllm']}, commit `{env['commit']}`; "
            f"`{result['command']}`."
        )
    measured = [_by_kernel(path) for path in paths]
    modes = dict.fromkeys((task, mode) for found in measured for task, mode, _ in found)
    for task, mode in modes:
        names = dict.fromkeys(
            n for found in measured for t, m, n in found if (t, m) == (task, mode)
        )
        lines = [[n, *(found.get((task, mode, n), "–") for found in measured)] for n in names]
        parts.append(f"\n{task}, {mode}\n\n{table(['kernel', *heads], lines)}")
    return "\n".join(parts)


def _by_kernel(path: pathlib.Path) -> dict[tuple[str, str, str], str]:
    """Returns the cells of one processor's column by task, shape with threads, and kernel: of each
    task at the longest context."""
    found = [r for r in rows(path) if r["task"] in ("decode", "prefill")]
    longest = {t: max(r["context"] for r in found if r["task"] == t) for t in ("decode", "prefill")}
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in found:
        if r["context"] == longest[r["task"]]:
            cells.setdefault((r["task"], r["mode"], r["policy"]), {})[r["metric"]] = r["value"]
    return {
        key: f"{own.get('speedup_vs_vllm_bf16', 1):.2f} ×"
        + (f" ({own['bandwidth_share']:.0%})" if "bandwidth_share" in own else "")
        for key, own in cells.items()
    }


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


def gpu_compaction() -> str:
    """docs/gpu.md's table: what a compaction asks of a device, before layers were moved together
    and now."""
    kinds = ("kernels", "operations", "uploads", "waits")
    before, now = (
        {(r["policy"], r["mode"].partition(",")[0], r["task"]): r for r in rows(path)}
        for path in (RESULTS / f"gpu_compaction{when}.json" for when in ("_before", ""))
    )

    def told(row: dict[str, Any]) -> str:
        each = float(row["mode"].rpartition("=")[2])
        more = f" ({each:.3g})" if row["task"] in kinds[:2] else ""
        return f"{row['value']:,.0f}{more}"

    lines = []
    for policy, stage in dict.fromkeys((policy, stage) for policy, stage, _ in now):
        pairs = [[at[policy, stage, kind] for at in (before, now)] for kind in kinds]
        cells = [" → ".join(told(row) for row in pair) for pair in pairs]
        lines.append([f"`{policy}`, {stage}", *cells])
    return table(["policy, compaction", *kinds], lines)


def pitfalls() -> str:
    """Returns the table of what policies do to instructions: left to them, by share, protected."""
    paths = beside(RESULTS / "pitfalls.json")
    every = [r for path in paths for r in rows(path)]
    found = {(r["policy"], r["mode"], r["task"], r["metric"]): r for r in every}
    tasks, ways = ("conflict", "system_rule", "system_secret"), ("plain", "fair", "protected")

    def cells(policy: str, task: str, metric: str) -> list[str]:
        at = [found.get((policy, way, task, metric)) for way in ways]
        if metric == "rule_kept":
            return ["-" if r is None else f"{r['value'] * r['n']:.0f}/{r['n']}" for r in at]
        return ["-" if r is None else f"{r['value']:+.1f}" for r in at]

    lines = []
    for policy in dict.fromkeys(r["policy"] for r in every if r["mode"] == "fair"):
        kept = (" ".join(cells(policy, task, "rule_kept")) for task in tasks)
        lost = (" ".join(cells(policy, task, "delta_nll")) for task in ("system_rule", "neutral"))
        lines.append([f"`{policy}`", *kept, *lost])
    head = ["policy", *(f"{task}: kept" for task in tasks), "system_rule: loss", "neutral: loss"]
    return "\n\n".join([*map(_measured_on, paths), table(head, lines)])


PARTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        *(
            summary,
            capacity,
            quality,
            methods,
            codecs,
            bits,
            serving,
            pressure,
            overhead,
            first,
            kernels,
        ),
        *(gpu_floor, gpu_metadata, gpu_compaction, gpu_memory, pitfalls),
    )
}


def gpu_page() -> str:
    """Returns what GPU_PAGE says: tables of what the GPU kernels compile to."""
    from benchmarks.gpu.tables import page

    return page(read(GPU_PAGE.with_suffix(".json")))


def policies_page() -> str:
    """What POLICIES_PAGE says: each policy by its docstring, with what was measured of it."""
    from vllm_kvcrush.policies import BUILT_IN
    from vllm_kvcrush.tools import policies

    path = RESULTS / "policies.json"
    head = (
        "# Policies\n\nWritten by `make figures` from the docstrings and what was measured "
        "(`python -m benchmarks.policies`); `vllm-kvcrush policies NAME` prints the same, of "
        "installed packages too. [A policy of your own](own_policy.md) takes 20 lines."
    )
    figures: dict[str, dict[str, str]] = {}
    cost = rows(path, metric="compaction_s") if path.exists() else []
    lost = rows(path, metric="delta_nll") if path.exists() else []
    if cost:
        figures["ms"] = {r["policy"]: f"{1000 * r['value']:.1f}" for r in cost}
        head += (
            f"\n\n*ms*: processor time of a layer, scores and choice, at {cost[0]['context']} "
            f"tokens, copies included, one thread. {_measured_on(path)}"
        )
    for row in rows(path, metric="prefill_s") if path.exists() else []:
        head += (
            f" The prefill of these tokens, in transformers, takes {1000 * row['value']:.0f} ms of "
            f"processor time a layer, of which {10 * row['value']:.1f} ms are 1 %."
        )
    for budget in sorted({r["budget"] for r in lost}, reverse=True):
        figures[f"loss at {budget:g}"] = {
            r["policy"]: f"{r['value']:+.2f}" for r in lost if r["budget"] == budget
        }
    kept = RESULTS / "kept.json"
    if kept.exists():
        same = rows(kept, metric="overlap")
        figures["as kvpress"] = {r["policy"]: f"{r['value']:.3f}" for r in same}
        nested = min(r["value"] for r in rows(kept, metric="nested"))
        head += (
            f"\n\n*As kvpress*: of the tokens that kvpress keeps at {same[0]['budget']:g} of "
            f"{same[0]['context']} tokens, the share that is kept here too, given the same "
            "tensors, its hyperparameters and queries of the whole prompt, over layers and heads "
            "(`python -m benchmarks.policies.peers`). Where heads get other numbers of tokens than "
            "in kvpress, as `pyramidkv` and `adakv` say, it is the share of the larger number: of "
            f"the smaller one it is {nested:.3f} or more under every policy."
        )
    if lost:
        variants = [
            f"`{r['policy']}` {r['value']:+.2f} at {r['budget']:g}"
            for r in lost
            if "(" in r["policy"]
        ]
        head += (
            f"\n\n*Loss*: nats a token over the full cache's, one compaction at "
            f"{lost[0]['context']} tokens before the question, offline, {lost[0]['n']} items. "
            f"Small differences are chance. {'; '.join(variants)}."
        )
    return f"{head}\n\n{policies.page(BUILT_IN, figures)}"


def parts() -> dict[str, str]:
    """Returns all generated texts by name."""
    return {name: make() for name, make in PARTS.items()}


def main() -> None:
    """Rewrites pictures and tables."""
    (ROOT / "docs" / "plan.svg").write_text(plan_picture())
    GPU_PAGE.write_text(gpu_page())
    POLICIES_PAGE.write_text(policies_page())
    for name in DRAW:
        draw(name, RESULTS / f"{name}.json", FIGURES / f"{name}.svg")
    filled = parts()
    for page in PAGES:
        page.write_text(fill(page.read_text(), filled))
    print("\n".join(f"{page.relative_to(ROOT)} is up to date" for page in PAGES))


if __name__ == "__main__":
    main()
