"""Measures what compressing short requests saves and costs, by length, to set --kv-min-tokens.

A request is an excerpt of prose: its first half is the prompt, its second half is forced, token by
token. A floor of N tokens gives up what is saved, and avoids what is lost, at lengths below N.
"""

from __future__ import annotations

from benchmarks import report
from benchmarks.quality import prose
from benchmarks.quality.engine import BLOCK, Engine, Job
from benchmarks.report import Run, interruptible, progress, say, table
from vllm_kvcrush.tools import demo_model

LENGTHS, QUICK = (128, 256, 384, 512, 768, 1024), (128, 256)
POLICIES = ("auto", "int4", "kvcrush")


def jobs(engine: Engine, lengths: tuple[int, ...], excerpts: int, policy: str) -> list[Job]:
    """Returns one job for each excerpt; no two excerpts overlap."""
    ids = engine.tokenizer.encode(prose.span(0, prose.length()))
    start, found = 0, []
    for number in range(excerpts):
        for length in lengths:
            part = ids[start : start + length]
            assert len(part) == length, "the text is too short for so many excerpts"
            start += length
            prompt, tokens = part[: length // 2], part[length // 2 :]
            found.append(
                Job(
                    f"{policy}/{length}/{number}",
                    prompt,
                    tokens,
                    [True] * len(tokens),
                    [None] * len(tokens),
                    policy,
                    1.0 if policy == "none" else 0.25,
                    None if policy == "none" else f"none/{length}/{number}",
                )
            )
    return found


def main() -> None:
    """Runs the benchmark; see --help."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--excerpts", type=int, default=4, help="requests of each length")
    args = parser.parse_args()
    lengths, excerpts = (QUICK, 1) if args.quick else (LENGTHS, args.excerpts)
    with interruptible("floor"):
        run = Run("floor", args)
        model = str(demo_model.prepare(say=say))
        tokens = 2 * excerpts * sum(length + 2 * BLOCK for length in lengths)
        engine = Engine(model, max(lengths) + BLOCK, tokens)
        found = {}
        for policy in progress(["none", *POLICIES], "policies"):
            found |= engine.forced(jobs(engine, lengths, excerpts, policy))
    lines = []
    for policy in POLICIES:
        for length in lengths:
            each = [found[f"{policy}/{length}/{number}"] for number in range(excerpts)]
            raw = [found[f"none/{length}/{number}"] for number in range(excerpts)]
            lost = [
                ours - theirs
                for r, full in zip(each, raw, strict=True)
                for ours, theirs in zip(r["nll"], full["nll"], strict=True)
            ]
            agree = [same for r in each for same in r["agree"]]
            held, whole = (sum(r["held"] for r in some) / excerpts for some in (each, raw))
            values = {
                "delta_nll": (sum(lost) / len(lost), "nats"),
                "agreement": (sum(agree) / len(agree), "ratio"),
                "bytes_ratio": (held / whole, "ratio"),
                "bytes_saved": (whole - held, "bytes"),
            }
            where = {"policy": policy, "codec": report.codec(policy), "budget": 0.25}
            for metric, (value, unit) in values.items():
                run.add(metric, value, unit, len(lost), context=length, task="prose", **where)
            lines.append([policy, str(length), *(f"{value:.4g}" for value, _ in values.values())])
    print(table(["policy", "tokens", *values], lines))
    run.finish()
    engine.close()


if __name__ == "__main__":
    main()
