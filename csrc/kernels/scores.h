// Window scores by float products.
#pragma once

#include "kernels/attention.h"
#include "kernels/window.h"

namespace kvc::KVC_NAMESPACE {
namespace {

struct FloatProducts : Memory {
    static int64_t lay_out(const Layer &layer, int rows, uint8_t *base, FloatProducts &m) {
        return Memory::lay_out(layer, rows, base, m);
    }
    static int padded(int rows) {
        return (rows + kItemPad - 1) / kItemPad * kItemPad;
    }
    void begin(const Layer &layer, int count) {
        std::memset(query, 0, sizeof(float) * count * layer.k_size);
    }
    void put(const Layer &layer, int row, const void *from, int64_t at, int dtype) {
        float *to = query + int64_t{row / kItemPad} * kItemPad * layer.k_size + row % kItemPad;
        for (int c = 0; c < layer.k_size; ++c)
            to[c * kItemPad] = load_scalar(from, at + c, dtype) * (layer.scale * kLog2e);
    }
    void scores(const Layer &layer, Tile &tile, float *s) {
        expand_keys(layer, tile, *this);
        block_scores(tile, query, rows.count, layer.k_size, s);
    }
};

size_t window_scratch(const Layer &layer, const kvc_batch &batch, int rows) {
    return window_scratch_by<FloatProducts>(layer, batch, rows);
}
void window_weights(const Layer &layer, const kvc_batch &batch, const WindowQueries &query,
                    int first, int heads, float factor, float *out, int64_t out_stride,
                    uint8_t *scratch) {
    window_weights_by<FloatProducts>(layer, batch, query, first, heads, factor, out, out_stride,
                                     scratch);
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
