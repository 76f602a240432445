// Codecs fitted to a model: keys as components of unequal bits (kvc_head_table), rotated values in
// equal ones, a few tokens as int8.
#pragma once

#include "codecs/fitted_query.h"
#include "codecs/int8.h"
#include "codecs/rope.h"
#include "kernels/codes.h"

namespace kvc::KVC_NAMESPACE {

KVC_INLINE const kvc_head_table &head_table(const Layer &layer, int codec, int head) {
    return layer.table(codec)->heads[head];
}

// Scales of values: 2^((i - 128) / 16), and 0. Made by the compiler: code that runs when the
// library is loaded would need this unit's instructions on every CPU.
struct ScaleTable {
    float of[256] = {};
    constexpr ScaleTable() {
        constexpr double sixteenth[16] = {
            1.0,
            1.0442737824274138,
            1.0905077326652577,
            1.1387886347566916,
            1.189207115002721,
            1.241857812073484,
            1.2968395546510096,
            1.3542555469368927,
            1.4142135623730951,
            1.4768261459394993,
            1.5422108254079407,
            1.6104903319492543,
            1.681792830507429,
            1.7562521603732995,
            1.8340080864093424,
            1.9152065613971474,
        };
        double power = 1.0 / 256;  // 2^-8 at 0
        for (int i = 0; i < 256; i += 16, power *= 2)
            for (int j = 0; j < 16; ++j) of[i + j] = static_cast<float>(power * sixteenth[j]);
        of[0] = 0;
    }
};
inline constexpr ScaleTable kScales{};

KVC_INLINE void token_scales(const uint8_t *scales, int count, float *to) {
    for (int t = 0; t < kStrip; ++t) to[t] = t < count ? kScales.of[scales[t]] : 0.0f;
}

// ------------------------------------------------------------------------------------ decoding

// Components of a strip's keys: x[component][16 tokens], centred codes.
inline void expand_components(const kvc_head_table &head, const uint8_t *k, float *x) {
    std::memset(x, 0, sizeof(float) * head.components * kStrip);
    for (int i = 0; i < head.pieces; ++i) {
        const kvc_piece piece = head.piece[i];
        const int32_t mask = (1 << piece.bits) - 1;
        const float factor = static_cast<float>(1 << piece.weight);
        const vf by = vset(factor), start = vset(-factor * middle(piece.bits));
        for (int l = 0; l < kStrip; l += W) {
            const vi word = vload_words<W>(k + piece.word * 4 * kStrip + 4 * l);
            for (int j = 0; j < 4; ++j) {
                float *at = x + (4 * piece.quad + j) * kStrip + l;
                const vf code = to_float(vand(vright(word, 8 * j + piece.first), mask));
                vstore(at, vadd(vload(at), vfma(code, by, start)));
            }
        }
    }
}

// rows[r][16 tokens] = start[r] + sum over c of matrix[r][c] * x[c][16 tokens]. Four rows at a
// time.
inline void multiply_rows(const float *matrix, int64_t stride, const float *start, int rows,
                          int columns, const float *x, float *to) {
    constexpr int N = kStrip / W;
    for (int r = 0; r < rows; r += 4) {
        vf acc[4][N];
        repeat<4>(KVC_LAMBDA(i) {
            repeat<N>(
                KVC_LAMBDA(v) { acc[i][v] = start != nullptr ? vset(start[r + i]) : vzero(); });
        });
        const float *from = matrix + r * stride;
        for (int c = 0; c < columns; ++c)
            repeat<N>(KVC_LAMBDA(v) {
                const vf column = vload(x + c * kStrip + v * W);
                repeat<4>(KVC_LAMBDA(i) {
                    vaccumulate(acc[i][v], column, vbroadcast(from + i * stride + c));
                });
            });
        repeat<4>(KVC_LAMBDA(i) {
            repeat<N>(KVC_LAMBDA(v) { vstore(to + (r + i) * kStrip + v * W, acc[i][v]); });
        });
    }
}

// Keys of a strip as a float32 panel [k_size][16 tokens], with RoPE.
inline void expand_fitted_keys(const Layer &layer, const Strip &strip, float *keys) {
    const kvc_table &table = *layer.table(strip.codec);
    const kvc_head_table &head = table.heads[strip.head];
    alignas(64) float x[kMaxHead * kStrip];
    expand_components(head, strip.k, x);
    multiply_rows(head.inverse, head.stride, head.mean, layer.k_size, head.components, x, keys);
    if (table.local) {
        float angle[kMaxHead];
        angles(table, layer.k_size, strip_position(layer, strip), angle, angle + layer.k_size / 2);
        turn_strip(angle, layer.k_size, false, keys);
    }
}

// Rotated values of a strip as float32 panels. The last 8 channels may write 8 floats more.
inline void expand_fitted_values(const Layer &layer, const Strip &strip, float *values) {
    const int bits = head_table(layer, strip.codec, strip.head).v_bits, mask = bits == 4 ? 15 : 3;
    float scale[kStrip];
    token_scales(strip.scales, strip.count, scale);
    const vf centre = vset(middle(bits));
    const uint8_t *from = strip.v;
    for (int c = 0; c < layer.v_size; c += 16) {
        const int lanes = panel_lanes(layer.v_size, c / 16);
        alignas(64) uint32_t high[2 * 8] = {};
        if (bits == 3) {
            std::memcpy(high, from + 4 * lanes, 32);
            for (int l = 0; l < 8; ++l) high[8 + l] = high[l] >> 4;
        }
        for (int t = 0; t < kStrip; ++t) {
            // In 4 bits a word holds rows 0-3 low and 4-7 high; in 2 bits rows 0-3, 4-7, ...
            const int word = bits == 4 ? t / 8 : 0, field = bits == 4 ? t % 8 / 4 : t / 4;
            const int shift = 8 * (t % 4) + (bits == 4 ? 4 : 2) * field;
            for (int l = 0; l < lanes; l += W) {
                const uint8_t *at = from + (word * lanes + l) * 4;
                const vi eight = lanes == 8 ? vload_words<8>(at) : vload_words<W>(at);
                vf code = to_float(vand(vright(eight, shift), mask));
                if (bits == 3) {
                    const vi top = vload_words<W>(reinterpret_cast<const uint8_t *>(high + l));
                    const vf bit = to_float(vand(vright(top, 8 * (t % 4) + t / 4), 1));
                    code = vfma(bit, vset(4), code);
                }
                vstore(values + t * lanes + l, vmul(vsub(code, centre), vset(scale[t])));
            }
        }
        from += code_panel_bytes(bits, lanes);
        values += kStrip * lanes;
    }
}

// A strip of exceptions as float32 panels: zeros where it has no token.
inline void expand_exceptions(const Layer &layer, const Strip &strip, float *keys, float *values) {
    const int k_size = layer.k_size, v_size = layer.v_size;
    const int all = head_table(layer, strip.codec, strip.head).exceptions;
    const uint8_t *scales = strip.k + int64_t{strip.place} * 4;
    const int8_t *k = reinterpret_cast<const int8_t *>(strip.k + int64_t{all} * 4) +
                      int64_t{strip.place} * k_size;
    const int8_t *v = reinterpret_cast<const int8_t *>(strip.k + int64_t{all} * (4 + k_size)) +
                      int64_t{strip.place} * v_size;
    if (keys != nullptr) std::memset(keys, 0, sizeof(float) * kStrip * k_size);
    if (values != nullptr) std::memset(values, 0, sizeof(float) * kStrip * v_size);
    for (int t = 0; t < strip.count; ++t) {
        uint16_t scale[2];
        std::memcpy(scale, scales + 4 * t, sizeof scale);
        const float k_scale = half_to_float(scale[0]), v_scale = half_to_float(scale[1]);
        for (int c = 0; c < k_size && keys != nullptr; ++c)
            keys[c * kStrip + t] = static_cast<float>(k[t * k_size + c]) * k_scale;
        for (int c = 0; c < v_size && values != nullptr; ++c) {
            const int lanes = panel_lanes(v_size, c / 16);
            values[c / 16 * 16 * kStrip + t * lanes + c % 16] =
                static_cast<float>(v[t * v_size + c]) * v_scale;
        }
    }
}

// ------------------------------------------------------------------------------------ encoding

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
inline void encode_fitted_keys(const kvc_head_table &head, int k_size, float *keys, float *loss,
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

// V of 16 tokens with the codes of a unit variance and a scale each with which a value keeps its
// length.
inline void encode_fitted_values(const kvc_head_table &head, const float *const *value, int v_size,
                                 TokenScales &scales, uint8_t *v) {
    alignas(64) float turned[kMaxHead * kStrip];
    alignas(64) float inverse[kStrip], codes[kStrip], norms[kStrip];
    rotate_strip(value, v_size, turned);
    const float centre = middle(head.v_bits), top = 2 * centre;
    const auto level = [&](int c, int l) {
        const vf y = vmul(vload(turned + c * kStrip + l), vload(inverse + l));
        return vround(vclamp(vadd(y, vset(centre)), 0, top));
    };
    for (int l = 0; l < kStrip; l += W) {
        vf square = vzero(), length = vzero();
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
            length = vfma(code, code, length);
        }
        vstore(codes + l, length);
    }
    for (int t = 0; t < kStrip; ++t) {
        const float square = inverse[t] > 0 ? norms[t] / codes[t] : 0.0f;
        const float byte = square > 0 ? 128 + 8 * __builtin_log2f(square) : 0.0f;
        scales.v[t] = square > 0 ? static_cast<uint8_t>(clamp(byte + 0.5f, 1, 255)) : 0;
    }
    if (head.v_bits == 4)
        store_nibbles(v_size, v, level);
    else if (head.v_bits == 3)
        store_triples(v_size, v, level);
    else
        store_pairs(v_size, v, level);
}
// The first tokens of a request draw attention whatever the query.
constexpr int kSinks = 4;

inline void encode_fitted(const Layer &layer, int codec, int own, uint8_t *page, int count,
                          const float *key, const float *value) {
    const kvc_table &table = *layer.table(codec);
    const kvc_head_table &head = table.heads[own];
    const PageLayout at = layer.layout(codec, own);
    const int k_size = layer.k_size, v_size = layer.v_size;
    Worst worst(least(head.exceptions, count));
    each_strip(layer, count, key, value,
               [&](int strip, int n, const float *const *k_rows, const float *const *v_rows) {
                   const int first = strip * kStrip;
                   alignas(64) float turned[kMaxHead * kStrip], loss[kStrip] = {};
                   turn_rows(k_rows, k_size, turned);
                   int32_t position;
                   get_positions(at, codec, layer.page_bytes, page, first, 1, &position);
                   if (table.local) {
                       float angle[kMaxHead];
                       angles(table, k_size, position, angle, angle + k_size / 2);
                       turn_strip(angle, k_size, true, turned);
                   }
                   uint8_t *k = page + at.strip_at(strip);
                   encode_fitted_keys(head, k_size, turned, loss, k);
                   TokenScales scales{};
                   encode_fitted_values(head, v_rows, v_size, scales, k + at.v);
                   std::memcpy(page + at.scales_at(strip), &scales, sizeof scales);
                   for (int t = 0; t < n; ++t)
                       worst.offer(position + t < kSinks ? __builtin_inff() : loss[t], first + t);
               });
    for (int i = 0; i < worst.count; ++i) {
        const int32_t t = worst.token[i];
        uint8_t *bits = page + at.scales_at(t / kStrip) + offsetof(TokenScales, exceptions);
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

// Puts the exceptions among the first `held` tokens of a page into what was read of tokens
// places[0..n), or the first n if places is null.
inline void decode_exceptions(const Layer &layer, int codec, int head, const uint8_t *page,
                              int held, int n, const int32_t *places, float *key, float *value) {
    const PageLayout at = layer.layout(codec, head);
    const int k_size = layer.k_size, v_size = layer.v_size;
    const int all = head_table(layer, codec, head).exceptions;
    const auto place = [&](int i) { return places != nullptr ? places[i] : i; };
    int i = 0;  // both go in the order of tokens
    each_exception(
        at, page, held, layer.exceptions(codec, head, held, page), [&](int number, int token) {
            while (i < n && place(i) < token) ++i;
            if (i == n || place(i) != token) return;
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

struct Fitted : Expanded<Fitted> {
    static void expand(const Layer &layer, const Strip &strip, float *keys, float *values) {
        if (keys != nullptr) expand_fitted_keys(layer, strip, keys);
        if (values != nullptr) expand_fitted_values(layer, strip, values);
    }
    static constexpr auto encode = encode_fitted;

#if defined(KVC_INTEGER_PRODUCTS)
    using Query = FittedQuery;

    static constexpr auto scores = fitted_scores;

    static void values(const Pass &pass, Query &query, float *p, const float *decay, float *sums) {
        const Tile &tile = pass.tile;
        for (int i = 0; i < tile.strips; ++i)
            token_scales(tile.strip[i].scales, tile.strip[i].count,
                         query.weights.scale + i * kStrip);
        switch (head_table(pass.layer, tile.kind, tile.strip[0].head).v_bits) {
            case 4:
                return code_values<4>(pass, query.weights, p, decay, sums);
            case 3:
                return code_values<3>(pass, query.weights, p, decay, sums);
            default:
                return code_values<2>(pass, query.weights, p, decay, sums);
        }
    }
#endif
};

// Strips of exceptions; their pages are the codec's.
struct Exceptions : Expanded<Exceptions> {
    static constexpr auto expand = expand_exceptions;
    static constexpr void (*encode)(const Layer &, int, int, uint8_t *, int, const float *,
                                    const float *) = nullptr;
};

}  // namespace kvc::KVC_NAMESPACE
