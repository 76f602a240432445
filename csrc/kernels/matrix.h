// Prefill by products of bfloat16 matrices. A block of query rows shares each tile of tokens, whose
// K and V become bfloat16 panels just once:
//
//   K strip of 16 tokens   [k_padded / 2][16 tokens][2], in raw pages as they are
//   V panel of 16 channels [kTile / 2][16 channels][2]
//
// Queries, keys, values and weights are bfloat16, all sums float32.
#pragma once

#include "kernels/codecs.h"
#include "kernels/rows.h"
#include "kernels/window.h"
#include "simd/bf16.h"

namespace kvc::KVC_NAMESPACE {
namespace {

constexpr int kMatrixRows = 256;  // of an item: more share what unpacking codes costs

inline int rounded_up(int n, int to) {
    return (n + to - 1) / to * to;
}

// s[row][token] of a tile, without the factor.
inline void matrix_scores(const uint8_t *const *strip, int strips, const uint16_t *q, int rows,
                          int k_padded, float *s) {
    for (int r = 0; r < rows; r += kRows) {
        const uint16_t *own = q + int64_t{r} * k_padded;
        float *to = s + r * kTile;
        int i = 0;
        const int64_t depth = k_padded / kDepth;
        for (; i + 2 <= strips; i += 2)
            product<true, false>(own, 2 * k_padded, strip[i], strip[i + 1], depth, to + i * kStrip,
                                 kTile);
        if (i < strips)
            product<false, false>(own, 2 * k_padded, strip[i], nullptr, depth, to + i * kStrip,
                                  kTile);
    }
}

// Adds weights times values; weights are bfloat16 at the beginning of their rows of kTile floats.
inline void matrix_values(const uint16_t *v, int strips, const float *p, int rows, int v_padded,
                          float *sums) {
    const int depth = (strips + 1) / 2;
    for (int r = 0; r < rows; r += kRows) {
        const float *own = p + r * kTile;
        float *to = sums + int64_t{r} * v_padded;
        int c = 0;
        for (; c + 32 <= v_padded; c += 32) {
            const uint16_t *panel = v + c * kTile;
            product<true, true>(own, kTile * 4, panel, panel + kTile * 16, depth, to + c, v_padded);
        }
        if (c < v_padded)
            product<false, true>(own, kTile * 4, v + c * kTile, nullptr, depth, to + c, v_padded);
    }
}

// ------------------------------------------------------------------------------------ softmax

// 2^x for x <= 0 to within 2^-18, which is finer than bfloat16; exactly 0 below -126.
KVC_INLINE vf vexp2_bf16(vf x) {
    const vf n = vround(x), f = vsub(x, n);
    vf y = vset(9.5828500e-3f);
    y = vfma(y, f, vset(5.5906430e-2f));
    y = vfma(y, f, vset(2.4024099e-1f));
    y = vfma(y, f, vset(6.9312419e-1f));
    y = vfma(y, f, vset(1.0f));
    const __mmask16 alive = _mm512_cmp_ps_mask(x, vset(-126.0f), _CMP_GT_OQ);
    return _mm512_maskz_scalef_ps(alive, y, n);
}

// As softmax_row does, of scores times `factor` > 0, into bfloat16 in their place; up to the next
// multiple of 32 with zeros.
KVC_INLINE void matrix_softmax_row(float *s, int width, float factor, float &top, float &total,
                                   float &decay) {
    vf peak = vload(s);
    for (int c = W; c < width; c += W) peak = vmax(peak, vload(s + c));
    const float new_top = most(top, vhmax(peak) * factor);
    uint16_t *to = reinterpret_cast<uint16_t *>(s);
    if (new_top == kNever) {  // nothing visible yet
        for (int c = 0; c < width; c += 2 * W) vstore_words(to + c, ivzero());
        decay = 1;
        return;
    }
    const vf scale = vset(factor), base = vset(-new_top);
    const auto weight = [&](int c) { return vexp2_bf16(vfma(vload(s + c), scale, base)); };
    vf sum = vzero();
    int c = 0;
    // What is written lies behind what is still to be read.
    for (; c + 2 * W <= width; c += 2 * W) {
        const vf first = weight(c), second = weight(c + W);
        sum = vadd(sum, vadd(first, second));
        vstore_words(to + c, bf16_row(first, second));
    }
    if (c < width) {
        const vf last = weight(c);
        sum = vadd(sum, last);
        vstore_words(to + c, bf16_row(last, vzero()));
    }
    decay = top == new_top ? 1.0f : (top == kNever ? 0.0f : __builtin_exp2f(top - new_top));
    total = total * decay + vhsum(sum);
    top = new_top;
}

// -------------------------------------------------------------------------------------- panels

// Rows of a float panel, two by two.
template <int lanes>
KVC_INLINE void pack_rows(const float *from, int rows, uint16_t *to) {
    for (int r = 0; r < rows; r += 2)
        vstore_words(to + r * 16, bf16_pairs(vload_lanes<lanes>(from + r * lanes),
                                             vload_lanes<lanes>(from + (r + 1) * lanes)));
}

struct MatrixMemory {
    Rows rows;
    uint16_t *query;           // [rows][k_padded]
    float *scores;             // [rows][kTile]
    uint16_t *keys;            // [kTileStrips][k_padded * 16]
    uint16_t *values;          // [v_padded / 16][kTile * 16]
    float *k_strip, *v_strip;  // of a strip, before it is rounded
    // For keys of fitted codecs: the inverse of `inverse_of`, and a strip's components.
    uint16_t *inverse;     // [k_size up to 32 rows][components up to kDepth]
    uint16_t *components;  // a panel
    int inverse_of;

    static int64_t lay_out(const Layer &layer, int most_rows, uint8_t *base, MatrixMemory &m) {
        Arena arena(base);
        const int64_t padded = rounded_up(most_rows, kRows);
        const int64_t k_padded = rounded_up(layer.k_size, kDepth);
        m.rows.sums = arena.take<float>(padded * layer.v_padded);
        m.rows.rotated = arena.take<float>(padded * layer.v_padded);
        m.rows.top = arena.take<float>(padded);
        m.rows.total = arena.take<float>(padded);
        m.rows.decay = arena.take<float>(padded);
        m.query = arena.take<uint16_t>(padded * k_padded);
        m.scores = arena.take<float>(padded * kTile);
        m.keys = arena.take<uint16_t>(int64_t{kTile} * k_padded);
        m.values = arena.take<uint16_t>(int64_t{kTile} * layer.v_padded);
        m.k_strip = arena.take<float>(kStrip * k_padded);
        m.v_strip = arena.take<float>(int64_t{kStrip} * layer.v_padded + 16);
        m.inverse = arena.take<uint16_t>(layer.has_tables() ? k_padded * k_padded : 0);
        m.components = arena.take<uint16_t>(kStrip * k_padded);
        m.inverse_of = -1;
        return arena.end() - base;
    }
};

#define KVC_KIND(codec, kind) codec::expand,
constexpr decltype(CodecTraits::expand) kExpand[] = {KVC_EACH_KIND(KVC_KIND)};
#undef KVC_KIND

// Components are codes around 0, which bfloat16 holds exactly.
inline void matrix_inverse(const kvc_head_table &head, int codec, int k_size, MatrixMemory &m) {
    if (m.inverse_of == codec) return;
    m.inverse_of = codec;
    const int depth = rounded_up(head.components, kDepth), rows = rounded_up(k_size, kRows);
    std::memset(m.inverse, 0, size_t{2} * static_cast<size_t>(rows * depth));
    for (int r = 0; r < k_size; ++r)
        for (int c = 0; c < head.components; ++c)
            m.inverse[r * depth + c] = float_to_bf16(head.inverse[int64_t{r} * head.stride + c]);
}

// As expand_fitted_keys does, with the product by tiles.
inline void matrix_fitted_keys(const Layer &layer, const Strip &strip, MatrixMemory &m) {
    const kvc_table &table = *layer.table(strip.codec);
    const kvc_head_table &head = table.heads[strip.head];
    const int k_size = layer.k_size, depth = rounded_up(head.components, kDepth);
    matrix_inverse(head, strip.codec, k_size, m);
    alignas(64) float x[kMaxHead * kStrip];
    expand_components(head, strip.k, x);
    pack_rows<kStrip>(x, head.components, m.components);
    std::memset(m.components + head.components * kStrip, 0,
                size_t{2} * kStrip * static_cast<size_t>(depth - head.components));
    for (int r = 0; r < k_size; r += kRows) {
        product<false, false>(m.inverse + r * depth, 2 * depth, m.components, nullptr,
                              depth / kDepth, m.k_strip + r * kStrip, kStrip);
    }
    for (int r = 0; r < k_size; ++r) {
        float *own = m.k_strip + r * kStrip;
        vstore(own, vadd(vload(own), vset(head.mean[r])));
    }
    if (!table.local) return;
    float angle[kMaxHead];
    angles(table, k_size, strip_position(layer, strip), angle, angle + k_size / 2);
    turn_strip(angle, k_size, false, m.k_strip);
}

inline bool is_plain(const Tile &tile) {
    return tile.kind == KVC_RAW;
}

// Points the tile's K at panels: at the page itself where it holds them.
inline void matrix_keys(const Layer &layer, Tile &tile, int k_padded, MatrixMemory &m) {
    const int k_size = layer.k_size;
    if (is_plain(tile) && k_padded == k_size) return;
    for (int i = 0; i < tile.strips; ++i) {
        uint16_t *to = m.keys + int64_t{i} * kStrip * k_padded;
        if (is_plain(tile)) {
            std::memcpy(to, tile.k[i], size_t{2} * kStrip * k_size);
        } else {
            if (kExpand[tile.kind] == Fitted::expand)
                matrix_fitted_keys(layer, tile.strip[i], m);
            else
                kExpand[tile.kind](layer, tile.strip[i], m.k_strip, nullptr);
            pack_rows<kStrip>(m.k_strip, k_size, to);
        }
        std::memset(to + kStrip * k_size, 0, size_t{2} * kStrip * (k_padded - k_size));
        tile.k[i] = reinterpret_cast<const uint8_t *>(to);
    }
}

// A strip's panels of values, 16 lanes wide each, into those of its tile.
inline void matrix_raw_values(const Layer &layer, const Strip &strip, uint16_t *to,
                              MatrixMemory &m) {
    const uint8_t *from = strip.v;
    if (strip.count < kStrip) {
        uint8_t *whole = reinterpret_cast<uint8_t *>(m.v_strip);
        copy_v_strip(strip.v, whole, strip.count, layer.v_size, KVC_BF16);
        from = whole;
    }
    for (int c = 0; c < layer.v_size; c += 16, to += kTile * 16) {
        if (panel_lanes(layer.v_size, c / 16) == 16) {
            std::memcpy(to, from + c * kStrip * 2, size_t{2} * 16 * kStrip);
            continue;
        }
        for (int t = 0; t < kStrip; t += 2)
            vstore_words(to + t * 16, vload_words<8>(from + c * kStrip * 2 + t * 16));
    }
}
inline void matrix_tile_values(const Layer &layer, const Tile &tile, MatrixMemory &m) {
    for (int i = 0; i < tile.strips; ++i) {
        uint16_t *to = m.values + i * kStrip * 16;
        if (is_plain(tile)) {
            matrix_raw_values(layer, tile.strip[i], to, m);
            continue;
        }
        kExpand[tile.kind](layer, tile.strip[i], nullptr, m.v_strip);
        const float *from = m.v_strip;
        for (int c = 0; c < layer.v_size; c += 16, from += kStrip * 16, to += kTile * 16) {
            if (panel_lanes(layer.v_size, c / 16) == 16)
                pack_rows<16>(from, kStrip, to);
            else
                pack_rows<8>(from, kStrip, to);
        }
    }
    if (tile.strips % 2 != 0)  // what shares a step with the last strip
        for (int c = 0; c < layer.v_padded; c += 16)
            std::memset(m.values + c * kTile + tile.strips * kStrip * 16, 0,
                        size_t{2} * 16 * kStrip);
}

// ----------------------------------------------------------------------------------- decode

// Two bfloat16 from the halves of words.
KVC_INLINE vi bf16_of_words(vi x) {
    return bf16_pairs(to_float(vright_signed(vleft(x, 16), 16)), to_float(vright_signed(x, 16)));
}

// TableProducts::pack: 16 fields to a panel, [words][16 fields][2], an even number of panels.
inline void pack_weights(const int32_t *weight, int words, int fields, uint16_t *to) {
    const int depth = rounded_up(words, kDepth / 2);
    for (int first = 0; first < rounded_up(fields, 32); first += 16)
        for (int c = 0; c < depth; ++c, to += 32) {
            const uint8_t *own =
                reinterpret_cast<const uint8_t *>(weight + int64_t{c} * fields + first);
            const bool there = first < fields && c < words;
            vstore_words(to, there ? bf16_of_words(vload_words<W>(own)) : ivzero());
        }
}
// TableProducts::multiply.
inline void multiply_weights(const uint16_t *panels, int words, int fields, const int32_t *x,
                             const float *step, float *to, int64_t stride) {
    const int depth = rounded_up(words, kDepth / 2);
    alignas(64) uint16_t a[kRows * kMaxHead];
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < depth; c += W)
            vstore_words(a + 2 * (r * depth + c),
                         bf16_of_words(
                             vload_words<W>(reinterpret_cast<const uint8_t *>(x + r * kHalf + c))));
    {
        const ProductRegion region;
        for (int first = 0; first < fields; first += 32, panels += 64 * depth)
            product<true, false>(a, 4 * depth, panels, panels + 32 * depth, 2 * depth / kDepth,
                                 to + first, stride);
    }
    for (int first = 0; first < fields; first += W) {
        const vf by = vload(step + first);
        for (int r = 0; r < kRows; ++r)
            vstore(to + r * stride + first, vmul(vload(to + r * stride + first), by));
    }
}

// ----------------------------------------------------------------------------------- attention

inline int matrix_items_rows(const Layer &layer) {
    return most(1, kMatrixRows / layer.group);
}
inline size_t matrix_scratch(const Layer &layer) {
    MatrixMemory unused;
    return static_cast<size_t>(MatrixMemory::lay_out(layer, matrix_items_rows(layer) * layer.group,
                                                     reinterpret_cast<uint8_t *>(64), unused));
}

// One row of queries, whose factor comes with the scores.
inline void put_query(const Layer &layer, int row, const void *from, int64_t at, int dtype,
                      MatrixMemory &m) {
    uint16_t *to = m.query + int64_t{row} * rounded_up(layer.k_size, kDepth);
    if (dtype == KVC_BF16)
        std::memcpy(to, static_cast<const uint16_t *>(from) + at, size_t{2} * layer.k_size);
    else
        for (int c = 0; c < layer.k_size; ++c)
            to[c] = float_to_bf16(load_scalar(from, at + c, dtype));
}

// Queries of a block, `group` rows a token; what is left of their last tiles is 0.
inline void matrix_queries(const Attention &call, const QueryBlock &block, int k_padded,
                           MatrixMemory &m) {
    const Layer &layer = *call.layer;
    const int group = layer.group;
    std::memset(m.query, 0, size_t{2} * static_cast<size_t>(m.rows.count * k_padded));
    for (int i = 0; i < block.tokens * group; ++i)
        put_query(layer, i, call.query,
                  (block.row + i / group) * call.query_stride +
                      (int64_t{block.head} * group + i % group) * layer.k_size,
                  call.query_dtype, m);
}

// What was gathered so far, relative to the rows' new maxima.
inline void decay_rows(const Rows &rows, int used, float *sums, int v_padded) {
    for (int i = 0; i < used; ++i) {
        if (rows.decay[i] == 1) continue;
        const vf factor = vset(rows.decay[i]);
        float *own = sums + int64_t{i} * v_padded;
        for (int c = 0; c < v_padded; c += W) vstore(own + c, vmul(vload(own + c), factor));
    }
}

inline void matrix_softmax(const Layer &layer, const Tile &tile, const QueryBlock &block,
                           MatrixMemory &m) {
    const float factor = layer.scale * kLog2e;
    const Strip &end = tile.strip[tile.strips - 1];
    const bool mask = has_partial_strip(tile) || (end.tail >= 0 && end.tail + kStrip > block.seen);
    const bool apart = mask || tile.bias || !(factor > 0);
    const int width = tile.strips * kStrip, group = layer.group;
    Rows &rows = m.rows;
    for (int i = 0; i < block.tokens * group; ++i) {
        float *s = m.scores + i * kTile;
        if (apart)
            for (int c = 0; c < width; c += W) vstore(s + c, vmul(vload(s + c), vset(factor)));
        if (mask) mask_row(s, tile, block.seen + i / group);
        if (tile.bias) bias_row(layer, s, tile);
        matrix_softmax_row(s, width, apart ? 1.0f : factor, rows.top[i], rows.total[i],
                           rows.decay[i]);
    }
}

inline void matrix_item(const Attention &call, const QueryBlock &block, MatrixMemory &m) {
    const Layer &layer = *call.layer;
    const int group = layer.group, used = block.tokens * group;
    const int k_padded = rounded_up(layer.k_size, kDepth), v_padded = layer.v_padded;
    Rows &rows = m.rows;
    rows.count = rounded_up(used, kRows);
    clear(rows, v_padded);
    matrix_queries(call, block, k_padded, m);
    const ProductRegion region;
    const int tail = static_cast<int>(most<int64_t>(0, block.seen + block.tokens - 1));
    Tiles tiles(layer, *call.batch, block.seq, block.head, tail, 0, INT64_MAX);
    Tile tile;
    while (tiles.next(tile)) {
        matrix_keys(layer, tile, k_padded, m);
        matrix_scores(tile.k, tile.strips, m.query, rows.count, k_padded, m.scores);
        matrix_softmax(layer, tile, block, m);
        matrix_tile_values(layer, tile, m);
        const bool rotated = tile.kind != kExceptions && kFormats[tile.kind].rotated;
        decay_rows(rows, used, rows.sums, v_padded);
        if (rows.any_rotated) decay_rows(rows, used, rows.rotated, v_padded);
        matrix_values(m.values, tile.strips, m.scores, rows.count, v_padded,
                      rotated ? rows.rotated : rows.sums);
        rows.any_rotated |= rotated;
    }
    join_rotated(layer, rows);
    for (int i = 0; i < used; ++i)
        write_row(call, block.row + i / group, block.head * group + i % group,
                  rows.sums + int64_t{i} * v_padded, rows.top[i], rows.total[i]);
}

// For window scores.
struct MatrixProducts : MatrixMemory {
    static int64_t lay_out(const Layer &layer, int rows, uint8_t *base, MatrixProducts &m) {
        return MatrixMemory::lay_out(layer, rows, base, m);
    }
    static int padded(int rows) {
        return rounded_up(rows, kRows);
    }
    void begin(const Layer &layer, int count) {
        std::memset(query, 0,
                    size_t{2} * static_cast<size_t>(count * rounded_up(layer.k_size, kDepth)));
    }
    void put(const Layer &layer, int row, const void *from, int64_t at, int dtype) {
        put_query(layer, row, from, at, dtype, *this);
    }
    void scores(const Layer &layer, Tile &tile, float *s) {
        const ProductRegion region;
        const int k_padded = rounded_up(layer.k_size, kDepth);
        matrix_keys(layer, tile, k_padded, *this);
        matrix_scores(tile.k, tile.strips, query, rows.count, k_padded, s);
        const vf factor = vset(layer.scale * kLog2e);
        for (int i = 0; i < rows.count; ++i)
            for (int c = i * kTile; c < i * kTile + tile.strips * kStrip; c += W)
                vstore(s + c, vmul(vload(s + c), factor));
    }
};

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
