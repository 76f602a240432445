// Paged attention: decode by ranges of strips, prefill by blocks of query rows.
#pragma once

#include "kernels/codecs.h"
#include "kernels/rows.h"

namespace kvc::KVC_NAMESPACE {
namespace {

constexpr int kItemRows = 96;  // query rows of an item of several tokens

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
        traits.scores({layer, current, ahead_k, m.keys, call.products}, m.prepared, m.query,
                      m.scores);
        for (int g = 0; g < group; ++g) {
            float *s = m.scores + g * kTile;
            if (partial) mask_row(s, current, tail);
            if (current.bias) bias_row(layer, s, current);
            softmax_row(s, current.strips * kStrip, rows.top[g], rows.total[g], rows.decay[g]);
        }
        const bool rotated = traits.rotated;
        float *sums = rotated ? rows.rotated : rows.sums;
        float *other = rotated ? rows.sums : rows.rotated;
        traits.values({layer, current, ahead_v, m.values, call.products}, m.prepared, m.scores,
                      rows.decay, sums);
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
    const QueryBlock block = query_block(call, seq, item, blocks);
    const int head = block.head, count = block.tokens, group = layer.group;
    Rows &rows = m.rows;
    rows.count = (count * group + kItemPad - 1) / kItemPad * kItemPad;
    clear(rows, layer.v_padded);
    // Packed as the product reads it: kItemPad rows side by side, channel after channel.
    const float factor = layer.scale * kLog2e;
    std::memset(m.query, 0, sizeof(float) * rows.count * layer.k_size);
    for (int i = 0; i < count * group; ++i) {
        const int64_t at = (block.row + i / group) * call.query_stride +
                           (int64_t{head} * group + i % group) * layer.k_size;
        float *to = m.query + int64_t{i / kItemPad} * kItemPad * layer.k_size + i % kItemPad;
        for (int c = 0; c < layer.k_size; ++c)
            to[c * kItemPad] = load_scalar(call.query, at + c, call.query_dtype) * factor;
    }
    const int tail = static_cast<int>(most<int64_t>(0, block.seen + count - 1));
    Tiles tiles(layer, *call.batch, seq, head, tail, 0, INT64_MAX);
    Tile tile;
    while (tiles.next(tile)) {
        const bool partial = has_partial_strip(tile);
        expand_keys(layer, tile, m);
        expand_values(layer, tile, m);
        block_scores(tile, m.query, rows.count, layer.k_size, m.scores);
        const Strip &end = tile.strip[tile.strips - 1];
        const bool mask = partial || (end.tail >= 0 && end.tail + kStrip > block.seen);
        for (int i = 0; i < count * group; ++i) {
            float *s = m.scores + i * kTile;
            if (mask) mask_row(s, tile, block.seen + i / group);
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
        write_row(call, block.row + i / group, head * group + i % group,
                  rows.sums + int64_t{i} * layer.v_padded, rows.top[i], rows.total[i]);
}

void attention(const Attention &call, int64_t item, uint8_t *scratch) {
    const Layer &layer = *call.layer;
    const int seq = sequence_of(call, item);
    const int64_t first = call.first_item[seq];
    const int64_t each = (call.first_item[seq + 1] - first) / layer.num_kv_heads;
    Memory m;
    Memory::lay_out(layer, items_rows(layer) * layer.group, scratch, m);
    if (query_tokens(call, seq) == 1)
        decode_item(call, seq, item - first, each, m);
    else
        prefill_item(call, seq, item - first, each, m);
}

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
