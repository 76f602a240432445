// Codecs fitted to a model: keys as components of unequal bits (kvc_head_table), rotated values in
// equal ones, a few tokens as int8.
#pragma once

#include "codecs/int8.h"
#include "kernels/codes.h"

namespace kvc::KVC_NAMESPACE {

constexpr int kMostPieces = 3 * kMaxHead / 4;  // 8 bits are 4 + 4, and one in a word may be split
constexpr int kBlockPieces = 8;                // as many products as 16 bits hold
constexpr int kMostBlocks = (kMostPieces + kBlockPieces - 1) / kBlockPieces;

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

// ------------------------------------------------------------------------------------ rotary

// Cosines, then sines, of all pairs at a position.
inline void angles(const kvc_table &table, int k_size, int64_t position, float *to) {
    // What a wrong directory finds may be anything.
    const int64_t p = least<int64_t>(most<int64_t>(position, 0), table.positions - 1);
    const int half = k_size / 2;
    const float *a = table.coarse + p / 256 * k_size, *b = table.fine + p % 256 * k_size;
    for (int j = 0; j < half; ++j) {
        const float c = a[j], s = a[half + j], x = b[j], y = b[half + j];
        to[j] = c * x - s * y;
        to[half + j] = s * x + c * y;
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
        angles(table, layer.k_size, strip_position(layer, strip), angle);
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

// ------------------------------------------------------------------------------------ products

#if defined(KVC_INTEGER_PRODUCTS)

// What becomes of the query of one token: a weight for every field of the keys' codes, in bytes,
// with a step for each block of fields.
struct FittedQuery {
    int8_t *code;  // [group][kStride]
    float *step;   // [group][kMostBlocks]
    float *shift;  // [group]
    int codec, head;
    int32_t position;  // as seen from where; -1: keys are coded as they are
    CodeWeights weights;
    // Where there are TableProducts: the table that they have packed, rows of the query as seen
    // from several strips, and their fields.
    uint16_t *packed;
    float *turned, *field;
    int packed_codec, packed_head;

    static constexpr int kStride = kMostBlocks * kBlock;

    template <class Arena>
    void take(Arena &arena, const Layer &layer) {
        const int64_t group = layer.group;
        code = arena.template take<int8_t>(group * kStride + 64);
        step = arena.template take<float>(group * kMostBlocks);
        shift = arena.template take<float>(group);
        weights.take(arena, group);
        if (!layer.has_tables()) return;
        constexpr int64_t rows = TableProducts::kRows;
        packed = arena.template take<uint16_t>(int64_t{(layer.k_size + 31) / 32 * 32} * kStride);
        turned = arena.template take<float>(rows * kMaxHead);
        field = arena.template take<float>(rows * kStride);
    }
    void begin() {
        codec = packed_codec = -1;
    }
};
static_assert(kBlock == 4 * kBlockPieces);

// Rounds a block of weights to bytes; returns their sum, each times its `middle` and the step.
KVC_INLINE float fitted_block(const float *x, const float *middles, int8_t *code, float &step) {
    vf peak = vzero();
    for (int i = 0; i < kBlock; i += W) peak = vmax(peak, vabs(vload(x + i)));
    const float largest = vhmax(peak);
    const bool any = largest > 1e-30f;  // below, the inverse would overflow
    step = any ? largest * (1 / 127.0f) : 0.0f;
    const vf inverse = vset(any ? 127.0f / largest : 0.0f);
    vf sum = vzero();
    vf rounded[kBlock / W];
    repeat<kBlock / W>(KVC_LAMBDA(i) {
        rounded[i] = vround(vmul(vload(x + i * W), inverse));
        sum = vfma(rounded[i], vload(middles + i * W), sum);
    });
    store_block(code, rounded);
    return vhsum(sum) * step;
}

// Fields first ... first + 8 N of G heads: field[g][i] = sum over channels c of x[g][c] *
// weight[c][i].
template <int G, int N>
KVC_INLINE void fitted_run(const kvc_head_table &head, int k_size, const float *x, int first,
                           float *field) {
    vf acc[G][N];
    repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { acc[g][v] = vzero(); }); });
    const float *column = head.weight + first;
    for (int c = 0; c < k_size; ++c, column += head.fields) {
        vf b[G];
        repeat<G>(KVC_LAMBDA(g) { b[g] = vbroadcast(x + g * kMaxHead + c); });
        repeat<N>(KVC_LAMBDA(v) {
            const vf m = vload(column + v * W);
            repeat<G>(KVC_LAMBDA(g) { vaccumulate(acc[g][v], m, b[g]); });
        });
    }
    repeat<G>(KVC_LAMBDA(g) {
        repeat<N>(
            KVC_LAMBDA(v) { vstore(field + g * FittedQuery::kStride + first + v * W, acc[g][v]); });
    });
}
template <int G>
KVC_APART void fitted_fields(const kvc_head_table &head, int k_size, const float *x, float *field) {
    int first = 0;
    if constexpr (W == 16 || G <= 3)  // where that many sums fit the registers
        for (; first + 32 <= head.fields; first += 32)
            fitted_run<G, 32 / W>(head, k_size, x, first, field);
    for (; first < head.fields; first += 16) fitted_run<G, 16 / W>(head, k_size, x, first, field);
    // The last block of fields may be half empty.
    if (first % kBlock != 0)
        for (int g = 0; g < G; ++g)
            for (int l = 0; l < 16; l += W)
                vstore(field + g * FittedQuery::kStride + first + l, vzero());
}

// A row of channels as seen from where the angles are.
inline void turn_query(const float *from, const float *angle, int half, float *to) {
    int j = 0;
    for (; j + W <= half; j += W) {
        const vf a = vload(from + j), b = vload(from + half + j);
        const vf c = vload(angle + j), s = vload(angle + half + j);
        vstore(to + j, vfma(b, s, vmul(a, c)));
        vstore(to + half + j, vsub(vmul(b, c), vmul(a, s)));
    }
    for (; j < half; ++j) {
        const float a = from[j], b = from[half + j];
        to[j] = a * angle[j] + b * angle[half + j];
        to[half + j] = b * angle[j] - a * angle[half + j];
    }
}

// The weights of query head g from its fields: bytes, with what the means and middles of codes
// bring.
KVC_INLINE void fitted_codes(const kvc_head_table &own, int k_size, const float *x,
                             const float *field, int g, FittedQuery &to) {
    vf mean = vzero();
    for (int c = 0; c < k_size; c += 8)
        mean = vfma(vload_lanes<8>(x + c), vload_lanes<8>(own.mean + c), mean);
    float shift = vhsum(mean);
    const int64_t at = int64_t{g} * FittedQuery::kStride;
    for (int first = 0, block = 0; first < own.fields; first += kBlock, ++block)
        shift -= fitted_block(field + first, own.middle + first, to.code + at + first,
                              to.step[g * kMostBlocks + block]);
    to.shift[g] = shift;
}

// At most this many query heads at a time.
constexpr int kQueryRun = 4;

inline void fitted_query(const Layer &layer, const Strip &strip, const float *q, FittedQuery &to) {
    const kvc_table &table = *layer.table(strip.codec);
    const kvc_head_table &own = table.heads[strip.head];
    const int32_t position = table.local ? strip_position(layer, strip) : -1;
    if (to.codec == strip.codec && to.head == strip.head && to.position == position) return;
    to.codec = strip.codec;
    to.head = strip.head;
    to.position = position;
    const int k_size = layer.k_size, group = layer.group;
    alignas(64) float turned[kQueryRun * kMaxHead], field[kQueryRun * FittedQuery::kStride];
    float angle[kMaxHead + W];
    if (table.local) angles(table, k_size, position, angle);
    for (int run = 0; run < group; run += kQueryRun) {
        const int heads = least(kQueryRun, group - run);
        const float *x = q + run * kMaxHead;
        if (table.local) {
            for (int g = 0; g < heads; ++g)
                turn_query(x + g * kMaxHead, angle, k_size / 2, turned + g * kMaxHead);
            x = turned;
        }
        switch (heads) {
            case 1:
                fitted_fields<1>(own, k_size, x, field);
                break;
            case 2:
                fitted_fields<2>(own, k_size, x, field);
                break;
            case 3:
                fitted_fields<3>(own, k_size, x, field);
                break;
            default:
                fitted_fields<kQueryRun>(own, k_size, x, field);
        }
        for (int g = 0; g < heads; ++g)
            fitted_codes(own, k_size, x + g * kMaxHead, field + g * FittedQuery::kStride, run + g,
                         to);
    }
}

// The same for the next strips of a tile together, as many as `tiles` takes rows; returns how many,
// whose fields are then in `to.field`.
inline int fitted_rows(const Pass &pass, int first, const float *q, FittedQuery &to) {
    const Layer &layer = pass.layer;
    const Strip *strip = pass.tile.strip + first;
    const kvc_table &table = *layer.table(strip->codec);
    const kvc_head_table &own = table.heads[strip->head];
    const int k_size = layer.k_size, group = layer.group;
    if (to.packed_codec != strip->codec || to.packed_head != strip->head) {
        pass.products->pack(own, k_size, to.packed);
        to.packed_codec = strip->codec;
        to.packed_head = strip->head;
    }
    const int strips = least(pass.tile.strips - first, TableProducts::kRows / group);
    to.codec = -1;  // codes will not be what fitted_query left
    float angle[kMaxHead + W];
    for (int i = 0; i < strips; ++i) {
        angles(table, k_size, strip_position(layer, strip[i]), angle);
        for (int g = 0; g < group; ++g)
            turn_query(q + g * kMaxHead, angle, k_size / 2, to.turned + (i * group + g) * kMaxHead);
    }
    pass.products->multiply(to.packed, k_size, own.fields, to.turned, strips * group, to.field,
                            FittedQuery::kStride);
    return strips;
}

// Scores of NP strips of keys.
template <int G, int NP>
KVC_APART void fitted_k(const uint8_t *const *strip, const kvc_head_table &head, const int8_t *q,
                        const float *step, const float *shift, float *s,
                        const uint8_t *const *next) {
    constexpr int N = NP * vectors(kStrip), NV = vectors(kStrip);
    vf acc[G][N];
    const uint8_t *panel[NP];
    repeat<NP>(KVC_LAMBDA(j) {
        panel[j] = strip[j];
        for (int word = 0; word < head.words; ++word) prefetch(next[j] + word * 4 * kStrip);
    });
    repeat<G>(KVC_LAMBDA(g) {
        const vf start = vset(shift[g]);
        repeat<N>(KVC_LAMBDA(v) { acc[g][v] = start; });
    });
    for (int first = 0; first < head.pieces; first += kBlockPieces, ++step) {
        const int last = least(head.pieces, first + kBlockPieces);
        vi sum[G][N];
        repeat<G>(KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { sum[g][v] = ivzero(); }); });
        for (int i = first; i < last; ++i) {
            const kvc_piece piece = head.piece[i];
            vi x[N];
            repeat<N>(KVC_LAMBDA(v) {
                x[v] = load_field<W>(panel[v / NV] + piece.word * 4 * kStrip + v % NV * 4 * W,
                                     piece.first, piece.bits);
            });
            repeat<G>(KVC_LAMBDA(g) {
                const vi b = broadcast_word(q + g * FittedQuery::kStride + 4 * i);
                repeat<N>(KVC_LAMBDA(v) { dot_bytes(sum[g][v], x[v], b); });
            });
        }
        repeat<G>(KVC_LAMBDA(g) {
            const vf factor = vset(step[g * kMostBlocks]);
            repeat<N>(
                KVC_LAMBDA(v) { acc[g][v] = vfma(bytes_total(sum[g][v]), factor, acc[g][v]); });
        });
    }
    repeat<G>(
        KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { vstore(s + g * kTile + v * W, acc[g][v]); }); });
}

#endif

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
                       angles(table, k_size, position, angle);
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

    // All strips at once where keys are coded as they are, else one by one.
    static void scores(const Pass &pass, Query &query, const float *q, float *s) {
        const Tile &tile = pass.tile;
        const kvc_table &table = *pass.layer.table(tile.kind);
        const int group = pass.layer.group, step = table.local ? 1 : tile.strips;
        const bool tiled = table.local && pass.products != nullptr && group <= TableProducts::kRows;
        int known = 0;  // strips whose fields are known, from `begin` on
        for (int first = 0, begin = 0; first < tile.strips; first += step) {
            if (tiled && first == begin + known) {
                begin = first;
                known = fitted_rows(pass, first, q, query);
            }
            for (int g = 0; tiled && g < group; ++g) {
                const int row = (first - begin) * group + g;
                fitted_codes(table.heads[tile.strip[first].head], pass.layer.k_size,
                             query.turned + row * kMaxHead, query.field + row * query.kStride, g,
                             query);
            }
            if (!tiled) fitted_query(pass.layer, tile.strip[first], q, query);
            each_k_run(step, group, [&](auto heads, auto panels, int strip, int head) {
                strip += first;
                fitted_k<decltype(heads)::count, decltype(panels)::count>(
                    tile.k + strip, table.heads[tile.strip[first].head],
                    query.code + head * FittedQuery::kStride, query.step + head * kMostBlocks,
                    query.shift + head, s + head * kTile + strip * kStrip, pass.ahead + strip);
            });
        }
    }

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
