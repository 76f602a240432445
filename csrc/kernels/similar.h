// Cosines of many keys of a head with many others, a tile at a time: they are compared where they
// are made, and no matrix of them lies in memory. Where there are products of bytes these say first
// which cosines can matter; those are then made in float32, so that they decide nothing.
#pragma once

#include "kernels/attention.h"

namespace kvc::KVC_NAMESPACE {
namespace {

float inverse_norm(const float *key, int size) {
    vf sum = vzero();
    int c = 0;
    for (; c + W <= size; c += W) {
        const vf x = vload(key + c);
        sum = vfma(x, x, sum);
    }
    if constexpr (W > 8)
        if (c < size) {
            const vf x = vload_lanes<8>(key + c);
            sum = vfma(x, x, sum);
        }
    return 1.0f / most(__builtin_sqrtf(vhsum(sum)), 1e-12f);
}

float product(const float *a, const float *b, int size) {
    vf sum = vzero();
    int c = 0;
    for (; c + W <= size; c += W) sum = vfma(vload(a + c), vload(b + c), sum);
    if constexpr (W > 8)
        if (c < size) sum = vfma(vload_lanes<8>(a + c), vload_lanes<8>(b + c), sum);
    return vhsum(sum);
}

// More than products of unit vectors in float32 can be wrong by.
constexpr float kRounding = 1e-5f;

#if defined(KVC_INTEGER_PRODUCTS)

// Rows that go together: as many sums as can be under way.
constexpr int kAlikeBlock = W == 16 ? 12 : 4;
// Steps of a channel of a unit vector, in rows and in columns. Bytes of rows are offset to be
// positive; pairs of products stay below 2^15. Sums may wrap around, as what they come to does not.
constexpr int kRowSteps = 127, kOffset = 128, kColumnSteps = 63;

// What rounding takes from a unit vector, its norm; codes get its channels.
float to_codes(const float *key, float scale, int most_steps, int size, int32_t *codes) {
    vf lost = vzero();
    const auto round = [&](vf x, int32_t *to) {
        const vf steps = vmul(x, vset(scale * static_cast<float>(most_steps)));
        const vi code = to_int(steps);
        const vf error = vsub(steps, to_float(code));
        vstore_words(to, code);
        return vfma(error, error, lost);
    };
    int c = 0;
    for (; c + W <= size; c += W) lost = round(vload(key + c), codes + c);
    if constexpr (W > 8)
        if (c < size) lost = round(vload_lanes<8>(key + c), codes + c);
    return __builtin_sqrtf(vhsum(lost)) / static_cast<float>(most_steps);
}
int32_t four(const int32_t *codes, uint32_t offset) {
    uint32_t word = 0;
    for (int i = 3; i >= 0; --i)
        word = word << 8 | ((static_cast<uint32_t>(codes[i]) + offset) & 255);
    return static_cast<int32_t>(word);
}

// A strip: words of four channels [quads][kStrip], then for each column what takes the offset out
// of its sums, and the most that rounding takes from one.
int64_t strip_bytes(int size) {
    return int64_t{size} * kStrip + 2 * kStrip * int64_t{sizeof(float)};
}
const uint8_t *strip_end(const uint8_t *strip, int size) {
    return strip + int64_t{size} * kStrip;
}
float strip_lost(const uint8_t *strip, int size) {
    float lost;
    std::memcpy(&lost, strip_end(strip, size) + kStrip * sizeof(int32_t), sizeof lost);
    return lost;
}

void pack_strip(const Alike &alike, int64_t strip, uint8_t *packed, float *inverse) {
    uint8_t *to = packed + strip * strip_bytes(alike.size);
    uint32_t start[kStrip];
    float lost = 0;
    for (int l = 0; l < kStrip; ++l) {
        const int64_t index = strip * kStrip + l;
        const float *key = alike.key(alike.column(least(index, alike.columns - 1)));
        const float scale = inverse_norm(key, alike.size);
        int32_t codes[kMaxHead];
        lost = most(lost, to_codes(key, scale, kColumnSteps, alike.size, codes));
        uint32_t sum[2] = {};  // of the pairs of each word
        for (int c = 0; c < alike.size; c += 4) {
            const int32_t word = four(codes + c, 0);
            std::memcpy(to + c * kStrip + 4 * l, &word, 4);
            for (int i = 0; i < 4; ++i) sum[i / 2] += static_cast<uint32_t>(codes[c + i]);
        }
        // Vectors of 8 lanes add pairs to 16 bits, others fours to 32.
        start[l] = W == 8 ? (-kOffset * sum[0] & 65535) | (-kOffset * sum[1] << 16)
                          : -kOffset * (sum[0] + sum[1]);
        if (index < alike.columns) inverse[index] = scale;
    }
    to += int64_t{alike.size} * kStrip;
    std::memcpy(to, start, sizeof start);
    std::memcpy(to + sizeof start, &lost, sizeof lost);
}

// Cosines, but for rounding, of a block of rows with a strip: cosine[row * stride + lane].
KVC_APART void multiply_codes(const uint8_t *strip, int size, const int32_t *rows, float *cosine,
                              int64_t stride) {
    constexpr int N = kStrip / W, G = kAlikeBlock;
    const uint8_t *start = strip_end(strip, size);
    vi sum[G][N];
    repeat<N>(KVC_LAMBDA(v) {
        const vi from = vload_words<W>(start + v * W * 4);
        repeat<G>(KVC_LAMBDA(g) { sum[g][v] = from; });
    });
    for (int q = 0; q < size / 4; ++q, rows += G) {
        vi column[N];
        repeat<N>(KVC_LAMBDA(v) { column[v] = vload_words<W>(strip + (q * kStrip + v * W) * 4); });
        repeat<G>(KVC_LAMBDA(g) {
            const vi row = ivset(rows[g]);
            repeat<N>(KVC_LAMBDA(v) { dot_bytes(sum[g][v], row, column[v]); });
        });
    }
    repeat<G>(KVC_LAMBDA(g) {
        repeat<N>(KVC_LAMBDA(v) {
            vstore(cosine + g * stride + v * W,
                   vmul(bytes_total(sum[g][v]), vset(1.0f / (kRowSteps * kColumnSteps))));
        });
    });
}

#else

constexpr int kAlikeBlock = kItemPad;

// Cosines of a block of rows with a strip: cosine[row * stride + lane].
void multiply_block(const uint8_t *strip, int size, const float *rows, float *cosine,
                    int64_t stride) {
    float tile[kAlikeBlock * kTile];
    multiply_k<F32, kAlikeBlock, 1, 1, kAlikeBlock, false>(&strip, size, rows, tile, nullptr);
    for (int g = 0; g < kAlikeBlock; ++g)
        std::memcpy(cosine + g * stride, tile + g * kTile, sizeof(float) * kStrip);
}

// A strip: unit vectors, [size][kStrip].
int64_t strip_bytes(int size) {
    return int64_t{size} * kStrip * int64_t{sizeof(float)};
}

void pack_strip(const Alike &alike, int64_t strip, uint8_t *packed, float *inverse) {
    const uint32_t *row[kStrip];
    float scale[kStrip];
    for (int l = 0; l < kStrip; ++l) {
        const int64_t index = strip * kStrip + l;
        const float *key = alike.key(alike.column(least(index, alike.columns - 1)));
        row[l] = reinterpret_cast<const uint32_t *>(key);
        scale[l] = inverse_norm(key, alike.size);
        if (index < alike.columns) inverse[index] = scale[l];
    }
    float *to = reinterpret_cast<float *>(packed + strip * strip_bytes(alike.size));
    transpose(row, alike.size, reinterpret_cast<uint32_t *>(to));
    for (int c = 0; c < alike.size; ++c)
        for (int l = 0; l < kStrip; ++l) to[c * kStrip + l] *= scale[l];
}

#endif

// Rows that are compared with columns, and their products with some of these.
struct AlikeRows {
    static constexpr int kMost = (kAlikeRows + kAlikeBlock - 1) / kAlikeBlock * kAlikeBlock;
    uint8_t *packed;  // blocks of kAlikeBlock rows
    float *cosine;    // [kAlikeBlock][stride]
    float *top;       // of each kTile columns of a row
    float *scale;     // of each row: 1 / norm
    float *lost;      // what rounding takes from it, its norm
    int64_t *slot;
    int64_t stride;
    float columns_lost;  // of the columns
    const Alike *alike;

    // With room for the products of a block with so many columns.
    static size_t lay_out(const Alike &alike, int64_t columns, uint8_t *base, AlikeRows &m) {
        Arena arena(base);
        m.alike = &alike;
        m.stride = (columns + kTile - 1) / kTile * kTile;
        m.packed = arena.take<uint8_t>(int64_t{kMost} * alike.size * int64_t{sizeof(float)});
        m.cosine = arena.take<float>(kAlikeBlock * m.stride);
        m.top = arena.take<float>(m.stride / kTile);
        m.scale = arena.take<float>(kMost);
        m.lost = arena.take<float>(kMost);
        m.slot = arena.take<int64_t>(kMost);
        return static_cast<size_t>(arena.end() - base);
    }

    // Takes the first `count` of `slot`.
    void pack(int count) {
        const int size = alike->size;
        const int padded = (count + kAlikeBlock - 1) / kAlikeBlock * kAlikeBlock;
        for (int i = 0; i < padded; ++i) {
            // Rows past the last repeat it; nobody looks at their products.
            const float *key = alike->key(slot[least(i, count - 1)]);
            scale[i] = inverse_norm(key, size);
            const int64_t block = int64_t{i / kAlikeBlock} * kAlikeBlock * size;
#if defined(KVC_INTEGER_PRODUCTS)
            int32_t codes[kMaxHead];
            lost[i] = to_codes(key, scale[i], kRowSteps, size, codes);
            int32_t *to = reinterpret_cast<int32_t *>(packed) + block / 4 + i % kAlikeBlock;
            for (int c = 0; c < size; c += 4) to[c / 4 * kAlikeBlock] = four(codes + c, kOffset);
#else
            lost[i] = 0;
            float *to = reinterpret_cast<float *>(packed) + block + i % kAlikeBlock;
            for (int c = 0; c < size; ++c) to[c * kAlikeBlock] = key[c] * scale[i];
#endif
        }
    }

    // Multiplies the block of rows from `begin` on with strips of columns: cosine[row][column] of
    // these. Lanes past the last column repeat it.
    void multiply(int begin, int64_t first_strip, int64_t strips) {
        const int64_t bytes = strip_bytes(alike->size);
        const uint8_t *strip = alike->packed + first_strip * bytes;
        columns_lost = 0;
#if defined(KVC_INTEGER_PRODUCTS)
        const int32_t *rows =
            reinterpret_cast<const int32_t *>(packed) + int64_t{begin} * alike->size / 4;
        for (int64_t i = 0; i < strips; ++i, strip += bytes) {
            multiply_codes(strip, alike->size, rows, cosine + i * kStrip, stride);
            columns_lost = most(columns_lost, strip_lost(strip, alike->size));
        }
#else
        const float *rows = reinterpret_cast<float *>(packed) + int64_t{begin} * alike->size;
        for (int64_t i = 0; i < strips; ++i, strip += bytes)
            multiply_block(strip, alike->size, rows, cosine + i * kStrip, stride);
#endif
    }
    // How far a row's products may be from its cosines.
    float slack(int row) const {
        return lost[row] + (1 + lost[row]) * columns_lost + kRounding;
    }
    float exact(int row, int64_t index) const {
        return product(alike->key(slot[row]), alike->key(alike->column(index)), alike->size) *
               scale[row] * alike->inverse[index];
    }
};

// Strips that rows search through together.
constexpr int64_t kSearch = 8;

size_t alike_scratch(const Alike &alike) {
    AlikeRows unused;
    return AlikeRows::lay_out(alike, alike.strips() * kStrip, reinterpret_cast<uint8_t *>(64),
                              unused);
}

float greatest(const float *x, int64_t n) {
    vf top = vload(x);
    for (int64_t i = W; i < n; i += W) top = vmax(top, vload(x + i));
    return vhmax(top);
}

// For each of `count` rows the column that is most similar, of equal ones the first: its slot in
// `nearest`, and the cosine.
void nearest_columns(const Alike &alike, const int64_t *rows, int count, int64_t *nearest,
                     float *cosine, uint8_t *scratch) {
    const int64_t lanes = alike.strips() * kStrip;
    AlikeRows m;
    AlikeRows::lay_out(alike, lanes, scratch, m);
    for (int i = 0; i < count; ++i) m.slot[i] = rows[i];
    m.pack(count);
    for (int begin = 0; begin < count; begin += kAlikeBlock) {
        m.multiply(begin, 0, alike.strips());
        for (int i = begin; i < least(count, begin + kAlikeBlock); ++i) {
            const float *own = m.cosine + (i - begin) * m.stride, slack = m.slack(i);
            float best = -2;
            int64_t found = -1;
            const auto take = [&](int64_t lane) {
                const int64_t index = least(lane, alike.columns - 1);
                const float x = m.exact(i, index);
                if (x > best || (x == best && index < found)) best = x, found = index;
            };
            // The most promising one first, so that few others are.
            float top = -4;
            int64_t likely = 0;
            for (int64_t at = 0, part = 0; at < lanes; at += kTile, ++part) {
                m.top[part] = greatest(own + at, least<int64_t>(kTile, lanes - at));
                if (m.top[part] > top) top = m.top[part], likely = at;
            }
            for (int64_t l = likely; l < least<int64_t>(likely + kTile, lanes) && found < 0; ++l)
                if (own[l] == top) take(l);
            for (int64_t at = 0, part = 0; at < lanes; at += kTile, ++part) {
                if (!(m.top[part] + slack >= best)) continue;
                for (int64_t l = at; l < least<int64_t>(at + kTile, lanes); ++l)
                    if (own[l] + slack >= best) take(l);
            }
            cosine[i] = best;
            nearest[i] = found < 0 ? rows[i] : alike.column(found);
        }
    }
}

// For each row of slots first ... first + count the latest other column whose cosine is above the
// threshold, 0 or more: its slot in `latest`, or -1, and the cosine. Columns are all slots. Those
// that have found theirs are left out, so columns are taken from the newest on, few at first.
void latest_columns(const Alike &alike, int64_t first, int count, float threshold, int64_t *latest,
                    float *cosine, uint8_t *scratch) {
    AlikeRows m;
    AlikeRows::lay_out(alike, kSearch * kStrip, scratch, m);
    for (int i = 0; i < count; ++i) m.slot[i] = first + i, latest[i] = -1, cosine[i] = 0;
    int packed = count, left = count;
    int64_t width = 1;
    m.pack(packed);
    for (int64_t end = alike.strips(); end > 0 && left > 0;) {
        const int64_t start = most<int64_t>(0, end - width), lanes = (end - start) * kStrip;
        for (int begin = 0; begin < packed; begin += kAlikeBlock) {
            const int rows = least(kAlikeBlock, packed - begin);
            bool searching = false;
            for (int i = 0; i < rows; ++i) searching |= latest[m.slot[begin + i] - first] < 0;
            if (!searching) continue;
            m.multiply(begin, start, end - start);
            for (int i = 0; i < rows; ++i) {
                const int64_t row = m.slot[begin + i], at = row - first;
                if (latest[at] >= 0) continue;
                const float *own = m.cosine + i * m.stride, slack = m.slack(begin + i);
                if (!(greatest(own, lanes) + slack > threshold)) continue;
                for (int64_t strip = lanes; (strip -= kStrip) >= 0 && latest[at] < 0;) {
                    if (!(greatest(own + strip, kStrip) + slack > threshold)) continue;
                    for (int64_t l = strip + kStrip; --l >= strip && latest[at] < 0;) {
                        const int64_t index = least(start * kStrip + l, alike.columns - 1);
                        if (index == row || !(own[l] + slack > threshold)) continue;
                        const float x = m.exact(begin + i, index);
                        if (x > threshold) latest[at] = index, cosine[at] = x;
                    }
                }
                left -= latest[at] >= 0;
            }
        }
        if (left > 0 && left < packed - packed / 4) {
            int kept = 0;
            for (int i = 0; i < packed; ++i)
                if (latest[m.slot[i] - first] < 0) m.slot[kept++] = m.slot[i];
            packed = kept;
            m.pack(packed);
        }
        end = start;
        width = least(2 * width, kSearch);
    }
}

// sum[c] += the unit keys of slots [0, n).
void add_units(const float *keys, int64_t n, int size, double *sum) {
    for (int64_t i = 0; i < n; ++i) {
        const float *key = keys + i * size, scale = inverse_norm(key, size);
        for (int c = 0; c < size; ++c) sum[c] += static_cast<double>(key[c] * scale);
    }
}

// out[i] = the product of a unit key with `sum`, less its square.
void total_cosines(const float *keys, int64_t n, int size, const float *sum, float *out) {
    for (int64_t i = 0; i < n; ++i) {
        const float *key = keys + i * size, scale = inverse_norm(key, size);
        out[i] = scale * (product(key, sum, size) - scale * product(key, key, size));
    }
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
