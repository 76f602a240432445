// Float products over panels: out[g][lane] = sum over rows r of panel[r][lane] * weight(g, r).
// The same loop serves q.K (lanes are tokens, rows channels) and p.V (lanes are channels, rows
// tokens).
#pragma once

#include "layout.h"
#include "simd/simd.h"

namespace kvc::KVC_NAMESPACE {

constexpr int kTile = 128;  // tokens between two updates of a softmax
constexpr int kTileStrips = kTile / kStrip;

// Into the second-level cache: more of these can be under way at once than of those into the first.
KVC_INLINE void prefetch(const void *p) {
    __builtin_prefetch(p, 0, 2);
}

// How a panel of floats is stored. A step is what one vector of 32-bit words holds: `rows` rows.
struct F32 {
    static constexpr int rows = 1, lane_bytes = 4;
    template <int lanes, int row>
    static KVC_INLINE vf load(const uint8_t *p) {
        return vload_lanes<lanes>(reinterpret_cast<const float *>(p));
    }
};
struct BF16 {
    static constexpr int rows = 2, lane_bytes = 4;
    template <int lanes, int row>
    static KVC_INLINE vf load(const uint8_t *p) {
        return vload_bf16_pairs<lanes, row>(p);
    }
};
struct F16 {
    static constexpr int rows = 1, lane_bytes = 2;
    template <int lanes, int row>
    static KVC_INLINE vf load(const uint8_t *p) {
        return vload_half<lanes>(p);
    }
};

// Lanes of panel `panel` of a strip of V.
KVC_INLINE int panel_lanes(int v_size, int panel) {
    return v_size - panel * 16 >= 16 ? 16 : 8;
}

constexpr int vectors(int lanes) {
    return lanes < W ? 1 : lanes / W;
}

// Calls use(0) ... use(N - 1) with constants: loops that must leave no trace, since accumulators
// that GCC takes for an array in memory cost more than the arithmetic.
template <int I>
struct Constant {
    constexpr operator int() const {
        return I;
    }
};
template <int N, int I = 0, class F>
KVC_INLINE void repeat(F &&use) {
    if constexpr (I < N) {
        use(Constant<I>{});
        repeat<N, I + 1>(use);
    }
}
#define KVC_LAMBDA(argument) [&](auto argument) __attribute__((always_inline))

// Adds one row of NP panels to G accumulators each; weight(g) is at w[g * GS].
template <class S, int row, int lanes, int G, int NP, int GS>
KVC_INLINE void multiply_row(vf (&acc)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                             int64_t at, const float *w) {
    constexpr int NV = vectors(lanes), N = NP * NV, width = lanes < W ? lanes : W;
    // Whichever of the two fits beside the accumulators stays in registers.
    if constexpr (G <= 3) {
        vf b[G];
        repeat<G>(KVC_LAMBDA(g) { b[g] = vbroadcast(w + g * GS); });
        repeat<N>(KVC_LAMBDA(v) {
            const vf x =
                S::template load<width, row>(panel[v / NV] + at + v % NV * W * S::lane_bytes);
            repeat<G>(KVC_LAMBDA(g) { vaccumulate(acc[g][v], x, b[g]); });
        });
    } else {
        vf x[N];
        repeat<N>(KVC_LAMBDA(v) {
            x[v] = S::template load<width, row>(panel[v / NV] + at + v % NV * W * S::lane_bytes);
        });
        repeat<G>(KVC_LAMBDA(g) {
            const vf b = vbroadcast(w + g * GS);
            repeat<N>(KVC_LAMBDA(v) { vaccumulate(acc[g][v], x[v], b); });
        });
    }
}

// Adds `rows` rows of NP panels to G accumulators each. weight(g, r) is at w[g * GS + r * RS].
// Where `ahead` is given, prefetches for each panel as much as it reads, from there on.
template <class S, int lanes, int G, int NP, int GS, int RS, bool fetch>
KVC_INLINE void multiply(vf (&acc)[G][NP * vectors(lanes)], const uint8_t *const (&panel)[NP],
                         int rows, const float *w, const uint8_t *const (&ahead)[NP]) {
    constexpr int step = lanes * S::lane_bytes;
    // A turn takes a cache line of each panel: head sizes are multiples of 8, strips of 16.
    constexpr int steps = step < 64 ? 64 / step : 1;
    const int64_t bytes = int64_t{rows} / S::rows * step;
    for (int64_t at = 0; at < bytes; at += steps * step, w += steps * S::rows * RS) {
        if constexpr (fetch) repeat<NP>(KVC_LAMBDA(j) { prefetch(ahead[j] + at); });
        repeat<steps>(KVC_LAMBDA(i) {
            const float *own = w + i * S::rows * RS;
            multiply_row<S, 0, lanes, G, NP, GS>(acc, panel, at + i * step, own);
            if constexpr (S::rows == 2)
                multiply_row<S, 1, lanes, G, NP, GS>(acc, panel, at + i * step, own + RS);
        });
    }
}

// Scores of NP K strips: s[g * kTile + 16 * j + lane].
template <class S, int G, int NP, int GS, int RS, bool fetch>
KVC_APART void multiply_k(const uint8_t *const *strip, int channels, const float *q, float *s,
                          const uint8_t *const *next) {
    constexpr int N = NP * vectors(kStrip);
    vf acc[G][N];
    const uint8_t *panel[NP], *ahead[NP];
    repeat<NP>(KVC_LAMBDA(j) { panel[j] = strip[j], ahead[j] = fetch ? next[j] : nullptr; });
    repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { acc[g][v] = vzero(); }); });
    multiply<S, kStrip, G, NP, GS, RS, fetch>(acc, panel, channels, q, ahead);
    repeat<G>(
        KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { vstore(s + g * kTile + v * W, acc[g][v]); }); });
}

// Adds NP panels of channels, over `strips` V strips, to out[g * out_stride + lane] times decay[g].
template <class S, int lanes, int G, int NP, int GS, int RS, bool fetch>
KVC_APART void multiply_v(const uint8_t *const *strip, int strips, int64_t offset, const float *p,
                          const float *decay, float *out, int64_t out_stride,
                          const uint8_t *const *next) {
    constexpr int N = NP * vectors(lanes);
    constexpr int panel_bytes = kStrip / S::rows * lanes * S::lane_bytes;
    vf acc[G][N];
    repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { acc[g][v] = vzero(); }); });
    for (int i = 0; i < strips; ++i) {
        const uint8_t *panel[NP], *ahead[NP];
        repeat<NP>(KVC_LAMBDA(j) {
            panel[j] = strip[i] + offset + j * panel_bytes;
            ahead[j] = fetch ? next[i] + offset + j * panel_bytes : nullptr;
        });
        multiply<S, lanes, G, NP, GS, RS, fetch>(acc, panel, kStrip, p + i * kStrip * RS, ahead);
    }
    repeat<G>(KVC_LAMBDA(g) {
        const vf old = vset(decay[g]);
        repeat<N>(KVC_LAMBDA(v) {
            float *at = out + g * out_stride + v * W;
            vstore(at, vfma(vload(at), old, acc[g][v]));
        });
    });
}

}  // namespace kvc::KVC_NAMESPACE
