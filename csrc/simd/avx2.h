// AVX2 with FMA and F16C.
#pragma once

#include "simd/x86.h"

namespace kvc::KVC_NAMESPACE {

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

KVC_INLINE vf vzero() {
    return _mm256_setzero_ps();
}
KVC_INLINE vf vset(float x) {
    return _mm256_set1_ps(x);
}
KVC_INLINE vf vload(const float *p) {
    return _mm256_loadu_ps(p);
}
KVC_INLINE void vstore(float *p, vf x) {
    _mm256_storeu_ps(p, x);
}
template <int lanes>
KVC_INLINE vf vload_lanes(const float *p) {
    return vload(p);
}
KVC_INLINE vf vadd(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
KVC_INLINE vf vsub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
KVC_INLINE vf vmul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
KVC_INLINE vf vfma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
// Volatile keeps these in the order written: GCC would load all broadcasts first and spill.
KVC_INLINE vf vbroadcast(const float *p) {
#if defined(__SANITIZE_ADDRESS__)
    return vset(*p);  // it cannot look into assembly
#endif
    vf x;
    asm volatile("vbroadcastss %1, %0" : "=x"(x) : "m"(*p));
    return x;
}
KVC_INLINE void vaccumulate(vf &sum, vf a, vf b) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
KVC_INLINE vf vmax(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
KVC_INLINE vf vmin(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
KVC_INLINE float vhmax(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
KVC_INLINE float vhsum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
// Eight lanes that come to the same.
KVC_INLINE eight fold_most(vf a) {
    return a;
}
KVC_INLINE eight fold_sum(vf a) {
    return a;
}
KVC_INLINE vf vabs(vf a) {
    return _mm256_andnot_ps(vset(-0.0f), a);
}
KVC_INLINE vf vround(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KVC_INLINE vf vexp2(vf x) {
    const vf alive = _mm256_cmp_ps(x, vset(-126.0f), _CMP_GT_OQ);
    const vf n = vround(vmax(x, vset(-126.0f))), f = vsub(x, n);
    vf y = vset(1.5353362e-4f);
    y = vfma(y, f, vset(1.3398874e-3f));
    y = vfma(y, f, vset(9.6184370e-3f));
    y = vfma(y, f, vset(5.5503324e-2f));
    y = vfma(y, f, vset(2.4022648e-1f));
    y = vfma(y, f, vset(6.9314720e-1f));
    y = vfma(y, f, vset(1.0f));
    const vi exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    return _mm256_and_ps(alive, y);
}
KVC_INLINE vf vhadamard(vf x, int size) {
    const vf first = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const vf second = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const vf third = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    x = _mm256_fmadd_ps(x, first, _mm256_permute_ps(x, 0xb1));
    if (size > 2) x = _mm256_fmadd_ps(x, second, _mm256_permute_ps(x, 0x4e));
    if (size > 4) x = _mm256_fmadd_ps(x, third, _mm256_permute2f128_ps(x, x, 1));
    return x;
}
template <int lanes, int half>
KVC_INLINE vf vload_bf16_pairs(const uint8_t *p) {
    const vi x = _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
    if (half == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
}
template <int lanes>
KVC_INLINE vi vload_words16(const uint8_t *p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
template <int lanes>
KVC_INLINE vi vload_words(const uint8_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
}
KVC_INLINE vi vleft(vi x, int bits) {
    return _mm256_slli_epi32(x, bits);
}
KVC_INLINE vi vright(vi x, int bits) {
    return _mm256_srli_epi32(x, bits);
}
KVC_INLINE vi vright_signed(vi x, int bits) {
    return _mm256_srai_epi32(x, bits);
}
KVC_INLINE vi vand(vi x, int32_t mask) {
    return _mm256_and_si256(x, _mm256_set1_epi32(mask));
}
KVC_INLINE vf to_float(vi x) {
    return _mm256_cvtepi32_ps(x);
}
KVC_INLINE vi to_int(vf x) {
    return _mm256_cvtps_epi32(x);
}
KVC_INLINE vi vor(vi a, vi b) {
    return _mm256_or_si256(a, b);
}
KVC_INLINE void vstore_words(void *p, vi x) {
    _mm256_storeu_si256(static_cast<vi *>(p), x);
}
KVC_INLINE void vstore_words16(void *p, vi x) {
    const vi low = _mm256_and_si256(x, _mm256_set1_epi32(65535));
    const vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
}
template <int lanes>
KVC_INLINE vf vload_half(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

constexpr int kMostHeads = 6, kItemPad = 6, kItemPanels = 1;
constexpr int panels_at_once(int heads) {
    return heads == 1 ? 4 : heads <= 3 ? 2 : 1;
}
// Integer additions wait for one another for a single cycle.
constexpr int code_panels_at_once(int heads) {
    return heads == 1 ? 4 : heads == 2 ? 2 : 1;
}

// ------------------------------------------------------------------------------------ integers

#define KVC_INTEGER_PRODUCTS

KVC_INLINE vi ivset(int32_t x) {
    return _mm256_set1_epi32(x);
}
KVC_INLINE vi ivzero() {
    return _mm256_setzero_si256();
}
// Units, because GCC would do many products first and spill them.
KVC_INLINE void dot_pairs(vi &sum, vi a, vi b) {
    vi product;
    asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
}
KVC_INLINE void dot_bytes(vi &sum, vi a, vi b) {
    vi product;
    asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
                 : "+x"(sum), "=&x"(product)
                 : "x"(a), "x"(b));
}
KVC_INLINE vf bytes_total(vi sum) {
    return to_float(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}
template <int lanes>
KVC_INLINE vi load_int8_pairs(const uint8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
template <int lanes>
KVC_INLINE void load_nibbles(const uint8_t *p, vi &low, vi &high) {
    const vi x = _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
    const vi mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(x, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
}
template <int lanes>
KVC_INLINE void load_pairs(const uint8_t *p, vi (&to)[4]) {
    const vi x = _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
    const vi mask = _mm256_set1_epi8(3);
    to[0] = _mm256_and_si256(x, mask);
    to[1] = _mm256_and_si256(_mm256_srli_epi16(x, 2), mask);
    to[2] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
    to[3] = _mm256_and_si256(_mm256_srli_epi16(x, 6), mask);
}
template <int lanes>
KVC_INLINE void load_triples(const uint8_t *panel, int v, vi (&to)[4]) {
    load_pairs<lanes>(panel + v * 4 * W, to);
    const vi both = _mm256_loadu_si256(reinterpret_cast<const vi *>(panel + 4 * lanes));
    const vi high = v == 0 ? both : _mm256_srli_epi16(both, 4);
    const vi mask = _mm256_set1_epi8(4);
    to[0] = _mm256_or_si256(to[0], _mm256_and_si256(_mm256_slli_epi16(high, 2), mask));
    to[1] = _mm256_or_si256(to[1], _mm256_and_si256(_mm256_slli_epi16(high, 1), mask));
    to[2] = _mm256_or_si256(to[2], _mm256_and_si256(high, mask));
    to[3] = _mm256_or_si256(to[3], _mm256_and_si256(_mm256_srli_epi16(high, 1), mask));
}
KVC_INLINE void store_int16(int16_t *to, vf x) {
    const vi code = _mm256_cvtps_epi32(x);
    const vi packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(code, code), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_castsi256_si128(packed));
}

// Fields first ... first + bits of each byte.
template <int lanes>
KVC_INLINE vi load_field(const uint8_t *p, int first, int bits) {
    const vi x = _mm256_loadu_si256(reinterpret_cast<const vi *>(p));
    return _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(first)),
                            _mm256_set1_epi8(static_cast<char>((1 << bits) - 1)));
}

KVC_INLINE vf store_block(int8_t *to, const vf (&x)[4]) {
    const vi a = _mm256_cvtps_epi32(x[0]), b = _mm256_cvtps_epi32(x[1]);
    const vi c = _mm256_cvtps_epi32(x[2]), d = _mm256_cvtps_epi32(x[3]);
    const vi bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<vi *>(to), _mm256_permutevar8x32_epi32(bytes, order));
    return to_float(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
}

}  // namespace kvc::KVC_NAMESPACE
