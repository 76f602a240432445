#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UBSan and calls them with random and hostile
# arguments (tests/native/fuzz.cpp), on every instruction set that this CPU runs, and on AMX
# with its instructions in plain C++; then, where a cross compiler and an emulator are
# installed, the NEON kernels, whose results must be those of the portable ones here.
#
#   SEED=1 FUZZ_SECONDS=30 NEON_CASES=40 scripts/sanitize.sh [further arguments of fuzz]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=${SEED:-1} seconds=${FUZZ_SECONDS:-30} cases=${NEON_CASES:-40}
# setup.py compiles the kernels: with .venv, or before there is one with a Python that has setuptools.
python=.venv/bin/python
# The driver must draw the same numbers everywhere.
driver=(-std=c++17 -g1 -ffp-contract=off -Wall -Wextra)

say() { printf 'sanitize: %s\n' "$*"; }

if ! $python -c 'import setuptools' 2>/dev/null; then
    python=build/sanitize-venv/bin/python
    "${PYTHON:-python3}" -m venv --clear build/sanitize-venv
    $python -m pip install -qq --disable-pip-version-check "$(grep '^setuptools==' requirements.lock)"
fi

# build DIRECTORY COMPILER FLAGS: kernels as setup.py builds them, and the driver with them.
build() {
    local into=build/$1 cxx=$2 flags=$3
    if [ -x "$into/fuzz" ] && [ "$(cat "$into/flags")" = "$cxx $flags" ] &&
        [ -z "$(find csrc setup.py tests/native scripts/sanitize.sh -newer "$into/fuzz" -type f)" ]; then
        return
    fi
    rm -rf "$into"
    mkdir -p "$into"
    say "building $into with $cxx $flags"
    CXX=$cxx CXXFLAGS=$flags $python setup.py -q build_ext \
        --build-temp "$into/objects" --build-lib "$into/lib"
    # shellcheck disable=SC2086
    $cxx "${driver[@]}" $flags -rdynamic tests/native/fuzz.cpp "$into"/objects/*.o \
        -ldl -lpthread -o "$into/fuzz"
    echo "$cxx $flags" >"$into/flags"
}

# Only what this CPU runs: under sanitizers the others take minutes to compile.
runs=baseline
for pair in avx2:avx2 avx512:avx512_vnni avx512bf16:avx512_bf16 amx:amx_bf16; do
    grep -qw "${pair#*:}" /proc/cpuinfo 2>/dev/null && runs+=" ${pair%:*}"
done
# A sanitizer does not see what the instructions for tiles read and write, but what they are in C++.
# The two others, which take many minutes to compile so, are for KVCRUSH_FULL=1.
if [[ $runs == *avx2* ]]; then
    runs+=" amx_emulated${KVCRUSH_FULL:+ avx512_emulated avx512bf16_emulated}"
fi
[ "$(uname -m)" = x86_64 ] || runs="baseline neon"

cxx=${CXX:-g++}
KVCRUSH_BUILD_ISAS=$runs build sanitize "$cxx" "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
build/sanitize/fuzz --seed "$seed" --seconds "$seconds" "$@"

arm=aarch64-linux-gnu
if ! command -v $arm-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    say "SKIPPED: NEON kernels, which need $arm-g++ and qemu-aarch64 here" \
        "(Debian: apt-get install g++-$arm qemu-user)"
    exit 0
fi
build neon $arm-g++ "-O2"
build/sanitize/fuzz --seed "$seed" --cases "$cases" --isa baseline --write build/neon/wanted
qemu-aarch64 -L /usr/$arm build/neon/fuzz --seed "$seed" --cases "$cases" --isa neon \
    --against build/neon/wanted
