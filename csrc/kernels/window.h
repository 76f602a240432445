// How much attention the newest queries pay to every token held: what policies score with. Products
// is how queries meet keys:
//
//   Rows rows;
//   static int64_t lay_out(const Layer &, int rows, uint8_t *base, Products &);
//   static int padded(int rows);
//   void begin(const Layer &, int rows);                        forgets all queries
//   void put(const Layer &, int row, const void *query, int64_t at, int dtype);
//   void scores(const Layer &, Tile &, float *s);               in powers of 2
#pragma once

#include "kernels/rows.h"
#include "kernels/tiles.h"

namespace kvc::KVC_NAMESPACE {
namespace {

// Working memory of `rows` queries of one KV head over n slots.
template <class Products>
struct WindowMemory {
    Products products;
    float *weights;  // [tiles][rows][kTile], relative to a row's maximum when the tile came
    float *tops;     // [tiles][rows], those maxima
    float *factors;  // [rows]

    static int64_t lay_out(const Layer &layer, int rows, int64_t tiles, uint8_t *base,
                           WindowMemory &m) {
        const int64_t first = Products::lay_out(layer, rows, base, m.products);
        const int64_t padded = Products::padded(rows);
        Arena arena(base + (first + 63) / 64 * 64);
        m.weights = arena.take<float>(tiles * padded * kTile);
        m.tops = arena.take<float>(tiles * padded);
        m.factors = arena.take<float>(padded);
        return arena.end() - base;
    }
};

inline int64_t count_tiles(const Layer &layer, const kvc_batch &batch, int head) {
    Tiles tiles(layer, batch, 0, head, batch.tail_length[0], 0, INT64_MAX);
    Tile tile;
    int64_t count = 0;
    while (tiles.next(tile)) ++count;
    return count;
}

template <class Products>
size_t window_scratch_by(const Layer &layer, const kvc_batch &batch, int rows) {
    int64_t tiles = 0;
    for (int h = 0; h < layer.num_kv_heads; ++h) tiles = most(tiles, count_tiles(layer, batch, h));
    WindowMemory<Products> unused;
    return static_cast<size_t>(WindowMemory<Products>::lay_out(
        layer, rows, tiles, reinterpret_cast<uint8_t *>(64), unused));
}

// Sums, over a window of queries, of their attention weights times `factor`, for the query heads
// first ... first + heads of a KV head: out[i * out_stride + slot] for every slot held. Heads go
// together, since K is then read once and few rows are padding. Rows that do not begin the window
// are added to what `out` has. With `greatest` there is one such sum for all of the heads.
template <class Products>
void window_weights_by(const Layer &layer, const kvc_batch &batch, const WindowQueries &query,
                       int first, int heads, float factor, float *out, int64_t out_stride,
                       uint8_t *scratch) {
    const int window = query.window, count = query.count, used = heads * count;
    const int head = first / layer.group, tail = batch.tail_length[0];
    WindowMemory<Products> m;
    WindowMemory<Products>::lay_out(layer, used, count_tiles(layer, batch, head), scratch, m);
    Rows &rows = m.products.rows;
    rows.count = Products::padded(used);
    for (int i = 0; i < rows.count; ++i) rows.top[i] = kNever, rows.total[i] = 0;
    m.products.begin(layer, rows.count);
    for (int i = 0; i < used; ++i)
        m.products.put(
            layer, i, query.data,
            (first + i / count) * query.head_stride + (query.begin + i % count) * query.row_stride,
            query.dtype);
    Tile tile;
    int64_t index = 0;
    for (Tiles tiles(layer, batch, 0, head, tail, 0, INT64_MAX); tiles.next(tile); ++index) {
        float *weights = m.weights + index * rows.count * kTile;
        m.products.scores(layer, tile, weights);
        const Strip &end = tile.strip[tile.strips - 1];
        const bool mask =
            has_partial_strip(tile) || (end.tail >= 0 && end.tail + kStrip > tail - window + 1);
        for (int i = 0; i < used; ++i) {
            float *s = weights + i * kTile;
            if (mask) mask_row(s, tile, tail - window + 1 + query.begin + i % count);
            if (tile.bias) bias_row(layer, s, tile);
            softmax_row(s, tile.strips * kStrip, rows.top[i], rows.total[i], rows.decay[i]);
            m.tops[index * rows.count + i] = rows.top[i];
        }
    }
    index = 0;
    for (Tiles tiles(layer, batch, 0, head, tail, 0, INT64_MAX); tiles.next(tile); ++index) {
        const float *weights = m.weights + index * rows.count * kTile;
        for (int i = 0; i < used; ++i)
            m.factors[i] = rows.total[i] > 0 && m.tops[index * rows.count + i] != kNever
                               ? factor / rows.total[i] *
                                     __builtin_exp2f(m.tops[index * rows.count + i] - rows.top[i])
                               : 0.0f;
        for (int i = 0; i < tile.strips; ++i) {
            const Strip &strip = tile.strip[i];
            for (int g = 0; g < (query.greatest ? 1 : heads); ++g) {
                float *to = out + g * out_stride + strip.slot;
                const bool apart = tile.kind == kExceptions;
                float lanes[kStrip] = {};
                if (query.begin != 0 && apart)
                    each_lane(layer, strip, [&](int lane, int token) { lanes[lane] = to[token]; });
                else if (query.begin != 0)
                    std::memcpy(lanes, to, sizeof(float) * strip.count);
                vf sum[kStrip / W];
                repeat<kStrip / W>(KVC_LAMBDA(v) { sum[v] = vload(lanes + v * W); });
                for (int row = g * count; row < (g + 1) * count; ++row) {
                    const float *from = weights + row * kTile + i * kStrip;
                    if (query.greatest) {
                        vf top[kStrip / W];
                        repeat<kStrip / W>(KVC_LAMBDA(v) { top[v] = vzero(); });
                        for (int other = row; other < used; other += count, from += count * kTile)
                            repeat<kStrip / W>(KVC_LAMBDA(v) {
                                const vf by = vset(m.factors[other]);
                                top[v] = vmax(top[v], vmul(vload(from + v * W), by));
                            });
                        repeat<kStrip / W>(KVC_LAMBDA(v) { sum[v] = vadd(sum[v], top[v]); });
                        continue;
                    }
                    const vf by = vset(m.factors[row]);
                    repeat<kStrip / W>(
                        KVC_LAMBDA(v) { sum[v] = vfma(vload(from + v * W), by, sum[v]); });
                }
                repeat<kStrip / W>(KVC_LAMBDA(v) { vstore(lanes + v * W, sum[v]); });
                if (apart)
                    each_lane(layer, strip, [&](int lane, int token) { to[token] = lanes[lane]; });
                else
                    std::memcpy(to, lanes, sizeof(float) * strip.count);
            }
        }
    }
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
