// What AVX2 and AVX-512 have in common.
#pragma once

#include <immintrin.h>

#include "simd/scalar.h"

namespace kvc::KVC_NAMESPACE {

// Eight floats, a row each, where what a row's vectors come to is wanted of eight rows.
using eight = __m256;

KVC_INLINE eight load_eight(const float *p) {
    return _mm256_loadu_ps(p);
}
KVC_INLINE void store_eight(float *p, eight x) {
    _mm256_storeu_ps(p, x);
}
KVC_INLINE eight times(eight a, eight b) {
    return _mm256_mul_ps(a, b);
}
// x - a * b.
KVC_INLINE eight less_product(eight x, eight a, eight b) {
    return _mm256_fnmadd_ps(a, b, x);
}
// join(a, b) of all lanes of each.
template <class F>
KVC_INLINE eight of_each(const eight *x, F join) {
    eight two[4], four[2];
    for (int i = 0; i < 4; ++i)
        two[i] = join(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                      _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        four[i] = join(_mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0x44),
                       _mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0xee));
    return join(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                _mm256_permute2f128_ps(four[0], four[1], 0x31));
}
KVC_INLINE eight most_of_each(const eight *x) {
    return of_each(x, [](eight a, eight b) { return _mm256_max_ps(a, b); });
}
KVC_INLINE eight sum_of_each(const eight *x) {
    return of_each(x, [](eight a, eight b) { return _mm256_add_ps(a, b); });
}
// Steps with which rows of these largest magnitudes become bytes, and what to multiply them by; 0
// where the inverse would overflow.
KVC_INLINE eight byte_steps(eight largest, float *inverse) {
    const eight any = _mm256_cmp_ps(largest, _mm256_set1_ps(1e-30f), _CMP_GT_OQ);
    const eight by = _mm256_div_ps(_mm256_set1_ps(127), largest);
    store_eight(inverse, _mm256_and_ps(any, by));
    return _mm256_and_ps(any, times(largest, _mm256_set1_ps(1 / 127.0f)));
}

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
