// int4 pages: keys on a grid of each channel of 64 tokens, rotated values on one of each token.
#pragma once

#include "kernels/codes.h"

namespace kvc::KVC_NAMESPACE {

// The grid of each channel of a group, from the least to the largest of its n tokens. Returns what
// codes are made with: (x - low) * inverse.
inline void int4_grid(const float *key, int n, int k_size, uint16_t *scale, float *low,
                      float *inverse) {
    float high[kMaxHead];
    for (int c = 0; c < k_size; ++c) low[c] = high[c] = key[c];
    for (int i = 1; i < n; ++i) {
        const float *x = key + int64_t{i} * k_size;
        for (int c = 0; c < k_size; ++c) {
            low[c] = x[c] < low[c] ? x[c] : low[c];
            high[c] = x[c] > high[c] ? x[c] : high[c];
        }
    }
    uint16_t *zero = scale + k_size;
    for (int c = 0; c < k_size; ++c) {
        zero[c] = float_to_half(clamp(low[c], -kHalfMax, kHalfMax));
        low[c] = half_to_float(zero[c]);
        scale[c] = float_to_half(clamp((high[c] - low[c]) / 15, 0, kHalfMax));
        const float rounded = half_to_float(scale[c]);
        inverse[c] = rounded > 0 ? 1 / rounded : 0;
    }
}

inline void encode_int4_keys(const float *const *key, int k_size, const float *low,
                             const float *inverse, uint8_t *k) {
    alignas(64) float turned[kMaxHead * kStrip];
    turn_rows(key, k_size, turned);
    for (int c = 0; c < k_size; c += 8)
        for (int l = 0; l < kStrip; l += W) {
            vi word = to_int(vzero());
            for (int j = 0; j < 8; ++j) {
                const vf x = vload(turned + (c + j) * kStrip + l);
                const vf level = vmul(vsub(x, vset(low[c + j])), vset(inverse[c + j]));
                word = vor(word, vleft(to_int(vclamp(level, 0, 15)), j % 4 * 8 + j / 4 * 4));
            }
            vstore_words(k + c / 8 * 64 + 4 * l, word);
        }
}

// V of 16 tokens, rotated.
inline void encode_int4_values(const float *const *value, int v_size, uint16_t *scale, uint8_t *v) {
    alignas(64) float turned[kMaxHead * kStrip], inverse[kStrip];
    rotate_strip(value, v_size, turned);
    fit_tokens<4>(turned, v_size, scale, inverse);
    store_nibbles(v_size, v, [&](int c, int l) {
        return token_level<4>(turned + c * kStrip + l, inverse + l);
    });
}

#if defined(KVC_INTEGER_PRODUCTS)

// Scores of NP K strips; shift[g] is what all tokens of their group have in common.
template <int G, int NP>
KVC_APART void int4_k(const uint8_t *const *strip, int channels, const int8_t *q, const float *step,
                      const float *shift, float *s, const uint8_t *const *next) {
    constexpr int N = NP * vectors(kStrip);
    vf acc[G][N];
    const uint8_t *panel[NP], *ahead[NP];
    repeat<NP>(KVC_LAMBDA(j) { panel[j] = strip[j], ahead[j] = next[j]; });
    repeat<G>(KVC_LAMBDA(g) {
        const vf start = vset(shift[g]);
        repeat<N>(KVC_LAMBDA(v) { acc[g][v] = start; });
    });
    for (int first = 0; first < channels; first += kBlock, ++step) {
        const int last = least(channels, first + kBlock);
        vi sum[G][N];
        repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { sum[g][v] = ivzero(); }); });
        for (int row = first; row < last; row += 8) {
            const int64_t at = int64_t{row} * 8;
            repeat<NP>(KVC_LAMBDA(j) { prefetch(ahead[j] + at); });
            multiply_eight<kStrip, G, NP, kMaxHead>(sum, panel, at, q + row);
        }
        repeat<G>(KVC_LAMBDA(g) {
            const vf factor = vset(step[g * kBlocks]);
            repeat<N>(
                KVC_LAMBDA(v) { acc[g][v] = vfma(bytes_total(sum[g][v]), factor, acc[g][v]); });
        });
    }
    repeat<G>(
        KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { vstore(s + g * kTile + v * W, acc[g][v]); }); });
}

#endif

struct Int4 : Expanded<Int4> {
    // Scales of a group: of the channels of its keys, their zeros, and those of its values.
    static KVC_INLINE const uint8_t *k_zeros(const Layer &layer, const Strip &strip) {
        return strip.scales + 2 * layer.k_size;
    }
    static KVC_INLINE const uint8_t *v_scales(const Layer &layer, const Strip &strip) {
        return strip.scales + 2 * (2 * layer.k_size + strip.place * kStrip);
    }

    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        if (keys != nullptr) {
            const uint16_t *scales = reinterpret_cast<const uint16_t *>(strip.scales);
            const uint16_t *zeros = scales + layer.k_size;
            each_int4_row<kStrip>(
                strip.k, layer.k_size, KVC_ROW {
                    const vf scale = vset(half_to_float(scales[row]));
                    const vf zero = vset(half_to_float(zeros[row]));
                    vstore(keys + row * kStrip + l, vfma(code, scale, zero));
                });
        }
        if (values == nullptr) return;
        float scale[kStrip];
        token_halves(v_scales(layer, strip), strip.count, scale);
        const uint8_t *panel = strip.v;
        each_panel(layer.v_size, [&](int lanes) {
            const auto use = KVC_ROW {
                vstore(values + row * lanes + l, vmul(vsub(code, vset(7.5f)), vset(scale[row])));
            };
            if (lanes == 16)
                each_int4_row<16>(panel, kStrip, use);
            else
                each_int4_row<8>(panel, kStrip, use);
            panel += kStrip * lanes / 2;
            values += kStrip * lanes;
        });
    }

    static void encode(const Layer &layer, int codec, int head, uint8_t *page, int count,
                       const float *key, const float *value) {
        const PageLayout at = layer.layout(codec, head);
        const int k_size = layer.k_size, group = at.group_strips * kStrip;
        float low[kMaxHead], inverse[kMaxHead];
        each_strip(layer, count, key, value,
                   [&](int strip, int, const float *const *k_rows, const float *const *v_rows) {
                       const int place = strip % at.group_strips, first = strip * kStrip;
                       uint8_t *k = page + at.strip_at(strip);
                       uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.scales_at(strip));
                       if (place == 0)
                           int4_grid(k_rows[0], least(group, count - first), k_size, scale, low,
                                     inverse);
                       encode_int4_keys(k_rows, k_size, low, inverse, k);
                       encode_int4_values(v_rows, layer.v_size, scale + 2 * k_size + place * kStrip,
                                          k + at.v);
                   });
    }

#if defined(KVC_INTEGER_PRODUCTS)
    struct Query {
        float *k_scale, *k_middle;  // [kMaxHead]
        int8_t *code;               // [group][kMaxHead]
        float *step;                // [group][kBlocks]
        float *shift;               // [group]
        CodeWeights weights;

        template <class Arena>
        void take(Arena &arena, const Layer &layer) {
            k_scale = arena.template take<float>(kMaxHead + 16);
            k_middle = arena.template take<float>(kMaxHead + 16);
            code = arena.template take<int8_t>(int64_t{layer.group} * kMaxHead + 16);
            step = arena.template take<float>(int64_t{layer.group} * kBlocks + 16);
            shift = arena.template take<float>(layer.group + 16);
            weights.take(arena, layer.group);
        }
        void begin() {}
    };

    // The scales of a group's channels go into the query, which becomes bytes anew for each group,
    // with a step for every 32 channels. Codes count from their middle: 7.5 of each is moved to the
    // shift, exactly for the query and as rounded for its bytes.
    static void fold(const Layer &layer, const Strip &strip, Query &query, const float *q) {
        const int size = layer.k_size, padded = (size + kBlock - 1) / kBlock * kBlock;
        float *scale = query.k_scale, *middle = query.k_middle;
        load_halves(strip.scales, size, scale);
        load_halves(k_zeros(layer, strip), size, middle);
        for (int c = size; c < padded; ++c) scale[c] = middle[c] = 0;
        for (int c = 0; c < padded; c += W)
            vstore(middle + c, vfma(vload(scale + c), vset(7.5f), vload(middle + c)));
        for (int g = 0; g < layer.group; ++g) {
            const float *own = q + g * kMaxHead;
            // Apart, so that no block waits for the step of the one before.
            vf even = vzero(), odd = vzero(), rounded = vzero();
            for (int c = 0, block = 0; c < padded; c += kBlock, ++block) {
                vf folded[kBlock / W];
                repeat<kBlock / W>(KVC_LAMBDA(i) {
                    const vf x = vload(own + c + i * W);
                    folded[i] = vmul(x, vload(scale + c + i * W));
                    vf &sum = i % 2 == 0 ? even : odd;
                    sum = vfma(x, vload(middle + c + i * W), sum);
                });
                float step;
                const vf sum = quantise_block<false>(folded, query.code + g * kMaxHead + c, step);
                rounded = vfma(sum, vset(step), rounded);
                query.step[g * kBlocks + block] = step;
            }
            query.shift[g] = vhsum(vfma(rounded, vset(-7.5f), vadd(even, odd)));
        }
    }

    static void scores(const Pass &pass, Query &query, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        for (int first = 0, end; first < tile.strips; first = end) {
            const uint8_t *own = tile.strip[first].scales;
            for (end = first + 1; end < tile.strips && tile.strip[end].scales == own;) ++end;
            fold(layer, tile.strip[first], query, q);
            each_k_run(end - first, layer.group, [&](auto heads, auto panels, int strip, int head) {
                strip += first;
                int4_k<decltype(heads)::count, decltype(panels)::count>(
                    tile.k + strip, layer.k_size, query.code + head * kMaxHead,
                    query.step + head * kBlocks, query.shift + head,
                    s + head * kTile + strip * kStrip, pass.ahead + strip);
            });
        }
    }

    static void values(const Pass &pass, Query &query, float *p, const float *decay, float *sums) {
        const Tile &tile = pass.tile;
        for (int i = 0; i < tile.strips; ++i)
            token_halves(v_scales(pass.layer, tile.strip[i]), tile.strip[i].count,
                         query.weights.scale + i * kStrip);
        code_values<4>(pass, query.weights, p, decay, sums);
    }
#endif
};

}  // namespace kvc::KVC_NAMESPACE
