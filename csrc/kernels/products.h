// Products over the strips of a tile, for any number of query rows, in the pieces that kernels of
// panels take.
#pragma once

#include "kernels/tiles.h"

namespace kvc::KVC_NAMESPACE {

// Rows of a panel of codes as floats, in a lambda: which row, the first lane, the codes.
#define KVC_ROW [&](int row, int l, vf code) __attribute__((always_inline))

// Calls use(lanes) for every panel of V.
template <class F>
KVC_INLINE void each_panel(int v_size, F use) {
    for (int c = 0; c < v_size; c += 16) use(panel_lanes(v_size, c / 16));
}

// n floats (a multiple of 8) of 16 bits.
KVC_INLINE void load_halves(const uint8_t *from, int n, float *to) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(to + i, vload_half<W>(from + 2 * i));
    if constexpr (W > 8)  // or GCC warns of what is never left
        if (i < n) vstore(to + i, vload_half<8>(from + 2 * i));
}
// Those of a strip's tokens; 0 where there is no token, since what lies there may be NaN.
KVC_INLINE void token_halves(const uint8_t *from, int count, float *to) {
    load_halves(from, kStrip, to);
    for (int l = count; l < kStrip; ++l) to[l] = 0;
}

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

// Calls use(Heads<count>, first head) for runs of at most kMostHeads heads.
template <int N>
struct Heads {
    static constexpr int count = N;
};
template <class F>
KVC_INLINE void each_heads(int heads, F use) {
    const int runs = (heads + kMostHeads - 1) / kMostHeads;
    for (int first = 0, run = 0; run < runs; ++run) {
        const int size = (heads - first) / (runs - run);
        repeat<kMostHeads>(KVC_LAMBDA(before) {
            if (size == before + 1) use(Heads<before + 1>{}, first);
        });
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

#if defined(KVC_INTEGER_PRODUCTS)

// Calls use(Heads, Panels, first strip, first head) for the pieces of a K side.
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

KVC_INLINE vi broadcast_word(const void *p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return ivset(word);
}

#endif

}  // namespace kvc::KVC_NAMESPACE
