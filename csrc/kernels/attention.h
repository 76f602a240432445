// Paged attention: decode by ranges of strips, prefill by blocks of query rows.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "kernels/codecs.h"

namespace kvc::KVC_NAMESPACE {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
const float kNever = -__builtin_inff();

constexpr int kItemRows = 96;  // query rows of an item of several tokens

// Query rows that share one pass over K and V, and what they have gathered so far. All rows of
// `sums` hold v_padded floats.
struct Rows {
    int count;
    float *sums;     // weighted V so far
    float *rotated;  // the same for codecs whose V is rotated
    float *top, *total, *decay;
    bool any_rotated;
};

float load_scalar(const void *base, int64_t index, int dtype) {
    if (dtype == KVC_F32) return static_cast<const float *>(base)[index];
    const uint16_t x = static_cast<const uint16_t *>(base)[index];
    return dtype == KVC_BF16 ? bf16_to_float(x) : half_to_float(x);
}

void store_scalar(void *base, int64_t index, int dtype, float x) {
    if (dtype == KVC_F32)
        static_cast<float *>(base)[index] = x;
    else
        static_cast<uint16_t *>(base)[index] =
            dtype == KVC_BF16 ? float_to_bf16(x) : float_to_half(x);
}

void clear(Rows &rows, int v_padded) {
    std::memset(rows.sums, 0, sizeof(float) * rows.count * v_padded);
    std::memset(rows.rotated, 0, sizeof(float) * rows.count * v_padded);
    for (int i = 0; i < rows.count; ++i) rows.top[i] = kNever, rows.total[i] = 0;
    rows.any_rotated = false;
}

// Turns one row's scores of a tile into weights relative to the row's new maximum.
KVC_INLINE void softmax_row(float *s, int width, float &top, float &total, float &decay) {
    vf peak = vload(s);
    for (int c = W; c < width; c += W) peak = vmax(peak, vload(s + c));
    const float new_top = most(top, vhmax(peak));
    if (new_top == kNever) {  // nothing visible yet
        for (int c = 0; c < width; c += W) vstore(s + c, vzero());
        decay = 1;
        return;
    }
    const vf base = vset(new_top);
    vf sum = vzero();
    for (int c = 0; c < width; c += W) {
        const vf p = vexp2(vsub(vload(s + c), base));
        vstore(s + c, p);
        sum = vadd(sum, p);
    }
    decay = top == new_top ? 1.0f : (top == kNever ? 0.0f : __builtin_exp2f(top - new_top));
    total = total * decay + vhsum(sum);
    top = new_top;
}

// Hides lanes that hold no token, one that is an exception, or one that `visible` tail tokens do
// not reach.
KVC_INLINE void mask_row(float *s, const Tile &tile, int64_t visible) {
    for (int i = 0; i < tile.strips; ++i) {
        const Strip &strip = tile.strip[i];
        int64_t count = strip.count;
        if (strip.tail >= 0) count = least<int64_t>(count, most<int64_t>(visible - strip.tail, 0));
        for (int64_t lane = count; lane < kStrip; ++lane) s[i * kStrip + lane] = kNever;
        for (int bits = strip.hidden; bits != 0; bits &= bits - 1)
            s[i * kStrip + __builtin_ctz(static_cast<unsigned>(bits))] = kNever;
    }
}

KVC_INLINE void bias_row(const Layer &layer, float *s, const Tile &tile) {
    for (int i = 0; i < tile.strips; ++i) {
        const Strip &strip = tile.strip[i];
        if (strip.bias == nullptr) continue;
        if (tile.kind == kExceptions) {
            each_lane(layer, strip, [&](int lane, int token) {
                s[i * kStrip + lane] += strip.bias[token] * kLog2e;
            });
            continue;
        }
        for (int lane = 0; lane < strip.count; ++lane)
            s[i * kStrip + lane] += strip.bias[lane] * kLog2e;
    }
}

// Whether some lanes of some strip do not count.
bool has_partial_strip(const Tile &tile) {
    for (int i = 0; i < tile.strips; ++i)
        if (tile.strip[i].count < kStrip || tile.strip[i].hidden != 0) return true;
    return false;
}

// Scales are few, but waiting for them costs as much as for codes.
KVC_INLINE void prefetch_scales(const Tile &tile) {
    for (int i = 0; i < tile.strips; ++i)
        if (i == 0 || tile.strip[i].scales != tile.strip[i - 1].scales)
            for (int64_t at = 0; at < tile.scale_bytes; at += 64)
                prefetch(tile.strip[i].scales + at);
}

// Undoes the rotation of V in what was gathered from rotated codecs and adds it to the rest.
void join_rotated(const Layer &layer, Rows &rows) {
    if (!rows.any_rotated) return;
    for (int i = 0; i < rows.count; ++i) {
        float *rotated = rows.rotated + int64_t{i} * layer.v_padded;
        float *sums = rows.sums + int64_t{i} * layer.v_padded;
        rotate_back(rotated, layer.v_size);
        for (int c = 0; c < layer.v_size; ++c) sums[c] += rotated[c];
    }
}

void write_row(const Attention &call, int64_t row, int head, const float *sums, float top,
               float total) {
    const Layer &layer = *call.layer;
    const float factor = total > 0 ? 1 / total : 0;
    const int64_t at = row * call.out_stride + int64_t{head} * layer.v_size;
    for (int c = 0; c < layer.v_size; ++c)
        store_scalar(call.out, at + c, call.out_dtype, sums[c] * factor);
    if (call.lse != nullptr)
        call.lse[row * layer.num_heads + head] =
            total > 0 ? (top + __builtin_log2f(total)) * kLn2 : kNever;
}

int64_t strips_of(const Attention &call, int seq, int head, int64_t tail_tokens) {
    const kvc_directory &directory = call.batch->directory;
    int64_t strips = (tail_tokens + kStrip - 1) / kStrip;
    if (directory.begin != nullptr) {
        const int64_t at = seq * directory.stride + head;
        for (int e = directory.begin[at]; e < directory.end[at]; ++e)
            strips +=
                call.layer->strips(directory.codec[e], head, directory.count[e], directory.page[e]);
    }
    return strips;
}

// Places arrays one after the other in a worker's memory.
class Arena {
   public:
    explicit Arena(uint8_t *base) : at_(base) {}
    template <class T>
    T *take(int64_t count) {
        T *result = reinterpret_cast<T *>(at_);
        const int64_t bytes = count * int64_t{sizeof(T)}, whole = (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
        // A gap that nothing may touch, unless the address is made up and only sizes count.
        if (reinterpret_cast<uintptr_t>(at_) >> 40 != 0) {
            __asan_unpoison_memory_region(at_, static_cast<size_t>(bytes));
            __asan_poison_memory_region(at_ + bytes, static_cast<size_t>(whole - bytes + 64));
        }
        at_ += 64;
#endif
        at_ += whole;
        return result;
    }
    const uint8_t *end() const {
        return at_;
    }

   private:
    uint8_t *at_;
};

struct Memory {
    Rows rows;
    float *query, *scores;
    float *keys, *values;  // of a tile
    Prepared prepared;

    // With a null base only the size counts.
    static int64_t lay_out(const Layer &layer, int rows, uint8_t *base, Memory &m) {
        Arena arena(base);
        const int64_t padded = (rows + kItemPad - 1) / kItemPad * kItemPad;
        m.rows.sums = arena.take<float>(padded * layer.v_padded);
        m.rows.rotated = arena.take<float>(padded * layer.v_padded);
        m.rows.top = arena.take<float>(padded);
        m.rows.total = arena.take<float>(padded);
        m.rows.decay = arena.take<float>(padded);
        m.query = arena.take<float>(padded * kMaxHead);
        m.scores = arena.take<float>(padded * kTile);
        m.keys = arena.take<float>(int64_t{kTile} * layer.k_size);
        m.values = arena.take<float>(int64_t{kTile} * layer.v_padded + 16);
        m.prepared.take(arena, layer);
        return arena.end() - base;
    }
};

int items_rows(const Layer &layer) {
    return most(1, kItemRows / layer.group);
}

size_t attention_scratch(const Layer &layer) {
    Memory unused;
    // Offsets from an arbitrary aligned address: nothing is touched.
    return static_cast<size_t>(Memory::lay_out(layer, items_rows(layer) * layer.group,
                                               reinterpret_cast<uint8_t *>(64), unused));
}

int64_t partial_floats(const Layer &layer) {
    return int64_t{layer.group} * (layer.v_padded + 2);
}

// Points the tile's K, or V, at floats: at the page itself where it holds float32.
void expand_keys(const Layer &layer, Tile &tile, Memory &m) {
    const CodecTraits &traits = kTraits[tile.kind];
    if (traits.plain && layer.dtype == KVC_F32) return;
    for (int i = 0; i < tile.strips; ++i) {
        float *keys = m.keys + i * kStrip * layer.k_size;
        traits.expand(layer, tile.strip[i], keys, nullptr);
        tile.k[i] = reinterpret_cast<const uint8_t *>(keys);
    }
}
void expand_values(const Layer &layer, Tile &tile, Memory &m) {
    const CodecTraits &traits = kTraits[tile.kind];
    const bool floats = traits.plain && layer.dtype == KVC_F32;
    for (int i = 0; i < tile.strips; ++i) {
        // V rows that nobody wrote may be NaN, which a weight of 0 does not silence.
        if (floats && tile.strip[i].count == kStrip) continue;
        float *values = m.values + int64_t{i} * kStrip * layer.v_size;
        traits.expand(layer, tile.strip[i], nullptr, values);
        tile.v[i] = reinterpret_cast<const uint8_t *>(values);
    }
}

// One query token of one KV head over strips [first, last).
void attend_one(const Attention &call, int seq, int head, int64_t first, int64_t last, Memory &m) {
    const Layer &layer = *call.layer;
    const int64_t row = call.batch->query_start[seq];
    const int group = layer.group;
    Rows &rows = m.rows;
    rows.count = group;
    clear(rows, layer.v_padded);
    const float factor = layer.scale * kLog2e;
    for (int g = 0; g < group; ++g) {
        const int64_t at = row * call.query_stride + (int64_t{head} * group + g) * layer.k_size;
        float *to = m.query + g * kMaxHead;
        for (int c = 0; c < layer.k_size; ++c)
            to[c] = load_scalar(call.query, at + c, call.query_dtype) * factor;
        // Integer kernels read whole blocks of 32 channels.
        for (int c = layer.k_size; c < (layer.k_size + 31) / 32 * 32; ++c) to[c] = 0;
    }
    m.prepared.begin();
    const int tail = call.batch->tail_length[seq];
    Tiles tiles(layer, *call.batch, seq, head, tail, first, last);
    Tile tile[2];
    int now = 0;
    if (!tiles.next(tile[0])) return;
    for (bool more = true; more; now ^= 1) {
        Tile &current = tile[now], &next = tile[now ^ 1];
        more = tiles.next(next);
        if (more)
            prefetch_scales(next);
        else
            next.strips = 0;
        const bool partial = has_partial_strip(current);
        const CodecTraits &traits = kTraits[current.kind];
        const uint8_t *ahead_k[kTileStrips], *ahead_v[kTileStrips];
        for (int i = 0; i < current.strips; ++i) {
            ahead_k[i] = i < next.strips ? next.k[i] : current.k[i];
            ahead_v[i] = i < next.strips ? next.v[i] : current.v[i];
        }
        traits.scores({layer, current, ahead_k, m.keys}, m.prepared, m.query, m.scores);
        for (int g = 0; g < group; ++g) {
            float *s = m.scores + g * kTile;
            if (partial) mask_row(s, current, tail);
            if (current.bias) bias_row(layer, s, current);
            softmax_row(s, current.strips * kStrip, rows.top[g], rows.total[g], rows.decay[g]);
        }
        const bool rotated = traits.rotated;
        float *sums = rotated ? rows.rotated : rows.sums;
        float *other = rotated ? rows.sums : rows.rotated;
        traits.values({layer, current, ahead_v, m.values}, m.prepared, m.scores, rows.decay, sums);
        if (rotated || rows.any_rotated)
            for (int g = 0; g < group; ++g)
                if (rows.decay[g] != 1)
                    for (int c = 0; c < layer.v_padded; ++c)
                        other[g * layer.v_padded + c] *= rows.decay[g];
        rows.any_rotated |= rotated;
    }
    join_rotated(layer, rows);
}

void merge(const Attention &call, int seq, int head, int64_t splits, const float *partial) {
    const Layer &layer = *call.layer;
    const int64_t row = call.batch->query_start[seq], each = partial_floats(layer);
    float sums[kMaxHead];
    for (int g = 0; g < layer.group; ++g) {
        const int64_t at = int64_t{g} * (layer.v_padded + 2);
        float top = kNever, total = 0;
        for (int64_t i = 0; i < splits; ++i) top = most(top, partial[i * each + at]);
        for (int c = 0; c < layer.v_size; ++c) sums[c] = 0;
        for (int64_t i = 0; i < splits && top != kNever; ++i) {
            const float *part = partial + i * each + at;
            const float factor = __builtin_exp2f(part[0] - top);
            total += part[1] * factor;
            for (int c = 0; c < layer.v_size; ++c) sums[c] += part[2 + c] * factor;
        }
        write_row(call, row, head * layer.group + g, sums, top, total);
    }
}

void decode_item(const Attention &call, int seq, int64_t item, int64_t splits, Memory &m) {
    const Layer &layer = *call.layer;
    const int head = static_cast<int>(item / splits);
    const int64_t split = item % splits;
    const int tail = call.batch->tail_length[seq];
    const int64_t strips = strips_of(call, seq, head, tail);
    const int64_t first = least(split * kSplitStrips, strips);
    const int64_t last = least(first + kSplitStrips, strips);
    attend_one(call, seq, head, first, last, m);
    if (splits == 1) {
        for (int g = 0; g < layer.group; ++g)
            write_row(call, call.batch->query_start[seq], head * layer.group + g,
                      m.rows.sums + int64_t{g} * layer.v_padded, m.rows.top[g], m.rows.total[g]);
        return;
    }
    const int64_t each = partial_floats(layer);
    float *partial = call.partial + call.first_partial[seq] + head * splits * each;
    for (int g = 0; g < layer.group; ++g) {
        float *part = partial + split * each + int64_t{g} * (layer.v_padded + 2);
        part[0] = m.rows.top[g];
        part[1] = m.rows.total[g];
        std::memcpy(part + 2, m.rows.sums + int64_t{g} * layer.v_padded,
                    sizeof(float) * layer.v_size);
    }
    int32_t *arrived = call.arrived + int64_t{seq} * layer.num_kv_heads + head;
    if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == splits)
        merge(call, seq, head, splits, partial);
}

// A block of query tokens: `group` rows each, tokens first.
void prefill_item(const Attention &call, int seq, int64_t item, int64_t blocks, Memory &m) {
    const Layer &layer = *call.layer;
    const int head = static_cast<int>(item / blocks), group = layer.group;
    const int64_t start = call.batch->query_start[seq];
    const int64_t tokens = call.batch->query_start[seq + 1] - start;
    // The last blocks see most: first come, first served.
    const int64_t block = blocks - 1 - item % blocks;
    const int64_t first = block * call.block_rows;
    const int count = static_cast<int>(least<int64_t>(call.block_rows, tokens - first));
    const int64_t seen = call.batch->tail_length[seq] - tokens + 1 + first;  // by the first token
    Rows &rows = m.rows;
    rows.count = (count * group + kItemPad - 1) / kItemPad * kItemPad;
    clear(rows, layer.v_padded);
    // Packed as the product reads it: kItemPad rows side by side, channel after channel.
    const float factor = layer.scale * kLog2e;
    std::memset(m.query, 0, sizeof(float) * rows.count * layer.k_size);
    for (int i = 0; i < count * group; ++i) {
        const int64_t at = (start + first + i / group) * call.query_stride +
                           (int64_t{head} * group + i % group) * layer.k_size;
        float *to = m.query + int64_t{i / kItemPad} * kItemPad * layer.k_size + i % kItemPad;
        for (int c = 0; c < layer.k_size; ++c)
            to[c * kItemPad] = load_scalar(call.query, at + c, call.query_dtype) * factor;
    }
    const int tail = static_cast<int>(most<int64_t>(0, seen + count - 1));
    Tiles tiles(layer, *call.batch, seq, head, tail, 0, INT64_MAX);
    Tile tile;
    while (tiles.next(tile)) {
        const bool partial = has_partial_strip(tile);
        expand_keys(layer, tile, m);
        expand_values(layer, tile, m);
        block_scores(tile, m.query, rows.count, layer.k_size, m.scores);
        const Strip &end = tile.strip[tile.strips - 1];
        const bool mask = partial || (end.tail >= 0 && end.tail + kStrip > seen);
        for (int i = 0; i < count * group; ++i) {
            float *s = m.scores + i * kTile;
            if (mask) mask_row(s, tile, seen + i / group);
            if (tile.bias) bias_row(layer, s, tile);
            softmax_row(s, tile.strips * kStrip, rows.top[i], rows.total[i], rows.decay[i]);
        }
        for (int i = count * group; i < rows.count; ++i) rows.decay[i] = 0;
        const bool rotated = kTraits[tile.kind].rotated;
        float *sums = rotated ? rows.rotated : rows.sums;
        float *other = rotated ? rows.sums : rows.rotated;
        block_values(tile, m.scores, rows.count, layer.v_size, rows.decay, sums, layer.v_padded);
        if (rotated || rows.any_rotated)
            for (int i = 0; i < rows.count; ++i)
                if (rows.decay[i] != 1)
                    for (int c = 0; c < layer.v_padded; ++c)
                        other[i * layer.v_padded + c] *= rows.decay[i];
        rows.any_rotated |= rotated;
    }
    join_rotated(layer, rows);
    for (int i = 0; i < count * group; ++i)
        write_row(call, start + first + i / group, head * group + i % group,
                  rows.sums + int64_t{i} * layer.v_padded, rows.top[i], rows.total[i]);
}

void attention(const Attention &call, int64_t item, uint8_t *scratch) {
    const Layer &layer = *call.layer;
    int low = 0, high = call.batch->num_seqs - 1;
    while (low < high) {  // the last sequence whose first item is not after this one
        const int middle = (low + high + 1) / 2;
        if (call.first_item[middle] <= item)
            low = middle;
        else
            high = middle - 1;
    }
    const int64_t items = call.first_item[low + 1] - call.first_item[low];
    const int64_t each = items / layer.num_kv_heads;
    const int64_t tokens = call.batch->query_start[low + 1] - call.batch->query_start[low];
    Memory m;
    Memory::lay_out(layer, items_rows(layer) * layer.group, scratch, m);
    if (tokens == 1)
        decode_item(call, low, item - call.first_item[low], each, m);
    else
        prefill_item(call, low, item - call.first_item[low], each, m);
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
