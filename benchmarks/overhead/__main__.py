"""Measures compaction's share of a request's time, and the cost of an idle plugin.

Offline engines with the demo model (SmolLM2-135M, float32), each in a process of its own.

1. One request at a time, prompts of several lengths, budget 0.25: the seconds that the worker
   spends in compactions over the seconds from submission to the last token.
2. Plain vLLM, plain vLLM again as a control, the plugin without a policy, and a policy that every
   request opts out of: four engines side by side, measured in turns; the ratio of their decode
   steps, round by round.
3. Decode steps over full contexts, plain vLLM and policies, in turns.

    python -m benchmarks.overhead [--quick] [--json FILE]
"""

from __future__ import annotations

from benchmarks.overhead import decode, idle, share
from benchmarks.report import Run, arguments, interruptible, say

OUTPUT = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", help="prompt lengths, in tokens")
    parser.add_argument("--repeats", type=int, help="of every prompt length and policy")
    parser.add_argument("--rounds", type=int, help="in which the idle plugin is measured")
    args = parser.parse_args()
    args.prompts = args.prompts or (
        [512, 1024, 2048] if args.quick else [512, 1024, 2048, 4096, 8000]
    )
    args.repeats = args.repeats or (2 if args.quick else 3)
    args.rounds = args.rounds or (10 if args.quick else 25)
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds}: an interval needs 5 rounds or more")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    if not all(0 < prompt <= 8192 - OUTPUT for prompt in args.prompts):
        parser.error(f"--prompts: the demo model takes 1 to {8192 - OUTPUT} tokens")
    tokens = 8 if args.quick else 24
    context, batches, turns = (1024, [1, 4], 2) if args.quick else (7680, [1, 8], 2)

    from vllm_kvcrush.tools import demo_model

    model = str(demo_model.prepare(say=say))
    run = Run("overhead", args)
    steps = decode.measure(run, model, context, batches, 2 * tokens, turns)
    shares = share.measure(run, model, args.prompts, OUTPUT, args.repeats)
    rounds = idle.measure(run, model, args.rounds, tokens)
    print(
        f"\nOne request at a time, {OUTPUT} output tokens, budget {share.BUDGET}, medians of "
        f"{args.repeats} (smallest to largest). Published claim: below {share.CLAIM:.1%}.\n"
    )
    print(share.report(run, shares, OUTPUT))
    print(
        f"\nA decode step of {idle.BATCH} requests, {args.rounds} rounds of {tokens} steps: median "
        "ratio of a round and its 95 % bootstrap interval. An interval that contains 1 is no "
        "difference.\n"
    )
    print(idle.report(run, rounds))
    print(
        f"\nDecode steps over contexts of {context} tokens, {turns} rounds of {2 * tokens} steps: "
        "medians (smallest to largest).\n"
    )
    print(decode.report(run, steps, context))
    run.finish()


if __name__ == "__main__":
    with interruptible("overhead"):
        main()
