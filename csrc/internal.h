// What the interface (api.cpp) and the kernels of each instruction set share. Plain data only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace kvc {

// A layer with everything that follows from it.
struct Layer : kvc_layer {
    int group;     // query heads of a KV head
    int v_padded;  // v_size up to a multiple of 16
    // Of codecs that need no tables.
    int64_t flat_capacity[KVC_CODECS];
    PageLayout flat[KVC_CODECS];

    const uint8_t *page(int64_t index) const {
        return pool + index * page_bytes;
    }
    // Null: a codec without tables here.
    KVC_OWN const kvc_table *table(int codec) const {
        return tables != nullptr ? tables[codec] : nullptr;
    }
    // Whether some pages may round positions.
    KVC_OWN bool has_tables() const {
        for (const Format &format : kFormats)
            if (format.tables && table(format.codec) != nullptr) return true;
        return false;
    }
    KVC_OWN int64_t capacity(int codec, int head) const {
        if (!kFormats[codec].tables) return flat_capacity[codec];
        return table(codec) != nullptr ? table(codec)->heads[head].capacity : 0;
    }
    KVC_OWN PageLayout layout(int codec, int head) const {
        if (!kFormats[codec].tables) return flat[codec];
        return fitted_layout(table(codec)->heads[head], k_size, v_size);
    }
    // Of the first `count` tokens of a page, those that are int8.
    KVC_OWN int exceptions(int codec, int head, int count, const uint8_t *page) const {
        if (!kFormats[codec].tables) return 0;
        const int most = table(codec)->heads[head].exceptions;
        if (count == table(codec)->heads[head].capacity) return most;
        const uint8_t *scales = page + layout(codec, head).scales;
        int found = 0;
        for (int first = 0; first < count; first += kStrip, scales += sizeof(TokenScales)) {
            uint16_t bits;
            std::memcpy(&bits, scales + offsetof(TokenScales, exceptions), sizeof bits);
            if (count - first < kStrip) bits &= static_cast<uint16_t>((1u << (count - first)) - 1);
            for (unsigned left = bits; left != 0; left &= left - 1) ++found;
        }
        return most < found ? most : found;
    }
    // Strips that attention walks through in a page: exceptions have strips of their own.
    KVC_OWN int64_t strips(int codec, int head, int count, int64_t index) const {
        const int int8 = exceptions(codec, head, count, page(index));
        return (count + kStrip - 1) / kStrip + (int8 + kStrip - 1) / kStrip;
    }
    int64_t pages() const {
        return num_blocks * block_pages;
    }
    int64_t tail_page(int64_t block, int head) const {
        return block * block_pages + first_page + head;
    }
};

// A request of several tokens is one item per block of query rows; one of a single token is split
// into ranges of this many strips, so that the result depends on neither threads nor batch.
constexpr int kSplitStrips = 64;

// How tiles of matrices multiply the words of fitted codecs (codecs/fitted_query.h) in decode.
struct TableProducts {
    static constexpr int kRows = 32;
    // The weights of a table's fields, [words][fields], as `multiply` reads them.
    void (*pack)(const int32_t *weight, int words, int fields, uint16_t *to);
    // to[row * stride + field] = step[field] * (sum over words of x[row][word] *
    // weight[word][field]) of kRows rows; x has kMaxHead / 2 words a row. Up to the next multiple
    // of 32 fields are written.
    void (*multiply)(const uint16_t *packed, int words, int fields, const int32_t *x,
                     const float *step, float *to, int64_t stride);
};

struct Attention {
    const Layer *layer;
    const kvc_batch *batch;
    const void *query;
    void *out;
    float *lse;
    int64_t query_stride, out_stride;
    int32_t query_dtype, out_dtype;
    int32_t block_rows;             // query tokens of an item of several
    const int64_t *first_item;      // [num_seqs + 1]
    float *partial;                 // of split sequences
    const int64_t *first_partial;   // [num_seqs], in floats
    int32_t *arrived;               // [num_seqs, num_kv_heads], zero: splits that are done
    const TableProducts *products;  // or null
};

// The newest queries of a request.
struct WindowQueries {
    const void *data;
    int64_t head_stride, row_stride;
    int32_t dtype, window;
    int32_t begin, count;  // of the window's rows, those that one call takes
    bool greatest;         // of each row only the greatest weight among the heads counts
};

// Rows that are compared with columns together.
constexpr int kAlikeRows = 240;

// The keys of a head, of which some slots are columns that others are compared with.
struct Alike {
    const float *keys;  // [slots, size]
    int size;
    const int64_t *column_slots;  // ascending; null: all slots
    int64_t columns;
    const uint8_t *packed;  // columns in strips, as the kernels want them
    const float *inverse;   // 1 / norm of each column

    const float *key(int64_t slot) const {
        return keys + slot * size;
    }
    int64_t column(int64_t index) const {
        return column_slots != nullptr ? column_slots[index] : index;
    }
    int64_t strips() const {
        return (columns + kStrip - 1) / kStrip;
    }
};

// What an instruction set brings.
struct Kernels {
    const char *name;
    // Bytes that a worker needs beside its arguments.
    size_t (*attention_scratch)(const Layer &);
    // Query tokens of an item, and floats that a split of one token leaves for merging.
    int (*attention_rows)(const Layer &);
    int64_t (*partial_floats)(const Layer &);
    void (*attention)(const Attention &, int64_t item, uint8_t *scratch);

    void (*store)(const Layer &, int64_t first, int64_t last, const void *key, int64_t key_stride,
                  const void *value, int64_t value_stride, const int64_t *slots);
    // Writes `count` tokens into an empty page; their positions are there already.
    void (*encode)(const Layer &, int codec, int head, uint8_t *page, int count, const float *key,
                   const float *value);
    // Reads tokens places[0..n) of a page that holds `count`, or the first n if places is null.
    void (*decode)(const Layer &, int codec, int head, const uint8_t *page, int count, int n,
                   const int32_t *places, float *key, float *value);

    // Rows: queries of all heads that one call of window_weights takes together.
    size_t (*window_scratch)(const Layer &, const kvc_batch &, int rows);
    void (*window_weights)(const Layer &, const kvc_batch &, const WindowQueries &, int first,
                           int heads, float factor, float *out, int64_t out_stride,
                           uint8_t *scratch);

    // Bytes of a strip of columns, and for a call of nearest or latest.
    int64_t (*strip_bytes)(int size);
    size_t (*alike_scratch)(const Alike &);
    void (*pack_strip)(const Alike &, int64_t strip, uint8_t *packed, float *inverse);
    void (*nearest)(const Alike &, const int64_t *rows, int count, int64_t *nearest, float *cosine,
                    uint8_t *scratch);
    void (*latest)(const Alike &, int64_t first, int count, float threshold, int64_t *latest,
                   float *cosine, uint8_t *scratch);
    void (*add_units)(const float *keys, int64_t n, int size, double *sum);
    void (*total_cosines)(const float *keys, int64_t n, int size, const float *sum, float *out);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
// Instructions that this CPU may lack, in plain C++: for tests, only where a build names them.
extern const Kernels kAvx512Emulated;
extern const Kernels kAvx512Bf16Emulated;
extern const Kernels kAmxEmulated;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

// Positions of tokens first ... first + count of a page. Where several share one, those that
// follow are taken to be its neighbours'.
KVC_OWN void get_positions(const PageLayout &at, int codec, int64_t page_bytes, const uint8_t *page,
                           int first, int count, int32_t *positions) {
    const int each = kFormats[codec].position_step;
    PageHeader header;
    std::memcpy(&header, page + page_bytes - sizeof header, sizeof header);
    int steps = 0;
    for (int i = first; i < first + count; ++i) {
        const int index = i / each;
        while (steps < PageHeader::kSteps && header.first[steps] <= index) ++steps;
        uint16_t own;
        std::memcpy(&own, page + at.positions + 2 * index, sizeof own);
        // Unsigned: what a wrong directory finds here may be anything.
        positions[i - first] = static_cast<int32_t>(static_cast<uint32_t>(header.base) + own +
                                                    (static_cast<uint32_t>(steps) << 16) +
                                                    static_cast<uint32_t>(i % each));
    }
}

// select.cpp
void top_row(const float *scores, int64_t n, int64_t keep, uint8_t *mask);
bool represent(int64_t bit_heads, int64_t units, int64_t unit, const uint8_t *bits,
               const uint8_t *anchor, int64_t heads, uint8_t *mask, int64_t count);

// merge.cpp
bool nearest_kept(int64_t slots, int size, const float *keys, const uint8_t *gone,
                  const uint8_t *kept, int64_t *target, float *cosine);
bool redundancy(int64_t slots, int size, const float *keys, float threshold, float *out);
void merge(int64_t slots, int64_t size, const float *x, const int64_t *target, const float *weight,
           float *out);
void spread(int64_t slots, int64_t size, const uint8_t *kept, const float *part, int64_t width,
            float *values);

// Working memory. What all objects hold together is counted.
class Scratch {
   public:
    // Bytes that an object may keep from one call to the next, since fresh pages cost as much as
    // some work does; and what work is cut to fit.
    static constexpr size_t kKept = size_t{16} << 20;

    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() {
        release();
    }
    // At least so many bytes, aligned to 64; their contents are lost if they move. Null: there is
    // no memory.
    uint8_t *get(size_t wanted);
    // Gives back what is too much to keep.
    void trim() {
        if (size_ > kKept) release();
    }
    void release();

    // The most bytes that all objects have held at once since the last call.
    static int64_t peak();

   private:
    uint8_t *data_ = nullptr;
    size_t size_ = 0;
};

// threads.cpp
int max_threads();
// Calls work(context, item, scratch) for every item on the process's OpenMP team, each thread with
// `scratch` bytes of its own; on the calling thread alone if `alone`. False: out of memory.
bool parallel(int64_t items, size_t scratch, bool alone, void (*work)(void *, int64_t, uint8_t *),
              void *context);

}  // namespace kvc
