// What an instruction set knows to do with strips of each kind: one record a codec, and how codecs
// without products of their own share those of floats.
#pragma once

#include "kernels/products.h"

namespace kvc::KVC_NAMESPACE {

// A tile and one query token of a KV head, while the next tile comes from memory.
struct Pass {
    const Layer &layer;
    const Tile &tile;
    const uint8_t *const *ahead;    // what to prefetch while each strip is read
    float *scratch;                 // [kTile * max(k_size, v_padded) + 16]
    const TableProducts *products;  // or null
};

// What codecs derive from the query of one token and the weights of a tile; defined beside the list
// of codecs.
struct Prepared;

struct CodecTraits {
    int kind;      // the codec, or kExceptions
    bool rotated;  // V is stored rotated
    bool plain;    // strips are panels of the layer's dtype
    // s[g][token] of a tile; q: [group][kMaxHead].
    void (*scores)(const Pass &, Prepared &, const float *q, float *s);
    // sums[g][channel] = sums * decay + weights times V. Overwrites p: [group][kTile].
    void (*values)(const Pass &, Prepared &, float *p, const float *decay, float *sums);
    // A strip as float32 panels, each part unless null; V stays rotated, and is 0 where there is no
    // token. A vector of the last 8 channels of V may write 8 floats more.
    void (*expand)(const Layer &, const Strip &, float *keys, float *values);
    // Writes tokens into an empty page; their positions are there already. Null: no codec.
    void (*encode)(const Layer &, int codec, int head, uint8_t *page, int count, const float *key,
                   const float *value);
};

// Products of a codec that has none of its own: of its strips as floats.
template <class C>
struct Expanded {
    struct Query {
        template <class Arena>
        void take(Arena &, const Layer &) {}
        void begin() {}
    };
    static constexpr bool plain = false;

    static void scores(const Pass &pass, Query &, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const uint8_t *strip[kTileStrips];
        for (int i = 0; i < tile.strips; ++i) {
            float *at = pass.scratch + i * kStrip * layer.k_size;
            C::expand(layer, tile.strip[i], at, nullptr);
            strip[i] = reinterpret_cast<const uint8_t *>(at);
        }
        float_scores<F32>(strip, tile.strips, layer.k_size, q, layer.group, s, strip);
    }
    static void values(const Pass &pass, Query &, float *p, const float *decay, float *sums) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const uint8_t *strip[kTileStrips];
        for (int i = 0; i < tile.strips; ++i) {
            float *at = pass.scratch + int64_t{i} * kStrip * layer.v_size;
            C::expand(layer, tile.strip[i], nullptr, at);
            strip[i] = reinterpret_cast<const uint8_t *>(at);
        }
        float_values<F32>(strip, tile.strips, layer.v_size, p, decay, layer.group, sums,
                          layer.v_padded, strip);
    }
};

// Calls use(strip, tokens, K rows, V rows) for every strip of `count` tokens; rows that are not
// there are 0.
template <class F>
KVC_INLINE void each_strip(const Layer &layer, int count, const float *key, const float *value,
                           F use) {
    alignas(64) const float zeros[kMaxHead] = {};
    for (int first = 0; first < count; first += kStrip) {
        const float *k_rows[kStrip], *v_rows[kStrip];
        for (int t = 0; t < kStrip; ++t) {
            const bool there = first + t < count;
            k_rows[t] = there ? key + int64_t{first + t} * layer.k_size : zeros;
            v_rows[t] = there ? value + int64_t{first + t} * layer.v_size : zeros;
        }
        use(first / kStrip, least(kStrip, count - first), k_rows, v_rows);
    }
}

// 16 rows of floats as [column][row].
KVC_INLINE void turn_rows(const float *const *rows, int columns, float *to) {
    const uint32_t *words[kStrip];
    for (int t = 0; t < kStrip; ++t) words[t] = reinterpret_cast<const uint32_t *>(rows[t]);
    transpose(words, columns, reinterpret_cast<uint32_t *>(to));
}

constexpr float kHalfMax = 65504.0f;

KVC_INLINE float clamp(float x, float low, float high) {
    // In this order NaN becomes `low`.
    x = x > low ? x : low;
    return x < high ? x : high;
}
KVC_INLINE vf vclamp(vf x, float low, float high) {
    // vmax returns its second argument for NaN.
    return vmin(vmax(x, vset(low)), vset(high));
}

}  // namespace kvc::KVC_NAMESPACE
