// Products over quantised panels in integers: codes times weights of 16 bits, which are exact to
// 1 / 65534 of their largest. Sums stay within 32 bits: 256 rows * 127 * 32767 < 2^31.
#pragma once

#include "panel.h"

#if defined(__AVX2__)

namespace kvc::KVC_NAMESPACE {

constexpr float kCodeMax = 32767.0f;

#if defined(__AVX512F__)
KVC_INLINE vi ivset(int32_t x) {
    return _mm512_set1_epi32(x);
}
KVC_INLINE vi ivzero() {
    return _mm512_setzero_si512();
}
// sum + a0 * b0 + a1 * b1 of the int16 pairs in each word.
KVC_INLINE vi dot_pairs(vi sum, vi a, vi b) {
    return _mm512_dpwssd_epi32(sum, a, b);
}
KVC_INLINE vf to_float(vi x) {
    return _mm512_cvtepi32_ps(x);
}
// Codes of W weights, rounded; eights: in the order that int4 panels want.
template <bool eights>
KVC_INLINE void store_codes(int16_t *to, vf x) {
    vi code = _mm512_cvtps_epi32(x);
    if (eights) code = _mm512_shuffle_epi32(code, _MM_PERM_DBCA);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16(code));
}
#else
KVC_INLINE vi ivset(int32_t x) {
    return _mm256_set1_epi32(x);
}
KVC_INLINE vi ivzero() {
    return _mm256_setzero_si256();
}
// One unit, because GCC would do many products first and spill them.
KVC_INLINE vi dot_pairs(vi sum, vi a, vi b) {
    vi product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
    return sum;
}
KVC_INLINE vf to_float(vi x) {
    return _mm256_cvtepi32_ps(x);
}
template <bool eights>
KVC_INLINE void store_codes(int16_t *to, vf x) {
    const vi pick = eights ? _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1,
                                              -1, 0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1,
                                              -1, -1)
                           : _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1,
                                              -1, 0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1,
                                              -1, -1);
    const vi code = _mm256_shuffle_epi8(_mm256_cvtps_epi32(x), pick);
    const vi packed = _mm256_permute4x64_epi64(code, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_castsi256_si128(packed));
}
#endif

// How a panel of codes is stored. A step is `rows` rows, as `words` vectors of int16 pairs; the
// pairs are rows (0, 1) of int8 and rows (0, 2), (1, 3), (4, 6), (5, 7) of int4.
struct I8 {
    static constexpr int rows = 2, words = 1, lane_bytes = 2;
    static constexpr bool eights = false;
    template <int lanes>
    static KVC_INLINE void load(const uint8_t *p, vi (&x)[1]) {
#if defined(__AVX512F__)
        if constexpr (lanes == W)
            x[0] = _mm512_cvtepi8_epi16(
                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        else
            x[0] = _mm512_zextsi256_si512(
                _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#else
        x[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#endif
    }
};
struct I4 {
    static constexpr int rows = 8, words = 4, lane_bytes = 4;
    static constexpr bool eights = true;
    template <int lanes>
    static KVC_INLINE void load(const uint8_t *p, vi (&x)[4]) {
#if defined(__AVX512F__)
        const vi y = lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
        const vi mask = _mm512_set1_epi16(15);
        x[0] = _mm512_and_si512(y, mask);
        x[1] = _mm512_and_si512(_mm512_srli_epi16(y, 8), mask);
        x[2] = _mm512_and_si512(_mm512_srli_epi16(y, 4), mask);
        x[3] = _mm512_srli_epi16(y, 12);
#else
        const vi y = _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
        const vi mask = _mm256_set1_epi16(15);
        x[0] = _mm256_and_si256(y, mask);
        x[1] = _mm256_and_si256(_mm256_srli_epi16(y, 8), mask);
        x[2] = _mm256_and_si256(_mm256_srli_epi16(y, 4), mask);
        x[3] = _mm256_srli_epi16(y, 12);
#endif
    }
};

// The integer twin of multiply(): weights of head g start at w + g * stride, in int16.
template <class S, int lanes, int G, int NP, int stride>
KVC_INLINE void multiply_codes(vi (&acc)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                               int rows, const int16_t *w, const uint8_t *const (&ahead)[NP]) {
    constexpr int NV = vectors(lanes), width = lanes < W ? lanes : W;
    constexpr int step = lanes * S::lane_bytes, steps = step < 64 ? 64 / step : 1;
    const int64_t bytes = int64_t{rows} / S::rows * step;
    for (int64_t at = 0; at < bytes; at += steps * step, w += steps * S::rows) {
#pragma GCC unroll 16
        for (int j = 0; j < NP; ++j) prefetch(ahead[j] + at);
#pragma GCC unroll 4
        for (int i = 0; i < steps; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < NP; ++j)
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    vi x[S::words];
                    S::template load<width>(panel[j] + at + i * step + v * W * S::lane_bytes, x);
#pragma GCC unroll 4
                    for (int k = 0; k < S::words; ++k)
#pragma GCC unroll 16
                        for (int g = 0; g < G; ++g) {
                            int32_t pair;
                            std::memcpy(&pair, w + g * stride + i * S::rows + 2 * k, 4);
                            acc[g][j * NV + v] = dot_pairs(acc[g][j * NV + v], x[k], ivset(pair));
                        }
                }
    }
}

// Sums of codes times q of NP K strips: s[g * kTile + 16 * j + lane], as floats.
template <class S, int G, int NP>
void multiply_k_codes(const uint8_t *const *strip, int channels, const int16_t *q, float *s,
                      const uint8_t *const *next) {
    constexpr int NV = vectors(kStrip);
    vi acc[G][NP * NV];
    const uint8_t *panel[NP], *ahead[NP];
    for (int j = 0; j < NP; ++j) panel[j] = strip[j], ahead[j] = next[j];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < NP * NV; ++v) acc[g][v] = ivzero();
    multiply_codes<S, kStrip, G, NP, kMaxHead>(acc, panel, channels, q, ahead);
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
        for (int v = 0; v < NP * NV; ++v) vstore(s + g * kTile + v * W, to_float(acc[g][v]));
}

// out[g * out_stride + lane] = out * decay[g] + (sum - shift[g]) * step[g].
template <class S, int lanes, int G, int NP>
void multiply_v_codes(const uint8_t *const *strip, int strips, int64_t offset, const int16_t *p,
                      const float *step, const float *shift, const float *decay, float *out,
                      int64_t out_stride, const uint8_t *const *next) {
    constexpr int NV = vectors(lanes), panel_bytes = kStrip / S::rows * lanes * S::lane_bytes;
    vi acc[G][NP * NV];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < NP * NV; ++v) acc[g][v] = ivzero();
    for (int i = 0; i < strips; ++i) {
        const uint8_t *panel[NP], *ahead[NP];
        for (int j = 0; j < NP; ++j) {
            panel[j] = strip[i] + offset + j * panel_bytes;
            ahead[j] = next[i] + offset + j * panel_bytes;
        }
        multiply_codes<S, lanes, G, NP, kTile>(acc, panel, kStrip, p + i * kStrip, ahead);
    }
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
        for (int v = 0; v < NP * NV; ++v) {
            float *at = out + g * out_stride + v * W;
            const vf sum = vmul(vsub(to_float(acc[g][v]), vset(shift[g])), vset(step[g]));
            vstore(at, vfma(vload(at), vset(decay[g]), sum));
        }
}

// Codes of n weights (a multiple of 8; 8 more may be read and written) relative to their largest,
// and the step between codes; returns the sum of the codes.
template <bool eights>
KVC_INLINE float quantise(const float *x, int n, int16_t *code, float &step) {
    vf peak = vzero();
    int i = 0;
    for (; i + W <= n; i += W) peak = vmax(peak, vabs(vload(x + i)));
    if (i < n) peak = vmax(peak, vabs(vload_lanes<8>(x + i)));
    const float largest = vhmax(peak);
    const bool any = largest > 1e-30f;  // below, the inverse would overflow
    step = any ? largest / kCodeMax : 0.0f;
    const vf inverse = vset(any ? kCodeMax / largest : 0.0f);
    vf sum = vzero();
    for (i = 0; i < n; i += W) {
        const vf y = vround(vmul(i + W <= n ? vload(x + i) : vload_lanes<8>(x + i), inverse));
        store_codes<eights>(code + i, y);
        sum = vadd(sum, y);
    }
    return vhsum(sum);
}

}  // namespace kvc::KVC_NAMESPACE

#endif
