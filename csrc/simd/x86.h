// What AVX2 and AVX-512 have in common.
#pragma once

#include <immintrin.h>

#include "simd/scalar.h"

namespace kvc::KVC_NAMESPACE {

// The first columns of `transpose`; returns how many.
KVC_INLINE int transpose_columns(const uint32_t *const *row, int columns, uint32_t *to) {
    int c = 0;
    for (; c + 8 <= columns; c += 8)
        for (int half = 0; half < 16; half += 8) {
            __m256 a[8], b[8];
            for (int r = 0; r < 8; ++r)
                a[r] = _mm256_loadu_ps(reinterpret_cast<const float *>(row[half + r] + c));
            for (int r = 0; r < 8; r += 2) {
                b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
                b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
            }
            for (int r = 0; r < 8; r += 4)
                for (int k = 0; k < 2; ++k) {
                    a[r + 2 * k] = _mm256_shuffle_ps(b[r + k], b[r + k + 2], 0x44);
                    a[r + 2 * k + 1] = _mm256_shuffle_ps(b[r + k], b[r + k + 2], 0xee);
                }
            for (int r = 0; r < 4; ++r) {
                float *out = reinterpret_cast<float *>(to + 16 * (c + r) + half);
                _mm256_storeu_ps(out, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
                _mm256_storeu_ps(out + 64, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
            }
        }
    return c;
}

}  // namespace kvc::KVC_NAMESPACE
