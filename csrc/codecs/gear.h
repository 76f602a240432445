// gear pages: codes beside a product of low rank, and for keys single channels beside both.
#pragma once

#include "codecs/chunk.h"

namespace kvc::KVC_NAMESPACE {

constexpr int kRank = kGearRank;
constexpr int kLoops = 4;  // of the power iteration

// The main directions of n rows less `mean`, of unit length, by power iteration: one after the
// other, each of what those before leave over.
struct Directions {
    alignas(64) float of[kRank][kMaxHead + 16] = {};
    alignas(64) float mean[kMaxHead + 16] = {};
    int size;

    Directions(const float *x, int n, int own_size, bool centred) : size(own_size) {
        if (centred) {
            double sum[kMaxHead] = {};
            for (int t = 0; t < n; ++t)
                for (int c = 0; c < size; ++c)
                    sum[c] += static_cast<double>(x[int64_t{t} * size + c]);
            for (int c = 0; c < size; ++c) mean[c] = static_cast<float>(sum[c] / most(n, 1));
        }
        for (int r = 0; r < kRank; ++r) find(x, n, r);
    }

    // How much of each direction a row has.
    void weights(const float *row, float (&along)[kRank]) const {
        alignas(64) float rest[kMaxHead + 16] = {};
        for (int c = 0; c < size; ++c) rest[c] = row[c] - mean[c];
        take(rest, kRank, along);
    }

   private:
    // Takes the first `count` directions off a row.
    void take(float *rest, int count, float *along) const {
        for (int r = 0; r < count; ++r) {
            along[r] = dot_row(rest, of[r], size);
            for (int c = 0; c < size; ++c) rest[c] -= along[r] * of[r][c];
        }
    }

    void find(const float *x, int n, int r) {
        for (int c = 0; c < size; ++c) of[r][c] = kSigns.of[c];
        for (int loop = 0; loop < kLoops; ++loop) {
            alignas(64) float next[kMaxHead + 16] = {}, rest[kMaxHead + 16] = {};
            for (int t = 0; t < n; ++t) {
                float along[kRank];
                for (int c = 0; c < size; ++c) rest[c] = x[int64_t{t} * size + c] - mean[c];
                take(rest, r, along);
                const float own = dot_row(rest, of[r], size);
                for (int c = 0; c < size; ++c) next[c] += own * rest[c];
            }
            const float length = __builtin_sqrtf(dot_row(next, next, size));
            const bool usual = length > 1e-30f && length < 1e30f;
            for (int c = 0; c < size; ++c) of[r][c] = usual ? next[c] / length : 0;
        }
    }
};

struct Gear : Expanded<Gear> {
    static constexpr Format format = kFormats[KVC_GEAR];
    static constexpr int bits = format.bits;
    static constexpr float top = (1 << bits) - 1, centre = 0.5f * top;

    // Of a page: scales and zeros of the channels of K, then factors.
    static KVC_INLINE const uint8_t *k_zeros(const Layer &layer, const uint8_t *page) {
        return page + 2 * layer.k_size;
    }
    static KVC_INLINE const uint8_t *k_factor(const Layer &layer, const uint8_t *page, int r) {
        return page + 2 * (2 + r) * layer.k_size;
    }
    static KVC_INLINE const uint8_t *v_factor(const Layer &layer, const uint8_t *page, int r) {
        return page + 2 * (2 + kRank) * layer.k_size + 2 * r * layer.v_size;
    }
    // Of a strip, after the scales of its values: weights, then single channels.
    static KVC_INLINE const uint8_t *k_weights(const uint8_t *scales, int r) {
        return scales + 2 * kStrip * (1 + r);
    }
    static KVC_INLINE const uint8_t *v_weights(const uint8_t *scales, int r) {
        return scales + 2 * kStrip * (1 + kRank + r);
    }
    static KVC_INLINE const uint8_t *places(const uint8_t *scales) {
        return scales + 2 * kStrip * (1 + 2 * kRank);
    }
    static KVC_INLINE int singles(const Layer &layer) {
        return layer.k_size / format.per_rest;
    }
    // Calls use(token, channel, rest) for the single channels of a strip.
    template <class F>
    static KVC_INLINE void each_single(const Layer &layer, const uint8_t *scales, F use) {
        const int n = singles(layer);
        const uint8_t *place = places(scales);
        for (int i = 0; i < n; ++i) {
            uint16_t at, rest;
            std::memcpy(&at, place + 2 * i, 2);
            std::memcpy(&rest, place + 2 * (n + i), 2);
            // What a wrong directory finds may be anything.
            const int channel = least(at % 256, layer.k_size - 1);
            use(at / 256 % kStrip, channel, half_to_float(rest));
        }
    }

    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        alignas(64) float row[kRank][kMaxHead + 16];
        float own[kRank][kStrip];
        if (keys != nullptr) {
            alignas(64) float scale[kMaxHead + 16], zero[kMaxHead + 16];
            load_row(strip.page, layer.k_size, scale);
            load_row(k_zeros(layer, strip.page), layer.k_size, zero);
            for (int r = 0; r < kRank; ++r) {
                load_row(k_factor(layer, strip.page, r), layer.k_size, row[r]);
                load_halves(k_weights(strip.scales, r), kStrip, own[r]);
            }
            each_key_row<bits>(strip.k, layer.k_size, [&](int c, int l, vf code) {
                vf x = vfma(code, vset(scale[c]), vset(zero[c]));
                for (int r = 0; r < kRank; ++r) x = vfma(vload(own[r] + l), vset(row[r][c]), x);
                vstore(keys + c * kStrip + l, x);
            });
            each_single(layer, strip.scales,
                        [&](int t, int c, float rest) { keys[c * kStrip + t] += rest; });
        }
        if (values == nullptr) return;
        float scale[kStrip];
        token_halves(strip.scales, strip.count, scale);
        for (int r = 0; r < kRank; ++r) {
            load_row(v_factor(layer, strip.page, r), layer.v_size, row[r]);
            token_halves(v_weights(strip.scales, r), strip.count, own[r]);
        }
        each_value_row<bits>(strip.v, layer.v_size, [&](int t, int c, int at, vf code) {
            vf x = vmul(vsub(code, vset(centre)), vset(scale[t]));
            for (int r = 0; r < kRank; ++r) x = vfma(vload(row[r] + c), vset(own[r][t]), x);
            vstore(values + at, x);
        });
    }

    // ---------------------------------------------------------------------------- encoding

    // What is done to one page of keys: first all weights, then which channels stand apart, whose
    // grids leave them out, then codes.
    struct Keys {
        const Layer &layer;
        const PageLayout at;
        uint8_t *page;
        const float *key;
        int count;
        alignas(64) float factor[kRank][kMaxHead + 16];
        float mean[kMaxHead] = {}, inverse[kMaxHead] = {};

        uint8_t *scales(int strip) const {
            return page + at.scales_at(strip);
        }
        // Calls use(token, rest of its key) for the tokens of a strip.
        template <class F>
        void each_rest(int strip, F use) const {
            float own[kRank][kStrip];
            for (int r = 0; r < kRank; ++r)
                load_halves(k_weights(scales(strip), r), kStrip, own[r]);
            const int first = strip * kStrip;
            for (int t = 0; t < least(kStrip, count - first); ++t) {
                float rest[kMaxHead];
                const float *x = key + int64_t{first + t} * layer.k_size;
                for (int c = 0; c < layer.k_size; ++c) {
                    rest[c] = x[c];
                    for (int r = 0; r < kRank; ++r) rest[c] -= own[r][t] * factor[r][c];
                }
                use(t, static_cast<const float *>(rest));
            }
        }
        int strips() const {
            return (count + kStrip - 1) / kStrip;
        }

        // Mean and spread of each channel's rests.
        void measure() {
            double sum[kMaxHead] = {}, square[kMaxHead] = {};
            const int k_size = layer.k_size;
            for (int s = 0; s < strips(); ++s)
                each_rest(s, [&](int, const float *x) {
                    for (int c = 0; c < k_size; ++c) {
                        sum[c] += static_cast<double>(x[c]);
                        square[c] += static_cast<double>(x[c]) * static_cast<double>(x[c]);
                    }
                });
            for (int c = 0; c < k_size && count > 0; ++c) {
                const double own = sum[c] / count;
                const double variance = square[c] / count - own * own;
                mean[c] = static_cast<float>(own);
                inverse[c] = variance > 1e-12 * (own * own) + 1e-30
                                 ? 1 / __builtin_sqrtf(static_cast<float>(variance))
                                 : 0;
            }
        }

        // Those channels of a strip's keys that are farthest from their means.
        void choose(int strip, float *low, float *high) const {
            const int k_size = layer.k_size, n = singles(layer);
            float far[kStrip][kMaxHead], farthest[kStrip] = {};
            const auto largest = [&](int t) {
                float x = -1;
                for (int c = 0; c < k_size; ++c) x = most(x, far[t][c]);
                return x;
            };
            int tokens = 0;
            each_rest(strip, [&](int t, const float *x) {
                for (int c = 0; c < k_size; ++c)
                    far[t][c] = __builtin_fabsf(x[c] - mean[c]) * inverse[c];
                farthest[t] = largest(t);
                tokens = t + 1;
            });
            uint8_t *place = const_cast<uint8_t *>(places(scales(strip)));
            for (int i = 0; i < n; ++i) {
                int t = 0, c = 0;
                for (int j = 1; j < tokens; ++j)
                    if (farthest[j] > farthest[t]) t = j;
                while (c < k_size - 1 && far[t][c] != farthest[t]) ++c;
                far[t][c] = -1;
                farthest[t] = largest(t);
                const uint16_t own = static_cast<uint16_t>(t * 256 + c);
                std::memcpy(place + 2 * i, &own, 2);
            }
            each_rest(strip, [&](int t, const float *x) {
                for (int c = 0; c < k_size; ++c) {
                    if (far[t][c] < 0) continue;
                    low[c] = least(low[c], x[c]);
                    high[c] = most(high[c], x[c]);
                }
            });
        }

        void grid(const float *low, const float *high, float *lows, float *inverses) const {
            uint16_t *scale = reinterpret_cast<uint16_t *>(page), *zero = scale + layer.k_size;
            for (int c = 0; c < layer.k_size; ++c) {
                const bool any = low[c] <= high[c];
                zero[c] = saturated_half(any ? low[c] : mean[c]);
                lows[c] = half_to_float(zero[c]);
                scale[c] = float_to_half(clamp(any ? (high[c] - lows[c]) / top : 0, 0, kHalfMax));
                const float rounded = half_to_float(scale[c]);
                inverses[c] = rounded > 0 ? 1 / rounded : 0;
            }
        }

        void code(int strip, const float *lows, const float *inverses) const {
            const int k_size = layer.k_size, n = singles(layer);
            const uint16_t *scale = reinterpret_cast<const uint16_t *>(page);
            alignas(64) float turned[kMaxHead * kStrip] = {};
            each_rest(strip, [&](int t, const float *x) {
                for (int c = 0; c < k_size; ++c) turned[c * kStrip + t] = x[c];
            });
            const auto level = [&](int c, int l) {
                const vf x = vsub(vload(turned + c * kStrip + l), vset(lows[c]));
                return vround(vclamp(vmul(x, vset(inverses[c])), 0, top));
            };
            store_key_codes<bits>(k_size, page + at.strip_at(strip), level);
            uint8_t *rest = const_cast<uint8_t *>(places(scales(strip))) + 2 * n;
            each_single(layer, scales(strip), [&](int t, int c, float) {
                float levels[W];
                vstore(levels, level(c, t / W * W));
                const float x = turned[c * kStrip + t] - lows[c];
                const uint16_t own = saturated_half(x - levels[t % W] * half_to_float(scale[c]));
                std::memcpy(rest, &own, 2);
                rest += 2;
            });
        }
    };

    static void store_weights(const Directions &own, const float *row, int t, int stride,
                              uint16_t *to) {
        float along[kRank];
        own.weights(row, along);
        for (int r = 0; r < kRank; ++r) to[r * stride + t] = saturated_half(along[r]);
    }

    static void encode_values(const Layer &layer, const float *const *rows, const uint8_t *page,
                              uint8_t *scales, uint8_t *v) {
        alignas(64) float turned[kMaxHead * kStrip], inverse[kStrip], factor[kMaxHead + 16];
        float own[kStrip];
        rotate_strip(rows, layer.v_size, turned);
        for (int r = 0; r < kRank; ++r) {
            load_row(v_factor(layer, page, r), layer.v_size, factor);
            load_halves(v_weights(scales, r), kStrip, own);
            for (int c = 0; c < layer.v_size; ++c)
                for (int l = 0; l < kStrip; l += W) {
                    float *x = turned + c * kStrip + l;
                    vstore(x, vsub(vload(x), vmul(vload(own + l), vset(factor[c]))));
                }
        }
        fit_tokens<bits>(turned, layer.v_size, reinterpret_cast<uint16_t *>(scales), inverse);
        store_value_codes<bits>(layer.v_size, v, [&](int c, int l) {
            return token_level<bits>(turned + c * kStrip + l, inverse + l);
        });
    }

    static void encode(const Layer &layer, int codec, int head, uint8_t *page, int count,
                       const float *key, const float *value) {
        const PageLayout at = layer.layout(codec, head);
        const int k_size = layer.k_size, v_size = layer.v_size;
        const Directions k_own(key, count, k_size, true), v_own(value, count, v_size, false);
        Keys keys{layer, at, page, key, count, {}};
        for (int r = 0; r < kRank; ++r) {
            uint8_t *k = const_cast<uint8_t *>(k_factor(layer, page, r));
            uint8_t *v = const_cast<uint8_t *>(v_factor(layer, page, r));
            alignas(64) float turned[kMaxHead + 16] = {};
            std::memcpy(turned, v_own.of[r], sizeof(float) * v_size);
            rotate(turned, v_size);
            for (int c = 0; c < k_size; ++c)
                reinterpret_cast<uint16_t *>(k)[c] = float_to_half(k_own.of[r][c]);
            for (int c = 0; c < v_size; ++c)
                reinterpret_cast<uint16_t *>(v)[c] = float_to_half(turned[c]);
            load_row(k, k_size, keys.factor[r]);
        }
        each_strip(layer, count, key, value,
                   [&](int strip, int n, const float *const *k_rows, const float *const *v_rows) {
                       uint8_t *scales = keys.scales(strip);
                       std::memset(scales, 0, static_cast<size_t>(at.header));
                       uint16_t *to = reinterpret_cast<uint16_t *>(scales);
                       for (int t = 0; t < n; ++t) {
                           store_weights(k_own, k_rows[t], t, kStrip, to + kStrip);
                           store_weights(v_own, v_rows[t], t, kStrip, to + kStrip * (1 + kRank));
                       }
                       encode_values(layer, v_rows, page, scales, page + at.strip_at(strip) + at.v);
                   });
        float low[kMaxHead], high[kMaxHead], lows[kMaxHead], inverses[kMaxHead];
        for (int c = 0; c < k_size; ++c) low[c] = __builtin_inff(), high[c] = -low[c];
        keys.measure();
        for (int s = 0; s < keys.strips(); ++s) keys.choose(s, low, high);
        keys.grid(low, high, lows, inverses);
        for (int s = 0; s < keys.strips(); ++s) keys.code(s, lows, inverses);
    }

    // ---------------------------------------------------------------------------- products

#if defined(KVC_INTEGER_PRODUCTS)
    struct Query {
        float *folded;  // [kMaxHead]
        float *along;   // [group][kRank]: of the keys' factors in `page`
        CodeQuery codes;
        CodeWeights weights;
        const uint8_t *page;

        template <class Arena>
        void take(Arena &arena, const Layer &layer) {
            folded = arena.template take<float>(kMaxHead + 16);
            along = arena.template take<float>(int64_t{layer.group} * kRank + 16);
            codes.take(arena, layer.group);
            weights.take(arena, layer.group);
        }
        void begin() {
            page = nullptr;
        }
    };

    // The scales of a page's channels go into the query, which becomes bytes anew for each page.
    static void fold(const Layer &layer, const uint8_t *page, Query &query, const float *q) {
        if (query.page == page) return;
        query.page = page;
        const int size = layer.k_size;
        alignas(64) float scale[kMaxHead + 16], shift[kMaxHead + 16], row[kRank][kMaxHead + 16];
        load_row(page, size, scale);
        load_row(k_zeros(layer, page), size, shift);
        for (int r = 0; r < kRank; ++r) load_row(k_factor(layer, page, r), size, row[r]);
        for (int c = 0; c < size; c += W)
            vstore(shift + c, vfma(vload(scale + c), vset(centre), vload(shift + c)));
        std::memset(query.folded, 0, sizeof(float) * kMaxHead);
        for (int g = 0; g < layer.group; ++g) {
            const float *own = q + g * kMaxHead;
            for (int c = 0; c < size; c += W)
                vstore(query.folded + c, vmul(vload(own + c), vload(scale + c)));
            // Codes count from their middle: moved exactly for the query, and as rounded for bytes.
            const float rounded = query.codes.set(g, query.folded, size);
            query.codes.shift[g] = dot_row(own, shift, size) - centre * rounded;
            for (int r = 0; r < kRank; ++r) query.along[g * kRank + r] = dot_row(own, row[r], size);
        }
    }

    static void scores(const Pass &pass, Query &query, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        each_page(tile, [&](int first, int end) {
            fold(layer, tile.strip[first].page, query, q);
            code_scores<bits>(pass, query.codes, first, end, s);
            for (int i = first; i < end; ++i) {
                const uint8_t *scales = tile.strip[i].scales;
                float own[kRank][kStrip];
                for (int r = 0; r < kRank; ++r) load_halves(k_weights(scales, r), kStrip, own[r]);
                for (int g = 0; g < layer.group; ++g)
                    for (int r = 0; r < kRank; ++r) {
                        const vf by = vset(query.along[g * kRank + r]);
                        float *at = s + g * kTile + i * kStrip;
                        for (int l = 0; l < kStrip; l += W)
                            vstore(at + l, vfma(vload(own[r] + l), by, vload(at + l)));
                    }
                each_single(layer, scales, [&](int t, int c, float rest) {
                    for (int g = 0; g < layer.group; ++g)
                        s[g * kTile + i * kStrip + t] += q[g * kMaxHead + c] * rest;
                });
            }
        });
    }

    static void values(const Pass &pass, Query &query, float *p, const float *decay, float *sums) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        for (int i = 0; i < tile.strips; ++i)
            token_halves(tile.strip[i].scales, tile.strip[i].count,
                         query.weights.scale + i * kStrip);
        code_values<bits>(pass, query.weights, p, decay, sums);
        each_page(tile, [&](int first, int end) {
            for (int r = 0; r < kRank; ++r) {
                alignas(64) float row[kMaxHead + 16], own[kTile];
                load_row(v_factor(layer, tile.strip[first].page, r), layer.v_size, row);
                for (int i = first; i < end; ++i)
                    token_halves(v_weights(tile.strip[i].scales, r), tile.strip[i].count,
                                 own + i * kStrip);
                for (int g = 0; g < layer.group; ++g) {
                    vf sum = vzero();
                    for (int i = first * kStrip; i < end * kStrip; i += W)
                        sum = vfma(vload(p + g * kTile + i), vload(own + i), sum);
                    add_row(row, vhsum(sum), layer.v_size, sums + int64_t{g} * layer.v_padded);
                }
            }
        });
    }
#endif
};

}  // namespace kvc::KVC_NAMESPACE
