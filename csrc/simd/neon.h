// NEON.
#pragma once

#include <arm_neon.h>

#include "simd/scalar.h"

namespace kvc::KVC_NAMESPACE {

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

// GCC keeps the factors of all rows in registers too.
constexpr int kMostHeads = 5, kItemPad = 5, kItemPanels = 1;
constexpr int panels_at_once(int heads) {
    return heads == 1 ? 4 : heads <= 3 ? 2 : 1;
}

// The first columns of `transpose`; returns how many.
KVC_INLINE int transpose_columns(const uint32_t *const *row, int columns, uint32_t *to) {
    int c = 0;
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
    return c;
}

}  // namespace kvc::KVC_NAMESPACE
