// What attention needs whatever computes its products: query rows, their softmax, and working
// memory.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "kernels/rotation.h"
#include "kernels/strips.h"

namespace kvc::KVC_NAMESPACE {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
const float kNever = -__builtin_inff();

// Query rows that share one pass over K and V, and what they have gathered so far. All rows of
// `sums` hold v_padded floats.
struct Rows {
    int count;
    float *sums;     // weighted V so far
    float *rotated;  // the same for codecs whose V is rotated
    float *top, *total, *decay;
    bool any_rotated;
};

inline float load_scalar(const void *base, int64_t index, int dtype) {
    if (dtype == KVC_F32) return static_cast<const float *>(base)[index];
    const uint16_t x = static_cast<const uint16_t *>(base)[index];
    return dtype == KVC_BF16 ? bf16_to_float(x) : half_to_float(x);
}

inline void store_scalar(void *base, int64_t index, int dtype, float x) {
    if (dtype == KVC_F32)
        static_cast<float *>(base)[index] = x;
    else
        static_cast<uint16_t *>(base)[index] =
            dtype == KVC_BF16 ? float_to_bf16(x) : float_to_half(x);
}

inline void clear(Rows &rows, int v_padded) {
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
inline bool has_partial_strip(const Tile &tile) {
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
inline void join_rotated(const Layer &layer, Rows &rows) {
    if (!rows.any_rotated) return;
    for (int i = 0; i < rows.count; ++i) {
        float *rotated = rows.rotated + int64_t{i} * layer.v_padded;
        float *sums = rows.sums + int64_t{i} * layer.v_padded;
        rotate_back(rotated, layer.v_size);
        for (int c = 0; c < layer.v_size; ++c) sums[c] += rotated[c];
    }
}

inline void write_row(const Attention &call, int64_t row, int head, const float *sums, float top,
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

// The sequence that an item belongs to.
inline int sequence_of(const Attention &call, int64_t item) {
    int low = 0, high = call.batch->num_seqs - 1;
    while (low < high) {  // the last sequence whose first item is not after this one
        const int middle = (low + high + 1) / 2;
        if (call.first_item[middle] <= item)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
inline int64_t query_tokens(const Attention &call, int seq) {
    return int64_t{call.batch->query_start[seq + 1]} - call.batch->query_start[seq];
}

// A block of consecutive query tokens of one KV head.
struct QueryBlock {
    int seq, head;
    int64_t row;  // of the first token in the call's query
    int tokens;
    int64_t seen;  // by the first token, of the tail
};
inline QueryBlock query_block(const Attention &call, int seq, int64_t item, int64_t blocks) {
    const int64_t start = call.batch->query_start[seq], tokens = query_tokens(call, seq);
    // The last blocks see most: first come, first served.
    const int64_t first = (blocks - 1 - item % blocks) * call.block_rows;
    return {seq, static_cast<int>(item / blocks), start + first,
            static_cast<int>(least<int64_t>(call.block_rows, tokens - first)),
            call.batch->tail_length[seq] - tokens + 1 + first};
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

}  // namespace
}  // namespace kvc::KVC_NAMESPACE
