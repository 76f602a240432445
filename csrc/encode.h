// Writing pages and reading them back, outside attention.
#pragma once

#include "codecs.h"
#include "internal.h"

namespace kvc::KVC_NAMESPACE {
namespace {

// Places of an element in a strip, counted in elements of the codec (int4: in codes).
KVC_INLINE int64_t k_plain(int c, int t) {
    return c * kStrip + t;
}
KVC_INLINE int64_t k_pairs(int c, int t) {
    return c / 2 * 2 * kStrip + 2 * t + c % 2;
}
KVC_INLINE int64_t v_plain(int t, int c, int v_size) {
    const int lanes = panel_lanes(v_size, c / 16);
    return c / 16 * 16 * kStrip + t * lanes + c % 16;
}
KVC_INLINE int64_t v_pairs(int t, int c, int v_size) {
    const int lanes = panel_lanes(v_size, c / 16);
    return c / 16 * 16 * kStrip + t / 2 * 2 * lanes + 2 * (c % 16) + t % 2;
}
// Of int4, in bytes; rows 4..7 of every eight are the high halves.
KVC_INLINE int64_t k_nibble(int c, int t) {
    return c / 8 * 4 * kStrip + 4 * t + c % 4;
}
KVC_INLINE int64_t v_nibble(int t, int c, int v_size) {
    const int lanes = panel_lanes(v_size, c / 16);
    return c / 16 * 8 * kStrip + t / 8 * 4 * lanes + 4 * (c % 16) + t % 4;
}

KVC_INLINE void set_nibble(uint8_t *at, int row, int code) {
    const int shift = row % 8 / 4 * 4;
    *at = static_cast<uint8_t>((*at & (0xf0 >> shift)) | code << shift);
}
KVC_INLINE int get_nibble(const uint8_t *at, int row) {
    return *at >> (row % 8 / 4 * 4) & 15;
}

KVC_INLINE float clamp(float x, float low, float high) {
    // In this order NaN becomes `low`.
    x = x > low ? x : low;
    return x < high ? x : high;
}

// ------------------------------------------------------------------------------------ raw pages

template <int dtype, class T>
void store_rows(const Layer &layer, int64_t first, int64_t last, const T *key, int64_t key_stride,
                const T *value, int64_t value_stride, const int64_t *slots) {
    const PageLayout &at = layer.layout[KVC_RAW];
    const int k_size = layer.k_size, v_size = layer.v_size;
    for (int64_t i = first; i < last; ++i) {
        if (slots[i] < 0) continue;
        const int64_t block = slots[i] / layer.block_size;
        const int place = static_cast<int>(slots[i] % layer.block_size);
        const int strip = place / kStrip, t = place % kStrip;
        for (int h = 0; h < layer.num_kv_heads; ++h) {
            uint8_t *page = layer.pool + layer.tail_page(block, h) * layer.page_bytes;
            T *k = reinterpret_cast<T *>(page + at.strip_at(strip));
            T *v = reinterpret_cast<T *>(page + at.strip_at(strip) + at.v);
            const T *from_k = key + i * key_stride + int64_t{h} * k_size;
            const T *from_v = value + i * value_stride + int64_t{h} * v_size;
            for (int c = 0; c < k_size; ++c)
                k[dtype == KVC_BF16 ? k_pairs(c, t) : k_plain(c, t)] = from_k[c];
            for (int c = 0; c < v_size; ++c)
                v[dtype == KVC_BF16 ? v_pairs(t, c, v_size) : v_plain(t, c, v_size)] = from_v[c];
        }
    }
}

void store(const Layer &layer, int64_t first, int64_t last, const void *key, int64_t key_stride,
           const void *value, int64_t value_stride, const int64_t *slots) {
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

KVC_INLINE void put_float(uint8_t *base, int64_t index, int dtype, float x) {
    if (dtype == KVC_F32) {
        std::memcpy(base + 4 * index, &x, 4);
    } else {
        const uint16_t bits = dtype == KVC_BF16 ? float_to_bf16(x) : float_to_half(x);
        std::memcpy(base + 2 * index, &bits, 2);
    }
}
KVC_INLINE float get_float(const uint8_t *base, int64_t index, int dtype) {
    if (dtype == KVC_F32) {
        float x;
        std::memcpy(&x, base + 4 * index, 4);
        return x;
    }
    uint16_t bits;
    std::memcpy(&bits, base + 2 * index, 2);
    return dtype == KVC_BF16 ? bf16_to_float(bits) : half_to_float(bits);
}

void encode_raw(const Layer &layer, int codec, uint8_t *page, int count, const float *key,
                const float *value) {
    const PageLayout &at = layer.layout[codec];
    const int k_size = layer.k_size, v_size = layer.v_size, dtype = layer.dtype;
    for (int i = 0; i < count; ++i) {
        uint8_t *k = page + at.strip_at(i / kStrip), *v = k + at.v;
        const int t = i % kStrip;
        for (int c = 0; c < k_size; ++c)
            put_float(k, dtype == KVC_BF16 ? k_pairs(c, t) : k_plain(c, t), dtype,
                      key[int64_t{i} * k_size + c]);
        for (int c = 0; c < v_size; ++c)
            put_float(v, dtype == KVC_BF16 ? v_pairs(t, c, v_size) : v_plain(t, c, v_size), dtype,
                      value[int64_t{i} * v_size + c]);
    }
}

// ------------------------------------------------------------------------------------ int8 pages

// The scale of one token, rounded to float16, and what to multiply by to get codes.
KVC_INLINE uint16_t int8_scale(const float *x, int size, float &inverse) {
    vf peak = vzero();
    int c = 0;
    for (; c + W <= size; c += W) peak = vmax(peak, vabs(vload(x + c)));
    float largest = vhmax(peak);
    for (; c < size; ++c) largest = most(largest, __builtin_fabsf(x[c]));
    const uint16_t scale = float_to_half(least(largest / 127, 65504.0f));
    const float rounded = half_to_float(scale);
    inverse = rounded > 0 ? 1 / rounded : 0;
    return scale;
}
KVC_INLINE int8_t int8_code(float x, float inverse) {
    return static_cast<int8_t>(__builtin_nearbyintf(clamp(x * inverse, -127, 127)));
}

void encode_int8(const Layer &layer, uint8_t *page, int count, const float *key,
                 const float *value) {
    const PageLayout &at = layer.layout[KVC_INT8];
    const int k_size = layer.k_size, v_size = layer.v_size;
    for (int i = 0; i < count; ++i) {
        uint8_t *strip = page + at.strip_at(i / kStrip);
        int8_t *k = reinterpret_cast<int8_t *>(strip), *v = k + at.v;
        uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.group_at(i / kStrip));
        const float *from_k = key + int64_t{i} * k_size, *from_v = value + int64_t{i} * v_size;
        const int t = i % kStrip;
        float inverse;
        scale[t] = int8_scale(from_k, k_size, inverse);
        for (int c = 0; c < k_size; ++c) k[k_pairs(c, t)] = int8_code(from_k[c], inverse);
        scale[kStrip + t] = int8_scale(from_v, v_size, inverse);
        for (int c = 0; c < v_size; ++c) v[v_pairs(t, c, v_size)] = int8_code(from_v[c], inverse);
    }
}

// ------------------------------------------------------------------------------------ int4 pages

// Per channel of a group of tokens: the grid from the least to the largest of them.
void encode_int4_keys(const Layer &layer, uint8_t *page, int count, const float *key) {
    const PageLayout &at = layer.layout[KVC_INT4];
    const int k_size = layer.k_size, group = at.group_strips * kStrip;
    for (int first = 0; first < count; first += group) {
        const int n = least(group, count - first);
        uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.group_at(first / kStrip));
        uint16_t *zero = scale + k_size;
        float low[kMaxHead], high[kMaxHead], inverse[kMaxHead];
        const float *rows = key + int64_t{first} * k_size;
        for (int c = 0; c < k_size; ++c) low[c] = high[c] = rows[c];
        for (int i = 1; i < n; ++i)
            for (int c = 0; c < k_size; ++c) {
                const float x = rows[int64_t{i} * k_size + c];
                low[c] = x < low[c] ? x : low[c];
                high[c] = x > high[c] ? x : high[c];
            }
        for (int c = 0; c < k_size; ++c) {
            zero[c] = float_to_half(clamp(low[c], -65504, 65504));
            low[c] = half_to_float(zero[c]);
            scale[c] = float_to_half(clamp((high[c] - low[c]) / 15, 0, 65504));
            const float rounded = half_to_float(scale[c]);
            inverse[c] = rounded > 0 ? 1 / rounded : 0;
        }
        for (int i = 0; i < n; ++i) {
            const int token = first + i, t = token % kStrip;
            uint8_t *k = page + at.strip_at(token / kStrip);
            for (int c = 0; c < k_size; ++c) {
                const float x = (rows[int64_t{i} * k_size + c] - low[c]) * inverse[c];
                set_nibble(k + k_nibble(c, t), c,
                           static_cast<int>(__builtin_nearbyintf(clamp(x, 0, 15))));
            }
        }
    }
}

// Codes of one rotated vector on the grid scale * (-7.5, -6.5, ..., 7.5), and the scale: the best
// of a few clipping points, then least squares.
uint16_t int4_vector(const float *y, int size, uint8_t *code) {
    float largest = 0;
    for (int c = 0; c < size; ++c) largest = most(largest, __builtin_fabsf(y[c]));
    float best_error = 3e38f, best = 0;
    constexpr float kClips[] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f};
    for (const float clip : kClips) {
        const float scale = largest * clip / 7.5f;
        if (!(scale > 0)) break;
        const float inverse = 1 / scale;
        float dot = 0, norm = 0, error = 0;
        for (int c = 0; c < size; ++c) {
            const float level = __builtin_nearbyintf(clamp(y[c] * inverse + 7.5f, 0, 15)) - 7.5f;
            dot += y[c] * level;
            norm += level * level;
            error += (y[c] - scale * level) * (y[c] - scale * level);
        }
        if (error < best_error) best_error = error, best = dot / norm;
    }
    const uint16_t scale = float_to_half(least(best, 65504.0f));
    const float rounded = half_to_float(scale), inverse = rounded > 0 ? 1 / rounded : 0;
    for (int c = 0; c < size; ++c)
        code[c] = static_cast<uint8_t>(__builtin_nearbyintf(clamp(y[c] * inverse + 7.5f, 0, 15)));
    return scale;
}

void encode_int4_values(const Layer &layer, uint8_t *page, int count, const float *value) {
    const PageLayout &at = layer.layout[KVC_INT4];
    const int v_size = layer.v_size, group = at.group_strips * kStrip;
    for (int i = 0; i < count; ++i) {
        uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.group_at(i / kStrip));
        float y[kMaxHead];
        uint8_t code[kMaxHead];
        std::memcpy(y, value + int64_t{i} * v_size, sizeof(float) * v_size);
        rotate(y, v_size);
        scale[2 * layer.k_size + i % group] = int4_vector(y, v_size, code);
        uint8_t *v = page + at.strip_at(i / kStrip) + at.v;
        const int t = i % kStrip;
        for (int c = 0; c < v_size; ++c) set_nibble(v + v_nibble(t, c, v_size), t, code[c]);
    }
}

// ------------------------------------------------------------------------------------ any page

void encode(const Layer &layer, int codec, uint8_t *page, int count, const float *key,
            const float *value) {
    switch (codec) {
        case KVC_INT8:
            encode_int8(layer, page, count, key, value);
            break;
        case KVC_INT4:
            encode_int4_keys(layer, page, count, key);
            encode_int4_values(layer, page, count, value);
            break;
        default:
            encode_raw(layer, codec, page, count, key, value);
    }
}

void decode_token(const Layer &layer, int codec, const uint8_t *page, int i, float *key,
                  float *value) {
    const PageLayout &at = layer.layout[codec];
    const int k_size = layer.k_size, v_size = layer.v_size, dtype = layer.dtype, t = i % kStrip;
    const uint8_t *k = page + at.strip_at(i / kStrip), *v = k + at.v;
    const uint16_t *scale = reinterpret_cast<const uint16_t *>(page + at.group_at(i / kStrip));
    if (codec == KVC_INT8) {
        const float s_k = half_to_float(scale[t]), s_v = half_to_float(scale[kStrip + t]);
        if (key != nullptr)
            for (int c = 0; c < k_size; ++c)
                key[c] = s_k * static_cast<float>(static_cast<int8_t>(k[k_pairs(c, t)]));
        if (value != nullptr)
            for (int c = 0; c < v_size; ++c)
                value[c] = s_v * static_cast<float>(static_cast<int8_t>(v[v_pairs(t, c, v_size)]));
    } else if (codec == KVC_INT4) {
        if (key != nullptr)
            for (int c = 0; c < k_size; ++c)
                key[c] =
                    half_to_float(scale[k_size + c]) +
                    half_to_float(scale[c]) * static_cast<float>(get_nibble(k + k_nibble(c, t), c));
        if (value != nullptr) {
            const int group = at.group_strips * kStrip;
            const float s_v = half_to_float(scale[2 * k_size + i % group]);
            for (int c = 0; c < v_size; ++c)
                value[c] =
                    s_v * (static_cast<float>(get_nibble(v + v_nibble(t, c, v_size), t)) - 7.5f);
            rotate_back(value, v_size);
        }
    } else {
        if (key != nullptr)
            for (int c = 0; c < k_size; ++c)
                key[c] = get_float(k, dtype == KVC_BF16 ? k_pairs(c, t) : k_plain(c, t), dtype);
        if (value != nullptr)
            for (int c = 0; c < v_size; ++c)
                value[c] = get_float(
                    v, dtype == KVC_BF16 ? v_pairs(t, c, v_size) : v_plain(t, c, v_size), dtype);
    }
}

void decode(const Layer &layer, int codec, const uint8_t *page, int n, const int32_t *places,
            float *key, float *value) {
    for (int i = 0; i < n; ++i)
        decode_token(layer, codec, page, places != nullptr ? places[i] : i,
                     key != nullptr ? key + int64_t{i} * layer.k_size : nullptr,
                     value != nullptr ? value + int64_t{i} * layer.v_size : nullptr);
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
