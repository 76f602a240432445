// The instructions of AVX-512, VNNI, BF16 and AMX that avx512.h, bf16.h and amx.h use, in plain C++
// under Intel's names, for CPUs that lack them: slow, and for tests. Names of this namespace hide
// those of the compiler's headers.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "simd/x86.h"

// Macros in some compilers' headers, or without optimisation.
#undef _mm512_roundscale_ps
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_cmp_ps_mask
#undef _mm512_setr_epi32
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srai_epi32
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16

// Calls: where there are hundreds in a function, the compiler would take minutes to inline them.
#define KVC_EMULATE inline __attribute__((noinline))

namespace kvc::KVC_NAMESPACE {

// A register as N numbers of type T.
template <class T, int N = 64 / sizeof(T)>
struct Numbers {
    T of[N];

    template <class V>
    static KVC_INLINE Numbers from(const V &x) {
        static_assert(sizeof(V) == sizeof(Numbers));
        Numbers n;
        std::memcpy(&n, &x, sizeof n);
        return n;
    }
    template <class V>
    KVC_INLINE V as() const {
        static_assert(sizeof(V) == sizeof(Numbers));
        V x;
        std::memcpy(&x, this, sizeof x);
        return x;
    }
};
// A register whose number i is f(i).
template <class V, class T, int N = sizeof(V) / sizeof(T), class F>
KVC_INLINE V each_number(F f) {
    Numbers<T, N> n;
    for (int i = 0; i < N; ++i) n.of[i] = static_cast<T>(f(i));
    return n.template as<V>();
}
template <class F>
KVC_EMULATE __m512 each_float(F f) {
    return each_number<__m512, float>(f);
}
template <class F>
KVC_EMULATE __m512i each_word(F f) {
    return each_number<__m512i, uint32_t>(f);
}
KVC_INLINE Numbers<float> floats(__m512 x) {
    return Numbers<float>::from(x);
}
KVC_INLINE Numbers<uint32_t> words(__m512i x) {
    return Numbers<uint32_t>::from(x);
}

// ------------------------------------------------------------------------------------ floats

KVC_EMULATE __m512 _mm512_set1_ps(float x) {
    return each_float([&](int) { return x; });
}
KVC_EMULATE __m512 _mm512_setzero_ps() {
    return _mm512_set1_ps(0);
}
KVC_EMULATE __m512 _mm512_loadu_ps(const void *p) {
    __m512 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
KVC_EMULATE void _mm512_storeu_ps(void *p, __m512 x) {
    std::memcpy(p, &x, sizeof x);
}
KVC_EMULATE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *p) {
    const char *from = static_cast<const char *>(p);
    return each_float([&](int i) {
        float x = 0;
        if ((mask >> i & 1) != 0) std::memcpy(&x, from + 4 * i, 4);
        return x;
    });
}
KVC_EMULATE __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return a + b;
}
KVC_EMULATE __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    return a - b;
}
KVC_EMULATE __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return a * b;
}
KVC_EMULATE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto x = floats(a), y = floats(b), z = floats(c);
    return each_float([&](int i) { return __builtin_fmaf(x.of[i], y.of[i], z.of[i]); });
}
// The second operand where one is NaN.
KVC_EMULATE __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return a > b ? a : b;
}
KVC_EMULATE __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return a < b ? a : b;
}
KVC_EMULATE float _mm512_reduce_max_ps(__m512 a) {
    const auto x = floats(a);
    float top = x.of[0];
    for (int i = 1; i < 16; ++i) top = x.of[i] > top ? x.of[i] : top;
    return top;
}
KVC_EMULATE float _mm512_reduce_add_ps(__m512 a) {
    auto x = floats(a);
    for (int half = 8; half != 0; half /= 2)
        for (int i = 0; i < half; ++i) x.of[i] += x.of[i + half];
    return x.of[0];
}
KVC_EMULATE __m256 _mm512_castps512_ps256(__m512 a) {
    __m256 low;
    std::memcpy(&low, &a, sizeof low);
    return low;
}
KVC_EMULATE __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
    __m256 x;
    std::memcpy(&x, reinterpret_cast<const char *>(&a) + 32 * half, sizeof x);
    return x;
}
KVC_EMULATE __m512 _mm512_abs_ps(__m512 a) {
    const auto x = floats(a);
    return each_float([&](int i) { return __builtin_fabsf(x.of[i]); });
}
// To whole numbers, the only use here.
KVC_EMULATE __m512 _mm512_roundscale_ps(__m512 a, int) {
    const auto x = floats(a);
    return each_float([&](int i) { return __builtin_rintf(x.of[i]); });
}
KVC_EMULATE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {  // _CMP_GT_OQ
    const auto x = floats(a), y = floats(b);
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= unsigned{x.of[i] > y.of[i]} << i;
    return static_cast<__mmask16>(mask);
}
KVC_EMULATE __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
    const auto x = floats(a), y = floats(b);
    return each_float([&](int i) {
        return (mask >> i & 1) != 0 ? std::ldexp(x.of[i], static_cast<int>(std::floor(y.of[i])))
                                    : 0.0f;
    });
}
KVC_EMULATE __m512i _mm512_castps_si512(__m512 x) {
    return (__m512i)x;
}
KVC_EMULATE __m512 _mm512_castsi512_ps(__m512i x) {
    return (__m512)x;
}
KVC_EMULATE __m512 _mm512_permute_ps(__m512 a, int order) {
    const auto x = floats(a);
    return each_float([&](int i) { return x.of[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
KVC_EMULATE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    const auto x = floats(a), y = floats(b);
    return each_float([&](int i) {
        const int from = (order >> i / 4 * 2 & 3) * 4 + i % 4;
        return i < 8 ? x.of[from] : y.of[from];
    });
}
KVC_EMULATE __m512 _mm512_cvtph_ps(__m256i a) {
    const auto x = Numbers<uint16_t, 16>::from(a);
    return each_float([&](int i) { return half_to_float(x.of[i]); });
}
KVC_EMULATE __m512 _mm512_zextps256_ps512(__m256 a) {
    const auto x = Numbers<float, 8>::from(a);
    return each_float([&](int i) { return i < 8 ? x.of[i] : 0.0f; });
}

// ------------------------------------------------------------------------------------ integers

KVC_EMULATE __m512i _mm512_set1_epi32(int32_t x) {
    return each_word([&](int) { return x; });
}
KVC_EMULATE __m512i _mm512_set1_epi8(char x) {
    return each_number<__m512i, char>([&](int) { return x; });
}
KVC_EMULATE __m512i _mm512_setzero_si512() {
    return _mm512_set1_epi32(0);
}
template <class... T>
KVC_EMULATE __m512i _mm512_setr_epi32(T... x) {
    return Numbers<int32_t>{{x...}}.as<__m512i>();
}
KVC_EMULATE __m512i _mm512_loadu_si512(const void *p) {
    __m512i x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
KVC_EMULATE void _mm512_storeu_si512(void *p, __m512i x) {
    std::memcpy(p, &x, sizeof x);
}
KVC_EMULATE __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *p) {
    return (__m512i)_mm512_maskz_loadu_ps(mask, p);
}
KVC_EMULATE __m512i _mm512_mask_mov_epi32(__m512i a, __mmask16 mask, __m512i b) {
    const auto x = words(a), y = words(b);
    return each_word([&](int i) { return (mask >> i & 1) != 0 ? y.of[i] : x.of[i]; });
}
KVC_EMULATE __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return a & b;
}
KVC_EMULATE __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return a | b;
}
KVC_EMULATE __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    const auto x = words(a), y = words(b);
    return each_word([&](int i) { return x.of[i] + y.of[i]; });
}
// Shifts by as many bits as a number has, or more, leave nothing; those of signed numbers the sign.
KVC_EMULATE __m512i _mm512_slli_epi32(__m512i a, unsigned bits) {
    const auto x = words(a);
    return each_word([&](int i) { return bits > 31 ? 0 : x.of[i] << bits; });
}
KVC_EMULATE __m512i _mm512_srli_epi32(__m512i a, unsigned bits) {
    const auto x = words(a);
    return each_word([&](int i) { return bits > 31 ? 0 : x.of[i] >> bits; });
}
KVC_EMULATE __m512i _mm512_srlv_epi32(__m512i a, __m512i bits) {
    const auto x = words(a), by = words(bits);
    return each_word([&](int i) { return by.of[i] > 31 ? 0 : x.of[i] >> by.of[i]; });
}
KVC_EMULATE __m512i _mm512_srai_epi32(__m512i a, unsigned bits) {
    const auto x = Numbers<int32_t>::from(a);
    return each_word([&](int i) { return x.of[i] >> (bits > 31 ? 31 : bits); });
}
KVC_EMULATE __m512i _mm512_slli_epi16(__m512i a, unsigned bits) {
    const auto x = Numbers<uint16_t>::from(a);
    return each_number<__m512i, uint16_t>([&](int i) { return bits > 15 ? 0 : x.of[i] << bits; });
}
KVC_EMULATE __m512i _mm512_srli_epi16(__m512i a, unsigned bits) {
    const auto x = Numbers<uint16_t>::from(a);
    return each_number<__m512i, uint16_t>([&](int i) { return bits > 15 ? 0 : x.of[i] >> bits; });
}
KVC_EMULATE __m512i _mm512_srl_epi16(__m512i a, __m128i bits) {
    const uint64_t by = Numbers<uint64_t, 2>::from(bits).of[0];
    return _mm512_srli_epi16(a, by > 15 ? 16 : static_cast<unsigned>(by));
}
KVC_EMULATE __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const auto x = Numbers<uint16_t, 16>::from(a);
    return each_word([&](int i) { return x.of[i]; });
}
KVC_EMULATE __m512i _mm512_cvtepi8_epi16(__m256i a) {
    const auto x = Numbers<int8_t, 32>::from(a);
    return each_number<__m512i, int16_t>([&](int i) { return x.of[i]; });
}
KVC_EMULATE __m256i _mm512_cvtepi32_epi16(__m512i a) {
    const auto x = words(a);
    return each_number<__m256i, uint16_t>([&](int i) { return x.of[i]; });
}
KVC_EMULATE __m128i _mm512_cvtepi32_epi8(__m512i a) {
    const auto x = words(a);
    return each_number<__m128i, uint8_t>([&](int i) { return x.of[i]; });
}
KVC_EMULATE __m512 _mm512_cvtepi32_ps(__m512i a) {
    const auto x = Numbers<int32_t>::from(a);
    return each_float([&](int i) { return static_cast<float>(x.of[i]); });
}
// What does not fit, NaN among it, becomes the least number.
KVC_EMULATE __m512i _mm512_cvtps_epi32(__m512 a) {
    const auto x = floats(a);
    return each_word([&](int i) {
        const float whole = __builtin_rintf(x.of[i]);
        return whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<int32_t>(whole)
                                                                : INT32_MIN;
    });
}
KVC_EMULATE __m512i _mm512_zextsi256_si512(__m256i a) {
    const auto x = Numbers<uint32_t, 8>::from(a);
    return each_word([&](int i) { return i < 8 ? x.of[i] : 0; });
}
KVC_EMULATE __m512i _mm512_broadcast_i64x4(__m256i a) {
    const auto x = Numbers<uint32_t, 8>::from(a);
    return each_word([&](int i) { return x.of[i % 8]; });
}
KVC_EMULATE __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
    const auto x = Numbers<uint16_t>::from(a), from = Numbers<uint16_t>::from(order);
    return each_number<__m512i, uint16_t>([&](int i) { return x.of[from.of[i] % 32]; });
}

// ------------------------------------------------------------------------------------ products

// vpdpwssd: pairs of int16, added up without saturation.
KVC_EMULATE __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
    const auto s = words(sum);
    const auto x = Numbers<int16_t>::from(a), y = Numbers<int16_t>::from(b);
    return each_word([&](int i) {
        return s.of[i] + static_cast<uint32_t>(x.of[2 * i] * y.of[2 * i]) +
               static_cast<uint32_t>(x.of[2 * i + 1] * y.of[2 * i + 1]);
    });
}
// vpdpbusd: four unsigned times signed bytes, added up without saturation.
KVC_EMULATE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    const auto s = words(sum);
    const auto x = Numbers<uint8_t>::from(a);
    const auto y = Numbers<int8_t>::from(b);
    return each_word([&](int i) {
        uint32_t total = s.of[i];
        for (int j = 4 * i; j < 4 * i + 4; ++j) total += static_cast<uint32_t>(x.of[j] * y.of[j]);
        return total;
    });
}

// The units of bfloat16 take subnormal numbers for 0, and give 0 for them.
KVC_INLINE float flushed(float x) {
    return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x;
}
// vcvtne2ps2bf16: to nearest even; `high` fills the upper half.
KVC_EMULATE __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    const auto x = floats(low), y = floats(high);
    return each_number<__m512i, uint16_t>(
        [&](int i) { return float_to_bf16(flushed(i < 16 ? x.of[i] : y.of[i - 16])); });
}

// vdpbf16ps: the odd product first, each added with a rounding of its own.
KVC_EMULATE __m512 _mm512_dpbf16_ps(__m512 sum, __m512i a, __m512i b) {
    const auto s = floats(sum);
    const auto x = words(a), y = words(b);
    return each_float([&](int i) {
        const auto half = [](uint32_t bits) { return flushed(bits_to_float(bits)); };
        const float odd = flushed(__builtin_fmaf(half(x.of[i] & 0xffff0000u),
                                                 half(y.of[i] & 0xffff0000u), flushed(s.of[i])));
        return flushed(__builtin_fmaf(half(x.of[i] << 16), half(y.of[i] << 16), odd));
    });
}

// --------------------------------------------------------------------------------------- tiles

// The tiles of a thread. What the processor would not do ends the process: a tile that no
// configuration describes, products of tiles that do not fit.
struct TileFile {
    static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;
    bool configured;
    uint8_t rows[kTiles];
    uint16_t row_bytes[kTiles];
    alignas(64) uint8_t data[kTiles][kRows][kRowBytes];

    static void refuse(const char *why) {
        std::fprintf(stderr, "emulated tiles: %s\n", why);
        std::abort();
    }
    void check(int tile) const {
        if (!configured || rows[tile] == 0) refuse("a tile without a shape");
    }
};
inline thread_local TileFile t_tiles;

// ldtilecfg, and its end, tilerelease.
inline void _tile_loadconfig(const void *from) {
    const uint8_t *config = static_cast<const uint8_t *>(from);
    if (config[0] != 1 || config[1] != 0) TileFile::refuse("a configuration of another palette");
    t_tiles = {};
    t_tiles.configured = true;
    for (int i = 0; i < TileFile::kTiles; ++i) {
        std::memcpy(&t_tiles.row_bytes[i], config + 16 + 2 * i, 2);
        t_tiles.rows[i] = config[48 + i];
        if (t_tiles.rows[i] > TileFile::kRows || t_tiles.row_bytes[i] > TileFile::kRowBytes ||
            (t_tiles.rows[i] == 0) != (t_tiles.row_bytes[i] == 0))
            TileFile::refuse("a shape that no tile has");
    }
}
inline void _tile_release() {
    t_tiles = {};
}
template <int tile>
inline void tile_zero() {
    t_tiles.check(tile);
    std::memset(t_tiles.data[tile], 0, sizeof t_tiles.data[tile]);
}
template <int tile>
inline void tile_load(const void *from, int64_t stride) {
    tile_zero<tile>();
    for (int r = 0; r < t_tiles.rows[tile]; ++r)
        std::memcpy(t_tiles.data[tile][r], static_cast<const uint8_t *>(from) + r * stride,
                    t_tiles.row_bytes[tile]);
}
template <int tile>
inline void tile_store(void *to, int64_t stride) {
    t_tiles.check(tile);
    for (int r = 0; r < t_tiles.rows[tile]; ++r)
        std::memcpy(static_cast<uint8_t *>(to) + r * stride, t_tiles.data[tile][r],
                    t_tiles.row_bytes[tile]);
}
// tdpbf16ps: even and odd products add up apart and are then added to the sum.
template <int sum, int a, int b>
inline void tile_dot_bf16() {
    t_tiles.check(sum), t_tiles.check(a), t_tiles.check(b);
    const int words = t_tiles.row_bytes[a] / 4, columns = t_tiles.row_bytes[sum] / 4;
    if (t_tiles.rows[a] != t_tiles.rows[sum] || t_tiles.rows[b] != words ||
        t_tiles.row_bytes[b] != t_tiles.row_bytes[sum])
        TileFile::refuse("a product of tiles that do not fit");
    for (int m = 0; m < t_tiles.rows[sum]; ++m) {
        float even[16] = {}, odd[16] = {}, own[16];
        for (int k = 0; k < words; ++k) {
            uint32_t x;
            std::memcpy(&x, t_tiles.data[a][m] + 4 * k, 4);
            const float low = flushed(bits_to_float(x << 16));
            const float high = flushed(bits_to_float(x & 0xffff0000u));
            uint32_t y[16];
            std::memcpy(y, t_tiles.data[b][k], sizeof y);
            for (int n = 0; n < columns; ++n) {
                even[n] = flushed(__builtin_fmaf(low, flushed(bits_to_float(y[n] << 16)), even[n]));
                odd[n] = flushed(
                    __builtin_fmaf(high, flushed(bits_to_float(y[n] & 0xffff0000u)), odd[n]));
            }
        }
        std::memcpy(own, t_tiles.data[sum][m], sizeof own);
        for (int n = 0; n < columns; ++n)
            own[n] = flushed(flushed(own[n]) + flushed(even[n] + odd[n]));
        std::memcpy(t_tiles.data[sum][m], own, sizeof own);
    }
}

}  // namespace kvc::KVC_NAMESPACE
