"""Measures whether `auto` loses no more than any codec that takes as much memory.

Each model is calibrated, or gets statistics as at a server's start, and each codec's loss is
measured on held-out text, in all and by layer and head. Then contexts of another text are stored in
each codec alone, in what `auto` makes of as many blocks, a codec for each layer and head, and in
the best mixture of two codecs that is the same for all heads. Questions are forced over them.
Codecs are stored once; all else is put together from them.

    python -m benchmarks.content [--quick] [--models demo,biased,outliers] [--json FILE]
"""

from __future__ import annotations

import argparse
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.report import ROOT, Run, arguments, interruptible, interval, progress, say, table

BLOCK, ITEMSIZE = 64, 2
TABLES = ("calibrated", "start-up")
# Memory at which `auto` is measured besides that of each codec, times less than raw.
RATIOS = (4, 6, 8)
# No named codec may lose less than `auto` in as many bytes by more than this, in nats a token, and
# by more than this share of its own loss.
NOISE, NOISE_SHARE = 0.002, 0.1


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", help="model directory; else the demo model")
    parser.add_argument(
        "--models", type=lambda s: s.split(","), default=["demo", "biased", "outliers"]
    )
    parser.add_argument("--tables", type=lambda s: s.split(","), default=list(TABLES))
    parser.add_argument("--context", type=int, default=1536, help="tokens")
    parser.add_argument("--question", type=int, default=256, help="tokens")
    parser.add_argument("--excerpts", type=int, help="else 6 (quick: 2)")
    args = parser.parse_args()
    args.excerpts = args.excerpts or (2 if args.quick else 6)
    return args


class Study:
    """One model with one kind of tables."""

    def __init__(self, path: str, kind: str, made_by: str, quick: bool = False) -> None:
        from benchmarks.content.models import MODELS
        from vllm_kvcrush.codecs.transform import calibrate, losses, texts
        from vllm_kvcrush.codecs.transform.fit import fit
        from vllm_kvcrush.codecs.transform.points import POINTS, horizon
        from vllm_kvcrush.plan import Packing

        self.probe = probe = calibrate.Probe(path)
        MODELS[kind](probe)
        even = made_by == "start-up"
        statistics = self._plain() if even else self._full()
        far = horizon(probe.config)
        self.tables = {p.name: fit(statistics, p, probe.rope, far, even=even) for p in POINTS}
        held, about = calibrate.held_out(probe, None, None)
        # From each package's text.
        held = held[:: len(held) // 2] if quick else held
        self.losses = losses.measure(probe, held, self.tables, about, calibrate.bar)
        rooms = {codec: self._rooms(codec) for codec in self.losses.loss}
        self.packings = sorted(
            (
                Packing(codec, (tuple(sorted(Counter(rooms[codec]).items())),), loss)
                for codec, loss in self.losses.total.items()
            ),
            key=lambda packing: packing.tokens(1024),
        )
        self.rooms = rooms
        self._texts = texts
        if even:
            self.losses.loss = self._divided(held)

    def _rooms(self, codec: str) -> list[int]:
        """Returns how many tokens a page of each layer and head holds."""
        from vllm_kvcrush.codecs import CODECS

        model = self.probe.model
        page = BLOCK * 2 * model.size * ITEMSIZE
        if codec not in self.tables:
            room = CODECS[codec].capacity(page, model.size, model.size, ITEMSIZE)
            return [room] * (model.layers * model.kv_heads)
        own = self.tables[codec]
        return [
            own.capacity(layer, head, page, model.size)[0]
            for layer in range(model.layers)
            for head in range(model.kv_heads)
        ]

    def _divided(self, held: Any) -> Any:
        """Divides the codecs' losses among layers and heads as workers do when they start."""
        import torch

        from vllm_kvcrush import ops
        from vllm_kvcrush.codecs.transform import losses
        from vllm_kvcrush.engine.worker import statistics

        probe, model = self.probe, self.probe.model
        scale, layers = model.size**-0.5, range(model.layers)
        names = [packing.codec for packing in self.packings]
        errors = {c: torch.zeros(model.layers, model.kv_heads, dtype=torch.float64) for c in names}
        by_layer: list[float] = []
        for context, question in held[: statistics.EXCERPTS]:
            n = len(context)
            q, keys, values = probe.prefill([*context, *question])
            q = q[:, :, n :: statistics.EVERY].transpose(1, 2)
            kept = {"": (keys[:, :, :n], values[:, :, :n])}
            kept |= {c: losses.stored(c, *kept[""], self.tables) for c in names}

            def read(codec: str, layer: int, q: Any = q, kept: Any = kept) -> Any:
                held = ops.LayerKV(*(x[layer] for x in kept[codec]))
                return statistics.attended(held, q[layer], scale)

            for layer in layers:
                exact = read("", layer)
                for c in names:
                    errors[c][layer] += (read(c, layer) - exact).double().square().sum((1, 2))
            with torch.inference_mode():
                exact = probe.log_probabilities(*kept[""], n, question)
                for layer in layers if not by_layer else ():
                    k, v = (x.clone() for x in kept[names[0]])
                    k[layer], v[layer] = (x[layer] for x in kept[names[-1]])
                    other = probe.log_probabilities(k, v, n, question)
                    by_layer.append(float(losses.divergence(exact, other).double().mean()))
        return statistics.divided(self.losses.total, errors, names[-1], by_layer)

    def _full(self) -> Any:
        from vllm_kvcrush.codecs.transform import calibrate

        tokens = calibrate.tokens_of(self.probe, None, None, calibrate.bar)
        return calibrate.take_statistics(self.probe, calibrate.excerpts(tokens), calibrate.bar)

    def _plain(self) -> Any:
        """Takes statistics as workers do when they start, without gradients."""
        import torch

        from vllm_kvcrush.codecs.layout import SINKS
        from vllm_kvcrush.codecs.transform import texts
        from vllm_kvcrush.codecs.transform.fit import Statistics

        ids = self.probe.tokenizer.encode(texts.fitting(), add_special_tokens=False)[:2048]
        total, count = None, 0
        for first in range(0, len(ids) - 255, 256):
            q, k, _ = self.probe.prefill(2 * ids[first : first + 256])
            back = -torch.arange(k.shape[2])
            q, k = (self.probe.rope.rotate(x, back)[:, :, SINKS:] for x in (q, k))
            new, more = Statistics.of(k, q), k.shape[2]
            total = new if total is None else total.merged(new, count, more)
            count += more
        return total

    def excerpts(self, context: int, question: int, count: int) -> list[Any]:
        """Returns contexts and questions of a text that nothing was fitted to or measured on."""
        body = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/*.md")))

        def encode(text: str) -> list[int]:
            return list(self.probe.tokenizer.encode(text, add_special_tokens=False))

        return self._texts.excerpts([body], encode, context, question, count)

    def contents(self, tokens: int) -> dict[str, tuple[int, list[tuple[str, int]]]]:
        """Returns by name what is compared: blocks, and codecs with how many tokens each."""
        from vllm_kvcrush.plan import cdiv, least_loss

        raw = cdiv(tokens, BLOCK)
        found: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        for packing in self.packings:
            blocks = packing.blocks(tokens)
            found[packing.codec] = blocks, [(packing.codec, tokens)]
            parts = least_loss(self.packings, blocks, tokens)
            found[f"mixture beside {packing.codec}"] = blocks, [tuple(p) for p in parts or ()]
        for ratio in RATIOS:
            parts = least_loss(self.packings, raw // ratio, tokens)
            if parts is not None:
                found[f"mixture at {ratio}x"] = raw // ratio, [tuple(p) for p in parts]
        return found

    def by_head(self, blocks: int, tokens: int) -> Any:
        """Returns a codec for each layer and head, of those that fill `blocks` blocks, with the
        least expected loss: int64 [L, H], indices of `packings`; None if none has room."""
        import numpy as np

        from vllm_kvcrush.engine.worker.allocation import least_loss_codecs

        shape = (self.probe.model.layers, self.probe.model.kv_heads)
        names = [packing.codec for packing in self.packings]
        pages = np.stack([-(-tokens // np.array(self.rooms[c]).reshape(shape)) for c in names])
        losses = np.stack([self.losses.loss[c].numpy() for c in names])
        return least_loss_codecs(losses, pages, blocks * shape[0] * shape[1])

    def heads(self, tokens: int) -> dict[str, dict[str, int]]:
        """Returns how many layers and heads `auto` has in which codec, by names as in `measure`."""
        found = {}
        for name, (blocks, _) in self.contents(tokens).items():
            choice = self.by_head(blocks, tokens)
            if name.startswith("mixture") and choice is not None:
                counts = Counter(self.packings[i].codec for i in choice.ravel())
                found[name.replace("mixture", "auto")] = dict(counts.most_common())
        return found

    def measure(self, context: list[int], question: list[int]) -> dict[str, dict[str, float]]:
        """Returns the figures of each content on one excerpt."""
        import torch

        from vllm_kvcrush.codecs.transform import losses

        n = len(context)
        _, keys, values = self.probe.prefill(context)
        names = [packing.codec for packing in self.packings]
        kept = {c: losses.stored(c, keys, values, self.tables) for c in names}
        found = {}
        with torch.inference_mode():
            exact = self.probe.log_probabilities(keys, values, n, question)

            def figures(k: Any, v: Any) -> dict[str, float]:
                other = self.probe.log_probabilities(k, v, n, question)
                gold = torch.tensor(question[1:])[:, None]
                delta = (exact[:-1].gather(1, gold) - other[:-1].gather(1, gold)).mean()
                return {
                    "kl": float(losses.divergence(exact, other).mean()),
                    "delta_nll": float(delta),
                    "agreement": float((exact.argmax(-1) == other.argmax(-1)).float().mean()),
                }

            for name, (blocks, parts) in self.contents(n).items():
                first, k, v = 0, torch.empty_like(keys), torch.empty_like(values)
                for codec, count in parts:
                    here = slice(first, first + count)
                    for own, its in zip((k, v), kept[codec], strict=True):
                        own[:, :, here] = its[:, :, here]
                    first += count
                found[name] = figures(k, v)
                if name.startswith("mixture") and (choice := self.by_head(blocks, n)) is not None:
                    at = torch.from_numpy(choice)[None, :, :, None, None]
                    pair = [
                        torch.stack([kept[c][i] for c in names]).take_along_dim(at, 0)[0]
                        for i in range(2)
                    ]
                    found[name.replace("mixture", "auto")] = figures(*pair)
        return found


def ladder(study: Study) -> list[str]:
    """Returns the codecs that `auto` uses at some size."""
    from vllm_kvcrush.plan import expected

    used: dict[str, None] = {}
    for percent in range(50, 5, -1):
        found = expected(study.packings, BLOCK, percent / 100)
        used |= dict.fromkeys(part.codec for part in (found[1] if found else ()))
    return [p.codec for p in study.packings if p.codec in used]


def beaten(figures: Mapping[str, float], codec: str) -> bool:
    """Whether a codec loses less than `auto` in as many blocks, by more than noise."""
    own, auto = figures[codec], figures[f"auto beside {codec}"]
    return auto - own > max(NOISE, NOISE_SHARE * own)


def main() -> None:
    args = parse()
    from vllm_kvcrush.tools import demo_model

    run = Run("content", args)
    path = args.model or str(demo_model.prepare(say=say))
    raw = -(-args.context // BLOCK)
    worst = 0
    for kind in args.models:
        for made_by in args.tables:
            studies: list[Study] = []

            def study(
                kind: str = kind, made_by: str = made_by, made: list[Study] = studies
            ) -> Study:
                if not made:
                    made.append(Study(path, kind, made_by, args.quick))
                return made[0]

            name = f"{kind}/{made_by}"
            about = run.step(
                f"{name}/ladder",
                lambda study=study: {
                    "ladder": ladder(study()),
                    "losses": study().losses.total,
                    "contents": study().contents(args.context),
                    "heads": study().heads(args.context),
                },
            )
            found = []
            for i in progress(range(args.excerpts), name):

                def measure(study: Any = study, i: int = i) -> Any:
                    own = study().excerpts(args.context, args.question, args.excerpts)
                    return study().measure(*own[i])

                found.append(run.step(f"{name}/{i}", measure))
            means = {c: interval([f[c]["kl"] for f in found])[0] for c in found[0]}
            lines = []
            for content in found[0]:
                blocks, parts = about["contents"][content.replace("auto", "mixture")]
                cells = [content, f"{raw / blocks:.2f}"]
                if content in about["heads"]:
                    parts = about["heads"][content].items()
                whole = sum(n for _, n in parts)
                cells.append(
                    " + ".join(f"{c} {n * 100 // whole} %" for c, n in parts)
                    if content not in about["losses"]
                    else ""
                )
                for metric, unit in (("kl", "nats"), ("delta_nll", "nats"), ("agreement", "ratio")):
                    mean, low, high = interval([f[content][metric] for f in found])
                    run.add(
                        *(metric, mean, unit, len(found)),
                        **{"codec": content, "context": args.context, "mode": name},
                        **{"low": low, "high": high, "budget": blocks / raw},
                    )
                    cells.append(f"{mean:.4f}")
                if content in about["losses"]:
                    predicted = about["losses"][content]
                    run.add("expected_loss", predicted, "nats", codec=content, mode=name)
                    cells += [f"{predicted:.4f}", "beats auto" if beaten(means, content) else ""]
                else:
                    cells += ["", ""]
                lines.append(cells)
            wrong = [c for c in about["losses"] if beaten(means, c)]
            worst += len(wrong)
            run.add("codecs_that_beat_auto", len(wrong), "codecs", mode=name)
            print(f"\n{name}: {args.excerpts} excerpts of {args.context} tokens; ", end="")
            print(f"ladder {' → '.join(about['ladder'])}\n")
            head = ["content", "x bf16", "made of", "KL", "ΔNLL", "agreement", "expected", ""]
            print(table(head, lines), flush=True)
    run.finish(model=pathlib.Path(path).name)
    if worst:
        raise SystemExit(f"content: {worst} named codecs lose less than auto in as many bytes")


if __name__ == "__main__":
    with interruptible("content"):
        main()
