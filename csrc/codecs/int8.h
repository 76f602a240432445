// int8 pages: codes of a byte, a scale for each token's K and V.
#pragma once

#include "kernels/strips.h"

namespace kvc::KVC_NAMESPACE {

// Rows of a panel of codes as floats: use(row, first lane, codes) for each vector of lanes.
template <int lanes, class F>
KVC_INLINE void each_int8_row(const uint8_t *panel, int rows, F use) {
    constexpr int width = lanes < W ? lanes : W;
    for (int r = 0; r < rows; r += 2)
        for (int l = 0; l < lanes; l += width) {
            const vi pairs = vload_words16<width>(panel + r * lanes + 2 * l);
            use(r, l, to_float(vright_signed(vleft(pairs, 24), 24)));
            use(r + 1, l, to_float(vright_signed(vleft(pairs, 16), 24)));
        }
}

// The scale of one token, rounded to float16; the result is what to multiply by to get codes.
KVC_INLINE float int8_scale(const float *x, int size, uint16_t &scale) {
    vf peak = vzero();
    int c = 0;
    for (; c + W <= size; c += W) peak = vmax(vabs(vload(x + c)), peak);
    float largest = vhmax(peak);
    for (; c < size; ++c) largest = most(largest, __builtin_fabsf(x[c]));
    scale = float_to_half(least(largest / 127, kHalfMax));
    const float rounded = half_to_float(scale);
    return rounded > 0 ? 1 / rounded : 0;
}

// Two rows of codes as pairs of bytes.
KVC_INLINE vi int8_pairs(vf first, vf second) {
    const vi low = to_int(vclamp(first, -127, 127)), high = to_int(vclamp(second, -127, 127));
    return vor(vand(low, 255), vleft(high, 8));
}

inline void encode_int8_strip(const Layer &layer, const float *const *key,
                              const float *const *value, uint16_t *scale, uint8_t *k, uint8_t *v) {
    const int k_size = layer.k_size, v_size = layer.v_size;
    alignas(64) float turned[kMaxHead * kStrip], inverse[2][kStrip];
    for (int t = 0; t < kStrip; ++t) {
        inverse[0][t] = int8_scale(key[t], k_size, scale[t]);
        inverse[1][t] = int8_scale(value[t], v_size, scale[kStrip + t]);
    }
    turn_rows(key, k_size, turned);
    for (int c = 0; c < k_size; c += 2)
        for (int l = 0; l < kStrip; l += W) {
            const vf by = vload(inverse[0] + l);
            const float *x = turned + c * kStrip + l;
            vstore_words16(k + c * kStrip + 2 * l,
                           int8_pairs(vmul(vload(x), by), vmul(vload(x + kStrip), by)));
        }
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        for (int t = 0; t < kStrip; t += 2) {
            uint8_t *to = v + c * kStrip + t * lanes;
            const vf first = vset(inverse[1][t]), second = vset(inverse[1][t + 1]);
            if (lanes == 8 && W == 16) {
                const vi pairs = int8_pairs(vmul(vload_lanes<8>(value[t] + c), first),
                                            vmul(vload_lanes<8>(value[t + 1] + c), second));
                uint8_t both[2 * W];
                vstore_words16(both, pairs);
                std::memcpy(to, both, 16);
                continue;
            }
            for (int l = 0; l < lanes; l += W)
                vstore_words16(to + 2 * l, int8_pairs(vmul(vload(value[t] + c + l), first),
                                                      vmul(vload(value[t + 1] + c + l), second)));
        }
    }
}

KVC_INLINE float int8_row(const float *x, int size, uint16_t &scale, uint8_t *to) {
    const float inverse = int8_scale(x, size, scale);
    for (int c = 0; c < size; ++c)
        to[c] = static_cast<uint8_t>(
            static_cast<int8_t>(__builtin_rintf(clamp(x[c] * inverse, -127, 127))));
    return inverse;
}

#if defined(KVC_INTEGER_PRODUCTS)

// Adds `rows` rows of NP panels to G accumulators each; head g's weights are at w + g * stride.
template <int lanes, int G, int NP, int stride>
KVC_INLINE void multiply_int8(vi (&acc)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                              int rows, const int16_t *w, const uint8_t *const (&ahead)[NP]) {
    constexpr int NV = vectors(lanes), N = NP * NV, width = lanes < W ? lanes : W;
    constexpr int step = 2 * lanes, steps = 64 / step;  // bytes of two rows; a cache line
    const int64_t bytes = int64_t{rows} / 2 * step;
    for (int64_t at = 0; at < bytes; at += 64, w += 2 * steps) {
        repeat<NP>(KVC_LAMBDA(j) { prefetch(ahead[j] + at); });
        repeat<steps>(KVC_LAMBDA(i) {
            vi b[G];
            repeat<G>(KVC_LAMBDA(g) { b[g] = broadcast_word(w + g * stride + 2 * i); });
            repeat<N>(KVC_LAMBDA(v) {
                const vi x = load_int8_pairs<width>(panel[v / NV] + at + i * step + v % NV * 2 * W);
                repeat<G>(KVC_LAMBDA(g) { dot_pairs(acc[g][v], x, b[g]); });
            });
        });
    }
}

// Sums of codes times q of NP K strips: s[g * kTile + 16 * j + lane].
template <int G, int NP>
KVC_APART void int8_k(const uint8_t *const *strip, int channels, const int16_t *q, float *s,
                      const uint8_t *const *next) {
    constexpr int N = NP * vectors(kStrip);
    vi acc[G][N];
    const uint8_t *panel[NP], *ahead[NP];
    repeat<NP>(KVC_LAMBDA(j) { panel[j] = strip[j], ahead[j] = next[j]; });
    repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { acc[g][v] = ivzero(); }); });
    multiply_int8<kStrip, G, NP, kMaxHead>(acc, panel, channels, q, ahead);
    repeat<G>(KVC_LAMBDA(g) {
        repeat<N>(KVC_LAMBDA(v) { vstore(s + g * kTile + v * W, to_float(acc[g][v])); });
    });
}

// out[g * out_stride + lane] = out * decay[g] + sum * step[g].
template <int lanes, int G, int NP>
KVC_APART void int8_v(const uint8_t *const *strip, int strips, int64_t offset, const int16_t *p,
                      const float *step, const float *decay, float *out, int64_t out_stride,
                      const uint8_t *const *next) {
    constexpr int N = NP * vectors(lanes), panel_bytes = kStrip * lanes;
    vi acc[G][N];
    repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { acc[g][v] = ivzero(); }); });
    for (int i = 0; i < strips; ++i) {
        const uint8_t *panel[NP], *ahead[NP];
        repeat<NP>(KVC_LAMBDA(j) {
            panel[j] = strip[i] + offset + j * panel_bytes;
            ahead[j] = next[i] + offset + j * panel_bytes;
        });
        multiply_int8<lanes, G, NP, kTile>(acc, panel, kStrip, p + i * kStrip, ahead);
    }
    repeat<G>(KVC_LAMBDA(g) {
        repeat<N>(KVC_LAMBDA(v) {
            float *at = out + g * out_stride + v * W;
            const vf sum = vmul(to_float(acc[g][v]), vset(step[g]));
            vstore(at, vfma(vload(at), vset(decay[g]), sum));
        });
    });
}

// Codes of n weights (a multiple of 8; 8 more may be written) relative to their largest, and the
// step between codes.
KVC_INLINE void quantise_int16(const float *x, int n, int16_t *code, float &step) {
    vf peak = vzero();
    int i = 0;
    for (; i + W <= n; i += W) peak = vmax(peak, vabs(vload(x + i)));
    if (i < n) peak = vmax(peak, vabs(vload_lanes<8>(x + i)));
    const float largest = vhmax(peak);
    const bool any = largest > 1e-30f;  // below, the inverse would overflow
    step = any ? largest * (1 / 32767.0f) : 0.0f;
    const vf inverse = vset(any ? 32767.0f / largest : 0.0f);
    for (i = 0; i < n; i += W)
        store_int16(code + i, vmul(i + W <= n ? vload(x + i) : vload_lanes<8>(x + i), inverse));
}

#endif

struct Int8 : Expanded<Int8> {
    // Scales of a strip: of its keys, then of its values.
    static KVC_INLINE const uint8_t *v_scales(const Strip &strip) {
        return strip.scales + 2 * kStrip;
    }

    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        if (keys != nullptr) {
            vf scale[kStrip / W];
            for (int l = 0; l < kStrip; l += W) scale[l / W] = vload_half<W>(strip.scales + 2 * l);
            each_int8_row<kStrip>(
                strip.k, layer.k_size,
                KVC_ROW { vstore(keys + row * kStrip + l, vmul(code, scale[l / W])); });
        }
        if (values == nullptr) return;
        float scale[kStrip];
        token_halves(v_scales(strip), strip.count, scale);
        const uint8_t *panel = strip.v;
        each_panel(layer.v_size, [&](int lanes) {
            const auto use = KVC_ROW {
                vstore(values + row * lanes + l, vmul(code, vset(scale[row])));
            };
            if (lanes == 16)
                each_int8_row<16>(panel, kStrip, use);
            else
                each_int8_row<8>(panel, kStrip, use);
            panel += kStrip * lanes;
            values += kStrip * lanes;
        });
    }

    static void encode(const Layer &layer, int codec, int head, uint8_t *page, int count,
                       const float *key, const float *value) {
        const PageLayout at = layer.layout(codec, head);
        each_strip(layer, count, key, value,
                   [&](int strip, int, const float *const *k_rows, const float *const *v_rows) {
                       uint8_t *k = page + at.strip_at(strip);
                       uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.scales_at(strip));
                       encode_int8_strip(layer, k_rows, v_rows, scale, k, k + at.v);
                   });
    }

#if defined(KVC_INTEGER_PRODUCTS)
    struct Query {
        float *scale;            // [kTile] of V
        int16_t *q, *p;          // [group][kMaxHead], [group][kTile]
        float *q_step, *p_step;  // [group]
        bool known;

        template <class Arena>
        void take(Arena &arena, const Layer &layer) {
            scale = arena.template take<float>(kTile + 16);
            q = arena.template take<int16_t>(int64_t{layer.group} * kMaxHead + 16);
            p = arena.template take<int16_t>(int64_t{layer.group} * kTile + 16);
            q_step = arena.template take<float>(layer.group + 16);
            p_step = arena.template take<float>(layer.group + 16);
        }
        void begin() {
            known = false;
        }
    };

    static void scores(const Pass &pass, Query &query, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const int group = layer.group;
        if (!query.known) {
            for (int g = 0; g < group; ++g)
                quantise_int16(q + g * kMaxHead, layer.k_size, query.q + g * kMaxHead,
                               query.q_step[g]);
            query.known = true;
        }
        each_k_run(tile.strips, group, [&](auto heads, auto panels, int strip, int head) {
            int8_k<decltype(heads)::count, decltype(panels)::count>(
                tile.k + strip, layer.k_size, query.q + head * kMaxHead,
                s + head * kTile + strip * kStrip, pass.ahead + strip);
        });
        for (int i = 0; i < tile.strips; ++i) {
            float scale[kStrip];
            load_halves(tile.strip[i].scales, kStrip, scale);
            for (int g = 0; g < group; ++g) {
                const vf step = vset(query.q_step[g]);
                float *at = s + g * kTile + i * kStrip;
                for (int l = 0; l < kStrip; l += W)
                    vstore(at + l, vmul(vload(at + l), vmul(vload(scale + l), step)));
            }
        }
    }

    // Weights times V scales are codes relative to the tile's own largest: relative to anything
    // larger, a sink token would round all others away.
    static void values(const Pass &pass, Query &query, float *p, const float *decay, float *sums) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const int n = tile.strips * kStrip;
        for (int i = 0; i < tile.strips; ++i)
            token_halves(v_scales(tile.strip[i]), tile.strip[i].count, query.scale + i * kStrip);
        for (int g = 0; g < layer.group; ++g) {
            float *own = p + g * kTile;
            for (int i = 0; i < n; i += W)
                vstore(own + i, vmul(vload(own + i), vload(query.scale + i)));
            quantise_int16(own, n, query.p + g * kTile, query.p_step[g]);
        }
        each_v_run(
            layer.v_size, layer.group,
            [&](auto heads, auto panels, auto lanes, int channel, int head) {
                int8_v<decltype(lanes)::count, decltype(heads)::count, decltype(panels)::count>(
                    tile.v, tile.strips, int64_t{channel} * kStrip, query.p + head * kTile,
                    query.p_step + head, decay + head,
                    sums + int64_t{head} * layer.v_padded + channel, layer.v_padded, pass.ahead);
            });
    }
#endif
};

}  // namespace kvc::KVC_NAMESPACE
