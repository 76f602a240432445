// Products over quantised panels in integers.
//
//   int8   codes times weights of 16 bits; sums stay within 32: 256 rows * 127 * 32767 < 2^31
//   int4   codes times weights of 8 bits, whose step is chosen anew for every block of 32 rows: an
//          eighth of the format's own error at most, and sums of 8 products fit 16 bits
#pragma once

#include "panel.h"

#if defined(__AVX2__)

namespace kvc::KVC_NAMESPACE {

constexpr int kBlock = 32;  // rows of int4 that share a step
constexpr int kBlocks = kMaxHead / kBlock;

KVC_INLINE vi broadcast_word(const void *p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return ivset(word);
}

// ------------------------------------------------------------------------------------ int8

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

// ------------------------------------------------------------------------------------ int4

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

}  // namespace kvc::KVC_NAMESPACE

#endif
