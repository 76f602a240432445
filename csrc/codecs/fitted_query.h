// How the query of one token meets fitted keys: by a weight for every field of their codes. Keys
// coded as seen from their strip's position need the query as seen from there, so that each strip
// has weights of its own; a tile's strips get theirs together.
#pragma once

#include "codecs/rope.h"
#include "kernels/codes.h"

#if defined(KVC_INTEGER_PRODUCTS)

namespace kvc::KVC_NAMESPACE {

constexpr int kMostPieces = 3 * kMaxHead / 4;  // 8 bits are 4 + 4, and one in a word may be split
constexpr int kBlockPieces = 8;                // as many products as 16 bits hold
constexpr int kMostBlocks = (kMostPieces + kBlockPieces - 1) / kBlockPieces;
static_assert(kBlock == 4 * kBlockPieces);

// Queries become integers of at most so many steps: their products with kMaxHead of a table's
// weights, up to 4095, just fit 32 bits.
constexpr float kQuerySteps = 2047;
static_assert(int64_t{2047} * 4095 * kMaxHead < int64_t{1} << 31);

// Channels c and c + k_size / 2, which rotate together, are a word of two 16-bit integers. Rows of
// words end with zeros; those of floats have the second halves from kHalf on.
constexpr int kHalf = kMaxHead / 2;

// Two floats as the halves of a word.
KVC_INLINE vi word_pairs(vf low, vf high) {
    return vor(vleft(to_int(high), 16), vand(to_int(low), 65535));
}

// Rows go together in such numbers.
constexpr int kRowsAtOnce = 8;

struct FittedQuery {
    // Of each row, which is a query head as seen from one strip: what meets codes.
    int8_t *code;  // [row][stride]
    float *step;   // [block of fields][rows]
    float *shift;  // [row]
    // What leads there.
    int32_t *turned;  // [row][kHalf] words
    float *field;     // [row][stride]
    float *row_unit;  // [row]
    // The query in steps, and what one is.
    float *steps, *unit;  // [group][kMaxHead], [group]
    // Of the table of `codec` and `head`.
    float *mean;       // [kMaxHead]
    uint16_t *packed;  // weights for TableProducts
    int codec, head;   // -1: of no table
    int rows, stride;
    bool in_steps, known;  // known: of keys coded as they are, rows are there
    CodeWeights weights;   // of values

    static constexpr int kFields = kMostBlocks * kBlock;

    static int most_rows(int group) {
        constexpr int unit = TableProducts::kRows;
        return (group + unit - 1) / unit * unit;
    }

    template <class Arena>
    void take(Arena &arena, const Layer &layer) {
        weights.take(arena, layer.group);
        if (!layer.has_tables()) return;
        rows = most_rows(layer.group);
        const int64_t words = (layer.k_size / 2 + 15) / 16 * 16;
        code = arena.template take<int8_t>(int64_t{rows} * kFields + 64);
        step = arena.template take<float>(int64_t{rows} * kMostBlocks);
        shift = arena.template take<float>(rows);
        turned = arena.template take<int32_t>(int64_t{rows} * kHalf);
        field = arena.template take<float>(int64_t{rows} * kFields);
        row_unit = arena.template take<float>(rows);
        steps = arena.template take<float>(int64_t{layer.group} * kMaxHead);
        unit = arena.template take<float>(layer.group);
        mean = arena.template take<float>(kMaxHead);
        packed = arena.template take<uint16_t>(2 * words * kFields);
    }
    void begin() {
        codec = -1;
        in_steps = false;
    }
};

// ------------------------------------------------------------------------------------ the table

inline void use_table(const Layer &layer, const TableProducts *products, const Strip &strip,
                      const kvc_head_table &own, FittedQuery &to) {
    if (to.codec == strip.codec && to.head == strip.head) return;
    to.codec = strip.codec;
    to.head = strip.head;
    to.known = false;
    to.stride = (own.fields + kBlock - 1) / kBlock * kBlock;
    const int half = layer.k_size / 2;
    if (products != nullptr) products->pack(own.weight, half, own.fields, to.packed);
    std::memset(to.mean, 0, sizeof(float) * kMaxHead);
    std::memcpy(to.mean, own.mean, sizeof(float) * half);
    std::memcpy(to.mean + kHalf, own.mean + half, sizeof(float) * half);
    // The last block of fields may be half empty.
    for (int r = 0; r < to.rows && own.fields != to.stride; ++r)
        for (int l = 0; l < 16; l += W)
            vstore(to.field + int64_t{r} * to.stride + own.fields + l, vzero());
}

// ------------------------------------------------------------------------------------ the query

// Query heads in steps of the longest pair of channels, which no rotation makes longer.
inline void query_steps(const Layer &layer, const float *q, FittedQuery &to) {
    if (to.in_steps) return;
    to.in_steps = true;
    const int half = layer.k_size / 2;
    std::memset(to.steps, 0, sizeof(float) * kMaxHead * layer.group);
    for (int g = 0; g < layer.group; ++g) {
        float *own = to.steps + g * kMaxHead;
        std::memcpy(own, q + g * kMaxHead, sizeof(float) * half);
        std::memcpy(own + kHalf, q + g * kMaxHead + half, sizeof(float) * half);
        vf square = vset(1e-30f);
        for (int c = 0; c < half; c += W) {
            const vf low = vload(own + c), high = vload(own + kHalf + c);
            square = vmax(vfma(low, low, vmul(high, high)), square);
        }
        const float longest = __builtin_sqrtf(vhmax(square));
        to.unit[g] = longest / kQuerySteps;
        const vf inverse = vset(kQuerySteps / longest);
        for (int c = 0; c < half; c += W) {
            vstore(own + c, vmul(vload(own + c), inverse));
            vstore(own + kHalf + c, vmul(vload(own + kHalf + c), inverse));
        }
    }
}

// A query head as seen from where the angles are, cosines and sines from kHalf on, as a row of
// words; returns its product with the mean of keys.
template <bool turn>
KVC_INLINE float row_words(const float *x, const float *angle, const float *mean, int half,
                           int32_t *to) {
    vf sum = vzero();
    int c = 0;
    for (; c < half; c += W) {
        vf a = vload(x + c), b = vload(x + kHalf + c);
        if constexpr (turn) {
            const vf cosine = vload(angle + c), sine = vload(angle + kHalf + c);
            const vf low = vfma(b, sine, vmul(a, cosine));
            b = vsub(vmul(b, cosine), vmul(a, sine));
            a = low;
        }
        sum = vfma(a, vload(mean + c), sum);
        sum = vfma(b, vload(mean + kHalf + c), sum);
        vstore_words(to + c, word_pairs(a, b));
    }
    for (; c % 16 != 0; c += W) vstore_words(to + c, ivzero());  // TableProducts read 16 words
    return vhsum(sum);
}

// ------------------------------------------------------------------------------------ products

// Fields first ... first + N W of R rows, in steps of the query.
template <int R, int N>
KVC_INLINE void field_run(const kvc_head_table &own, const FittedQuery &query, int words, int row,
                          int first) {
    vi sum[R][N];
    repeat<R>(KVC_LAMBDA(r) { repeat<N>(KVC_LAMBDA(v) { sum[r][v] = ivzero(); }); });
    const int32_t *x = query.turned + row * kHalf, *column = own.weight + first;
    for (int c = 0; c < words; ++c, ++x, column += own.fields) {
        vi weight[N];
        repeat<N>(KVC_LAMBDA(v) {
            weight[v] = vload_words<W>(reinterpret_cast<const uint8_t *>(column + v * W));
        });
        repeat<R>(KVC_LAMBDA(r) {
            const vi both = ivset(x[r * kHalf]);
            repeat<N>(KVC_LAMBDA(v) { dot_pairs(sum[r][v], weight[v], both); });
        });
    }
    repeat<N>(KVC_LAMBDA(v) {
        const vf step = vload(own.step + first + v * W);
        repeat<R>(KVC_LAMBDA(r) {
            vstore(query.field + int64_t{row + r} * query.stride + first + v * W,
                   vmul(to_float(sum[r][v]), step));
        });
    });
}

// Fields of R rows; sums and columns fit the registers.
template <int R>
KVC_INLINE void fields_of(const kvc_head_table &own, const FittedQuery &query, int words, int row) {
    if constexpr (W == 16) {
        int first = 0, left = own.fields / 16;
        for (; left > 4 || left == 3; first += 48, left -= 3)
            field_run<R, 3>(own, query, words, row, first);
        for (; left >= 2; first += 32, left -= 2) field_run<R, 2>(own, query, words, row, first);
        if (left == 1) field_run<R, 1>(own, query, words, row, first);
    } else {
        for (int first = 0; first < own.fields; first += 16)
            for (int r = 0; r < R; r += 4) field_run<4, 16 / W>(own, query, words, row + r, first);
    }
}

// Fields of eight rows as bytes, with a step for each block of them; what they bring with the
// middles of codes comes off the shift.
inline void codes_of(const kvc_head_table &own, int row, FittedQuery &query) {
    static_assert(kRowsAtOnce == 8);
    constexpr int N = kBlock / W;
    const float *field = query.field + int64_t{row} * query.stride;
    int8_t *code = query.code + int64_t{row} * query.stride;
    const eight unit = load_eight(query.row_unit + row);
    eight shift = load_eight(query.shift + row);
    for (int first = 0, block = 0; first < own.fields; first += kBlock, ++block) {
        eight part[8];
        repeat<8>(KVC_LAMBDA(r) {
            vf peak = vzero();
            repeat<N>(KVC_LAMBDA(v) {
                peak = vmax(peak, vabs(vload(field + r * query.stride + first + v * W)));
            });
            part[r] = fold_most(peak);
        });
        // Below, the inverse would overflow.
        alignas(32) float inverse[8];
        const eight step = byte_steps(most_of_each(part), inverse);
        vf middle[N];
        repeat<N>(KVC_LAMBDA(v) { middle[v] = vload(own.middle + first + v * W); });
        repeat<8>(KVC_LAMBDA(r) {
            vf rounded[N], sum = vzero();
            repeat<N>(KVC_LAMBDA(v) {
                rounded[v] =
                    vround(vmul(vload(field + r * query.stride + first + v * W), vset(inverse[r])));
                sum = vfma(rounded[v], middle[v], sum);
            });
            store_block(code + r * query.stride + first, rounded);
            part[r] = fold_sum(sum);
        });
        shift = less_product(shift, sum_of_each(part), step);
        store_eight(query.step + block * query.rows + row, times(step, unit));
    }
    store_eight(query.shift + row, times(shift, unit));
}

// Weights of `count` strips for all query heads, strip after strip.
inline void fitted_rows(const Pass &pass, const kvc_table &table, const Strip *strip, int count,
                        FittedQuery &to) {
    const Layer &layer = pass.layer;
    const kvc_head_table &own = table.heads[strip->head];
    const int half = layer.k_size / 2, group = layer.group, rows = count * group;
    alignas(64) float angle[kMaxHead];
    for (int c = half; c < (half + W - 1) / W * W; ++c) angle[c] = angle[kHalf + c] = 0;
    for (int i = 0, row = 0; i < count; ++i) {
        if (table.local)
            angles(table, layer.k_size, strip_position(layer, strip[i]), angle, angle + kHalf);
        for (int g = 0; g < group; ++g, ++row) {
            const auto words = table.local ? row_words<true> : row_words<false>;
            to.shift[row] = words(to.steps + g * kMaxHead, angle, to.mean, half,
                                  to.turned + int64_t{row} * kHalf);
            to.row_unit[row] = to.unit[g];
        }
    }
    constexpr int together = TableProducts::kRows;
    if (pass.products != nullptr)
        for (int row = 0; row < rows; row += together)
            pass.products->multiply(to.packed, half, own.fields, to.turned + int64_t{row} * kHalf,
                                    own.step, to.field + int64_t{row} * to.stride, to.stride);
    for (int row = 0; row < rows; row += kRowsAtOnce) {
        if (pass.products == nullptr && rows - row <= 4)
            fields_of<4>(own, to, half, row);
        else if (pass.products == nullptr)
            fields_of<kRowsAtOnce>(own, to, half, row);
        codes_of(own, row, to);
    }
}

// Scores of NP strips of keys. `step` has `rows` floats for each block of fields.
template <int G, int NP>
KVC_APART void fitted_k(const uint8_t *const *strip, const kvc_head_table &head, const int8_t *q,
                        int stride, const float *step, int rows, const float *shift, float *s,
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
    for (int first = 0; first < head.pieces; first += kBlockPieces, step += rows) {
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
                const vi b = broadcast_word(q + int64_t{g} * stride + 4 * i);
                repeat<N>(KVC_LAMBDA(v) { dot_bytes(sum[g][v], x[v], b); });
            });
        }
        repeat<G>(KVC_LAMBDA(g) {
            const vf factor = vset(step[g]);
            repeat<N>(
                KVC_LAMBDA(v) { acc[g][v] = vfma(bytes_total(sum[g][v]), factor, acc[g][v]); });
        });
    }
    repeat<G>(
        KVC_LAMBDA(g) { repeat<N>(KVC_LAMBDA(v) { vstore(s + g * kTile + v * W, acc[g][v]); }); });
}

// Scores of a tile: where keys are coded as they are, all strips at once.
inline void fitted_scores(const Pass &pass, FittedQuery &query, const float *q, float *s) {
    const Layer &layer = pass.layer;
    const Tile &tile = pass.tile;
    const kvc_table &table = *layer.table(tile.kind);
    const kvc_head_table &own = table.heads[tile.strip[0].head];
    const int group = layer.group;
    query_steps(layer, q, query);
    use_table(layer, pass.products, tile.strip[0], own, query);
    const auto score = [&](auto heads, auto panels, int row, int strip, int head) {
        fitted_k<decltype(heads)::count, decltype(panels)::count>(
            tile.k + strip, own, query.code + int64_t{row + head} * query.stride, query.stride,
            query.step + row + head, query.rows, query.shift + row + head,
            s + head * kTile + strip * kStrip, pass.ahead + strip);
    };
    if (!table.local) {
        if (!query.known) fitted_rows(pass, table, tile.strip, 1, query);
        query.known = true;
        each_k_run(tile.strips, group, [&](auto heads, auto panels, int strip, int head) {
            score(heads, panels, 0, strip, head);
        });
        return;
    }
    const int at_once = query.rows / group;
    for (int first = 0; first < tile.strips; first += at_once) {
        const int count = least(at_once, tile.strips - first);
        fitted_rows(pass, table, tile.strip + first, count, query);
        each_heads(group, [&](auto heads, int head) {
            for (int i = 0; i < count; ++i) score(heads, Heads<1>{}, i * group, first + i, head);
        });
    }
}

}  // namespace kvc::KVC_NAMESPACE

#endif
