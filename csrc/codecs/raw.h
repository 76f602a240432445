// Raw and exact pages: elements of the layer's dtype.
#pragma once

#include "kernels/strips.h"

namespace kvc::KVC_NAMESPACE {

// Copies the first `count` tokens of a raw V strip and fills the rest with 0.
inline void copy_v_strip(const uint8_t *from, uint8_t *to, int count, int v_size, int dtype) {
    const int row_bytes = dtype_bytes(dtype);
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        const int64_t bytes = int64_t{kStrip} * lanes * row_bytes;
        int64_t kept = int64_t{count} * lanes * row_bytes;
        if (dtype == KVC_BF16 && count % 2 != 0) {  // the odd token shares words with the next
            kept -= int64_t{lanes} * row_bytes;
            for (int lane = 0; lane < lanes; ++lane) {
                std::memcpy(to + kept + 4 * lane, from + kept + 4 * lane, 2);
                std::memset(to + kept + 4 * lane + 2, 0, 2);
            }
            std::memcpy(to, from, kept);
            kept += 4 * lanes;
        } else {
            std::memcpy(to, from, kept);
        }
        std::memset(to + kept, 0, bytes - kept);
        from += bytes;
        to += bytes;
    }
}

// A panel of 16-bit floats as float32 [rows][lanes].
inline void expand_panel(const uint8_t *from, float *to, int rows, int lanes, int dtype) {
    const uint16_t *x = reinterpret_cast<const uint16_t *>(from);
    if (dtype == KVC_F16) {
        for (int i = 0; i < rows * lanes; ++i) to[i] = half_to_float(x[i]);
        return;
    }
    for (int r = 0; r < rows; r += 2, x += 2 * lanes, to += 2 * lanes)
        for (int l = 0; l < lanes; ++l) {
            to[l] = bf16_to_float(x[2 * l]);
            to[lanes + l] = bf16_to_float(x[2 * l + 1]);
        }
}

// One token into a strip; T is an unsigned integer as wide as an element.
template <int dtype, class T>
void store_token(const T *key, const T *value, int t, int k_size, int v_size, T *k, T *v) {
    constexpr bool pairs = dtype == KVC_BF16;
    for (int c = 0; c < k_size; ++c)
        k[pairs ? c / 2 * 2 * kStrip + 2 * t + c % 2 : c * kStrip + t] = key[c];
    for (int c = 0; c < v_size; ++c) {
        const int lanes = panel_lanes(v_size, c / 16), l = c % 16, panel = c / 16 * 16 * kStrip;
        v[panel + (pairs ? t / 2 * 2 * lanes + 2 * l + t % 2 : t * lanes + l)] = value[c];
    }
}

// Sixteen tokens into a strip.
template <int dtype, class T>
void store_strip(const T *const *key, const T *const *value, int k_size, int v_size, T *k, T *v) {
    if constexpr (dtype == KVC_F16) {
        for (int t = 0; t < kStrip; ++t)
            for (int c = 0; c < k_size; ++c) k[c * kStrip + t] = key[t][c];
    } else {
        // A word is a float32, or a pair of bfloat16 as the strip wants it.
        const uint32_t *row[kStrip];
        for (int t = 0; t < kStrip; ++t) row[t] = reinterpret_cast<const uint32_t *>(key[t]);
        transpose(row, k_size * static_cast<int>(sizeof(T)) / 4, reinterpret_cast<uint32_t *>(k));
    }
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        for (int t = 0; t < kStrip; t += 2) {
            const T *first = value[t] + c, *second = value[t + 1] + c;
            T *to = v + c * kStrip + t * lanes;
            for (int l = 0; l < lanes; ++l) {
                to[dtype == KVC_BF16 ? 2 * l : l] = first[l];
                to[dtype == KVC_BF16 ? 2 * l + 1 : lanes + l] = second[l];
            }
        }
    }
}

template <int dtype, class T>
void store_rows(const Layer &layer, int64_t first, int64_t last, const T *key, int64_t key_stride,
                const T *value, int64_t value_stride, const int64_t *slots) {
    const PageLayout &at = layer.flat[KVC_RAW];
    // bfloat16 pairs are read as words, which odd strides would misplace.
    const bool words = key_stride * static_cast<int64_t>(sizeof(T)) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(key) % 4 == 0;
    for (int64_t i = first; i < last;) {
        if (slots[i] < 0) {
            ++i;
            continue;
        }
        const int64_t block = slots[i] / layer.block_size;
        const int place = static_cast<int>(slots[i] % layer.block_size);
        int run = 1;
        while (run < kStrip && i + run < last && slots[i + run] == slots[i] + run) ++run;
        const bool whole = words && run == kStrip && place % kStrip == 0;
        for (int h = 0; h < layer.num_kv_heads; ++h) {
            uint8_t *page = layer.pool + layer.tail_page(block, h) * layer.page_bytes;
            T *k = reinterpret_cast<T *>(page + at.strip_at(place / kStrip));
            T *v = reinterpret_cast<T *>(page + at.strip_at(place / kStrip) + at.v);
            const T *from_k = key + i * key_stride + int64_t{h} * layer.k_size;
            const T *from_v = value + i * value_stride + int64_t{h} * layer.v_size;
            if (whole) {
                const T *k_rows[kStrip], *v_rows[kStrip];
                for (int t = 0; t < kStrip; ++t) {
                    k_rows[t] = from_k + t * key_stride;
                    v_rows[t] = from_v + t * value_stride;
                }
                store_strip<dtype>(k_rows, v_rows, layer.k_size, layer.v_size, k, v);
            } else {
                store_token<dtype>(from_k, from_v, place % kStrip, layer.k_size, layer.v_size, k,
                                   v);
            }
        }
        i += whole ? kStrip : 1;
    }
}

inline void store(const Layer &layer, int64_t first, int64_t last, const void *key,
                  int64_t key_stride, const void *value, int64_t value_stride,
                  const int64_t *slots) {
    const auto run = [&](auto tag, auto type) {
        using T = decltype(type);
        store_rows<decltype(tag)::count, T>(layer, first, last, static_cast<const T *>(key),
                                            key_stride, static_cast<const T *>(value), value_stride,
                                            slots);
    };
    if (layer.dtype == KVC_F32)
        run(Heads<KVC_F32>{}, uint32_t{});
    else if (layer.dtype == KVC_BF16)
        run(Heads<KVC_BF16>{}, uint16_t{});
    else
        run(Heads<KVC_F16>{}, uint16_t{});
}

inline void encode_raw_strip(const Layer &layer, const float *const *key, const float *const *value,
                             uint8_t *k, uint8_t *v) {
    const int k_size = layer.k_size, v_size = layer.v_size;
    if (layer.dtype == KVC_F32) {
        const uint32_t *k_rows[kStrip], *v_rows[kStrip];
        for (int t = 0; t < kStrip; ++t) {
            k_rows[t] = reinterpret_cast<const uint32_t *>(key[t]);
            v_rows[t] = reinterpret_cast<const uint32_t *>(value[t]);
        }
        store_strip<KVC_F32>(k_rows, v_rows, k_size, v_size, reinterpret_cast<uint32_t *>(k),
                             reinterpret_cast<uint32_t *>(v));
        return;
    }
    alignas(64) uint16_t halves[2][kStrip][kMaxHead];
    const uint16_t *rows[2][kStrip];
    const bool bf16 = layer.dtype == KVC_BF16;
    for (int side = 0; side < 2; ++side)
        for (int t = 0; t < kStrip; ++t) {
            const float *from = side == 0 ? key[t] : value[t];
            uint16_t *to = halves[side][t];
            for (int c = 0; c < (side == 0 ? k_size : v_size); ++c)
                to[c] = bf16 ? float_to_bf16(from[c]) : float_to_half(from[c]);
            rows[side][t] = to;
        }
    uint16_t *to_k = reinterpret_cast<uint16_t *>(k), *to_v = reinterpret_cast<uint16_t *>(v);
    if (bf16)
        store_strip<KVC_BF16>(rows[0], rows[1], k_size, v_size, to_k, to_v);
    else
        store_strip<KVC_F16>(rows[0], rows[1], k_size, v_size, to_k, to_v);
}

struct Raw : Expanded<Raw> {
    static constexpr bool plain = true;

    // Float32 pages need no expanding for their keys, nor for values if the strip is full.
    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        const int v_size = layer.v_size;
        if (layer.dtype == KVC_F32) {
            if (keys != nullptr) std::memcpy(keys, strip.k, sizeof(float) * kStrip * layer.k_size);
            if (values != nullptr)
                copy_v_strip(strip.v, reinterpret_cast<uint8_t *>(values), strip.count, v_size,
                             KVC_F32);
            return;
        }
        if (keys != nullptr) expand_panel(strip.k, keys, layer.k_size, kStrip, layer.dtype);
        const uint8_t *from = strip.v;
        for (int c = 0; c < v_size && values != nullptr; c += 16) {
            const int lanes = panel_lanes(v_size, c / 16);
            expand_panel(from, values, kStrip, lanes, layer.dtype);
            for (int i = strip.count * lanes; i < kStrip * lanes; ++i) values[i] = 0;
            from += int64_t{kStrip} * lanes * 2;
            values += kStrip * lanes;
        }
    }

    static void scores(const Pass &pass, Query &, const float *q, float *s) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const int n = tile.strips, size = layer.k_size;
        if (layer.dtype == KVC_F32)
            float_scores<F32>(tile.k, n, size, q, layer.group, s, pass.ahead);
        else if (layer.dtype == KVC_BF16)
            float_scores<BF16>(tile.k, n, size, q, layer.group, s, pass.ahead);
        else
            float_scores<F16>(tile.k, n, size, q, layer.group, s, pass.ahead);
    }

    static void values(const Pass &pass, Query &, float *p, const float *decay, float *sums) {
        const Layer &layer = pass.layer;
        const Tile &tile = pass.tile;
        const int n = tile.strips, size = layer.v_size, stride = layer.v_padded;
        // V rows that nobody wrote may be NaN, which a weight of 0 does not silence.
        const uint8_t *strip[kTileStrips];
        uint8_t *spare = reinterpret_cast<uint8_t *>(pass.scratch);
        for (int i = 0; i < n; ++i) {
            strip[i] = tile.v[i];
            if (tile.strip[i].count == kStrip) continue;
            copy_v_strip(tile.v[i], spare, tile.strip[i].count, size, layer.dtype);
            strip[i] = spare;
            spare += int64_t{kStrip} * size * dtype_bytes(layer.dtype);
        }
        if (layer.dtype == KVC_F32)
            float_values<F32>(strip, n, size, p, decay, layer.group, sums, stride, pass.ahead);
        else if (layer.dtype == KVC_BF16)
            float_values<BF16>(strip, n, size, p, decay, layer.group, sums, stride, pass.ahead);
        else
            float_values<F16>(strip, n, size, p, decay, layer.group, sums, stride, pass.ahead);
    }

    static void encode(const Layer &layer, int codec, int head, uint8_t *page, int count,
                       const float *key, const float *value) {
        const PageLayout at = layer.layout(codec, head);
        each_strip(layer, count, key, value,
                   [&](int strip, int, const float *const *k_rows, const float *const *v_rows) {
                       uint8_t *k = page + at.strip_at(strip);
                       encode_raw_strip(layer, k_rows, v_rows, k, k + at.v);
                   });
    }
};

}  // namespace kvc::KVC_NAMESPACE
