// What a page looks like inside. Defined here once; vllm_kvcrush/pages.py mirrors the sizes and a
// test asks the library whether the two agree.
//
// The unit of every page is a *strip* of 16 tokens, and the unit of a strip a *panel*: 16 lanes
// wide, so that one reading order serves both products of attention without horizontal sums.
//
//   K strip: one panel; lanes are the 16 tokens, rows run over the k_size channels
//   V strip: v_size / 16 panels; lanes are 16 channels, rows run over the 16 tokens
//            (a last panel of 8 lanes where v_size is an odd multiple of 8)
//
// Rows that a kernel multiplies in one instruction lie in the same 32-bit word:
//
//   float32, float16   [rows][lanes]
//   bfloat16, int8     [rows / 2][lanes][2]
//   int4               [rows / 8][lanes][4 bytes]; byte j holds row j (low) and row j + 4 (high)
//
//   raw     K strips of block_size tokens | V strips
//   exact   K strips of `capacity` tokens | V strips | positions | header
//   int8    K strips | V strips | K scales | V scales | positions | header
//           x = scale * code, one float16 scale per token and side, code in -127..127
//   int4    K strips | V strips | K groups | V scales | positions | header
//           K: k = zero + scale * code per channel over a group of 64 tokens of the page, float16
//              scale [k_size] then zero [k_size] for each group; code in 0..15
//           V: H S v = scale * (code - 7.5), S the signs of rotation_sign(), H orthonormal
//              Hadamard transforms over blocks of rotation_block(v_size) channels
//
// positions: uint16 per token; header, the page's last 32 bytes: struct PageHeader.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvcrush.h"

namespace kvc {

constexpr int kStrip = 16;
constexpr int kMaxHead = 256;
constexpr int kGroup = 64;  // tokens that share int4's K scales

// Positions ascend, so a page stores their low 16 bits and the tokens at which the rest steps up:
// position(i) = base + low[i] + 65536 * #{j : first[j] <= i}.
struct PageHeader {
    static constexpr int kSteps = 14;
    int32_t base;
    uint16_t first[kSteps];  // 65535: never
};
static_assert(sizeof(PageHeader) == 32);

constexpr int dtype_bytes(int dtype) {
    return dtype == KVC_F32 ? 4 : 2;
}

constexpr bool positions_kept(int codec) {
    return codec != KVC_RAW;
}

// Byte offsets of a page's arrays; `end` is where the last one ends.
struct PageLayout {
    int64_t k = 0, v = 0, k_scale = 0, v_scale = 0, positions = 0, end = 0;
    int64_t k_strip = 0, v_strip = 0;  // bytes of a strip
};

constexpr PageLayout page_layout(int codec, int64_t capacity, int k_size, int v_size, int dtype) {
    PageLayout at;
    const int64_t groups = (capacity + kGroup - 1) / kGroup;
    int64_t k_scales = 0, v_scales = 0;
    switch (codec) {
        case KVC_INT8:
            at.k_strip = kStrip * int64_t{k_size};
            at.v_strip = kStrip * int64_t{v_size};
            k_scales = v_scales = 2 * capacity;
            break;
        case KVC_INT4:
            at.k_strip = kStrip * int64_t{k_size} / 2;
            at.v_strip = kStrip * int64_t{v_size} / 2;
            k_scales = groups * 4 * k_size;
            v_scales = 2 * capacity;
            break;
        default:
            at.k_strip = kStrip * int64_t{k_size} * dtype_bytes(dtype);
            at.v_strip = kStrip * int64_t{v_size} * dtype_bytes(dtype);
    }
    at.v = capacity / kStrip * at.k_strip;
    at.k_scale = at.v + capacity / kStrip * at.v_strip;
    at.v_scale = at.k_scale + k_scales;
    at.positions = at.v_scale + v_scales;
    at.end = at.positions + (positions_kept(codec) ? 2 * capacity + int64_t{sizeof(PageHeader)} : 0);
    return at;
}

// The most tokens, a multiple of 16, that fit.
constexpr int64_t page_capacity(int codec, int64_t page_bytes, int k_size, int v_size, int dtype) {
    // A multiple of 16 tokens takes at most 2^16 / 16 steps: counts are 16 bits wide.
    int64_t low = 0, high = 65520 / kStrip;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (page_layout(codec, middle * kStrip, k_size, v_size, dtype).end <= page_bytes)
            low = middle;
        else
            high = middle - 1;
    }
    return low * kStrip;
}

// Pages of 128 tokens of two heads of 64: what the documentation quotes.
static_assert(page_capacity(KVC_RAW, 32768, 64, 64, KVC_BF16) == 128);
static_assert(page_capacity(KVC_EXACT, 32768, 64, 64, KVC_BF16) == 112);
static_assert(page_capacity(KVC_INT8, 32768, 64, 64, KVC_BF16) == 240);
static_assert(page_capacity(KVC_INT4, 32768, 64, 64, KVC_BF16) == 448);
static_assert(page_capacity(KVC_INT4, 65536, 64, 64, KVC_F32) == 896);

// Channels of one Hadamard transform: the largest power of two that divides v_size.
constexpr int rotation_block(int v_size) {
    return v_size & -v_size;
}

// Sign of channel c before the transform: a fixed random bit.
constexpr float rotation_sign(int c) {
    uint32_t x = static_cast<uint32_t>(c) * 2654435769u + 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return ((x ^ (x >> 16)) & 1) != 0 ? -1.0f : 1.0f;
}

}  // namespace kvc
