#!/usr/bin/env bash
# deploy_tools.sh [FILE]: puts the programs of deploy/requirements.txt, or of another such file, into
# .cache/deploy-tools-..., named after the file's folder, and prints that path, which tests name in
# PYTHONPATH; programs are in its bin. Its place is not .venv: they are large or want other versions
# than vLLM, and only tests of deploy/ need them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

file=${1:-deploy/requirements.txt}
cache=${VLLM_KVCRUSH_CACHE:-$PWD/.cache}
name=$(basename "$(dirname "$file")")-tools
wanted=$(sha256sum <"$file")
folder=$cache/$name-${wanted:0:12}
if [[ ! -f $folder/.complete ]]; then
    mkdir -p "$cache"
    if command -v flock >/dev/null; then
        exec 9>"$cache/.$name-lock"
        flock 9
    fi
    if [[ ! -f $folder/.complete ]]; then
        printf 'deploy tools: installing %s into %s\n' "$file" "$folder" >&2
        rm -rf "$cache/$name"-*
        "${PYTHON:-.venv/bin/python}" -m pip install -q --disable-pip-version-check --no-deps \
            --no-compile --target "$folder" -r "$file" >&2
        touch "$folder/.complete"
    fi
fi
printf '%s\n' "$folder"
