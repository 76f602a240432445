#!/usr/bin/env bash
# Makes the environment of one peer: setup.sh kvpress, or setup.sh openvino. It goes to
# .cache/peers/NAME (VLLM_KVCRUSH_CACHE/peers/NAME where that is set), from NAME.txt. Safe to run
# again at any time: it does nothing when the environment is up to date, and finishes one that an
# earlier run left half-made.
set -euo pipefail

say() { printf 'peers: %s\n' "$*"; }
die() { printf 'peers: %s\n' "$*" >&2; exit 1; }

name=${1-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case $name in
    kvpress | openvino) wanted=$here/$name.txt ;;
    *) die "which peer? Say $0 kvpress, or $0 openvino." ;;
esac
cache=${VLLM_KVCRUSH_CACHE:-$here/../../../.cache}
mkdir -p "$cache/peers" 2>/dev/null \
    || die "cannot write to $cache; set VLLM_KVCRUSH_CACHE to a directory that can be written to, with 2 GB free."
venv=$(cd "$cache/peers" && pwd)/$name

stamp=$venv/.setup-stamp
want=$(cat "$wanted" "$here/setup.sh" | sha256sum)
# The path is part of the stamp because a moved environment still points at its old place.
want="${want%% *} $venv"
up_to_date() { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$want" ]]; }
up_to_date && exit 0

# Two runs at once would install over each other; the second waits for the first.
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock --nonblock 9 || { say "Waiting for another set-up of $name to end."; flock 9; }
    up_to_date && exit 0
fi

host_python=${PYTHON:-python3}
command -v "$host_python" >/dev/null || die "no $host_python here; install Python 3.11 or newer, or name one with PYTHON=..."
"$host_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    || die "$host_python is $("$host_python" -V 2>&1); the peers need Python 3.11, 3.12 or 3.13. Name one with PYTHON=..."

started=$SECONDS
rm -f "$stamp"
py=$venv/bin/python
# RECORD tells whether pip itself is whole; see below.
if ! { grep -qs 'dist-info/INSTALLER' "$venv"/lib/python3*/site-packages/pip-*.dist-info/RECORD \
    && "$py" -m pip --version >/dev/null 2>&1; }; then
    say "Making an environment for $name with $("$host_python" -V 2>&1): $venv"
    "$host_python" -m venv --clear "$venv" \
        || die "could not make $venv; $host_python may lack its venv module (on Debian and Ubuntu: python3-venv)"
fi

# A run killed while pip was unpacking leaves packages that pip takes for installed. pip writes the
# name INSTALLER into RECORD last of all, so whatever lacks it is not whole and is done again.
"$py" - <<'PYTHON'
import pathlib, shutil, sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
for left_over in site.glob("~*"):
    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    if not record.is_file() or "dist-info/INSTALLER" not in record.read_text(errors="replace"):
        print(f"peers: {info.name.removesuffix('.dist-info')} was left half-installed; doing it again.")
        shutil.rmtree(info)
PYTHON

# --no-compile: Python compiles the few modules that are really imported when they first are.
install() {
    "$py" -m pip install -qq --disable-pip-version-check --no-compile --no-deps "$@" \
        || die "pip could not install $name's packages (its own words are above). Run $0 $name again; what is done is kept."
}

if torch=$(grep -E '^torch==' "$wanted"); then
    say "Installing $torch (the largest package; its CPU build)."
    install "$torch"
    "$py" - <<'PYTHON' || die "pip took the CUDA build of torch; the peer runs on the CPU beside the engine it is compared with. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, delete $venv and run this again."
import pathlib, runpy, sys, sysconfig

version = pathlib.Path(sysconfig.get_path("purelib"), "torch", "version.py")
sys.exit(runpy.run_path(str(version))["cuda"] is not None)
PYTHON
fi
say "Installing the $(grep -cE '^[^#]' "$wanted") packages of $name.txt."
install -r "$wanted"

printf '%s\n' "$want" >"$stamp"
say "Done in $((SECONDS - started)) s."
