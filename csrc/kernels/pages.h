// Pages outside attention: filled, and read back.
#pragma once

#include "kernels/codecs.h"

namespace kvc::KVC_NAMESPACE {
namespace {

void encode(const Layer &layer, int codec, int head, uint8_t *page, int count, const float *key,
            const float *value) {
    kTraits[codec].encode(layer, codec, head, page, count, key, value);
}

// Reads tokens of a page strip by strip; places ascend, null: 0, 1, ...
void decode(const Layer &layer, int codec, int head, const uint8_t *page, int held, int n,
            const int32_t *places, float *key, float *value) {
    const PageLayout at = layer.layout(codec, head);
    const int k_size = layer.k_size, v_size = layer.v_size;
    const CodecTraits &traits = kTraits[kFormats[codec].strips];
    const bool floats = traits.plain && layer.dtype == KVC_F32;
    alignas(64) float keys[kMaxHead * kStrip], values[kMaxHead * kStrip + 16];
    int open = -1;
    const float *from_k = keys, *from_v = values;
    for (int i = 0; i < n; ++i) {
        const int token = places != nullptr ? places[i] : i, t = token % kStrip;
        if (token / kStrip != open) {
            open = token / kStrip;
            Strip strip{};
            strip.k = page + at.strip_at(open);
            strip.v = strip.k + at.v;
            strip.scales = page + at.scales_at(open);
            strip.place = open % at.group_strips;
            strip.count = least(kStrip, held - open * kStrip);
            strip.page = page;
            strip.codec = codec;
            strip.head = head;
            if (floats) {
                from_k = reinterpret_cast<const float *>(strip.k);
                from_v = reinterpret_cast<const float *>(strip.v);
            } else {
                traits.expand(layer, strip, key != nullptr ? keys : nullptr,
                              value != nullptr ? values : nullptr);
            }
        }
        if (key != nullptr) {
            float *to = key + int64_t{i} * k_size;
            for (int c = 0; c < k_size; ++c) to[c] = from_k[c * kStrip + t];
        }
        if (value != nullptr) {
            alignas(64) float row[kMaxHead + 16];
            for (int c = 0; c < v_size; c += 16) {
                const int lanes = panel_lanes(v_size, c / 16);
                std::memcpy(row + c, from_v + c * kStrip + t * lanes, sizeof(float) * lanes);
            }
            if (traits.rotated) {
                std::memset(row + v_size, 0, sizeof(float) * 16);
                rotate_back(row, v_size);
            }
            std::memcpy(value + int64_t{i} * v_size, row, sizeof(float) * v_size);
        }
    }
    if (kFormats[codec].tables)
        decode_exceptions(layer, codec, head, page, held, n, places, key, value);
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
