// Vectors of W floats (vf) and 32-bit integers (vi) for the instruction set that this translation
// unit is compiled for. One header each gives the same names:
//
//   vzero vset vload vstore vload_lanes vadd vsub vmul vfma vbroadcast vaccumulate vmax vmin vhmax
//   vhsum vabs vround vexp2 vhadamard vload_bf16_pairs vload_half vload_words vload_words16 vleft
//   vright vright_signed vand vor to_float to_int vstore_words vstore_words16 transpose_columns
//   kMostHeads kItemPad kItemPanels panels_at_once code_panels_at_once
//
// and where it defines KVC_INTEGER_PRODUCTS also
//
//   ivset ivzero dot_pairs dot_bytes bytes_total load_int8_pairs load_nibbles load_pairs
//   load_triples load_field store_int16 store_block
//
// kMostHeads query rows share a pass over a panel, and panels_at_once panels share a pass over
// those rows: as many accumulators as there are registers, and never so few that additions wait for
// one another. kItemPad rows and kItemPanels panels go together in prefill.
#pragma once

#if defined(KVC_EMULATED)
#include "simd/emulated.h"
//
#include "simd/avx512.h"
#elif defined(__AVX512F__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#elif defined(KVC_NEON)
#include "simd/neon.h"
#else
#include "simd/portable.h"
#endif

namespace kvc::KVC_NAMESPACE {

// to[16 * c + r] = row[r][c] of 16 rows of words.
KVC_INLINE void transpose(const uint32_t *const *row, int columns, uint32_t *to) {
    // A word may be two numbers of 16 bits, which only memcpy may read as one.
    for (int c = transpose_columns(row, columns, to); c < columns; ++c)
        for (int r = 0; r < 16; ++r) std::memcpy(to + 16 * c + r, row[r] + c, 4);
}

}  // namespace kvc::KVC_NAMESPACE
