"""Compares what our policies and kvpress's presses keep of the same tensors of a real model.

    python -m benchmarks.policies.peers [--json FILE]

kvpress has no raw tail, and takes its statistics of queries over the whole prompt, so ours gets an
observation window of the whole prompt here. The environment of kvpress is made if it is not there.
"""

from __future__ import annotations

import pathlib
import subprocess
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.codecs.model import Forcer
from benchmarks.quality.peers import HERE, set_up
from benchmarks.quality.peers.kvpress_kept import PRESSES
from benchmarks.quality.tasks import build
from benchmarks.report import Run, arguments, interruptible, say, table
from vllm_kvcrush import ops, policies
from vllm_kvcrush.engine.worker.allocation import page_counts
from vllm_kvcrush.policies.base import Room, View
from vllm_kvcrush.policies.choice import allocated, choose, demanded, scored
from vllm_kvcrush.tools import demo_model

CONTEXT, SINKS, KEEP = 1024, 4, 0.5


class Ours(NamedTuple):
    """Our form of a press.

    Attributes:
        policy: the policy and its parameters.
        tail: newest tokens that always stay in kvpress.
        sinks: first tokens that do.
        window: whether the policy sees only the tail's queries, instead of all.
    """

    policy: str
    tail: int = 0
    sinks: int = 0
    window: bool = False


OURS = {
    "knorm": Ours("knorm"),
    "keydiff": Ours("keydiff"),
    "lagkv": Ours("lagkv", sinks=SINKS),
    "tova": Ours("tova", tail=1),
    "expected_attention": Ours("expected_attention", sinks=SINKS),
    "streaming": Ours("streaming", sinks=SINKS),
    "snapkv": Ours("snapkv(pool=5, pool_kind=avg)", 64, window=True),
    "pyramidkv": Ours("pyramidkv(snapkv(pool=5, pool_kind=avg))", 64, window=True),
    "adakv": Ours("adakv(expected_attention(epsilon=0.01))", sinks=SINKS),
}
assert set(OURS) == set(PRESSES)


def ours(
    own: Ours, forcer: Forcer, tensors: dict[str, Tensor], turned: Tensor, keep: int
) -> Tensor:
    """Returns what our policy keeps, bool [L, H, n]; pages are of one token each."""
    policy, tail = policies.get(own.policy), own.tail
    layers, heads, n, size = tensors["keys"].shape
    views = [
        View(
            held=ops.LayerKV(tensors["keys"][layer], tensors["values"][layer]),
            queries=turned[layer, :, -tail if own.window else SINKS :],
            scale=size**-0.5,
            candidates=n - tail,
            sinks=own.sinks,
            page_size=32,
            layer=layer,
            layers=layers,
            all_heads=lambda x: x,
            rope=forcer.probe.rope,
            computed=n,
        )
        for layer in range(layers)
    ]
    counts = torch.full((layers, heads), keep - tail)
    if policy.allocates:
        ones = torch.ones_like(counts)
        room = Room(int(counts.sum()), ones, ones * (n - tail))
        found = [demanded(policy, view, scored(policy, view)[0], room) for view in views]
        known = [demand for demand in found if demand is not None]
        shares = allocated(policy, torch.stack(known) if known else None, room)
        counts = torch.from_numpy(page_counts(shares, room, (ones * own.sinks).numpy()))
    kept = [choose(policy, view, counts[view.layer]).kept for view in views]
    rest = torch.ones(layers, heads, tail, dtype=torch.bool)
    return torch.cat((torch.stack(kept), rest), 2)


@torch.inference_mode()
def overlaps(model: str, keep: float) -> dict[str, tuple[float, float, float]]:
    """Returns, by method, the share of kept tokens that both keep: the mean over layers and heads,
    and the least; and the mean share of the one that keeps fewer, which is 1 where both rank tokens
    alike but give a head other numbers of them."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    python, forcer = set_up("kvpress"), Forcer(model)
    (item,) = build(AutoTokenizer.from_pretrained(model), ("text",), CONTEXT, 1, 0)
    turned, keys, values = forcer.probe.prefill(item.context)
    n, rope = keys.shape[2], forcer.probe.rope
    count = int(n * keep)
    tensors = {
        "keys": keys.contiguous(),
        "values": values.contiguous(),
        "queries": rope.rotate(turned.double(), -torch.arange(n)).float().contiguous(),
        "frequencies": rope.frequencies.float(),
        "kept": torch.tensor([count]),
    }
    with tempfile.TemporaryDirectory() as folder:
        given, result = (str(pathlib.Path(folder, x)) for x in ("given", "kept"))
        save_file(tensors, given)
        command = [str(python), "-I", str(HERE / "kvpress_kept.py"), given, result]
        subprocess.run(command, check=True)
        theirs = load_file(result)
    found = {}
    for name in PRESSES:
        kept = ours(OURS[name], forcer, tensors, turned, count)
        both, counts = (kept & theirs[name]).sum(2), (kept.sum(2), theirs[name].sum(2))
        share = both / torch.maximum(*counts)
        fewer = both / torch.minimum(*counts)
        found[name] = (float(share.mean()), float(share.min()), float(fewer.mean()))
    return found


def main() -> None:
    run = Run("kept", arguments(__doc__ or "").parse_args())
    model = str(demo_model.prepare(say=say))
    found = run.step("overlaps", lambda: overlaps(model, KEEP))
    where = {"budget": KEEP, "context": CONTEXT, "task": "text"}
    lines = []
    for name, (mean, least, fewer) in found.items():
        run.add("overlap", mean, "ratio", low=least, policy=name, mode=OURS[name].policy, **where)
        run.add("nested", fewer, "ratio", policy=name, mode=OURS[name].policy, **where)
        lines.append([OURS[name].policy, *(f"{x:.4f}" for x in (mean, least, fewer))])
    print(table(["method", "both keep", "least of a head", "of the one with fewer"], lines))
    run.finish(model=pathlib.Path(model).name)


if __name__ == "__main__":
    with interruptible("kept"):
        main()
