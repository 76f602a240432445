// Conversions to bfloat16, and products of its matrices by AMX tiles (KVC_TILES) or vdpbf16ps:
//
//   product<both, add>(a, a_stride, b0, b1, depth, to, stride)
//
// is kRows rows of 16 columns, or 32 if `both`, of floats, set or added to. `a` has rows of
// a_stride bytes; b0 and b1 are panels [rows / 2][16 columns][2]. `depth` counts kDepth rows of
// them. It stands in a ProductRegion.
#pragma once

#include "kernels/panel.h"

namespace kvc::KVC_NAMESPACE {

constexpr int kRows = 32, kDepth = 32;

// Rounded to bfloat16, to nearest even: 16 pairs, `low` in the low halves of words.
KVC_INLINE vi bf16_pairs(vf low, vf high) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder), (vi)_mm512_cvtne2ps_pbh(high, low));
}
// Adds a0 * b0 + a1 * b1 of the bfloat16 pairs in each word.
KVC_INLINE void dot_bf16(vf &sum, vi a, vi b) {
#if defined(KVC_EMULATED)
    sum = _mm512_dpbf16_ps(sum, a, b);
#else
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
}
// 32 in a row.
KVC_INLINE vi bf16_row(vf first, vf second) {
    return (vi)_mm512_cvtne2ps_pbh(second, first);
}

}  // namespace kvc::KVC_NAMESPACE

#if defined(KVC_TILES)
#include "simd/amx.h"
#else

namespace kvc::KVC_NAMESPACE {

struct ProductRegion {
    ~ProductRegion() {}  // or it would be an unused variable
};

template <bool both, bool add>
KVC_APART void product(const void *a, int64_t a_stride, const void *b0, const void *b1,
                       int64_t depth, float *to, int64_t stride) {
    constexpr int N = both ? 2 : 1, R = 8;  // sums and columns fit the registers
    const uint8_t *const panel[2] = {static_cast<const uint8_t *>(b0),
                                     static_cast<const uint8_t *>(b1)};
    for (int first = 0; first < kRows; first += R, to += R * stride) {
        const uint8_t *rows = static_cast<const uint8_t *>(a) + first * a_stride;
        vf sum[R][N];
        repeat<R>(KVC_LAMBDA(r) {
            repeat<N>(
                KVC_LAMBDA(n) { sum[r][n] = add ? vload(to + r * stride + 16 * n) : vzero(); });
        });
        for (int64_t i = 0; i < depth * kDepth / 2; ++i) {
            vi b[N];
            repeat<N>(KVC_LAMBDA(n) { b[n] = vload_words<W>(panel[n] + i * 64); });
            repeat<R>(KVC_LAMBDA(r) {
                int32_t word;
                std::memcpy(&word, rows + r * a_stride + 4 * i, 4);
                const vi x = ivset(word);
                repeat<N>(KVC_LAMBDA(n) { dot_bf16(sum[r][n], x, b[n]); });
            });
        }
        repeat<R>(KVC_LAMBDA(r) {
            repeat<N>(KVC_LAMBDA(n) { vstore(to + r * stride + 16 * n, sum[r][n]); });
        });
    }
}

}  // namespace kvc::KVC_NAMESPACE

#endif
