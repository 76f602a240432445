#!/usr/bin/env bash
# scripts/triton.sh [VERSION]: puts Triton into .cache/triton-VERSION and prints that path. Its place
# is not .venv: vLLM's CPU build warns about a Triton without a CPU backend in every process, and it
# is a gigabyte that only the GPU kernels' tests and their compilation need. They name it in
# PYTHONPATH. The usual version is the one that torch 2.13 for GPUs pins, which vLLM 0.32 pins: what
# users have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:-3.7.1}
cache=${VLLM_KVCRUSH_CACHE:-$PWD/.cache}
folder=$cache/triton-$version
if [[ ! -f $folder/.complete ]]; then
    mkdir -p "$cache"
    if command -v flock >/dev/null; then
        exec 9>"$cache/.triton-lock"
        flock 9
    fi
    if [[ ! -f $folder/.complete ]]; then
        printf 'triton: installing triton==%s into %s\n' "$version" "$folder" >&2
        rm -rf "$folder"
        .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-compile \
            --target "$folder" "triton==$version" >&2
        touch "$folder/.complete"
    fi
fi
printf '%s\n' "$folder"
