// Codes of 2 to 4 bits, four to a byte of each word: how they are stored, expanded and multiplied.
#pragma once

#include "kernels/rotation.h"
#include "kernels/strips.h"

namespace kvc::KVC_NAMESPACE {

// Middle of the codes of a field. Times the fields' weights, sums over pieces to the middle of the
// codes of a component.
KVC_INLINE float middle(int bits) {
    return 0.5f * static_cast<float>((1 << bits) - 1);
}

// Rows of a panel of 4-bit codes as floats: use(row, first lane, codes) for each vector of lanes.
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

// Codes of a strip of rotated V, which `level` gives for channel and lane, into panels of 4 bits.
template <class F>
void store_nibbles(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        const int lanes = panel_lanes(v_size, c / 16);
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint8_t *to = v + c / 16 * 8 * kStrip + c % 16 * 4;
        for (int t = 0; t < kStrip; t += 8, to += 4 * lanes) {
            // Four codes and the four after them become the halves of four bytes.
            uint64_t low, high;
            std::memcpy(&low, code + t, 8);
            std::memcpy(&high, code + t + 4, 8);
            uint64_t bytes = low | high << 4;
            bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
            const uint32_t word = static_cast<uint32_t>(bytes | bytes >> 16);
            std::memcpy(to, &word, 4);
        }
    }
}

// The same of 2 bits.
template <class F>
void store_pairs(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint32_t word = 0;
        for (int t = 0; t < kStrip; ++t) word |= uint32_t{code[t]} << (8 * (t % 4) + 2 * (t / 4));
        std::memcpy(v + c / 16 * 4 * kStrip + c % 16 * 4, &word, 4);
    }
}

// The same of 3 bits.
template <class F>
void store_triples(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint8_t *panel = v + c / 16 * code_panel_bytes(3, 16);
        uint8_t *shared = panel + 4 * panel_lanes(v_size, c / 16) + c % 8 * 4;
        uint32_t low = 0, high = 0;
        if (c % 16 >= 8) std::memcpy(&high, shared, 4);
        for (int t = 0; t < kStrip; ++t) {
            low |= uint32_t{code[t]} % 4 << (8 * (t % 4) + 2 * (t / 4));
            high |= uint32_t{code[t]} / 4 << (8 * (t % 4) + c % 16 / 8 * 4 + t / 4);
        }
        std::memcpy(panel + c % 16 * 4, &low, 4);
        std::memcpy(shared, &high, 4);
    }
}

// Grids of 16 rows [size][16 tokens] in codes around 0, scale * (code - middle): for each token the
// best of a few clipping points, its scale then fitted by least squares; and what to multiply by.
template <int bits>
void fit_tokens(const float *turned, int size, uint16_t *scale, float *inverses) {
    constexpr float kClips[] = {1.0f, 0.88f, 0.76f, 0.66f};
    constexpr int N = kStrip / W;
    const float centre = middle(bits);
    alignas(64) float best[kStrip] = {}, gain[kStrip] = {}, peaks[kStrip];
    for (int l = 0; l < kStrip; l += W) {
        vf peak = vzero();
        for (int c = 0; c < size; ++c) peak = vmax(vabs(vload(turned + c * kStrip + l)), peak);
        vstore(peaks + l, peak);
    }
    for (const float clip : kClips) {
        for (int t = 0; t < kStrip; ++t)
            inverses[t] = peaks[t] > 1e-30f ? centre / (peaks[t] * clip) : 0.0f;
        vf dot[N], norm[N], inverse[N];
        repeat<N>(KVC_LAMBDA(i) {
            dot[i] = norm[i] = vzero();
            inverse[i] = vload(inverses + i * W);
        });
        for (int c = 0; c < size; ++c)
            repeat<N>(KVC_LAMBDA(i) {
                const vf y = vload(turned + c * kStrip + i * W);
                const vf code = vround(vclamp(vfma(y, inverse[i], vset(centre)), 0, 2 * centre));
                const vf level = vsub(code, vset(centre));
                dot[i] = vfma(y, level, dot[i]);
                norm[i] = vfma(level, level, norm[i]);
            });
        alignas(64) float dots[kStrip], norms[kStrip];
        repeat<N>(KVC_LAMBDA(i) {
            vstore(dots + i * W, dot[i]);
            vstore(norms + i * W, norm[i]);
        });
        for (int t = 0; t < kStrip; ++t) {
            // What least squares takes off the squared error.
            const float gained = dots[t] / norms[t] * dots[t];
            if (gained > gain[t]) gain[t] = gained, best[t] = dots[t] / norms[t];
        }
    }
    for (int t = 0; t < kStrip; ++t) {
        scale[t] = float_to_half(least(best[t], kHalfMax));
        const float rounded = half_to_float(scale[t]);
        inverses[t] = rounded > 0 ? 1 / rounded : 0;
    }
}

// Codes of a vector of numbers on these grids.
template <int bits>
KVC_INLINE vf token_level(const float *y, const float *inverse) {
    const float centre = middle(bits);
    return vclamp(vadd(vmul(vload(y), vload(inverse)), vset(centre)), 0, 2 * centre);
}

#if defined(KVC_INTEGER_PRODUCTS)

constexpr int kBlock = 32;  // rows that share a step
constexpr int kBlocks = kMaxHead / kBlock;

// Before rounding, every weight of a block gets another part of a step: those too small to count
// one by one still count together.
alignas(64) inline constexpr float kDither[kBlock] = {
    -.484375f, .015625f, -.234375f, .265625f, -.359375f, .140625f, -.109375f, .390625f,
    -.421875f, .078125f, -.171875f, .328125f, -.296875f, .203125f, -.046875f, .453125f,
    -.453125f, .046875f, -.203125f, .296875f, -.328125f, .171875f, -.078125f, .421875f,
    -.390625f, .109375f, -.140625f, .359375f, -.265625f, .234375f, -.015625f, .484375f};

// Codes of a block of weights relative to its largest, and their step; the result adds up to the
// sum of the codes.
template <bool dither>
KVC_INLINE vf quantise_block(vf (&x)[kBlock / W], int8_t *code, float &step) {
    vf peak = vabs(x[0]);
    repeat<kBlock / W>(KVC_LAMBDA(i) { peak = vmax(peak, vabs(x[i])); });
    const float largest = vhmax(peak);
    const bool any = largest > 1e-30f;  // below, the inverse would overflow
    // 126.5: dither must not carry the largest beyond 127.
    step = any ? largest * (1 / 126.5f) : 0.0f;
    const vf inverse = vset(any ? 126.5f / largest : 0.0f);
    repeat<kBlock / W>(KVC_LAMBDA(i) {
        x[i] = dither ? vfma(x[i], inverse, vload(kDither + i * W)) : vmul(x[i], inverse);
    });
    return store_block(code, x);
}

// Adds eight rows of NP panels, whose bytes start at panel[j] + at, to sums of bytes.
template <int lanes, int G, int NP, int stride>
KVC_INLINE void multiply_eight(vi (&sum)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                               int64_t at, const int8_t *w) {
    constexpr int NV = vectors(lanes), N = NP * NV, width = lanes < W ? lanes : W;
    // As many vectors of codes at a time as fit beside the sums.
    constexpr int M = W == 8 && G * N > 8 ? 1 : N;
    repeat<N / M>(KVC_LAMBDA(part) {
        vi x[M], y[M];
        repeat<M>(KVC_LAMBDA(i) {
            const int v = part * M + i;
            load_nibbles<width>(panel[v / NV] + at + v % NV * 4 * W, x[i], y[i]);
        });
        repeat<G>(KVC_LAMBDA(g) {
            const vi low = broadcast_word(w + g * stride);
            repeat<M>(KVC_LAMBDA(i) { dot_bytes(sum[g][part * M + i], x[i], low); });
            const vi high = broadcast_word(w + g * stride + 4);
            repeat<M>(KVC_LAMBDA(i) { dot_bytes(sum[g][part * M + i], y[i], high); });
        });
    });
}

// Adds a strip of NP panels of V codes to sums of bytes.
template <int bits, int lanes, int G, int NP, int stride>
KVC_INLINE void multiply_strip(vi (&sum)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                               const int8_t *w) {
    if constexpr (bits == 4) {
        multiply_eight<lanes, G, NP, stride>(sum, panel, 0, w);
        multiply_eight<lanes, G, NP, stride>(sum, panel, 4 * lanes, w + 8);
    } else {
        constexpr int NV = vectors(lanes), N = NP * NV, width = lanes < W ? lanes : W;
        repeat<N>(KVC_LAMBDA(v) {
            vi x[4];
            if constexpr (bits == 3)
                load_triples<lanes>(panel[v / NV], v % NV, x);
            else
                load_pairs<width>(panel[v / NV] + v % NV * 4 * W, x);
            repeat<G>(KVC_LAMBDA(g) {
                repeat<4>(KVC_LAMBDA(k) {
                    dot_bytes(sum[g][v], x[k], broadcast_word(w + g * stride + 4 * k));
                });
            });
        });
    }
}

// out[g * out_stride + lane] = out * decay[g] + sums - shift[g].
template <int bits, int lanes, int G, int NP>
KVC_APART void code_v(const uint8_t *const *strip, int strips, int64_t offset, const int8_t *p,
                      const float *step, const float *shift, const float *decay, float *out,
                      int64_t out_stride, const uint8_t *const *next) {
    constexpr int N = NP * vectors(lanes), panel_bytes = code_panel_bytes(bits, lanes);
    vf acc[G][N];
    repeat<G>(KVC_LAMBDA(g) {
        const vf start = vset(-shift[g]), old = vset(decay[g]);
        repeat<N>(
            KVC_LAMBDA(v) { acc[g][v] = vfma(vload(out + g * out_stride + v * W), old, start); });
    });
    for (int i = 0; i < strips; i += 2, ++step) {
        vi sum[G][N];
        repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { sum[g][v] = ivzero(); }); });
        for (int k = i; k < least(strips, i + 2); ++k) {
            const uint8_t *panel[NP], *ahead[NP];
            repeat<NP>(KVC_LAMBDA(j) {
                panel[j] = strip[k] + offset + j * panel_bytes;
                ahead[j] = next[k] + offset + j * panel_bytes;
                prefetch(ahead[j]);
                if constexpr (panel_bytes > 64) prefetch(ahead[j] + 64);
            });
            multiply_strip<bits, lanes, G, NP, kTile>(sum, panel, p + k * kStrip);
        }
        repeat<G>(KVC_LAMBDA(g) {
            const vf factor = vset(step[g * kBlocks]);
            repeat<N>(
                KVC_LAMBDA(v) { acc[g][v] = vfma(bytes_total(sum[g][v]), factor, acc[g][v]); });
        });
    }
    repeat<G>(KVC_LAMBDA(g) {
        repeat<N>(KVC_LAMBDA(v) { vstore(out + g * out_stride + v * W, acc[g][v]); });
    });
}

// Weights of a tile's tokens as bytes, with what their scales bring.
struct CodeWeights {
    float *scale;  // [kTile] of V
    int8_t *code;  // [group][kTile]
    float *step;   // [group][kBlocks]
    float *shift;  // [group]

    template <class Arena>
    void take(Arena &arena, int64_t group) {
        scale = arena.template take<float>(kTile + 16);
        code = arena.template take<int8_t>(group * kTile + 16);
        step = arena.template take<float>(group * kBlocks + 16);
        shift = arena.template take<float>(group + 16);
    }
};

// sums[g][channel] = sums * decay + weights times values in codes of `bits` bits, whose tokens'
// scales are weights.scale. Overwrites p.
template <int bits>
inline void code_values(const Pass &pass, CodeWeights &weights, float *p, const float *decay,
                        float *sums) {
    const Layer &layer = pass.layer;
    const Tile &tile = pass.tile;
    const int n = tile.strips * kStrip, group = layer.group;
    if (n % kBlock != 0) {  // the last block is half empty
        std::memset(weights.scale + n, 0, sizeof(float) * kStrip);
        for (int g = 0; g < group; ++g) std::memset(p + g * kTile + n, 0, sizeof(float) * kStrip);
    }
    for (int g = 0; g < group; ++g) {
        vf shift = vzero();
        for (int first = 0, block = 0; first < n; first += kBlock, ++block) {
            vf x[kBlock / W];
            repeat<kBlock / W>(KVC_LAMBDA(i) {
                x[i] = vmul(vload(p + g * kTile + first + i * W),
                            vload(weights.scale + first + i * W));
            });
            float step;
            const vf sum = quantise_block<true>(x, weights.code + g * kTile + first, step);
            shift = vfma(sum, vset(step), shift);
            weights.step[g * kBlocks + block] = step;
        }
        weights.shift[g] = middle(bits) * vhsum(shift);
    }
    each_v_run(
        layer.v_size, group, [&](auto heads, auto panels, auto lanes, int channel, int head) {
            code_v<bits, decltype(lanes)::count, decltype(heads)::count, decltype(panels)::count>(
                tile.v, tile.strips, channel / 16 * code_panel_bytes(bits, 16),
                weights.code + head * kTile, weights.step + head * kBlocks, weights.shift + head,
                decay + head, sums + int64_t{head} * layer.v_padded + channel, layer.v_padded,
                pass.ahead);
        });
}

#endif

}  // namespace kvc::KVC_NAMESPACE
