#!/usr/bin/env bash
# Serves the model directory $MODEL with a quarter of the KV cache on a small CPU machine.
# PORT chooses the port; further arguments go to `vllm serve`, after the ones below, and win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${MODEL:?set MODEL to a model directory, or use \"make serve\"}"
port=${PORT:-8000}
venv=$PWD/.venv

# No usage statistics and no model hub: all that is needed is on disk.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# vLLM warns about any variable of this prefix that it does not know; it is of use only where
# `vllm-kvcrush calibrate` has put tables.
[[ -d ${VLLM_KVCRUSH_CACHE:-}/tables ]] || unset VLLM_KVCRUSH_CACHE
# Not set here: VLLM_CPU_NUM_OF_RESERVED_CPU=0. Its threads then fight with the engine's own
# process for the cores; on two cores a token took four times as long.
# Intel's OpenMP, which vLLM asks for on x86; the lock has it.
preload=${LD_PRELOAD:-}
if [[ -e $venv/lib/libiomp5.so ]]; then
    preload=$venv/lib/libiomp5.so${preload:+:$preload}
fi

# Otherwise the watcher below would take the other server for this one.
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    printf 'serve: Port %s is in use; choose another with "make serve PORT=...".\n' "$port" >&2
    exit 1
fi

printf 'serve: Starting vLLM with %s on port %s; this takes about a minute.\n' "${MODEL##*/}" "$port"

# The exec below puts vLLM in this shell's place, so that signals reach it and its exit status is
# this script's. The watcher therefore watches this process id, and ends when it does.
"$venv/bin/python" - "$$" "$port" "$PWD/LICENSE" <<'EOF' &
import os, shlex, sys, time, urllib.request

server, port = int(sys.argv[1]), sys.argv[2]
# A long prompt, made of a file that is there.
build = """import json, sys
text = open(sys.argv[1]).read() + "\\n\\nWhat does this licence allow, in a few words?"
print(json.dumps({"model": "smollm2", "messages": [{"role": "user", "content": text}],
    "max_tokens": 60, "temperature": 0, "kv_budget": 0.25}))"""
body = shlex.join([sys.executable, "-c", build, sys.argv[3]])
base = f"http://127.0.0.1:{port}"
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
while True:
    time.sleep(0.5)
    try:
        os.kill(server, 0)
    except OSError:
        sys.exit()
    try:
        open_url(f"{base}/health", timeout=5).close()
        break
    except OSError:
        continue
print(f"""
serve: Ready at {base}/v1 (stop with Ctrl-C). Ask it about a long text; kv_tokens_details, in the
answer's usage, tells how many bytes its KV took at its end (kv_bytes_held), and would take raw.

{body} | curl -s {base}/v1/chat/completions -H 'Content-Type: application/json' --data-binary @-
""", flush=True)
EOF

# Preloaded only now, so that the helpers above run without it.
[[ -z $preload ]] || export LD_PRELOAD=$preload
exec "$venv/bin/vllm" serve "$MODEL" \
    --served-model-name smollm2 \
    --kv-policy auto --kv-budget 0.25 \
    --host 127.0.0.1 --port "$port" \
    --dtype float32 --enforce-eager --block-size 32 \
    --max-model-len 4096 --kv-cache-memory-bytes 536870912 \
    --max-num-seqs 64 --max-num-batched-tokens 2048 \
    "$@"
