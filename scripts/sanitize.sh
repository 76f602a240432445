#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UBSan and calls them with random and hostile
# arguments (tests/native/fuzz.cpp), on every instruction set that this CPU runs; then, where a
# cross compiler and an emulator are installed, the NEON kernels, whose results must be those of
# the portable ones here.
#
#   SEED=1 FUZZ_SECONDS=30 NEON_CASES=40 scripts/sanitize.sh [further arguments of fuzz]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=${SEED:-1} seconds=${FUZZ_SECONDS:-30} cases=${NEON_CASES:-40}
python=.venv/bin/python
# The driver must draw the same numbers everywhere.
driver=(-std=c++17 -g1 -ffp-contract=off -Wall -Wextra)

say() { printf 'sanitize: %s\n' "$*"; }

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
for pair in avx2:avx2 avx512:avx512_vnni; do
    grep -qw "${pair#*:}" /proc/cpuinfo 2>/dev/null && runs+=" ${pair%:*}"
done
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
