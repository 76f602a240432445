#!/usr/bin/env bash
# Puts the programs of deploy/requirements.txt into .cache/deploy-tools and prints that path, which
# its tests name in PYTHONPATH; programs are in its bin. Its place is not .venv: they are large, and
# only tests/deployment needs them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${VLLM_KVCRUSH_CACHE:-$PWD/.cache}
wanted=$(sha256sum <deploy/requirements.txt)
folder=$cache/deploy-tools-${wanted:0:12}
if [[ ! -f $folder/.complete ]]; then
    mkdir -p "$cache"
    if command -v flock >/dev/null; then
        exec 9>"$cache/.deploy-tools-lock"
        flock 9
    fi
    if [[ ! -f $folder/.complete ]]; then
        printf 'deploy tools: installing deploy/requirements.txt into %s\n' "$folder" >&2
        rm -rf "$cache"/deploy-tools-*
        "${PYTHON:-.venv/bin/python}" -m pip install -q --disable-pip-version-check --no-deps \
            --no-compile --target "$folder" -r deploy/requirements.txt >&2
        touch "$folder/.complete"
    fi
fi
printf '%s\n' "$folder"
