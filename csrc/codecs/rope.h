// The rotary embedding of the keys of a strip, as fitted codecs undo and redo it.
#pragma once

#include "kernels/tiles.h"

namespace kvc::KVC_NAMESPACE {

// Cosines and sines of all pairs at a position.
inline void angles(const kvc_table &table, int k_size, int64_t position, float *cosine,
                   float *sine) {
    // What a wrong directory finds may be anything.
    const int64_t p = least<int64_t>(most<int64_t>(position, 0), table.positions - 1);
    const int half = k_size / 2;
    const float *a = table.coarse + p / 256 * k_size, *b = table.fine + p % 256 * k_size;
    int j = 0;
    for (; j + W <= half; j += W) {
        const vf c = vload(a + j), s = vload(a + half + j);
        const vf x = vload(b + j), y = vload(b + half + j);
        vstore(cosine + j, vsub(vmul(c, x), vmul(s, y)));
        vstore(sine + j, vfma(s, x, vmul(c, y)));
    }
    for (; j < half; ++j) {
        cosine[j] = a[j] * b[j] - a[half + j] * b[half + j];
        sine[j] = a[half + j] * b[j] + a[j] * b[half + j];
    }
}

// Turns rows [k_size][16 tokens] by the angles of one position, or back.
inline void turn_strip(const float *angle, int k_size, bool back, float *rows) {
    const int half = k_size / 2;
    for (int j = 0; j < half; ++j) {
        const vf c = vset(angle[j]), s = vset(back ? -angle[half + j] : angle[half + j]);
        float *low = rows + j * kStrip, *high = rows + (half + j) * kStrip;
        for (int l = 0; l < kStrip; l += W) {
            const vf a = vload(low + l), b = vload(high + l);
            vstore(low + l, vsub(vmul(a, c), vmul(b, s)));
            vstore(high + l, vfma(b, c, vmul(a, s)));
        }
    }
}

// Position of a strip's first token.
KVC_INLINE int32_t strip_position(const Layer &layer, const Strip &strip) {
    int32_t position;
    get_positions(layer.layout(strip.codec, strip.head), strip.codec, layer.page_bytes, strip.page,
                  strip.place * kStrip, 1, &position);
    return position;
}

}  // namespace kvc::KVC_NAMESPACE
