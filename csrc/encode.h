// Writing pages and reading them back, outside attention. The unit is a strip: 16 tokens whose K
// and V come as rows of floats, or zeros where the page ends.
#pragma once

#include "codecs.h"
#include "internal.h"

namespace kvc::KVC_NAMESPACE {
namespace {

constexpr float kHalfMax = 65504.0f;

KVC_INLINE float clamp(float x, float low, float high) {
    // In this order NaN becomes `low`.
    x = x > low ? x : low;
    return x < high ? x : high;
}
KVC_INLINE vf vclamp(vf x, float low, float high) {
    // vmax returns its second argument for NaN.
    return vmin(vmax(x, vset(low)), vset(high));
}

// ------------------------------------------------------------------------------------ raw pages

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

void encode_raw(const Layer &layer, const float *const *key, const float *const *value, uint8_t *k,
                uint8_t *v) {
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

// ------------------------------------------------------------------------------------ int8 pages

// The scale of one token, rounded to float16; the result is what to multiply by to get codes.
KVC_INLINE float int8_scale(const float *x, int size, uint16_t &scale) {
    vf peak = vzero();
    int c = 0;
    for (; c + W <= size; c += W) peak = vmax(vabs(vload(x + c)), peak);
    float largest = vhmax(peak);
    for (; c < size; ++c) largest = most(largest, __builtin_fabsf(x[c]));
    scale = float_to_half(least(largest / 127, kHalfMax));
    const float rounded = half_to_float(scale);
    return rounded > 0 ? 1 / rounded : 0;
}

// Two rows of codes as pairs of bytes.
KVC_INLINE vi int8_pairs(vf first, vf second) {
    const vi low = to_int(vclamp(first, -127, 127)), high = to_int(vclamp(second, -127, 127));
    return vor(vand(low, 255), vleft(high, 8));
}

void encode_int8(const Layer &layer, const float *const *key, const float *const *value,
                 uint16_t *scale, uint8_t *k, uint8_t *v) {
    const int k_size = layer.k_size, v_size = layer.v_size;
    alignas(64) float turned[kMaxHead * kStrip], inverse[2][kStrip];
    for (int t = 0; t < kStrip; ++t) {
        inverse[0][t] = int8_scale(key[t], k_size, scale[t]);
        inverse[1][t] = int8_scale(value[t], v_size, scale[kStrip + t]);
    }
    const uint32_t *row[kStrip];
    for (int t = 0; t < kStrip; ++t) row[t] = reinterpret_cast<const uint32_t *>(key[t]);
    transpose(row, k_size, reinterpret_cast<uint32_t *>(turned));
    for (int c = 0; c < k_size; c += 2)
        for (int l = 0; l < kStrip; l += W) {
            const vf by = vload(inverse[0] + l);
            const float *x = turned + c * kStrip + l;
            vstore_words16(k + c * kStrip + 2 * l,
                           int8_pairs(vmul(vload(x), by), vmul(vload(x + kStrip), by)));
        }
    for (int c = 0; c < v_size; c += 16) {
        const int lanes = panel_lanes(v_size, c / 16);
        for (int t = 0; t < kStrip; t += 2) {
            uint8_t *to = v + c * kStrip + t * lanes;
            const vf first = vset(inverse[1][t]), second = vset(inverse[1][t + 1]);
            if (lanes == 8 && W == 16) {
                const vi pairs = int8_pairs(vmul(vload_lanes<8>(value[t] + c), first),
                                            vmul(vload_lanes<8>(value[t + 1] + c), second));
                uint8_t both[2 * W];
                vstore_words16(both, pairs);
                std::memcpy(to, both, 16);
                continue;
            }
            for (int l = 0; l < lanes; l += W)
                vstore_words16(to + 2 * l, int8_pairs(vmul(vload(value[t] + c + l), first),
                                                      vmul(vload(value[t + 1] + c + l), second)));
        }
    }
}

// ------------------------------------------------------------------------------------ int4 pages

// The grid of each channel of a group, from the least to the largest of its n tokens. Returns what
// codes are made with: (x - low) * inverse.
void int4_grid(const float *key, int n, int k_size, uint16_t *scale, float *low, float *inverse) {
    float high[kMaxHead];
    for (int c = 0; c < k_size; ++c) low[c] = high[c] = key[c];
    for (int i = 1; i < n; ++i) {
        const float *x = key + int64_t{i} * k_size;
        for (int c = 0; c < k_size; ++c) {
            low[c] = x[c] < low[c] ? x[c] : low[c];
            high[c] = x[c] > high[c] ? x[c] : high[c];
        }
    }
    uint16_t *zero = scale + k_size;
    for (int c = 0; c < k_size; ++c) {
        zero[c] = float_to_half(clamp(low[c], -kHalfMax, kHalfMax));
        low[c] = half_to_float(zero[c]);
        scale[c] = float_to_half(clamp((high[c] - low[c]) / 15, 0, kHalfMax));
        const float rounded = half_to_float(scale[c]);
        inverse[c] = rounded > 0 ? 1 / rounded : 0;
    }
}

void encode_int4_keys(const float *const *key, int k_size, const float *low, const float *inverse,
                      uint8_t *k) {
    alignas(64) float turned[kMaxHead * kStrip];
    const uint32_t *row[kStrip];
    for (int t = 0; t < kStrip; ++t) row[t] = reinterpret_cast<const uint32_t *>(key[t]);
    transpose(row, k_size, reinterpret_cast<uint32_t *>(turned));
    for (int c = 0; c < k_size; c += 8)
        for (int l = 0; l < kStrip; l += W) {
            vi word = to_int(vzero());
            for (int j = 0; j < 8; ++j) {
                const vf x = vload(turned + (c + j) * kStrip + l);
                const vf level = vmul(vsub(x, vset(low[c + j])), vset(inverse[c + j]));
                word = vor(word, vleft(to_int(vclamp(level, 0, 15)), j % 4 * 8 + j / 4 * 4));
            }
            vstore_words(k + c / 8 * 64 + 4 * l, word);
        }
}

// V of 16 tokens, rotated, as [channel][token].
void rotate_strip(const float *const *value, int v_size, float *turned) {
    const uint32_t *row[kStrip];
    for (int t = 0; t < kStrip; ++t) row[t] = reinterpret_cast<const uint32_t *>(value[t]);
    transpose(row, v_size, reinterpret_cast<uint32_t *>(turned));
    const int block = rotation_block(v_size);
    const float unit = 1 / __builtin_sqrtf(static_cast<float>(block));
    for (int c = 0; c < v_size; ++c)
        for (int l = 0; l < kStrip; l += W) {
            float *at = turned + c * kStrip + l;
            vstore(at, vmul(vload(at), vset(kSigns.of[c] * unit)));
        }
    for (int half = 1; half < block; half *= 2)
        for (int first = 0; first < v_size; first += 2 * half)
            for (int at = first * kStrip; at < (first + half) * kStrip; at += W) {
                const vf a = vload(turned + at), b = vload(turned + at + half * kStrip);
                vstore(turned + at, vadd(a, b));
                vstore(turned + at + half * kStrip, vsub(a, b));
            }
}

// Codes of a strip of rotated V, which `level` gives for channel and lane, into panels of 4 bits.
template <class F>
void store_nibbles(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        const int lanes = panel_lanes(v_size, c / 16);
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint8_t *to = v + c / 16 * 8 * kStrip + c % 16 * 4;
        for (int t = 0; t < kStrip; t += 8, to += 4 * lanes) {
            // Four codes and the four after them become the halves of four bytes.
            uint64_t low, high;
            std::memcpy(&low, code + t, 8);
            std::memcpy(&high, code + t + 4, 8);
            uint64_t bytes = low | high << 4;
            bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
            const uint32_t word = static_cast<uint32_t>(bytes | bytes >> 16);
            std::memcpy(to, &word, 4);
        }
    }
}

// The same of 2 bits.
template <class F>
void store_pairs(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint32_t word = 0;
        for (int t = 0; t < kStrip; ++t) word |= uint32_t{code[t]} << (8 * (t % 4) + 2 * (t / 4));
        std::memcpy(v + c / 16 * 4 * kStrip + c % 16 * 4, &word, 4);
    }
}

// The same of 3 bits.
template <class F>
void store_triples(int v_size, uint8_t *v, F level) {
    for (int c = 0; c < v_size; ++c) {
        alignas(64) uint16_t code[kStrip];
        for (int l = 0; l < kStrip; l += W) vstore_words16(code + l, to_int(level(c, l)));
        uint8_t *panel = v + c / 16 * code_panel_bytes(3, 16);
        uint8_t *shared = panel + 4 * panel_lanes(v_size, c / 16) + c % 8 * 4;
        uint32_t low = 0, high = 0;
        if (c % 16 >= 8) std::memcpy(&high, shared, 4);
        for (int t = 0; t < kStrip; ++t) {
            low |= uint32_t{code[t]} % 4 << (8 * (t % 4) + 2 * (t / 4));
            high |= uint32_t{code[t]} / 4 << (8 * (t % 4) + c % 16 / 8 * 4 + t / 4);
        }
        std::memcpy(panel + c % 16 * 4, &low, 4);
        std::memcpy(shared, &high, 4);
    }
}

// V of 16 tokens, lanes being tokens, on the grids scale * (-7.5, -6.5, ..., 7.5): for each token
// the best of a few clipping points, its scale then fitted by least squares.
void encode_int4_values(const float *const *value, int v_size, uint16_t *scale, uint8_t *v) {
    constexpr float kClips[] = {1.0f, 0.88f, 0.76f, 0.66f};
    constexpr int N = kStrip / W;
    alignas(64) float turned[kMaxHead * kStrip];
    rotate_strip(value, v_size, turned);
    alignas(64) float best[kStrip] = {}, gain[kStrip] = {}, peaks[kStrip], inverses[kStrip];
    for (int l = 0; l < kStrip; l += W) {
        vf peak = vzero();
        for (int c = 0; c < v_size; ++c) peak = vmax(vabs(vload(turned + c * kStrip + l)), peak);
        vstore(peaks + l, peak);
    }
    for (const float clip : kClips) {
        for (int t = 0; t < kStrip; ++t)
            inverses[t] = peaks[t] > 1e-30f ? 7.5f / (peaks[t] * clip) : 0.0f;
        vf dot[N], norm[N], inverse[N];
        repeat<N>(KVC_LAMBDA(i) {
            dot[i] = norm[i] = vzero();
            inverse[i] = vload(inverses + i * W);
        });
        for (int c = 0; c < v_size; ++c)
            repeat<N>(KVC_LAMBDA(i) {
                const vf y = vload(turned + c * kStrip + i * W);
                const vf code = vround(vclamp(vfma(y, inverse[i], vset(7.5f)), 0, 15));
                const vf level = vsub(code, vset(7.5f));
                dot[i] = vfma(y, level, dot[i]);
                norm[i] = vfma(level, level, norm[i]);
            });
        alignas(64) float dots[kStrip], norms[kStrip];
        repeat<N>(KVC_LAMBDA(i) {
            vstore(dots + i * W, dot[i]);
            vstore(norms + i * W, norm[i]);
        });
        for (int t = 0; t < kStrip; ++t) {
            // What least squares takes off the squared error.
            const float gained = dots[t] / norms[t] * dots[t];
            if (gained > gain[t]) gain[t] = gained, best[t] = dots[t] / norms[t];
        }
    }
    for (int t = 0; t < kStrip; ++t) {
        scale[t] = float_to_half(least(best[t], kHalfMax));
        const float rounded = half_to_float(scale[t]);
        inverses[t] = rounded > 0 ? 1 / rounded : 0;
    }
    store_nibbles(v_size, v, [&](int c, int l) {
        const vf y = vmul(vload(turned + c * kStrip + l), vload(inverses + l));
        return vclamp(vadd(y, vset(7.5f)), 0, 15);
    });
}

// ------------------------------------------------------------------------------------ fitted pages

constexpr int kMostExceptions = 128;  // of a page; so many that their codes' loss says little

// The tokens of a page that lose most, the first of equal ones: kept in order of their loss.
struct Worst {
    int count = 0, most;
    float loss[kMostExceptions];
    int32_t token[kMostExceptions];

    explicit Worst(int limit) : most(limit) {}
    void offer(float own, int32_t t) {
        if (count == most && (most == 0 || !(own > loss[most - 1]))) return;
        int i = count < most ? count++ : most - 1;
        for (; i > 0 && own > loss[i - 1]; --i) loss[i] = loss[i - 1], token[i] = token[i - 1];
        loss[i] = own;
        token[i] = t;
    }
};

// Codes of 16 keys, given as [channel][token] without what `table` takes off first; adds up what
// each token loses.
void encode_fitted_keys(const kvc_head_table &head, int k_size, float *keys, float *loss,
                        uint8_t *k) {
    alignas(64) float x[kMaxHead * kStrip];
    for (int c = 0; c < k_size; ++c)
        for (int l = 0; l < kStrip; l += W) {
            float *at = keys + c * kStrip + l;
            vstore(at, vsub(vload(at), vset(head.mean[c])));
        }
    multiply_rows(head.forward, k_size, nullptr, k_size, k_size, keys, x);
    int bits[kMaxHead / 4] = {};
    for (int i = 0; i < head.pieces; ++i) bits[head.piece[i].quad] += head.piece[i].bits;
    alignas(64) int32_t code[kMaxHead * kStrip], words[kStrip * kMaxHead / 4] = {};
    for (int c = 0; c < k_size; ++c) {
        const float centre = middle(bits[c / 4]), top = 2 * centre;
        for (int l = 0; l < kStrip; l += W) {
            const vf own = vload(x + c * kStrip + l);
            const vf level = vround(vclamp(vadd(own, vset(centre)), 0, top));
            const vf error = vsub(own, vsub(level, vset(centre)));
            vstore(loss + l, vfma(vmul(error, error), vset(head.cost[c]), vload(loss + l)));
            vstore_words(code + c * kStrip + l, to_int(level));
        }
    }
    for (int i = 0; i < head.pieces; ++i) {
        const kvc_piece piece = head.piece[i];
        for (int j = 0; j < 4; ++j)
            for (int l = 0; l < kStrip; l += W) {
                const uint8_t *from =
                    reinterpret_cast<const uint8_t *>(code + (4 * piece.quad + j) * kStrip + l);
                int32_t *to = words + piece.word * kStrip + l;
                const vi field =
                    vand(vright(vload_words<W>(from), piece.weight), (1 << piece.bits) - 1);
                vstore_words(to, vor(vload_words<W>(reinterpret_cast<const uint8_t *>(to)),
                                     vleft(field, 8 * j + piece.first)));
            }
    }
    std::memcpy(k, words, size_t{4} * kStrip * head.words);
}

// V of 16 tokens with a scale each that loses least with the codes of a unit variance.
void encode_fitted_values(const kvc_head_table &head, const float *const *value, int v_size,
                          TokenScales &scales, uint8_t *v) {
    alignas(64) float turned[kMaxHead * kStrip];
    alignas(64) float inverse[kStrip], dots[kStrip], norms[kStrip];
    rotate_strip(value, v_size, turned);
    const float centre = middle(head.v_bits), top = 2 * centre;
    const auto level = [&](int c, int l) {
        const vf y = vmul(vload(turned + c * kStrip + l), vload(inverse + l));
        return vround(vclamp(vadd(y, vset(centre)), 0, top));
    };
    for (int l = 0; l < kStrip; l += W) {
        vf square = vzero(), dot = vzero(), norm = vzero();
        for (int c = 0; c < v_size; ++c) {
            const vf y = vload(turned + c * kStrip + l);
            square = vfma(y, y, square);
        }
        vstore(norms + l, square);
        for (int t = l; t < l + W; ++t) {
            const float rms = __builtin_sqrtf(norms[t] / static_cast<float>(v_size));
            inverse[t] = rms > 1e-30f && rms < 1e30f ? 1 / (rms * head.v_step) : 0.0f;
        }
        for (int c = 0; c < v_size; ++c) {
            const vf code = vsub(level(c, l), vset(centre));
            dot = vfma(vload(turned + c * kStrip + l), code, dot);
            norm = vfma(code, code, norm);
        }
        vstore(dots + l, dot);
        vstore(norms + l, norm);
    }
    for (int t = 0; t < kStrip; ++t) {
        const float scale = inverse[t] > 0 ? dots[t] / norms[t] : 0.0f;
        const float byte = scale > 0 ? 128 + 16 * __builtin_log2f(scale) : 0.0f;
        scales.v[t] = scale > 0 ? static_cast<uint8_t>(clamp(byte + 0.5f, 1, 255)) : 0;
    }
    if (head.v_bits == 4)
        store_nibbles(v_size, v, level);
    else if (head.v_bits == 3)
        store_triples(v_size, v, level);
    else
        store_pairs(v_size, v, level);
}

KVC_INLINE float int8_row(const float *x, int size, uint16_t &scale, uint8_t *to) {
    const float inverse = int8_scale(x, size, scale);
    for (int c = 0; c < size; ++c)
        to[c] = static_cast<uint8_t>(
            static_cast<int8_t>(__builtin_rintf(clamp(x[c] * inverse, -127, 127))));
    return inverse;
}

// The first tokens of a request draw attention whatever the query.
constexpr int kSinks = 4;

void encode_fitted(const Layer &layer, int codec, int own, uint8_t *page, int count,
                   const float *key, const float *value) {
    const kvc_table &table = *layer.table(codec);
    const kvc_head_table &head = table.heads[own];
    const PageLayout at = layer.layout(codec, own);
    const int k_size = layer.k_size, v_size = layer.v_size;
    alignas(64) const float zeros[kMaxHead] = {};
    Worst worst(least(head.exceptions, count));
    for (int first = 0; first < count; first += kStrip) {
        const int n = least(kStrip, count - first);
        const float *v_rows[kStrip];
        const uint32_t *k_rows[kStrip];
        for (int t = 0; t < kStrip; ++t) {
            const float *k_row = t < n ? key + int64_t{first + t} * k_size : zeros;
            k_rows[t] = reinterpret_cast<const uint32_t *>(k_row);
            v_rows[t] = t < n ? value + int64_t{first + t} * v_size : zeros;
        }
        alignas(64) float turned[kMaxHead * kStrip], loss[kStrip] = {};
        transpose(k_rows, k_size, reinterpret_cast<uint32_t *>(turned));
        int32_t position;
        get_positions(at, codec, layer.page_bytes, page, first, 1, &position);
        if (table.local) {
            float angle[kMaxHead];
            angles(table, k_size, position, angle);
            turn_strip(angle, k_size, true, turned);
        }
        uint8_t *k = page + at.strip_at(first / kStrip);
        encode_fitted_keys(head, k_size, turned, loss, k);
        TokenScales scales{};
        encode_fitted_values(head, v_rows, v_size, scales, k + at.v);
        std::memcpy(page + at.scales + first / kStrip * int64_t{sizeof scales}, &scales,
                    sizeof scales);
        for (int t = 0; t < n; ++t)
            worst.offer(position + t < kSinks ? __builtin_inff() : loss[t], first + t);
    }
    for (int i = 0; i < worst.count; ++i) {
        const int32_t t = worst.token[i];
        uint8_t *bits = page + at.scales + t / kStrip * int64_t{sizeof(TokenScales)} +
                        offsetof(TokenScales, exceptions);
        uint16_t word;
        std::memcpy(&word, bits, sizeof word);
        word = static_cast<uint16_t>(word | 1u << t % kStrip);
        std::memcpy(bits, &word, sizeof word);
    }
    uint8_t *scales = page + at.exceptions;
    uint8_t *k = scales + int64_t{head.exceptions} * 4;
    uint8_t *v = k + int64_t{head.exceptions} * k_size;
    each_exception(at, page, count, worst.count, [&](int number, int token) {
        uint16_t scale[2];
        int8_row(key + int64_t{token} * k_size, k_size, scale[0], k + int64_t{number} * k_size);
        int8_row(value + int64_t{token} * v_size, v_size, scale[1], v + int64_t{number} * v_size);
        std::memcpy(scales + 4 * number, scale, sizeof scale);
    });
}

// ------------------------------------------------------------------------------------ any page

void encode(const Layer &layer, int codec, int head, uint8_t *page, int count, const float *key,
            const float *value) {
    if (fitted(codec)) {
        encode_fitted(layer, codec, head, page, count, key, value);
        return;
    }
    const PageLayout at = layer.layout(codec, head);
    const int k_size = layer.k_size, v_size = layer.v_size;
    alignas(64) const float zeros[kMaxHead] = {};
    float low[kMaxHead], inverse[kMaxHead];
    for (int first = 0; first < count; first += kStrip) {
        const int strip = first / kStrip, place = strip % at.group_strips;
        const float *k_rows[kStrip], *v_rows[kStrip];
        for (int t = 0; t < kStrip; ++t) {
            const bool there = first + t < count;
            k_rows[t] = there ? key + int64_t{first + t} * k_size : zeros;
            v_rows[t] = there ? value + int64_t{first + t} * v_size : zeros;
        }
        uint8_t *k = page + at.strip_at(strip), *v = k + at.v;
        uint16_t *scale = reinterpret_cast<uint16_t *>(page + at.group_at(strip));
        if (codec == KVC_INT8) {
            encode_int8(layer, k_rows, v_rows, scale, k, v);
        } else if (codec == KVC_INT4) {
            const int group = at.group_strips * kStrip;
            if (place == 0)
                int4_grid(k_rows[0], least(group, count - first), k_size, scale, low, inverse);
            encode_int4_keys(k_rows, k_size, low, inverse, k);
            encode_int4_values(v_rows, v_size, scale + 2 * k_size + place * kStrip, v);
        } else {
            encode_raw(layer, k_rows, v_rows, k, v);
        }
    }
}

// Reads tokens of a page strip by strip; places ascend, null: 0, 1, ...
void decode(const Layer &layer, int codec, int head, const uint8_t *page, int held, int n,
            const int32_t *places, float *key, float *value) {
    const PageLayout at = layer.layout(codec, head);
    const int k_size = layer.k_size, v_size = layer.v_size;
    const bool quantised = codec > KVC_EXACT, floats = !quantised && layer.dtype == KVC_F32;
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
            strip.scales = fitted(codec) ? page + at.scales + open * int64_t{sizeof(TokenScales)}
                                         : page + at.group_at(open);
            strip.place = fitted(codec) ? open : open % at.group_strips;
            strip.count = fitted(codec) ? least(kStrip, held - open * kStrip) : kStrip;
            strip.page = page;
            strip.codec = codec;
            strip.head = head;
            if (quantised) {
                expand_codec(layer, codec, strip, key != nullptr ? keys : nullptr,
                             value != nullptr ? values : nullptr);
            } else if (floats) {
                from_k = reinterpret_cast<const float *>(strip.k);
                from_v = reinterpret_cast<const float *>(strip.v);
            } else {
                if (key != nullptr) expand_raw(strip.k, keys, kStrip, k_size, layer.dtype);
                if (value != nullptr) expand_raw_v(strip.v, values, v_size, layer.dtype);
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
            if (rotates_v(codec)) {
                std::memset(row + v_size, 0, sizeof(float) * 16);
                rotate_back(row, v_size);
            }
            std::memcpy(value + int64_t{i} * v_size, row, sizeof(float) * v_size);
        }
    }
    if (!fitted(codec)) return;
    // Exceptions among them, in the order of their tokens.
    const int all = head_table(layer, codec, head).exceptions;
    int i = 0;
    each_exception(
        at, page, held, layer.exceptions(codec, head, held, page), [&](int number, int token) {
            while (i < n && (places != nullptr ? places[i] : i) < token) ++i;
            if (i == n || (places != nullptr ? places[i] : i) != token) return;
            uint16_t scale[2];
            std::memcpy(scale, page + at.exceptions + 4 * number, sizeof scale);
            const int8_t *k =
                reinterpret_cast<const int8_t *>(page + at.exceptions) + int64_t{4} * all;
            const int8_t *v = k + int64_t{all} * k_size + int64_t{number} * v_size;
            k += int64_t{number} * k_size;
            for (int c = 0; c < k_size && key != nullptr; ++c)
                key[int64_t{i} * k_size + c] = static_cast<float>(k[c]) * half_to_float(scale[0]);
            for (int c = 0; c < v_size && value != nullptr; ++c)
                value[int64_t{i} * v_size + c] = static_cast<float>(v[c]) * half_to_float(scale[1]);
        });
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
