// Vectors that the compiler lowers to what the target has.
#pragma once

#include "simd/scalar.h"

namespace kvc::KVC_NAMESPACE {

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

constexpr int kMostHeads = 3, kItemPad = 4, kItemPanels = 1;
constexpr int panels_at_once(int) {
    return 1;
}

// The first columns of `transpose`; returns how many.
KVC_INLINE int transpose_columns(const uint32_t *const *row, int columns, uint32_t *to) {
    int c = 0;
    (void)row, (void)columns, (void)to;
    return c;
}

}  // namespace kvc::KVC_NAMESPACE
