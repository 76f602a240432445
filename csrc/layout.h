// What a page looks like inside. Defined here once; vllm_kvcrush/codecs/layout.py mirrors the sizes
// and a test asks the library whether the two agree.
//
// The unit of every page is a *strip* of 16 tokens, and the unit of a strip a *panel*: 16 lanes
// wide, so that one reading order serves both products of attention without horizontal sums.
//
//   strip = K panel | V panels
//   K: one panel; lanes are the 16 tokens, rows run over the k_size channels
//   V: v_size / 16 panels; lanes are 16 channels, rows run over the 16 tokens
//      (a last panel of 8 lanes where v_size is an odd multiple of 8)
//
// Rows that a kernel multiplies in one instruction lie in the same 32-bit word:
//
//   float32, float16   [rows][lanes]
//   bfloat16, int8     [rows / 2][lanes][2]
//   int4               [rows / 8][lanes][4 bytes]; byte j holds row j (low) and row j + 4 (high)
//
// Strips come in groups, each with a header of scales (float16) in front, so that everything about
// some tokens is in one run of bytes:
//
//   page = group | group | ... | positions | PageHeader, the last two only where kept
//
//   raw     groups of 1 strip without header; block_size tokens, no positions
//   exact   the same with positions, so fewer tokens
//   int8    groups of 1: [K scales 16][V scales 16]
//           x = scale * code, one scale per token and side, code in -127..127
//   int4    groups of 4: [K scales k_size][K zeros k_size][V scales 64], padded to 64 bytes
//           K: k = zero + scale * code per channel and group, code in 0..15
//           V: H S v = scale * (code - 7.5), one scale per token, S the signs of rotation_sign(),
//              H orthonormal Hadamard transforms over blocks of rotation_block(v_size) channels
//
//   tada    page = means | groups of 1, without anything between them
//           means: of the rotated keys and of the rotated values of the page, float16
//           group headers: [K scales 16][V scales 16]
//           H S k = mean + scale * (code - (2^bits - 1) / 2), with the rotation of k_size channels;
//           values likewise. K: panels of 16 channels, each stored as one of V's is whose lanes
//           are tokens and whose rows are channels
//   gear    page = [K scales k_size][K zeros k_size][K factors][V factors] | groups of 1
//           factors: kGearRank rows of k_size, or v_size, float16
//           group headers: [V scales 16][K weights][V weights]: kGearRank rows of 16 tokens; then
//           of k_size / 8 single channels their places, 256 * token + channel, and their rests
//           K: k = zero + scale * code + sum of weights times factors (+ rest); panels as in tada
//           V: H S v = scale * (code - (2^bits - 1) / 2) + sum of weights times factors
//
//   tc4, tc6, tc8 (fitted: see kvc_table)
//           page = strip | strip | ... | TokenScales of each strip | exceptions | positions | ...
//           K: [words][lanes][4 bytes]: byte j of a word holds component j of several quads
//              (kvc_piece), in fields of 1 to 4 bits
//           V: as in int4 in 4 bits; in 2 bits one word a lane: byte j holds rows j, j + 4, j + 8
//              and j + 12, from the low bits up; in 3 bits the low two so, then the high ones of
//              lanes l and l + 8 in word l: byte j holds rows j, j + 4, j + 8 and j + 12 of lane l
//              and then of l + 8, a bit each. H S v = scale * (code - (2^bits - 1) / 2)
//           A page is one group without a header; each strip has scales of its own.
//           exceptions: tokens that are int8 instead: [K scale, V scale float16] of each, then
//              their K rows, then their V rows; in the order of the bits in TokenScales
//
// positions: uint16 per token, in fitted pages per strip; PageHeader is the page's last 32 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvcrush.h"

// Functions that units of several instruction sets share must leave no copy of their own behind:
// the linker would keep any one, perhaps with instructions that this CPU lacks.
#define KVC_OWN inline __attribute__((always_inline))

namespace kvc {

constexpr int kStrip = 16;
constexpr int kMaxHead = 256;

// Positions ascend, so a page stores their low 16 bits and the indices at which the rest steps up:
// position(i) = base + low[i] + 65536 * #{j : first[j] <= i}.
struct PageHeader {
    static constexpr int kSteps = 14;
    int32_t base;
    uint16_t first[kSteps];  // 65535: never
};
static_assert(sizeof(PageHeader) == 32);

// Of a strip in a fitted codec: 2^((scale - 128) / 16) for each value, 0: the value is 0.
struct TokenScales {
    uint8_t v[kStrip];
    uint16_t exceptions;  // a bit for each token
};
static_assert(sizeof(TokenScales) == 18);

constexpr int dtype_bytes(int dtype) {
    return dtype == KVC_F32 ? 4 : 2;
}

// What a codec says of its pages, whatever the instruction set.
struct Format {
    int32_t codec;
    const char *name;
    bool tables;            // fitted to a model: kvc_layer::tables has it, and its layout
    bool positions;         // pages keep them
    int32_t position_step;  // tokens that share a stored position
    bool rotated;           // V is stored rotated
    int32_t strips;         // the codec whose kernels read its strips
    // The layout of codecs without tables.
    int32_t bits;            // of a code; 0: elements of the layer's dtype
    int32_t group_strips;    // strips whose scales lie together
    int32_t token_scales;    // of each token
    int32_t channel_scales;  // of each channel of K in a group
    // Where a page is one chunk.
    bool panels = false;   // K lies in panels of 16 channels
    int32_t page_k = 0;    // numbers of each channel of K at the page's start
    int32_t page_v = 0;    // and of V
    int32_t per_rest = 0;  // channels of K for each one that a strip keeps a rest of; 0: none
};
constexpr int kGearRank = 1;
constexpr Format kFormats[] = {
    {KVC_RAW, "raw", false, false, 1, false, KVC_RAW, 0, 1, 0, 0},
    {KVC_EXACT, "exact", false, true, 1, false, KVC_RAW, 0, 1, 0, 0},
    {KVC_INT8, "int8", false, true, 1, false, KVC_INT8, 8, 1, 2, 0},
    {KVC_INT4, "int4", false, true, 1, true, KVC_INT4, 4, 4, 1, 2},
    {KVC_TC4, "tc4", true, true, kStrip, true, KVC_TC4, 0, 0, 0, 0},
    {KVC_TC6, "tc6", true, true, kStrip, true, KVC_TC6, 0, 0, 0, 0},
    {KVC_TC8, "tc8", true, true, kStrip, true, KVC_TC8, 0, 0, 0, 0},
    {KVC_TADA, "tada", false, true, 1, true, KVC_TADA, 3, 1, 2, 0, true, 1, 1},
    {KVC_GEAR, "gear", false, true, 1, true, KVC_GEAR, 4, 1, 1 + 2 * kGearRank, 0, true,
     2 + kGearRank, kGearRank, 8},
};
constexpr bool formats_are_in_order() {
    for (int i = 0; i < KVC_CODECS; ++i)
        if (kFormats[i].codec != i) return false;
    return sizeof kFormats == KVC_CODECS * sizeof(Format);
}
static_assert(formats_are_in_order());

struct PageLayout {
    int32_t group_strips;  // strips of a group
    int64_t first;         // bytes of a page before its groups
    int64_t header;        // bytes of a group before its strips
    int64_t v;             // of a strip before its V
    int64_t strip;         // bytes
    int64_t scales;        // of a page before its TokenScales, where strips have their own
    int64_t strip_scales;  // bytes between them; 0: scales are in the groups' headers
    int64_t exceptions;    // of a page before them
    int64_t positions;     // of a page before them
    int64_t end;           // bytes of everything but the PageHeader

    constexpr int64_t group() const {
        return header + group_strips * strip;
    }
    constexpr int64_t group_at(int64_t index) const {
        return first + index / group_strips * group();
    }
    constexpr int64_t strip_at(int64_t index) const {
        return group_at(index) + header + index % group_strips * strip;
    }
    constexpr int64_t scales_at(int64_t index) const {
        return strip_scales != 0 ? scales + index * strip_scales : group_at(index);
    }
};

// Bytes of a panel of a strip of V in codes of `bits` bits: high bits of 8 lanes take a place
// for 16.
constexpr int code_panel_bytes(int bits, int lanes) {
    return bits == 3 ? 4 * lanes + 32 : kStrip * bits / 8 * lanes;
}
constexpr int code_bytes(int bits, int v_size) {
    return v_size / 16 * code_panel_bytes(bits, 16) + v_size % 16 / 8 * code_panel_bytes(bits, 8);
}

// Bytes up to whole cache lines.
constexpr int64_t lines(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

constexpr PageLayout page_layout(int codec, int64_t capacity, int k_size, int v_size, int dtype) {
    PageLayout at{};
    const Format &format = kFormats[codec];
    const int bits = format.bits != 0 ? format.bits : 8 * dtype_bytes(dtype);
    at.group_strips = format.group_strips;
    const int64_t scales = int64_t{format.token_scales} * format.group_strips * kStrip +
                           int64_t{format.channel_scales} * k_size;
    const int64_t rests = format.per_rest != 0 ? k_size / format.per_rest : 0;
    at.first = lines(2 * (int64_t{format.page_k} * k_size + int64_t{format.page_v} * v_size));
    at.header = format.panels ? (2 * scales + 4 * rests + 31) / 32 * 32 : lines(2 * scales);
    at.v = format.panels ? int64_t{code_bytes(bits, (k_size + 15) / 16 * 16)}
                         : int64_t{kStrip} * k_size * bits / 8;
    at.strip =
        at.v + (format.panels ? code_bytes(bits, v_size) : int64_t{kStrip} * v_size * bits / 8);
    const int64_t strips = capacity / kStrip;
    at.positions = strips != 0 ? at.strip_at(strips - 1) + at.strip : 0;
    at.end = at.positions + (format.positions ? 2 * capacity : 0);
    return at;
}

// A page of a codec with tables.
KVC_OWN PageLayout fitted_layout(const kvc_head_table &head, int k_size, int v_size) {
    PageLayout at{};
    const int32_t strips = head.capacity / kStrip;
    at.group_strips = strips != 0 ? strips : 1;
    at.v = int64_t{kStrip} * 4 * head.words;
    at.strip = at.v + code_bytes(head.v_bits, v_size);
    at.scales = strips * at.strip;
    at.strip_scales = sizeof(TokenScales);
    at.exceptions = at.scales + strips * at.strip_scales;
    at.positions = at.exceptions + int64_t{head.exceptions} * (k_size + v_size + 4);
    at.end = at.positions + int64_t{2} * strips;
    return at;
}

// The most tokens, a multiple of 16, that fit.
constexpr int64_t page_capacity(int codec, int64_t page_bytes, int k_size, int v_size, int dtype) {
    const int64_t room =
        page_bytes - (kFormats[codec].positions ? int64_t{sizeof(PageHeader)} : int64_t{0});
    int64_t low = 0, high = 65520 / kStrip;  // counts are 16 bits wide
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (page_layout(codec, middle * kStrip, k_size, v_size, dtype).end <= room)
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
