// What each codec knows how to do with a tile: score it, add up its values, or turn it into floats.
#pragma once

#include "fitted.h"
#include "integer.h"
#include "internal.h"
#include "panel.h"
#include "tiles.h"

namespace kvc::KVC_NAMESPACE {

constexpr bool rotates_v(int codec) {
    return codec == KVC_INT4 || (fitted(codec) && codec != kExceptions);
}

// Signs of the rotation of V, channel by channel.
struct Signs {
    float of[kMaxHead] = {};
    constexpr Signs() {
        for (int c = 0; c < kMaxHead; ++c) of[c] = rotation_sign(c);
    }
};
alignas(64) inline constexpr Signs kSigns{};

// Orthonormal Hadamard transforms over blocks of rotation_block(size); `x` may be written up to the
// next multiple of 16.
inline void hadamard(float *x, int size) {
    const int block = rotation_block(size), within = least(block, W);
    const vf factor = vset(1 / __builtin_sqrtf(static_cast<float>(block)));
    for (int c = 0; c < size; c += W) vstore(x + c, vmul(vhadamard(vload(x + c), within), factor));
    for (int half = W; half < block; half *= 2)
        for (int first = 0; first < size; first += 2 * half)
            for (int c = first; c < first + half; c += W) {
                const vf a = vload(x + c), b = vload(x + c + half);
                vstore(x + c, vadd(a, b));
                vstore(x + c + half, vsub(a, b));
            }
}
inline void rotate_back(float *x, int size) {
    hadamard(x, size);
    for (int c = 0; c < size; ++c) x[c] *= kSigns.of[c];
}
inline void rotate(float *x, int size) {
    for (int c = 0; c < size; ++c) x[c] *= kSigns.of[c];
    hadamard(x, size);
}

// Calls use(panel, channel, lanes) for every panel of V.
template <class F>
KVC_INLINE void each_panel(int v_size, F use) {
    for (int c = 0; c < v_size; c += 16) use(c / 16, c, panel_lanes(v_size, c / 16));
}

// Scales of a strip: of its tokens, and of its group's channels (int4: scales, then zeros).
KVC_INLINE const uint16_t *k_scales(const Strip &strip) {
    return reinterpret_cast<const uint16_t *>(strip.scales);
}
KVC_INLINE const uint16_t *v_scales(const Layer &layer, int codec, const Strip &strip) {
    const int first = codec == KVC_INT8 ? kStrip : 2 * layer.k_size + strip.place * kStrip;
    return k_scales(strip) + first;
}

// Copies the first `count` tokens of a raw V strip and fills the rest with 0.
inline void copy_v_strip(const uint8_t *from, uint8_t *to, int count, int v_size, int dtype) {
    const int row_bytes = dtype_bytes(dtype);
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        const int64_t bytes = int64_t{kStrip} * lanes * row_bytes;
        int64_t kept = int64_t{count} * lanes * row_bytes;
        if (dtype == KVC_BF16 && count % 2 != 0) {  // the odd token shares words with the next
            kept -= int64_t{lanes} * row_bytes;
            for (int lane = 0; lane < lanes; ++lane) {
                std::memcpy(to + kept + 4 * lane, from + kept + 4 * lane, 2);
                std::memset(to + kept + 4 * lane + 2, 0, 2);
            }
            std::memcpy(to, from, kept);
            kept += 4 * lanes;
        } else {
            std::memcpy(to, from, kept);
        }
        std::memset(to + kept, 0, bytes - kept);
        from += bytes;
        to += bytes;
    }
}

// A panel of 16-bit floats as float32 [rows][lanes].
inline void expand_panel(const uint8_t *from, float *to, int rows, int lanes, int dtype) {
    const uint16_t *x = reinterpret_cast<const uint16_t *>(from);
    if (dtype == KVC_F16) {
        for (int i = 0; i < rows * lanes; ++i) to[i] = half_to_float(x[i]);
        return;
    }
    for (int r = 0; r < rows; r += 2, x += 2 * lanes, to += 2 * lanes)
        for (int l = 0; l < lanes; ++l) {
            to[l] = bf16_to_float(x[2 * l]);
            to[lanes + l] = bf16_to_float(x[2 * l + 1]);
        }
}
inline void expand_raw(const uint8_t *from, float *to, int lanes, int rows, int dtype) {
    expand_panel(from, to, rows, lanes, dtype);
}
inline void expand_raw_v(const uint8_t *from, float *to, int v_size, int dtype) {
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        expand_panel(from, to, kStrip, lanes, dtype);
        from += int64_t{kStrip} * lanes * 2;
        to += kStrip * lanes;
    }
}

#define KVC_ROW [&](int row, int l, vf code) __attribute__((always_inline))

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
template <int lanes, class F>
KVC_INLINE void each_int4_row(const uint8_t *panel, int rows, F use) {
    constexpr int width = lanes < W ? lanes : W;
    for (int r = 0; r < rows; r += 8)
        for (int l = 0; l < lanes; l += width) {
            const vi eight = vload_words<width>(panel + r / 2 * lanes + 4 * l);
            repeat<8>(KVC_LAMBDA(k) {
                use(r + k, l, to_float(vand(vright(eight, k % 4 * 8 + k / 4 * 4), 15)));
            });
        }
}

// Any quantised strip as floats, each part unless null; V stays rotated where the codec rotates it.
// A vector of the last 8 channels of V may write 8 floats more.
inline void expand_codec(const Layer &layer, int codec, const Strip &strip, float *keys,
                         float *values) {
    if (codec == kExceptions) {
        expand_exceptions(layer, strip, keys, values);
        return;
    }
    if (fitted(codec)) {
        if (keys != nullptr) expand_fitted_keys(layer, strip, keys);
        if (values != nullptr) expand_fitted_values(layer, strip, values);
        return;
    }
    const int k_size = layer.k_size, v_size = layer.v_size;
    const uint16_t *k_scale = k_scales(strip);
    if (keys != nullptr && codec == KVC_INT8) {
        vf scale[kStrip / W];
        for (int l = 0; l < kStrip; l += W)
            scale[l / W] = vload_half<W>(reinterpret_cast<const uint8_t *>(k_scale + l));
        each_int8_row<kStrip>(
            strip.k, k_size,
            KVC_ROW { vstore(keys + row * kStrip + l, vmul(code, scale[l / W])); });
    } else if (keys != nullptr) {
        each_int4_row<kStrip>(
            strip.k, k_size, KVC_ROW {
                const vf scale = vset(half_to_float(k_scale[row]));
                const vf zero = vset(half_to_float(k_scale[k_size + row]));
                vstore(keys + row * kStrip + l, vfma(code, scale, zero));
            });
    }
    if (values == nullptr) return;
    const uint16_t *v_scale = v_scales(layer, codec, strip);
    float scale[kStrip] = {};  // 0 where there is no token
    for (int t = 0; t < strip.count; ++t) scale[t] = half_to_float(v_scale[t]);
    const uint8_t *panel = strip.v;
    each_panel(v_size, [&](int, int, int lanes) {
        const auto int8_row = KVC_ROW {
            vstore(values + row * lanes + l, vmul(code, vset(scale[row])));
        };
        const auto int4_row = KVC_ROW {
            vstore(values + row * lanes + l, vmul(vsub(code, vset(7.5f)), vset(scale[row])));
        };
        if (codec == KVC_INT8 && lanes == 16) each_int8_row<16>(panel, kStrip, int8_row);
        if (codec == KVC_INT8 && lanes == 8) each_int8_row<8>(panel, kStrip, int8_row);
        if (codec == KVC_INT4 && lanes == 16) each_int4_row<16>(panel, kStrip, int4_row);
        if (codec == KVC_INT4 && lanes == 8) each_int4_row<8>(panel, kStrip, int4_row);
        panel += kStrip * lanes / (codec == KVC_INT8 ? 1 : 2);
        values += kStrip * lanes;
    });
}

// What codecs derive from the query of one token, and from the weights of a tile.
struct Prepared {
    float *k_scale, *k_middle;         // [kMaxHead]
    float *v_scale;                    // [kTile]
    int16_t *q_int8, *p_int8;          // [group][kMaxHead], [group][kTile]
    float *q_int8_step, *p_int8_step;  // [group]
    int8_t *q_int4, *p_int4;           // [group][kMaxHead], [group][kTile]
    float *q_step, *p_step;            // [group][kBlocks]
    float *q_shift, *p_shift;          // [group]
    bool has_int8;
#if defined(__AVX2__)
    FittedQuery fitted;
#endif

    template <class Arena>
    void take(Arena &arena, const Layer &layer) {
        const int64_t group = layer.group;
        const auto floats = [&](int64_t n) { return arena.template take<float>(n + 16); };
        k_scale = floats(kMaxHead);
        k_middle = floats(kMaxHead);
        v_scale = floats(kTile);
        q_int8 = arena.template take<int16_t>(group * kMaxHead + 16);
        p_int8 = arena.template take<int16_t>(group * kTile + 16);
        q_int8_step = floats(group);
        p_int8_step = floats(group);
        q_int4 = arena.template take<int8_t>(group * kMaxHead + 16);
        p_int4 = arena.template take<int8_t>(group * kTile + 16);
        q_step = floats(group * kMaxHead / 32);
        p_step = floats(group * kMaxHead / 32);
        q_shift = floats(group);
        p_shift = floats(group);
#if defined(__AVX2__)
        fitted.take(arena, group);
#endif
    }
    void begin() {
        has_int8 = false;
#if defined(__AVX2__)
        fitted.codec = -1;
#endif
    }
};

template <class S, int G>
void k_heads(const uint8_t *const *strip, int strips, int channels, const float *q, float *s,
             const uint8_t *const *ahead) {
    constexpr int NP = panels_at_once(G);
    int i = 0;
    for (; i + NP <= strips; i += NP)
        multiply_k<S, G, NP, kMaxHead, 1, true>(strip + i, channels, q, s + i * kStrip, ahead + i);
    for (; i < strips; ++i)
        multiply_k<S, G, 1, kMaxHead, 1, true>(strip + i, channels, q, s + i * kStrip, ahead + i);
}

template <class S, int G>
void v_heads(const uint8_t *const *strip, int strips, int v_size, const float *p,
             const float *decay, float *out, int64_t out_stride, const uint8_t *const *ahead) {
    constexpr int NP = panels_at_once(G), panel_bytes = kStrip * 16 * S::lane_bytes / S::rows;
    int c = 0;
    for (; c + 16 * NP <= v_size; c += 16 * NP)
        multiply_v<S, 16, G, NP, kTile, 1, true>(strip, strips, int64_t{c / 16} * panel_bytes, p,
                                                 decay, out + c, out_stride, ahead);
    for (; c + 16 <= v_size; c += 16)
        multiply_v<S, 16, G, 1, kTile, 1, true>(strip, strips, int64_t{c / 16} * panel_bytes, p,
                                                decay, out + c, out_stride, ahead);
    if (c < v_size)
        multiply_v<S, 8, G, 1, kTile, 1, true>(strip, strips, int64_t{c / 16} * panel_bytes, p,
                                               decay, out + c, out_stride, ahead);
}

// Calls use(std::integral_constant-like tag, first head) for runs of at most kMostHeads heads.
template <int N>
struct Heads {
    static constexpr int count = N;
};
template <class F>
KVC_INLINE void each_heads(int heads, F use) {
    const int runs = (heads + kMostHeads - 1) / kMostHeads;
    for (int first = 0, run = 0; run < runs; ++run) {
        const int size = (heads - first) / (runs - run);
        switch (size) {
            case 1:
                use(Heads<1>{}, first);
                break;
            case 2:
                use(Heads<2>{}, first);
                break;
            case 3:
                use(Heads<3>{}, first);
                break;
#if defined(__AVX2__) || defined(KVC_NEON)
            case 4:
                use(Heads<4>{}, first);
                break;
            case 5:
                use(Heads<5>{}, first);
                break;
            case 6:
                use(Heads<6>{}, first);
                break;
#endif
#if defined(__AVX512F__)
            case 7:
                use(Heads<7>{}, first);
                break;
            case 8:
                use(Heads<8>{}, first);
                break;
#endif
            default:
                __builtin_unreachable();
        }
        first += size;
    }
}

template <class S>
void float_scores(const uint8_t *const *strip, int strips, int channels, const float *q, int heads,
                  float *s, const uint8_t *const *ahead) {
    each_heads(heads, [&](auto run, int first) {
        k_heads<S, decltype(run)::count>(strip, strips, channels, q + first * kMaxHead,
                                         s + first * kTile, ahead);
    });
}
template <class S>
void float_values(const uint8_t *const *strip, int strips, int v_size, const float *p,
                  const float *decay, int heads, float *out, int64_t stride,
                  const uint8_t *const *ahead) {
    each_heads(heads, [&](auto run, int first) {
        v_heads<S, decltype(run)::count>(strip, strips, v_size, p + first * kTile, decay + first,
                                         out + first * stride, stride, ahead);
    });
}

#if defined(__AVX2__)

KVC_INLINE void load_halves(const uint16_t *from, int n, float *to) {
    int i = 0;
    for (; i + W <= n; i += W)
        vstore(to + i, vload_half<W>(reinterpret_cast<const uint8_t *>(from + i)));
    if (i < n) vstore(to + i, vload_half<8>(reinterpret_cast<const uint8_t *>(from + i)));
}

// Calls k(strips, heads) pieces of a K side: use(Heads, Panels, first strip, first head).
template <class F>
KVC_INLINE void each_k_run(int strips, int heads, F use) {
    each_heads(heads, [&](auto run, int head) {
        constexpr int NP = code_panels_at_once(decltype(run)::count);
        int i = 0;
        for (; i + NP <= strips; i += NP) use(run, Heads<NP>{}, i, head);
        for (; i < strips; ++i) use(run, Heads<1>{}, i, head);
    });
}
// The same of a V side: use(Heads, Panels, Lanes, first channel, first head).
template <class F>
KVC_INLINE void each_v_run(int v_size, int heads, F use) {
    each_heads(heads, [&](auto run, int head) {
        constexpr int NP = code_panels_at_once(decltype(run)::count);
        int c = 0;
        for (; c + 16 * NP <= v_size; c += 16 * NP) use(run, Heads<NP>{}, Heads<16>{}, c, head);
        for (; c + 16 <= v_size; c += 16) use(run, Heads<1>{}, Heads<16>{}, c, head);
        if (c < v_size) use(run, Heads<1>{}, Heads<8>{}, c, head);
    });
}

// V scales of a tile; 0 where there is no token, since what lies there may be NaN.
KVC_INLINE void load_v_scales(const Layer &layer, const Tile &tile, float *to) {
    for (int i = 0; i < tile.strips; ++i) {
        if (fitted(tile.codec)) {
            token_scales(tile.strip[i].scales, tile.strip[i].count, to + i * kStrip);
            continue;
        }
        load_halves(v_scales(layer, tile.codec, tile.strip[i]), kStrip, to + i * kStrip);
        for (int l = tile.strip[i].count; l < kStrip; ++l) to[i * kStrip + l] = 0;
    }
}

inline void int8_scores(const Layer &layer, const Tile &tile, Prepared &prepared, const float *q,
                        int group, float *s, const uint8_t *const *ahead) {
    if (!prepared.has_int8) {
        for (int g = 0; g < group; ++g)
            quantise_int16(q + g * kMaxHead, layer.k_size, prepared.q_int8 + g * kMaxHead,
                           prepared.q_int8_step[g]);
        prepared.has_int8 = true;
    }
    each_k_run(tile.strips, group, [&](auto heads, auto panels, int strip, int head) {
        int8_k<decltype(heads)::count, decltype(panels)::count>(
            tile.k + strip, layer.k_size, prepared.q_int8 + head * kMaxHead,
            s + head * kTile + strip * kStrip, ahead + strip);
    });
    for (int i = 0; i < tile.strips; ++i) {
        float scale[kStrip];
        load_halves(k_scales(tile.strip[i]), kStrip, scale);
        for (int g = 0; g < group; ++g) {
            const vf step = vset(prepared.q_int8_step[g]);
            float *at = s + g * kTile + i * kStrip;
            for (int l = 0; l < kStrip; l += W)
                vstore(at + l, vmul(vload(at + l), vmul(vload(scale + l), step)));
        }
    }
}

// Weights times V scales are codes relative to the tile's own largest: relative to anything
// larger, a sink token would round all others away.
inline void int8_values(const Layer &layer, const Tile &tile, Prepared &prepared, float *p,
                        const float *decay, int group, float *sums, const uint8_t *const *ahead) {
    const int n = tile.strips * kStrip;
    load_v_scales(layer, tile, prepared.v_scale);
    for (int g = 0; g < group; ++g) {
        float *own = p + g * kTile;
        for (int i = 0; i < n; i += W)
            vstore(own + i, vmul(vload(own + i), vload(prepared.v_scale + i)));
        quantise_int16(own, n, prepared.p_int8 + g * kTile, prepared.p_int8_step[g]);
    }
    each_v_run(layer.v_size, group,
               [&](auto heads, auto panels, auto lanes, int channel, int head) {
                   int8_v<decltype(lanes)::count, decltype(heads)::count, decltype(panels)::count>(
                       tile.v, tile.strips, int64_t{channel} * kStrip,
                       prepared.p_int8 + head * kTile, prepared.p_int8_step + head, decay + head,
                       sums + int64_t{head} * layer.v_padded + channel, layer.v_padded, ahead);
               });
}

// The scales of a group's channels go into the query, which becomes bytes anew for each group, with
// a step for every 32 channels. Codes count from their middle: 7.5 of each is moved to the shift,
// exactly for the query and as rounded for its bytes.
inline void int4_query(const Layer &layer, const uint16_t *scales, Prepared &prepared,
                       const float *q, int group) {
    const int size = layer.k_size, padded = (size + kBlock - 1) / kBlock * kBlock;
    float *scale = prepared.k_scale, *middle = prepared.k_middle;
    load_halves(scales, size, scale);
    load_halves(scales + size, size, middle);
    for (int c = size; c < padded; ++c) scale[c] = middle[c] = 0;
    for (int c = 0; c < padded; c += W)
        vstore(middle + c, vfma(vload(scale + c), vset(7.5f), vload(middle + c)));
    for (int g = 0; g < group; ++g) {
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
            const vf sum = quantise_block<false>(folded, prepared.q_int4 + g * kMaxHead + c, step);
            rounded = vfma(sum, vset(step), rounded);
            prepared.q_step[g * kBlocks + block] = step;
        }
        const vf shift = vfma(rounded, vset(-7.5f), vadd(even, odd));
        prepared.q_shift[g] = vhsum(shift);
    }
}

inline void int4_scores(const Layer &layer, const Tile &tile, Prepared &prepared, const float *q,
                        int group, float *s, const uint8_t *const *ahead) {
    for (int first = 0, end; first < tile.strips; first = end) {
        const uint8_t *own = tile.strip[first].scales;
        for (end = first + 1; end < tile.strips && tile.strip[end].scales == own;) ++end;
        int4_query(layer, k_scales(tile.strip[first]), prepared, q, group);
        each_k_run(end - first, group, [&](auto heads, auto panels, int strip, int head) {
            strip += first;
            int4_k<decltype(heads)::count, decltype(panels)::count>(
                tile.k + strip, layer.k_size, prepared.q_int4 + head * kMaxHead,
                prepared.q_step + head * kBlocks, prepared.q_shift + head,
                s + head * kTile + strip * kStrip, ahead + strip);
        });
    }
}

// Values in codes of `bits` bits, scaled by token.
template <int bits>
inline void code_values(const Layer &layer, const Tile &tile, Prepared &prepared, float *p,
                        const float *decay, int group, float *sums, const uint8_t *const *ahead) {
    const int n = tile.strips * kStrip;
    load_v_scales(layer, tile, prepared.v_scale);
    if (n % kBlock != 0) {  // the last block is half empty
        std::memset(prepared.v_scale + n, 0, sizeof(float) * kStrip);
        for (int g = 0; g < group; ++g) std::memset(p + g * kTile + n, 0, sizeof(float) * kStrip);
    }
    for (int g = 0; g < group; ++g) {
        vf shift = vzero();
        for (int first = 0, block = 0; first < n; first += kBlock, ++block) {
            vf x[kBlock / W];
            repeat<kBlock / W>(KVC_LAMBDA(i) {
                x[i] = vmul(vload(p + g * kTile + first + i * W),
                            vload(prepared.v_scale + first + i * W));
            });
            float step;
            const vf sum = quantise_block<true>(x, prepared.p_int4 + g * kTile + first, step);
            shift = vfma(sum, vset(step), shift);
            prepared.p_step[g * kBlocks + block] = step;
        }
        prepared.p_shift[g] = middle(bits) * vhsum(shift);
    }
    each_v_run(
        layer.v_size, group, [&](auto heads, auto panels, auto lanes, int channel, int head) {
            code_v<bits, decltype(lanes)::count, decltype(heads)::count, decltype(panels)::count>(
                tile.v, tile.strips, channel / 16 * code_panel_bytes(bits, 16),
                prepared.p_int4 + head * kTile, prepared.p_step + head * kBlocks,
                prepared.p_shift + head, decay + head,
                sums + int64_t{head} * layer.v_padded + channel, layer.v_padded, ahead);
        });
}

// Keys of fitted codecs: all strips at once where they are coded as they are, else one by one.
inline void fitted_scores(const Layer &layer, const Tile &tile, Prepared &prepared, const float *q,
                          int group, float *s, const uint8_t *const *ahead) {
    const kvc_table &table = *layer.table(tile.codec);
    FittedQuery &query = prepared.fitted;
    const int step = table.local ? 1 : tile.strips;
    for (int first = 0; first < tile.strips; first += step) {
        fitted_query(layer, tile.strip[first], q, group, query);
        each_k_run(step, group, [&](auto heads, auto panels, int strip, int head) {
            strip += first;
            fitted_k<decltype(heads)::count, decltype(panels)::count>(
                tile.k + strip, table.heads[tile.strip[first].head],
                query.code + head * FittedQuery::kStride, query.step + head * kMostBlocks,
                query.shift + head, s + head * kTile + strip * kStrip, ahead + strip);
        });
    }
}

#endif

// Bits of the values of a tile in codes.
KVC_INLINE int code_bits(const Layer &layer, const Tile &tile) {
    return tile.codec == KVC_INT4 ? 4 : head_table(layer, tile.codec, tile.strip[0].head).v_bits;
}

// s[g][token] of a tile for one query token, while the next tile comes from memory.
inline void tile_scores(const Layer &layer, const Tile &tile, const Tile &next, Prepared &prepared,
                        const float *q, int group, float *s, float *keys) {
    const uint8_t *ahead[kTileStrips];
    for (int i = 0; i < tile.strips; ++i) ahead[i] = i < next.strips ? next.k[i] : tile.k[i];

    if (tile.codec <= KVC_EXACT) {
        switch (layer.dtype) {
            case KVC_F32:
                float_scores<F32>(tile.k, tile.strips, layer.k_size, q, group, s, ahead);
                break;
            case KVC_BF16:
                float_scores<BF16>(tile.k, tile.strips, layer.k_size, q, group, s, ahead);
                break;
            default:
                float_scores<F16>(tile.k, tile.strips, layer.k_size, q, group, s, ahead);
        }
        return;
    }
#if defined(__AVX2__)
    if (tile.codec != kExceptions) {
        if (tile.codec == KVC_INT8)
            int8_scores(layer, tile, prepared, q, group, s, ahead);
        else if (tile.codec == KVC_INT4)
            int4_scores(layer, tile, prepared, q, group, s, ahead);
        else
            fitted_scores(layer, tile, prepared, q, group, s, ahead);
        return;
    }
#endif
    (void)prepared;
    const uint8_t *expanded[kTileStrips];
    for (int i = 0; i < tile.strips; ++i) {
        float *at = keys + i * kStrip * layer.k_size;
        expand_codec(layer, tile.codec, tile.strip[i], at, nullptr);
        expanded[i] = reinterpret_cast<const uint8_t *>(at);
    }
    float_scores<F32>(expanded, tile.strips, layer.k_size, q, group, s, expanded);
}

// sums[g][channel] = sums * decay + weights times V, likewise. Overwrites p.
inline void tile_values(const Layer &layer, const Tile &tile, const Tile &next, Prepared &prepared,
                        float *p, const float *decay, int group, float *sums, float *values) {
    const uint8_t *ahead[kTileStrips];
    for (int i = 0; i < tile.strips; ++i) ahead[i] = i < next.strips ? next.v[i] : tile.v[i];
    if (tile.codec <= KVC_EXACT) {
        const int n = tile.strips, size = layer.v_size, stride = layer.v_padded;
        switch (layer.dtype) {
            case KVC_F32:
                float_values<F32>(tile.v, n, size, p, decay, group, sums, stride, ahead);
                break;
            case KVC_BF16:
                float_values<BF16>(tile.v, n, size, p, decay, group, sums, stride, ahead);
                break;
            default:
                float_values<F16>(tile.v, n, size, p, decay, group, sums, stride, ahead);
        }
        return;
    }
#if defined(__AVX2__)
    if (tile.codec == KVC_INT8) {
        int8_values(layer, tile, prepared, p, decay, group, sums, ahead);
        return;
    }
    if (tile.codec != kExceptions) {
        const int bits = code_bits(layer, tile);
        if (bits == 4)
            code_values<4>(layer, tile, prepared, p, decay, group, sums, ahead);
        else if (bits == 3)
            code_values<3>(layer, tile, prepared, p, decay, group, sums, ahead);
        else
            code_values<2>(layer, tile, prepared, p, decay, group, sums, ahead);
        return;
    }
#endif
    (void)prepared;
    const uint8_t *expanded[kTileStrips];
    for (int i = 0; i < tile.strips; ++i) {
        float *at = values + int64_t{i} * kStrip * layer.v_size;
        expand_codec(layer, tile.codec, tile.strip[i], nullptr, at);
        expanded[i] = reinterpret_cast<const uint8_t *>(at);
    }
    float_values<F32>(expanded, tile.strips, layer.v_size, p, decay, group, sums, layer.v_padded,
                      expanded);
}

// The same for kItemPad query rows side by side, q[row block][channel][row], over float32 strips.
inline void block_scores(const Tile &tile, const float *q, int rows, int channels, float *s) {
    constexpr int NP = kItemPanels;
    int i = 0;
    for (; i + NP <= tile.strips; i += NP)
        for (int r = 0; r < rows; r += kItemPad)
            multiply_k<F32, kItemPad, NP, 1, kItemPad, false>(tile.k + i, channels,
                                                              q + int64_t{r} * channels,
                                                              s + r * kTile + i * kStrip, nullptr);
    for (; i < tile.strips; ++i)
        for (int r = 0; r < rows; r += kItemPad)
            multiply_k<F32, kItemPad, 1, 1, kItemPad, false>(tile.k + i, channels,
                                                             q + int64_t{r} * channels,
                                                             s + r * kTile + i * kStrip, nullptr);
}
inline void block_values(const Tile &tile, const float *p, int rows, int v_size, const float *decay,
                         float *sums, int64_t stride) {
    constexpr int NP = kItemPanels, panel_bytes = kStrip * 16 * 4;
    int c = 0;
    for (; c + 16 * NP <= v_size; c += 16 * NP)
        for (int r = 0; r < rows; r += kItemPad)
            multiply_v<F32, 16, kItemPad, NP, kTile, 1, false>(
                tile.v, tile.strips, int64_t{c / 16} * panel_bytes, p + r * kTile, decay + r,
                sums + r * stride + c, stride, nullptr);
    for (; c + 16 <= v_size; c += 16)
        for (int r = 0; r < rows; r += kItemPad)
            multiply_v<F32, 16, kItemPad, 1, kTile, 1, false>(
                tile.v, tile.strips, int64_t{c / 16} * panel_bytes, p + r * kTile, decay + r,
                sums + r * stride + c, stride, nullptr);
    if (c < v_size)
        for (int r = 0; r < rows; r += kItemPad)
            multiply_v<F32, 8, kItemPad, 1, kTile, 1, false>(
                tile.v, tile.strips, int64_t{c / 16} * panel_bytes, p + r * kTile, decay + r,
                sums + r * stride + c, stride, nullptr);
}

}  // namespace kvc::KVC_NAMESPACE
