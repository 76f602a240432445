// tada pages: rotated keys and values as they differ from the page's mean, on a grid of each token.
#pragma once

#include "codecs/chunk.h"
#include "codecs/int4.h"

namespace kvc::KVC_NAMESPACE {

// The mean of n rows, rotated.
inline void rotated_mean(const float *x, int n, int size, uint16_t *to) {
    double sum[kMaxHead] = {};
    for (int t = 0; t < n; ++t)
        for (int c = 0; c < size; ++c) sum[c] += static_cast<double>(x[int64_t{t} * size + c]);
    alignas(64) float mean[kMaxHead + 16] = {};
    for (int c = 0; c < size; ++c) mean[c] = static_cast<float>(sum[c] / most(n, 1));
    rotate(mean, size);
    for (int c = 0; c < size; ++c) to[c] = saturated_half(mean[c]);
}

// 16 rows, rotated, less their page's mean: [channel][token].
inline void centre_strip(const float *const *rows, int size, const uint16_t *mean, float *turned) {
    rotate_strip(rows, size, turned);
    for (int c = 0; c < size; ++c) {
        const vf own = vset(half_to_float(mean[c]));
        for (int l = 0; l < kStrip; l += W) {
            float *at = turned + c * kStrip + l;
            vstore(at, vsub(vload(at), own));
        }
    }
}

struct Tada : Expanded<Tada> {
    static constexpr int bits = kFormats[KVC_TADA].bits;
    static constexpr float centre = 0.5f * ((1 << bits) - 1);

    // Of a strip, scales of its keys, then of its values; of a page, means likewise.
    static KVC_INLINE const uint8_t *v_scales(const Strip &strip) {
        return strip.scales + 2 * kStrip;
    }
    static KVC_INLINE const uint8_t *v_mean(const Layer &layer, const uint8_t *page) {
        return page + 2 * layer.k_size;
    }

    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        alignas(64) float mean[kMaxHead + 16];
        float scale[kStrip];
        if (keys != nullptr) {
            load_row(strip.page, layer.k_size, mean);
            load_halves(strip.scales, kStrip, scale);
            each_key_row<bits>(
                strip.k, layer.k_size, KVC_ROW {
                    const vf level = vsub(code, vset(centre));
                    vstore(keys + row * kStrip + l, vfma(level, vload(scale + l), vset(mean[row])));
                });
            rotate_strip_back(layer.k_size, keys);
        }
        if (values == nullptr) return;
        load_row(v_mean(layer, strip.page), layer.v_size, mean);
        token_halves(v_scales(strip), strip.count, scale);
        each_value_row<bits>(strip.v, layer.v_size, [&](int t, int c, int at, vf code) {
            const vf own = t < strip.count ? vload(mean + c) : vzero();
            vstore(values + at, vfma(vsub(code, vset(centre)), vset(scale[t]), own));
        });
    }

    static void encode(const Layer &layer, int codec, int head, uint8_t *page, int count,
                       const float *key, const float *value) {
        const PageLayout at = layer.layout(codec, head);
        const int k_size = layer.k_size, v_size = layer.v_size;
        uint16_t *k_mean = reinterpret_cast<uint16_t *>(page), *v_mean = k_mean + k_size;
        rotated_mean(key, count, k_size, k_mean);
        rotated_mean(value, count, v_size, v_mean);
        each_strip(layer, count, key, value,
                   [&](int strip, int, const float *const *k_rows, const float *const *v_rows) {
                       alignas(64) float turned[kMaxHead * kStrip], inverse[kStrip];
                       uint8_t *k = page + at.strip_at(strip);
                       uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.scales_at(strip));
                       const auto level = [&](int c, int l) {
                           return token_level<bits>(turned + c * kStrip + l, inverse + l);
                       };
                       centre_strip(k_rows, k_size, k_mean, turned);
                       fit_tokens<bits>(turned, k_size, scale, inverse);
                       store_key_codes<bits>(k_size, k, level);
                       centre_strip(v_rows, v_size, v_mean, turned);
                       fit_tokens<bits>(turned, v_size, scale + kStrip, inverse);
                       store_value_codes<bits>(v_size, k + at.v, level);
                   });
    }

#if defined(KVC_INTEGER_PRODUCTS)
    struct Query {
        float *rotated;  // [group][kMaxHead]
        float *base;     // [group]: of the mean of `page`
        CodeQuery codes;
        CodeWeights weights;
        const uint8_t *page;
        bool known;

        template <class Arena>
        void take(Arena &arena, const Layer &layer) {
            rotated = arena.template take<float>(int64_t{layer.group} * kMaxHead + 16);
            base = arena.template take<float>(layer.group + 16);
            codes.take(arena, layer.group);
            weights.take(arena, layer.group);
        }
        void begin() {
            page = nullptr;
            known = false;
        }
    };

    static void rotate_query(const Layer &layer, Query &query, const float *q) {
        if (query.known) return;
        query.known = true;
        for (int g = 0; g < layer.group; ++g) {
            float *own = query.rotated + g * kMaxHead;
            std::memset(own, 0, sizeof(float) * kMaxHead);
            std::memcpy(own, q + g * kMaxHead, sizeof(float) * layer.k_size);
            rotate(own, layer.k_size);
            query.codes.shift[g] = -centre * query.codes.set(g, own, layer.k_size);
        }
    }

    static void scores(const Pass &pass, Query &query, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        rotate_query(layer, query, q);
        code_scores<bits>(pass, query.codes, 0, tile.strips, s);
        for (int i = 0; i < tile.strips; ++i) {
            if (query.page != tile.strip[i].page) {
                alignas(64) float mean[kMaxHead + 16];
                query.page = tile.strip[i].page;
                load_row(query.page, layer.k_size, mean);
                for (int g = 0; g < layer.group; ++g)
                    query.base[g] = dot_row(query.rotated + g * kMaxHead, mean, layer.k_size);
            }
            float scale[kStrip];
            load_halves(tile.strip[i].scales, kStrip, scale);
            for (int g = 0; g < layer.group; ++g) {
                const vf base = vset(query.base[g]);
                float *at = s + g * kTile + i * kStrip;
                for (int l = 0; l < kStrip; l += W)
                    vstore(at + l, vfma(vload(at + l), vload(scale + l), base));
            }
        }
    }

    static void values(const Pass &pass, Query &query, float *p, const float *decay, float *sums) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        for (int i = 0; i < tile.strips; ++i)
            token_halves(v_scales(tile.strip[i]), tile.strip[i].count,
                         query.weights.scale + i * kStrip);
        code_values<bits>(pass, query.weights, p, decay, sums);
        each_page(tile, [&](int first, int end) {
            alignas(64) float mean[kMaxHead + 16];
            load_row(v_mean(layer, tile.strip[first].page), layer.v_size, mean);
            for (int g = 0; g < layer.group; ++g) {
                vf sum = vzero();
                for (int i = first * kStrip; i < end * kStrip; i += W)
                    sum = vadd(sum, vload(p + g * kTile + i));
                add_row(mean, vhsum(sum), layer.v_size, sums + int64_t{g} * layer.v_padded);
            }
        });
    }
#endif
};

}  // namespace kvc::KVC_NAMESPACE
