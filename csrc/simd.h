// Vectors of W floats for the instruction set that this translation unit is compiled for, in a
// namespace of its own: nothing here may be shared between units, or the linker would mix them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(KVC_NEON)
#include <arm_neon.h>
#endif

#ifndef KVC_NAMESPACE
#error "compile with -DKVC_NAMESPACE=name"
#endif

#define KVC_INLINE inline __attribute__((always_inline))
// Loops that need all registers are functions of their own.
#define KVC_APART __attribute__((noinline))

namespace kvc::KVC_NAMESPACE {

template <class T>
KVC_INLINE T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
KVC_INLINE T most(T a, T b) {
    return a < b ? b : a;
}

// Scalars. 16-bit floats travel as uint16_t.

KVC_INLINE float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
KVC_INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
KVC_INLINE float bf16_to_float(uint16_t x) {
    return bits_to_float(uint32_t{x} << 16);
}
// To nearest even; NaN stays NaN.
KVC_INLINE uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
KVC_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    // A multiplication rebuilds the exponent, subnormals included.
    const uint32_t magnitude = uint32_t{h} << 13 & 0x0fffe000u;
    const uint32_t sign = uint32_t{h & 0x8000u} << 16;
    if ((h & 0x7c00u) == 0x7c00u) return bits_to_float(sign | 0x7f800000u | magnitude);
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // 2^112
    return bits_to_float(sign | float_to_bits(scaled));
#endif
}
KVC_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: let the adder round
        const float shifted = bits_to_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    magnitude += 0xc8000fffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | magnitude >> 13);
#endif
}

#if defined(__AVX512F__)

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

#elif defined(__AVX2__)

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

#elif defined(KVC_NEON)

constexpr int W = 4;
using vf = float32x4_t;
using vi = int32x4_t;

KVC_INLINE vf vzero() {
    return vdupq_n_f32(0.0f);
}
KVC_INLINE vf vset(float x) {
    return vdupq_n_f32(x);
}
KVC_INLINE vf vload(const float *p) {
    return vld1q_f32(p);
}
KVC_INLINE void vstore(float *p, vf x) {
    vst1q_f32(p, x);
}
template <int lanes>
KVC_INLINE vf vload_lanes(const float *p) {
    return vload(p);
}
KVC_INLINE vf vadd(vf a, vf b) {
    return vaddq_f32(a, b);
}
KVC_INLINE vf vsub(vf a, vf b) {
    return vsubq_f32(a, b);
}
KVC_INLINE vf vmul(vf a, vf b) {
    return vmulq_f32(a, b);
}
KVC_INLINE vf vfma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
KVC_INLINE vf vbroadcast(const float *p) {
    return vld1q_dup_f32(p);
}
KVC_INLINE void vaccumulate(vf &sum, vf a, vf b) {
    sum = vfmaq_f32(sum, a, b);
}
// NEON's own maximum and minimum treat NaN otherwise.
KVC_INLINE vf vmax(vf a, vf b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
KVC_INLINE vf vmin(vf a, vf b) {
    return vbslq_f32(vcltq_f32(a, b), a, b);
}
KVC_INLINE float vhmax(vf a) {
    return vmaxnmvq_f32(a);
}
KVC_INLINE float vhsum(vf a) {
    return vaddvq_f32(a);
}
KVC_INLINE vf vabs(vf a) {
    return vabsq_f32(a);
}
KVC_INLINE vf vround(vf a) {
    return vrndnq_f32(a);
}
KVC_INLINE vf vexp2(vf x) {
    const vf low = vset(-126.0f);
    // NaN somewhere can leave x above 0.
    const vf clamped = vmin(vmax(x, low), vzero()), n = vround(clamped), f = vsub(clamped, n);
    vf y = vset(1.5353362e-4f);
    y = vfma(y, f, vset(1.3398874e-3f));
    y = vfma(y, f, vset(9.6184370e-3f));
    y = vfma(y, f, vset(5.5503324e-2f));
    y = vfma(y, f, vset(2.4022648e-1f));
    y = vfma(y, f, vset(6.9314720e-1f));
    y = vfma(y, f, vset(1.0f));
    const vi exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    const uint32x4_t bits = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent));
    return vreinterpretq_f32_u32(vandq_u32(bits, vcgtq_f32(x, low)));
}
KVC_INLINE vf vhadamard(vf x, int size) {
    const vf first = {1, -1, 1, -1}, second = {1, 1, -1, -1};
    x = vfmaq_f32(vrev64q_f32(x), x, first);
    if (size > 2) x = vfmaq_f32(vextq_f32(x, x, 2), x, second);
    return x;
}
template <int lanes>
KVC_INLINE vi vload_words(const uint8_t *p) {
    return vreinterpretq_s32_u8(vld1q_u8(p));
}
template <int lanes, int half>
KVC_INLINE vf vload_bf16_pairs(const uint8_t *p) {
    const uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(p));
    return vreinterpretq_f32_u32(half == 0 ? vshlq_n_u32(x, 16)
                                           : vandq_u32(x, vdupq_n_u32(0xffff0000u)));
}
template <int lanes>
KVC_INLINE vi vload_words16(const uint8_t *p) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))));
}
KVC_INLINE vi vleft(vi x, int bits) {
    return vreinterpretq_s32_u32(vreinterpretq_u32_s32(x) << static_cast<uint32_t>(bits));
}
KVC_INLINE vi vright(vi x, int bits) {
    return vreinterpretq_s32_u32(vreinterpretq_u32_s32(x) >> static_cast<uint32_t>(bits));
}
KVC_INLINE vi vright_signed(vi x, int bits) {
    return x >> bits;
}
KVC_INLINE vi vand(vi x, int32_t mask) {
    return vandq_s32(x, vdupq_n_s32(mask));
}
KVC_INLINE vf to_float(vi x) {
    return vcvtq_f32_s32(x);
}
KVC_INLINE vi to_int(vf x) {
    return vcvtnq_s32_f32(x);
}
KVC_INLINE vi vor(vi a, vi b) {
    return vorrq_s32(a, b);
}
KVC_INLINE void vstore_words(void *p, vi x) {
    vst1q_u8(static_cast<uint8_t *>(p), vreinterpretq_u8_s32(x));
}
KVC_INLINE void vstore_words16(void *p, vi x) {
    vst1_u8(static_cast<uint8_t *>(p), vreinterpret_u8_s16(vmovn_s32(x)));
}
template <int lanes>
KVC_INLINE vf vload_half(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

#else

// Portable: the compiler lowers these vectors to what the target has.
constexpr int W = 8;
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));

KVC_INLINE vf vset(float x) {
    return vf{x, x, x, x, x, x, x, x};
}
KVC_INLINE vf vzero() {
    return vset(0.0f);
}
KVC_INLINE vf vload(const float *p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
KVC_INLINE void vstore(float *p, vf x) {
    std::memcpy(p, &x, sizeof x);
}
template <int lanes>
KVC_INLINE vf vload_lanes(const float *p) {
    return vload(p);
}
KVC_INLINE vf vadd(vf a, vf b) {
    return a + b;
}
KVC_INLINE vf vsub(vf a, vf b) {
    return a - b;
}
KVC_INLINE vf vmul(vf a, vf b) {
    return a * b;
}
KVC_INLINE vf vfma(vf a, vf b, vf c) {
    return a * b + c;
}
KVC_INLINE vf vbroadcast(const float *p) {
    return vset(*p);
}
KVC_INLINE void vaccumulate(vf &sum, vf a, vf b) {
    sum = a * b + sum;
}
KVC_INLINE vf vmax(vf a, vf b) {
    return a > b ? a : b;
}
KVC_INLINE vf vmin(vf a, vf b) {
    return a < b ? a : b;
}
KVC_INLINE float vhmax(vf a) {
    float x = a[0];
    for (int i = 1; i < W; ++i) x = most(x, a[i]);
    return x;
}
KVC_INLINE float vhsum(vf a) {
    return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}
KVC_INLINE vf vabs(vf a) {
    return a < 0 ? -a : a;
}
// Adding and taking away 1.5 * 2^23 rounds |a| < 2^22 to nearest even.
KVC_INLINE vf vround(vf a) {
    const vf big = vset(12582912.0f);
    return (a + big) - big;
}
KVC_INLINE vf vexp2(vf x) {
    const vf low = vset(-126.0f), high = vzero();
    vf clamped = x > low ? x : low;
    clamped = clamped < high ? clamped : high;  // NaN somewhere can leave x above 0
    const vf n = vround(clamped), f = clamped - n;
    vf y = vset(1.5353362e-4f);
    y = y * f + 1.3398874e-3f;
    y = y * f + 9.6184370e-3f;
    y = y * f + 5.5503324e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314720e-1f;
    y = y * f + 1.0f;
    const vu exponent = (vu) __builtin_convertvector(n, vi) << 23;
    y = (vf)((vu)y + exponent);
    return x > low ? y : vzero();
}
KVC_INLINE vf vhadamard(vf x, int size) {
    for (int half = 1; half < size; half *= 2)
        for (int i = 0; i < W; ++i)
            if ((i & half) == 0) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    return x;
}
template <int lanes, int half>
KVC_INLINE vf vload_bf16_pairs(const uint8_t *p) {
    vu x;
    std::memcpy(&x, p, sizeof x);
    return half == 0 ? (vf)(x << 16) : (vf)(x & 0xffff0000u);
}
template <int lanes>
KVC_INLINE vi vload_words16(const uint8_t *p) {
    vi x;
    for (int i = 0; i < W; ++i) {
        uint16_t word;
        std::memcpy(&word, p + 2 * i, 2);
        x[i] = word;
    }
    return x;
}
template <int lanes>
KVC_INLINE vi vload_words(const uint8_t *p) {
    vi x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
KVC_INLINE vi vleft(vi x, int bits) {
    return (vi)((vu)x << bits);
}
KVC_INLINE vi vright(vi x, int bits) {
    return (vi)((vu)x >> bits);
}
KVC_INLINE vi vright_signed(vi x, int bits) {
    return x >> bits;
}
KVC_INLINE vi vand(vi x, int32_t mask) {
    return x & mask;
}
KVC_INLINE vf to_float(vi x) {
    return __builtin_convertvector(x, vf);
}
KVC_INLINE vi to_int(vf x) {
    return __builtin_convertvector(vround(x), vi);
}
KVC_INLINE vi vor(vi a, vi b) {
    return a | b;
}
KVC_INLINE void vstore_words(void *p, vi x) {
    std::memcpy(p, &x, sizeof x);
}
KVC_INLINE void vstore_words16(void *p, vi x) {
    for (int i = 0; i < W; ++i) {
        const uint16_t word = static_cast<uint16_t>(x[i]);
        std::memcpy(static_cast<uint8_t *>(p) + 2 * i, &word, 2);
    }
}
template <int lanes>
KVC_INLINE vf vload_half(const uint8_t *p) {
    vf x;
    for (int i = 0; i < W; ++i) {
        uint16_t h;
        std::memcpy(&h, p + 2 * i, 2);
        x[i] = half_to_float(h);
    }
    return x;
}

#endif

// to[16 * c + r] = row[r][c] of 16 rows of words.
KVC_INLINE void transpose(const uint32_t *const *row, int columns, uint32_t *to) {
    int c = 0;
#if defined(__AVX2__)
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
#elif defined(KVC_NEON)
    for (; c + 4 <= columns; c += 4)
        for (int r = 0; r < 16; r += 4) {
            const auto load = [&](int i) {
                const void *from = row[r + i] + c;
                return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t *>(from)));
            };
            const uint32x4_t a = load(0), b = load(1), d = load(2), e = load(3);
            const auto store = [&](int i, uint32x4_t low, uint32x4_t high, bool second) {
                const uint64x2_t x = vreinterpretq_u64_u32(low), y = vreinterpretq_u64_u32(high);
                vst1q_u32(to + 16 * (c + i) + r,
                          vreinterpretq_u32_u64(second ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y)));
            };
            store(0, vtrn1q_u32(a, b), vtrn1q_u32(d, e), false);
            store(1, vtrn2q_u32(a, b), vtrn2q_u32(d, e), false);
            store(2, vtrn1q_u32(a, b), vtrn1q_u32(d, e), true);
            store(3, vtrn2q_u32(a, b), vtrn2q_u32(d, e), true);
        }
#endif
    // A word may be two numbers of 16 bits, which only memcpy may read as one.
    for (; c < columns; ++c)
        for (int r = 0; r < 16; ++r) std::memcpy(to + 16 * c + r, row[r] + c, 4);
}

}  // namespace kvc::KVC_NAMESPACE
