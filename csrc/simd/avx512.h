// AVX-512 with F, BW, DQ, VL and VNNI.
#pragma once

#include "simd/x86.h"

namespace kvc::KVC_NAMESPACE {

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

KVC_INLINE vf vzero() {
    return _mm512_setzero_ps();
}
KVC_INLINE vf vset(float x) {
    return _mm512_set1_ps(x);
}
KVC_INLINE vf vload(const float *p) {
    return _mm512_loadu_ps(p);
}
KVC_INLINE void vstore(float *p, vf x) {
    _mm512_storeu_ps(p, x);
}
// The first `lanes` (8 or W) lanes; the others are 0.
template <int lanes>
KVC_INLINE vf vload_lanes(const float *p) {
    if constexpr (lanes == W) return vload(p);
    return _mm512_maskz_loadu_ps(0xff, p);
}
KVC_INLINE vf vadd(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
KVC_INLINE vf vsub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
KVC_INLINE vf vmul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
KVC_INLINE vf vfma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
KVC_INLINE vf vbroadcast(const float *p) {
    return vset(*p);
}
KVC_INLINE void vaccumulate(vf &sum, vf a, vf b) {
    sum = vfma(a, b, sum);
}
KVC_INLINE vf vmax(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
KVC_INLINE vf vmin(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
KVC_INLINE float vhmax(vf a) {
    return _mm512_reduce_max_ps(a);
}
KVC_INLINE float vhsum(vf a) {
    return _mm512_reduce_add_ps(a);
}
// Eight lanes that come to the same.
KVC_INLINE eight fold_most(vf a) {
    return _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
KVC_INLINE eight fold_sum(vf a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
KVC_INLINE vf vabs(vf a) {
    return _mm512_abs_ps(a);
}
KVC_INLINE vf vround(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^x for x <= 0; exactly 0 below -126.
KVC_INLINE vf vexp2(vf x) {
    const vf n = vround(x), f = vsub(x, n);
    vf y = vset(1.5353362e-4f);
    y = vfma(y, f, vset(1.3398874e-3f));
    y = vfma(y, f, vset(9.6184370e-3f));
    y = vfma(y, f, vset(5.5503324e-2f));
    y = vfma(y, f, vset(2.4022648e-1f));
    y = vfma(y, f, vset(6.9314720e-1f));
    y = vfma(y, f, vset(1.0f));
    const __mmask16 alive = _mm512_cmp_ps_mask(x, vset(-126.0f), _CMP_GT_OQ);
    return _mm512_maskz_scalef_ps(alive, y, n);
}
// Butterflies of a Hadamard transform among the lanes of a vector, at distances below `size`.
KVC_INLINE vf vhadamard(vf x, int size) {
    const __m512i ones = _mm512_castps_si512(vset(1.0f)), minus = _mm512_castps_si512(vset(-1.0f));
    const auto sign = [&](__mmask16 negative) {
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(ones, negative, minus));
    };
    x = _mm512_fmadd_ps(x, sign(0xaaaa), _mm512_permute_ps(x, 0xb1));
    if (size > 2) x = _mm512_fmadd_ps(x, sign(0xcccc), _mm512_permute_ps(x, 0x4e));
    if (size > 4) x = _mm512_fmadd_ps(x, sign(0xf0f0), _mm512_shuffle_f32x4(x, x, 0xb1));
    if (size > 8) x = _mm512_fmadd_ps(x, sign(0xff00), _mm512_shuffle_f32x4(x, x, 0x4e));
    return x;
}
// bf16 pairs in 32-bit words: the low (0) or the high (1) ones.
template <int lanes, int half>
KVC_INLINE vf vload_bf16_pairs(const uint8_t *p) {
    const vi x = lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
    if (half == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)));
}
// 16-bit and 32-bit words as int32 lanes.
template <int lanes>
KVC_INLINE vi vload_words16(const uint8_t *p) {
    if constexpr (lanes == W)
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_zextsi256_si512(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
template <int lanes>
KVC_INLINE vi vload_words(const uint8_t *p) {
    return lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
}
KVC_INLINE vi vleft(vi x, int bits) {
    return _mm512_slli_epi32(x, static_cast<unsigned>(bits));
}
KVC_INLINE vi vright(vi x, int bits) {
    return _mm512_srli_epi32(x, static_cast<unsigned>(bits));
}
KVC_INLINE vi vright_signed(vi x, int bits) {
    return _mm512_srai_epi32(x, static_cast<unsigned>(bits));
}
KVC_INLINE vi vand(vi x, int32_t mask) {
    return _mm512_and_si512(x, _mm512_set1_epi32(mask));
}
KVC_INLINE vf to_float(vi x) {
    return _mm512_cvtepi32_ps(x);
}
// To nearest even.
KVC_INLINE vi to_int(vf x) {
    return _mm512_cvtps_epi32(x);
}
KVC_INLINE vi vor(vi a, vi b) {
    return _mm512_or_si512(a, b);
}
KVC_INLINE void vstore_words(void *p, vi x) {
    _mm512_storeu_si512(p, x);
}
// The low halves of the lanes.
KVC_INLINE void vstore_words16(void *p, vi x) {
    _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtepi32_epi16(x));
}
template <int lanes>
KVC_INLINE vf vload_half(const uint8_t *p) {
    if constexpr (lanes == W)
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_zextps256_ps512(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

constexpr int kMostHeads = 8, kItemPad = 12, kItemPanels = 2;
constexpr int panels_at_once(int heads) {
    return heads == 1 ? 8 : heads <= 4 ? 4 : 2;
}
constexpr int code_panels_at_once(int heads) {
    return panels_at_once(heads);
}

// ------------------------------------------------------------------------------------ integers

#define KVC_INTEGER_PRODUCTS

KVC_INLINE vi ivset(int32_t x) {
    return _mm512_set1_epi32(x);
}
KVC_INLINE vi ivzero() {
    return _mm512_setzero_si512();
}
// Products that add to a sum in place: GCC would copy the sums of intrinsics, and spill the copies.
#if defined(KVC_EMULATED)
#define KVC_DOT(name, sum, a, b) sum = _mm512_##name##_epi32(sum, a, b)
#else
#define KVC_DOT(name, sum, a, b) asm("vp" #name " %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#endif

// Adds a0 * b0 + a1 * b1 of the int16 pairs in each word.
KVC_INLINE void dot_pairs(vi &sum, vi a, vi b) {
    KVC_DOT(dpwssd, sum, a, b);
}
// Adds the products of unsigned and signed bytes: of four in each word, or of pairs to 16 bits.
KVC_INLINE void dot_bytes(vi &sum, vi a, vi b) {
    KVC_DOT(dpbusd, sum, a, b);
}
KVC_INLINE vf bytes_total(vi sum) {
    return _mm512_cvtepi32_ps(sum);
}
template <int lanes>
KVC_INLINE vi load_int8_pairs(const uint8_t *p) {
    if constexpr (lanes == W)
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_zextsi256_si512(
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
template <int lanes>
KVC_INLINE void load_nibbles(const uint8_t *p, vi &low, vi &high) {
    const vi x = lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
    const vi mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(x, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
}
// Fields of two bits of each byte, from the low ones up.
template <int lanes>
KVC_INLINE void load_pairs(const uint8_t *p, vi (&to)[4]) {
    const vi x = lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
    const vi mask = _mm512_set1_epi8(3);
    to[0] = _mm512_and_si512(x, mask);
    to[1] = _mm512_and_si512(_mm512_srli_epi16(x, 2), mask);
    to[2] = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
    to[3] = _mm512_and_si512(_mm512_srli_epi16(x, 6), mask);
}
// Vector v of a panel of 3 bits.
template <int lanes>
KVC_INLINE void load_triples(const uint8_t *panel, int, vi (&to)[4]) {
    load_pairs<lanes>(panel, to);
    const vi high = _mm512_srlv_epi32(
        _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(panel + 4 * lanes))),
        _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4));
    const vi mask = _mm512_set1_epi8(4);
    to[0] = _mm512_or_si512(to[0], _mm512_and_si512(_mm512_slli_epi16(high, 2), mask));
    to[1] = _mm512_or_si512(to[1], _mm512_and_si512(_mm512_slli_epi16(high, 1), mask));
    to[2] = _mm512_or_si512(to[2], _mm512_and_si512(high, mask));
    to[3] = _mm512_or_si512(to[3], _mm512_and_si512(_mm512_srli_epi16(high, 1), mask));
}
KVC_INLINE void store_int16(int16_t *to, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

// Fields first ... first + bits of each byte.
template <int lanes>
KVC_INLINE vi load_field(const uint8_t *p, int first, int bits) {
    const vi x = lanes == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(0xff, p);
    return _mm512_and_si512(_mm512_srl_epi16(x, _mm_cvtsi32_si128(first)),
                            _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)));
}

// Rounds a block to bytes; the result adds up to the sum of the codes.
KVC_INLINE vf store_block(int8_t *to, const vf (&x)[2]) {
    const vi a = _mm512_cvtps_epi32(x[0]), b = _mm512_cvtps_epi32(x[1]);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 16), _mm512_cvtepi32_epi8(b));
    return to_float(_mm512_add_epi32(a, b));
}

}  // namespace kvc::KVC_NAMESPACE
