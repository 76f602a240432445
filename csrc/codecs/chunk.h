// What codecs share whose pages are one chunk: keys as codes in panels of 16 channels, and numbers
// at the page's start that all of its tokens share.
#pragma once

#include "kernels/codes.h"

namespace kvc::KVC_NAMESPACE {

// Calls use(first strip, end) for the runs of strips of a tile that lie in one page.
template <class F>
KVC_INLINE void each_page(const Tile &tile, F use) {
    for (int first = 0, end; first < tile.strips; first = end) {
        const uint8_t *page = tile.strip[first].page;
        for (end = first + 1; end < tile.strips && tile.strip[end].page == page;) ++end;
        use(first, end);
    }
}

// n float16 numbers, and zeros up to a multiple of 16; `to` has room for 16 more.
KVC_INLINE void load_row(const uint8_t *from, int n, float *to) {
    float *const end = to + most(n, 0);  // GCC warns of what a negative size would do
    for (int l = 0; l < 16; l += W) vstore(end + l, vzero());
    load_halves(from, n, to);
    if (n % W != 0)
        for (int l = 0; l < 8; ++l) end[l] = 0;
}

KVC_INLINE uint16_t saturated_half(float x) {
    return float_to_half(clamp(x, -kHalfMax, kHalfMax));
}

// sum over channels of a row (a multiple of 8; zeros up to one of 16) times another.
KVC_INLINE float dot_row(const float *x, const float *y, int size) {
    vf sum = vzero();
    for (int c = 0; c < size; c += W) sum = vfma(vload(x + c), vload(y + c), sum);
    return vhsum(sum);
}

// ------------------------------------------------------------------------------------ codes

// Codes of a strip of K, which `level` gives for channel and first lane, as panels.
template <int bits, class F>
void store_key_codes(int k_size, uint8_t *k, F level) {
    for (int first = 0; first < k_size; first += 16, k += code_panel_bytes(bits, 16)) {
        const int rows = least(16, k_size - first);
        alignas(64) int32_t high[kStrip];
        for (int l = 0; l < kStrip; l += W) {
            vi word[2] = {to_int(vzero()), to_int(vzero())};
            for (int r = 0; r < rows; ++r) {
                const vi code = to_int(level(first + r, l));
                if constexpr (bits == 4) {
                    word[r / 8] = vor(word[r / 8], vleft(code, r % 4 * 8 + r % 8 / 4 * 4));
                } else {
                    word[0] = vor(word[0], vleft(vand(code, 3), r % 4 * 8 + r / 4 * 2));
                    word[1] = vor(word[1], vleft(vright(code, 2), r % 4 * 8 + r / 4));
                }
            }
            vstore_words(k + 4 * l, word[0]);
            if constexpr (bits == 4) vstore_words(k + 4 * kStrip + 4 * l, word[1]);
            if constexpr (bits == 3) vstore_words(high + l, word[1]);
        }
        for (int l = 0; l < 8 && bits == 3; ++l) {
            const int32_t both = high[l] | high[l + 8] << 4;
            std::memcpy(k + 4 * kStrip + 4 * l, &both, 4);
        }
    }
}

// Codes of a strip of V, which `level` gives for channel and first lane, a token.
template <int bits, class F>
void store_value_codes(int v_size, uint8_t *v, F level) {
    if constexpr (bits == 4)
        store_nibbles(v_size, v, level);
    else if constexpr (bits == 3)
        store_triples(v_size, v, level);
    else
        store_pairs(v_size, v, level);
}

// The third bits of codes of a panel: bit 8 * (row % 4) + row / 4 of each lane's word.
KVC_INLINE void third_bits(const uint8_t *panel, int lanes, uint32_t (&to)[kStrip]) {
    std::memcpy(to, panel + 4 * lanes, 32);
    for (int l = 0; l < 8; ++l) to[8 + l] = to[l] >> 4;
}

// A row's codes of `width` lanes from l on; `high` of 3 bits.
template <int bits, int width>
KVC_INLINE vf row_codes(const uint8_t *panel, int lanes, int r, int l, const uint32_t *high) {
    if constexpr (bits == 4) {
        const vi word = vload_words<width>(panel + (r / 8 * lanes + l) * 4);
        return to_float(vand(vright(word, r % 4 * 8 + r % 8 / 4 * 4), 15));
    }
    vf code = to_float(vand(vright(vload_words<width>(panel + l * 4), r % 4 * 8 + r / 4 * 2), 3));
    if constexpr (bits == 3) {
        const vi top = vload_words<W>(reinterpret_cast<const uint8_t *>(high + l));
        code = vfma(to_float(vand(vright(top, r % 4 * 8 + r / 4), 1)), vset(4), code);
    }
    return code;
}

// Rows of a strip of K in codes: use(channel, first lane, codes) for each vector of lanes.
template <int bits, class F>
KVC_INLINE void each_key_row(const uint8_t *k, int k_size, F use) {
    for (int first = 0; first < k_size; first += 16, k += code_panel_bytes(bits, 16)) {
        alignas(64) uint32_t high[kStrip];
        if constexpr (bits == 3) third_bits(k, kStrip, high);
        for (int r = 0; r < least(16, k_size - first); ++r)
            for (int l = 0; l < kStrip; l += W)
                use(first + r, l, row_codes<bits, W>(k, kStrip, r, l, high));
    }
}

// Rows of a strip of V in codes: use(token, first channel, place among the floats, codes).
template <int bits, class F>
KVC_INLINE void each_value_row(const uint8_t *v, int v_size, F use) {
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        alignas(64) uint32_t high[kStrip];
        if constexpr (bits == 3) third_bits(v, lanes, high);
        for (int t = 0; t < kStrip; ++t)
            for (int l = 0; l < lanes; l += W)
                use(t, c + l, c * kStrip + t * lanes + l,
                    lanes == 8 ? row_codes<bits, 8>(v, lanes, t, l, high)
                               : row_codes<bits, W>(v, lanes, t, l, high));
        v += code_panel_bytes(bits, lanes);
    }
}

// ------------------------------------------------------------------------------------ products

#if defined(KVC_INTEGER_PRODUCTS)

// A query as bytes, with a step for each 32 channels.
struct CodeQuery {
    int8_t *code;  // [group][kMaxHead]
    float *step;   // [group][kBlocks]
    float *shift;  // [group]

    template <class Arena>
    void take(Arena &arena, int64_t group) {
        code = arena.template take<int8_t>(group * kMaxHead + 16);
        step = arena.template take<float>(group * kBlocks + 16);
        shift = arena.template take<float>(group + 16);
    }
    // Weights of head g by channel, zeros up to a multiple of 32. Returns the sum of those that the
    // bytes stand for.
    float set(int g, const float *x, int size) {
        vf sum = vzero();
        for (int c = 0, block = 0; c < size; c += kBlock, ++block) {
            vf part[kBlock / W];
            repeat<kBlock / W>(KVC_LAMBDA(i) { part[i] = vload(x + c + i * W); });
            float own;
            const vf codes = quantise_block<false>(part, code + g * kMaxHead + c, own);
            sum = vfma(codes, vset(own), sum);
            step[g * kBlocks + block] = own;
        }
        return vhsum(sum);
    }
};

// Scores of NP strips of keys in codes; shift[g] is what all tokens have in common.
template <int bits, int G, int NP>
KVC_APART void code_k(const uint8_t *const *strip, int channels, const int8_t *q, const float *step,
                      const float *shift, float *s, const uint8_t *const *next) {
    constexpr int N = NP * vectors(kStrip), panel_bytes = code_panel_bytes(bits, 16);
    vf acc[G][N];
    repeat<G>(KVC_LAMBDA(g) {
        const vf start = vset(shift[g]);
        repeat<N>(KVC_LAMBDA(v) { acc[g][v] = start; });
    });
    int64_t at = 0;
    for (int first = 0; first < channels; first += kBlock, ++step) {
        vi sum[G][N];
        repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { sum[g][v] = ivzero(); }); });
        for (int row = first; row < least(channels, first + kBlock); row += 16, at += panel_bytes) {
            const uint8_t *panel[NP];
            repeat<NP>(KVC_LAMBDA(j) {
                panel[j] = strip[j] + at;
                prefetch(next[j] + at);
                if constexpr (panel_bytes > 64) prefetch(next[j] + at + 64);
            });
            multiply_strip<bits, kStrip, G, NP, kMaxHead>(sum, panel, q + row);
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

// Scores of strips first ... end of a tile.
template <int bits>
KVC_INLINE void code_scores(const Pass &pass, const CodeQuery &query, int first, int end,
                            float *s) {
    each_k_run(end - first, pass.layer.group, [&](auto heads, auto panels, int strip, int head) {
        strip += first;
        code_k<bits, decltype(heads)::count, decltype(panels)::count>(
            pass.tile.k + strip, pass.layer.k_size, query.code + head * kMaxHead,
            query.step + head * kBlocks, query.shift + head, s + head * kTile + strip * kStrip,
            pass.ahead + strip);
    });
}

// sums[channel] += by * row[channel]; a row has zeros up to a multiple of 16.
KVC_INLINE void add_row(const float *row, float by, int size, float *sums) {
    const vf factor = vset(by);
    for (int c = 0; c < size; c += W)
        vstore(sums + c, vfma(vload(row + c), factor, vload(sums + c)));
}

#endif

}  // namespace kvc::KVC_NAMESPACE
