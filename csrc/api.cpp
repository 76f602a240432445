// The C interface: checks what it is given, then shares out the work.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "internal.h"

namespace kvc {
namespace {

thread_local char error_text[256];

int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    return -1;
}

int no_memory() {
    return fail("out of memory for the working space of a kernel");
}

// The kernels that a name stands for, or null: another name, or this CPU lacks the instructions.
const Kernels *find(const char *name) {
    if (std::strcmp(name, "baseline") == 0) return &kBaseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (avx2 && std::strcmp(name, "avx2") == 0) return &kAvx2;
    if (avx512 && std::strcmp(name, "avx512") == 0) return &kAvx512;
#elif defined(__aarch64__)
    if (std::strcmp(name, "neon") == 0) return &kNeon;
#endif
    return nullptr;
}

std::atomic<const Kernels *> chosen{nullptr};

// The environment decides at the first call, else the CPU. Null: the environment names nonsense.
const Kernels *kernels() {
    const Kernels *known = chosen.load(std::memory_order_acquire);
    if (known != nullptr) return known;
    const char *wanted = std::getenv("KVCRUSH_ISA");
    if (wanted != nullptr && *wanted != '\0') {
        known = find(wanted);
    } else {
        for (const char *name : {"baseline", "avx2", "avx512", "neon"})
            if (const Kernels *better = find(name)) known = better;
    }
    chosen.store(known, std::memory_order_release);
    return known;
}

// ------------------------------------------------------------------------------------ checks

bool good_heads(int32_t size) {
    return size > 0 && size % 8 == 0 && size <= kMaxHead;
}

int check_layer(const kvc_layer *given, Layer &layer) {
    static_cast<kvc_layer &>(layer) = *given;
    if (kernels() == nullptr)
        return fail(
            "KVCRUSH_ISA=%s is not one of baseline, avx2, avx512 and neon that this CPU has",
            std::getenv("KVCRUSH_ISA"));
    if (!good_heads(layer.k_size) || !good_heads(layer.v_size))
        return fail("head sizes %d and %d: both must be multiples of 8, at most %d", layer.k_size,
                    layer.v_size, kMaxHead);
    if (layer.dtype < KVC_F32 || layer.dtype > KVC_F16)
        return fail("dtype %d is not float32 (0), bfloat16 (1) or float16 (2)", layer.dtype);
    if (layer.block_size <= 0 || layer.block_size % kStrip != 0 || layer.block_size > 65520)
        return fail("block size %d is not a multiple of 16 up to 65520", layer.block_size);
    if (layer.num_kv_heads <= 0 || layer.num_heads <= 0 ||
        layer.num_heads % layer.num_kv_heads != 0 || layer.num_heads > 65536)
        return fail("%d query heads do not divide over %d KV heads", layer.num_heads,
                    layer.num_kv_heads);
    if (layer.first_page < 0 || layer.block_pages < layer.num_kv_heads ||
        layer.block_pages - layer.first_page < layer.num_kv_heads)
        return fail("%d pages from page %d of a block of %d pages", layer.num_kv_heads,
                    layer.first_page, layer.block_pages);
    const int64_t bytes =
        int64_t{layer.block_size} * (layer.k_size + layer.v_size) * dtype_bytes(layer.dtype);
    if (layer.page_bytes != bytes)
        return fail("page_bytes is %lld, %lld expected", static_cast<long long>(layer.page_bytes),
                    static_cast<long long>(bytes));
    if (layer.pool == nullptr || layer.num_blocks < 0 ||
        reinterpret_cast<uintptr_t>(layer.pool) % 64 != 0)
        return fail("the pool is missing or not aligned to 64 bytes");
    if (layer.num_blocks > INT64_MAX / (layer.page_bytes * layer.block_pages))
        return fail("%lld blocks are more than any memory holds",
                    static_cast<long long>(layer.num_blocks));
    layer.group = layer.num_heads / layer.num_kv_heads;
    layer.v_padded = (layer.v_size + 15) / 16 * 16;
    for (int codec = 0; codec < KVC_FIRST_FITTED; ++codec) {
        layer.flat_capacity[codec] =
            page_capacity(codec, layer.page_bytes, layer.k_size, layer.v_size, layer.dtype);
        layer.flat[codec] =
            page_layout(codec, layer.flat_capacity[codec], layer.k_size, layer.v_size, layer.dtype);
    }
    return 0;
}

constexpr int kMostExceptions = 128;

// What kernels trust of a fitted codec.
int check_table(const Layer &layer, const kvc_table &table) {
    if (table.positions <= 0 || table.heads == nullptr)
        return fail("a table without positions or heads");
    if (table.local != 0 && (table.coarse == nullptr || table.fine == nullptr))
        return fail("a table for keys as seen from their strip needs angles");
    for (int h = 0; h < layer.num_kv_heads; ++h) {
        const kvc_head_table &head = table.heads[h];
        if (head.piece == nullptr || head.mean == nullptr || head.forward == nullptr ||
            head.inverse == nullptr || head.cost == nullptr || head.weight == nullptr ||
            head.middle == nullptr)
            return fail("the table of head %d is not complete", h);
        if (head.v_bits < 2 || head.v_bits > 4 || !(head.v_step > 0))
            return fail("%d bits a value of head %d: 2 to 4, with a step", head.v_bits, h);
        if (head.components < 0 || head.components % 4 != 0 || head.components > layer.k_size ||
            head.stride < head.components || head.stride % 16 != 0 ||
            head.stride > (kMaxHead + 15) / 16 * 16)
            return fail("%d components in rows of %d for head %d", head.components, head.stride, h);
        if (head.words < 0 || head.words > kMaxHead / 4 || head.pieces < 0 ||
            head.pieces > 3 * kMaxHead / 4)
            return fail("%d pieces in %d words for head %d", head.pieces, head.words, h);
        if (head.fields != (4 * head.pieces + 15) / 16 * 16)
            return fail("%d fields for %d pieces of head %d", head.fields, head.pieces, h);
        int bits[kMaxHead / 4] = {};
        for (int i = 0; i < head.pieces; ++i) {
            const kvc_piece &piece = head.piece[i];
            if (piece.bits < 1 || piece.bits > 4 || 4 * piece.quad >= head.components ||
                piece.word >= head.words || piece.first + piece.bits > 8 || piece.weight > 7)
                return fail("piece %d of head %d lies outside its codes", i, h);
            bits[piece.quad] += piece.bits;
            if (bits[piece.quad] > 8) return fail("a component of head %d has over 8 bits", h);
        }
        if (head.capacity < 0 || head.capacity % kStrip != 0 || head.capacity > 65520 ||
            head.exceptions < 0 || head.exceptions > head.capacity ||
            head.exceptions > kMostExceptions)
            return fail("%d tokens and %d exceptions in a page of head %d", head.capacity,
                        head.exceptions, h);
        const PageLayout at = fitted_layout(head, layer.k_size, layer.v_size);
        if (at.end > layer.page_bytes - int64_t{sizeof(PageHeader)})
            return fail("%d tokens of head %d do not fit a page of %lld bytes", head.capacity, h,
                        static_cast<long long>(layer.page_bytes));
    }
    return 0;
}

int check_head(const Layer &layer, int head) {
    if (head < 0 || head >= layer.num_kv_heads) return fail("KV head %d does not exist", head);
    return 0;
}

int check_page(const Layer &layer, int head, int64_t page, int codec, int64_t count) {
    if (codec < 0 || codec >= KVC_CODECS) return fail("codec %d does not exist", codec);
    if (fitted(codec) && layer.table(codec) == nullptr)
        return fail("codec %d needs tables, which this layer has none of", codec);
    if (page < 0 || page >= layer.pages())
        return fail("page %lld is outside the cache of %lld pages", static_cast<long long>(page),
                    static_cast<long long>(layer.pages()));
    if (count < 0 || count > layer.capacity(codec, head))
        return fail("%lld tokens in a page that holds %lld", static_cast<long long>(count),
                    static_cast<long long>(layer.capacity(codec, head)));
    return 0;
}

// Entries of (row, head) for all heads of a row.
int check_directory(const Layer &layer, const kvc_directory &directory, int64_t row) {
    if (directory.begin == nullptr) return 0;
    for (int h = 0; h < layer.num_kv_heads; ++h) {
        const int64_t begin = directory.begin[row * directory.stride + h];
        const int64_t end = directory.end[row * directory.stride + h];
        if (begin > end || (begin < end && (begin < 0 || end > directory.size)))
            return fail("directory entries %lld to %lld of %lld", static_cast<long long>(begin),
                        static_cast<long long>(end), static_cast<long long>(directory.size));
        for (int64_t e = begin; e < end; ++e) {
            if (check_page(layer, h, directory.page[e], directory.codec[e], directory.count[e]) !=
                0)
                return -1;
            if (directory.bias == nullptr || directory.bias[e] < 0) continue;
            if (directory.bias[e] > directory.log_bias_size - directory.count[e])
                return fail("the log bias of directory entry %lld lies outside its array",
                            static_cast<long long>(e));
        }
    }
    return 0;
}

int check_tail(const Layer &layer, const int32_t *table, int64_t columns, int32_t length) {
    const int64_t blocks = (int64_t{length} + layer.block_size - 1) / layer.block_size;
    if (length < 0 || blocks > columns)
        return fail("a tail of %d tokens in a table of %lld blocks", length,
                    static_cast<long long>(columns));
    for (int64_t i = 0; i < blocks; ++i)
        if (table[i] < 0 || table[i] >= layer.num_blocks)
            return fail("block %d is outside the cache of %lld blocks", table[i],
                        static_cast<long long>(layer.num_blocks));
    return 0;
}

// ------------------------------------------------------------------------------------ positions

// False if they do not ascend, or span too much, or go beyond what the codec's tables know. Without
// a page that is all that is found out.
bool put_positions(const Layer &layer, int codec, int head, uint8_t *page, int count,
                   const int32_t *positions) {
    uint8_t *low = page != nullptr ? page + layer.layout(codec, head).positions : nullptr;
    PageHeader header;
    header.base = count != 0 ? positions[0] : 0;
    for (uint16_t &first : header.first) first = 65535;
    if (fitted(codec) && count != 0 &&
        (positions[0] < 0 || positions[count - 1] >= layer.table(codec)->positions))
        return false;
    const int each = position_step(codec);
    int64_t steps = 0;
    for (int i = 0; i < count; ++i) {
        if (i != 0 && positions[i] <= positions[i - 1]) return false;
        const int64_t offset = int64_t{positions[i]} - header.base;
        if (offset >> 16 > PageHeader::kSteps) return false;
        if (i % each != 0 || page == nullptr) continue;
        for (; steps < offset >> 16; ++steps) header.first[steps] = static_cast<uint16_t>(i / each);
        const uint16_t own = static_cast<uint16_t>(offset);
        std::memcpy(low + 2 * (i / each), &own, sizeof own);
    }
    if (page != nullptr)
        std::memcpy(page + layer.page_bytes - sizeof header, &header, sizeof header);
    return true;
}

int bad_positions(const Layer &layer, int codec) {
    if (fitted(codec))
        return fail(
            "positions within a page do not ascend from 0 on below %d, which its tables know",
            layer.table(codec)->positions);
    return fail("positions within a page do not ascend, or span 983040 or more");
}

// Calls work(item, scratch) for every item; one function object stands for all of them.
template <class F>
bool each(int64_t items, size_t scratch, bool alone, F &&work) {
    return parallel(
        items, scratch, alone,
        [](void *context, int64_t item, uint8_t *memory) {
            (*static_cast<std::remove_reference_t<F> *>(context))(item, memory);
        },
        &work);
}

// Kept from call to call.
thread_local std::vector<int64_t> items_memory;
thread_local std::vector<int32_t> arrived_memory;
thread_local Scratch partial_memory;

int attention(const Layer &layer, const kvc_batch &batch, const void *query, int32_t query_dtype,
              int64_t query_stride, void *out, int32_t out_dtype, int64_t out_stride, float *lse) {
    const Kernels &kernel = *kernels();
    const int64_t heads = layer.num_kv_heads;
    const int block_rows = kernel.attention_rows(layer);
    if (batch.num_seqs < 0) return fail("a batch of %d sequences", batch.num_seqs);
    items_memory.resize(2 * static_cast<size_t>(batch.num_seqs) + 1);
    int64_t *first_item = items_memory.data(), *first_partial = first_item + batch.num_seqs + 1;
    int64_t items = 0, partial = 0, work = 0;
    if (batch.num_seqs > 0 && batch.query_start[0] < 0) return fail("query_start is negative");
    for (int s = 0; s < batch.num_seqs; ++s) {
        const int64_t rows = int64_t{batch.query_start[s + 1]} - batch.query_start[s];
        const int32_t tail = batch.tail_length[s];
        if (rows < 0) return fail("query_start does not ascend at sequence %d", s);
        if (rows > 0 && check_tail(layer, batch.tail_table + s * batch.tail_stride,
                                   batch.tail_stride, tail) != 0)
            return -1;
        if (rows > 0 && check_directory(layer, batch.directory, s) != 0) return -1;
        first_item[s] = items;
        first_partial[s] = partial;
        int64_t each_head = rows == 0 ? 0 : (rows + block_rows - 1) / block_rows, most_strips = 0;
        if (rows > 0) {
            for (int64_t h = 0; h < heads; ++h) {
                int64_t strips = (int64_t{tail} + kStrip - 1) / kStrip;
                if (batch.directory.begin != nullptr) {
                    const int64_t at = s * batch.directory.stride + h;
                    for (int e = batch.directory.begin[at]; e < batch.directory.end[at]; ++e)
                        strips += layer.strips(batch.directory.codec[e], static_cast<int>(h),
                                               batch.directory.count[e], batch.directory.page[e]);
                }
                most_strips = strips > most_strips ? strips : most_strips;
            }
        }
        if (rows == 1) {
            each_head = (most_strips + kSplitStrips - 1) / kSplitStrips;
            if (each_head == 0) each_head = 1;
            if (each_head > 1) partial += heads * each_head * kernel.partial_floats(layer);
        }
        items += heads * each_head;
        work += rows * heads * most_strips;
    }
    first_item[batch.num_seqs] = items;
    uint8_t *sums = partial_memory.get(static_cast<size_t>(partial) * sizeof(float));
    if (sums == nullptr) return no_memory();
    arrived_memory.assign(static_cast<size_t>(batch.num_seqs * heads), 0);

    Attention call{};
    call.layer = &layer;
    call.batch = &batch;
    call.query = query;
    call.out = out;
    call.lse = lse;
    call.query_stride = query_stride;
    call.out_stride = out_stride;
    call.query_dtype = query_dtype;
    call.out_dtype = out_dtype;
    call.block_rows = block_rows;
    call.first_item = first_item;
    call.partial = reinterpret_cast<float *>(sums);
    call.first_partial = first_partial;
    call.arrived = arrived_memory.data();
    // Some 50 microseconds: waking a second thread would cost as much as it saves.
    const bool alone = work < 128;
    const bool done =
        each(items, kernel.attention_scratch(layer), alone,
             [&](int64_t item, uint8_t *memory) { kernel.attention(call, item, memory); });
    partial_memory.trim();
    return done ? 0 : no_memory();
}

int store(const Layer &layer, int64_t rows, const void *key, int64_t key_stride, const void *value,
          int64_t value_stride, const int64_t *slots) {
    const int64_t end = layer.num_blocks * layer.block_size;
    for (int64_t i = 0; i < rows; ++i)
        if (slots[i] >= end)
            return fail("slot %lld is outside the cache of %lld slots",
                        static_cast<long long>(slots[i]), static_cast<long long>(end));
    constexpr int64_t kRows = 32;
    const bool done =
        each((rows + kRows - 1) / kRows, 0, rows < 2 * kRows, [&](int64_t item, uint8_t *) {
            const int64_t last = (item + 1) * kRows;
            kernels()->store(layer, item * kRows, last < rows ? last : rows, key, key_stride, value,
                             value_stride, slots);
        });
    return done ? 0 : no_memory();
}

// ------------------------------------------------------------------------------------ requests

struct Source {
    const Layer &layer;
    const kvc_request &request;

    int64_t begin(int head) const {
        return request.directory.begin != nullptr ? request.directory.begin[head] : 0;
    }
    int64_t end(int head) const {
        return request.directory.begin != nullptr ? request.directory.end[head] : 0;
    }
    int64_t tokens(int head) const {
        int64_t n = request.tail_length;
        for (int64_t e = begin(head); e < end(head); ++e) n += request.directory.count[e];
        return n;
    }
};

int check_request(const Layer &layer, const kvc_request &request) {
    if (check_directory(layer, request.directory, 0) != 0) return -1;
    return check_tail(layer, request.tail_table, INT32_MAX, request.tail_length);
}

// Decodes n slots of a head, in any order; slots == null: first, first + 1, ...  False: some pages
// have no positions, which are -1.
bool read_slots(const Source &source, int head, const int64_t *slots, int64_t first, int64_t n,
                float *key, float *value, int32_t *positions) {
    const Layer &layer = source.layer;
    const kvc_directory &directory = source.request.directory;
    const Kernels &kernel = *kernels();
    const auto slot = [&](int64_t i) { return slots != nullptr ? slots[i] : first + i; };
    constexpr int kBatch = 256;
    int32_t places[kBatch];
    int64_t page_start = 0, entry = source.begin(head), done = 0;
    bool known = true;
    const int64_t entries = source.end(head);
    while (done < n) {
        int codec = KVC_RAW;
        int64_t index, count, start;
        if (slot(done) < page_start) {
            entry = source.begin(head);
            page_start = 0;
        }
        while (entry < entries && slot(done) >= page_start + directory.count[entry])
            page_start += directory.count[entry++];
        if (entry < entries) {
            codec = directory.codec[entry];
            index = directory.page[entry];
            count = directory.count[entry];
            start = page_start;
        } else {
            const int64_t block = (slot(done) - page_start) / layer.block_size;
            index = layer.tail_page(source.request.tail_table[block], head);
            count = layer.block_size;
            start = page_start + block * layer.block_size;
        }
        int batch = 0;
        // Places in a page must ascend.
        int64_t last = start - 1;
        while (batch < kBatch && done + batch < n && slot(done + batch) > last &&
               slot(done + batch) < start + count) {
            last = slot(done + batch);
            places[batch++] = static_cast<int32_t>(last - start);
        }
        const uint8_t *page = layer.page(index);
        if (key != nullptr || value != nullptr)
            kernel.decode(layer, codec, head, page, static_cast<int>(count), batch, places,
                          key != nullptr ? key + done * layer.k_size : nullptr,
                          value != nullptr ? value + done * layer.v_size : nullptr);
        if (positions != nullptr) {
            if (entry >= entries) {
                for (int i = 0; i < batch; ++i)
                    positions[done + i] = static_cast<int32_t>(source.request.tail_position +
                                                               (start - page_start) + places[i]);
            } else if (!positions_kept(codec)) {
                for (int i = 0; i < batch; ++i) positions[done + i] = -1;
                known = false;
            } else {
                const PageLayout at = layer.layout(codec, head);
                for (int i = 0; i < batch;) {
                    int run = 1;
                    while (i + run < batch && places[i + run] == places[i] + run) ++run;
                    get_positions(at, codec, layer.page_bytes, page, places[i], run,
                                  positions + done + i);
                    i += run;
                }
            }
        }
        done += batch;
    }
    return known;
}

// Kept from call to call.
thread_local Scratch positions_memory, staging_memory;

// The source entry whose tokens are slots [first, first + count) of a head, all of them and in the
// page's own codec; -1 if there is none.
int64_t whole_page(const Source &source, int head, const int64_t *slots, int64_t count, int codec) {
    if (!positions_kept(codec) || count == 0) return -1;
    for (int64_t i = 1; i < count; ++i)
        if (slots[i] != slots[0] + i) return -1;
    const kvc_directory &directory = source.request.directory;
    int64_t start = 0;
    for (int64_t e = source.begin(head); e < source.end(head); ++e) {
        if (start == slots[0] && directory.count[e] == count && directory.codec[e] == codec)
            return e;
        if (start > slots[0]) break;
        start += directory.count[e];
    }
    return -1;
}

// A target page and what it takes: slots [first, first + count) of all that the call names.
struct Piece {
    int head;
    int64_t entry, first, count;
    int64_t copied;   // source entry that is copied as it is, or -1
    int64_t waiting;  // page of the staging memory that it is written to first, or -1
    int32_t last;     // position of its last token as it was read
};

// Why slots cannot fill pages in the order that they are given in.
struct Disorder {
    enum Kind { kNone, kUnknown, kDecrease, kTie, kTwice, kBeyond } kind = kNone;
    int64_t slot = 0;
    int32_t before = 0, position = 0;
};

// Positions as read from pages become those that are stored. What fitted pages give back is at or
// before the true position, so tokens of several pages may tie although they are in order: of these
// the later ones are moved on, never beyond their true order. A page may begin before the last one
// ended, where another part of a region begins; within a page nothing may go back.
// positions, slots: of the head's first piece.
Disorder order_positions(const Layer &layer, const kvc_directory &target, Piece *piece,
                         const Piece *end, const int64_t *slots, int32_t *positions) {
    int64_t before = -1, stored = -1, i = 0;
    for (; piece != end; ++piece) {
        const bool kept = positions_kept(target.codec[piece->entry]);
        for (int64_t t = 0; t < piece->count; ++t, ++i) {
            const int32_t position = positions[i];
            Disorder found{Disorder::kNone, slots[i], static_cast<int32_t>(before), position};
            if (position < 0) {
                found.kind = Disorder::kUnknown;
            } else if (position < before && t != 0) {
                found.kind = Disorder::kDecrease;
            } else if (position == before) {
                if (slots[i] == slots[i - 1])
                    found.kind = Disorder::kTwice;
                else if (!layer.has_tables())
                    found.kind = Disorder::kTie;
            }
            stored = position < before ? position : std::max<int64_t>(position, stored + 1);
            if (position < 0) stored = -1;
            if (stored > INT32_MAX) found.kind = Disorder::kBeyond;
            if (kept && found.kind != Disorder::kNone) return found;
            if (stored != position) piece->copied = -1;
            before = piece->last = position;
            positions[i] = static_cast<int32_t>(std::min<int64_t>(stored, INT32_MAX));
        }
    }
    return {};
}

int bad_order(int head, const Disorder &found) {
    const long long slot = found.slot;
    switch (found.kind) {
        case Disorder::kUnknown:
            return fail(
                "slot %lld of head %d has no position (raw compressed pages keep none), "
                "which its target keeps",
                slot, head);
        case Disorder::kDecrease:
            return fail(
                "slots of head %d are not in position order: position %d comes after %d "
                "in one page",
                head, found.position, found.before);
        case Disorder::kTie:
            return fail("slots of head %d are not distinct: position %d comes twice", head,
                        found.position);
        case Disorder::kTwice:
            return fail("slot %lld of head %d is given twice", slot, head);
        default:
            return fail("position %d of head %d leaves no room for those that follow",
                        found.position, head);
    }
}

int compact(const Layer &layer, const kvc_request &request, const int64_t *slots,
            const int64_t *slot_start, const kvc_directory &target) {
    const Source source{layer, request};
    const int heads = layer.num_kv_heads;
    std::vector<Piece> pieces;
    std::vector<size_t> first_piece;
    bool keeps_positions = false;
    for (int h = 0; h < heads; ++h) {
        const int64_t n = slot_start[h + 1] - slot_start[h], held = source.tokens(h);
        const int64_t *own = slots + slot_start[h];
        for (int64_t i = 0; i < n; ++i)
            if (own[i] < 0 || own[i] >= held)
                return fail("slot %lld of head %d, which holds %lld tokens",
                            static_cast<long long>(own[i]), h, static_cast<long long>(held));
        int64_t used = 0;
        first_piece.push_back(pieces.size());
        for (int64_t e = target.begin[h]; e < target.end[h]; ++e) {
            pieces.push_back({h, e, slot_start[h] + used, target.count[e], -1, -1, 0});
            used += target.count[e];
            keeps_positions |= target.count[e] != 0 && positions_kept(target.codec[e]);
        }
        if (used != n)
            return fail("head %d keeps %lld slots, its pages take %lld", h,
                        static_cast<long long>(n), static_cast<long long>(used));
    }
    first_piece.push_back(pieces.size());
    const int64_t n = static_cast<int64_t>(pieces.size());
    const int64_t total = slot_start[heads] - slot_start[0];
    const bool alone = total < 256;
    // All is looked at before anything is written.
    for (Piece &piece : pieces)
        piece.copied = whole_page(source, piece.head, slots + piece.first, piece.count,
                                  target.codec[piece.entry]);
    int32_t *positions = nullptr;
    if (keeps_positions) {
        uint8_t *memory = positions_memory.get(static_cast<size_t>(total) * sizeof(int32_t));
        if (memory == nullptr) return no_memory();
        positions = reinterpret_cast<int32_t *>(memory) - slot_start[0];
        std::vector<Disorder> found(static_cast<size_t>(heads));
        const bool done = each(heads, 0, alone, [&](int64_t h, uint8_t *) {
            const int64_t first = slot_start[h];
            const int head = static_cast<int>(h);
            const size_t at = static_cast<size_t>(h);
            read_slots(source, head, slots + first, 0, slot_start[h + 1] - first, nullptr, nullptr,
                       positions + first);
            found[at] = order_positions(layer, target, pieces.data() + first_piece[at],
                                        pieces.data() + first_piece[at + 1], slots + first,
                                        positions + first);
        });
        if (!done) return no_memory();
        for (int h = 0; h < heads; ++h)
            if (found[static_cast<size_t>(h)].kind != Disorder::kNone)
                return bad_order(h, found[static_cast<size_t>(h)]);
        for (const Piece &piece : pieces) {
            const int codec = target.codec[piece.entry];
            // Tokens that tied may have been moved on past the end, which none of them was beyond.
            if (fitted(codec) && piece.copied < 0 && piece.last < layer.table(codec)->positions) {
                const int64_t end = layer.table(codec)->positions - piece.count;
                int32_t *own = positions + piece.first;
                for (int64_t t = piece.count - 1; t >= 0 && own[t] > end + t; --t)
                    own[t] = static_cast<int32_t>(end + t);
            }
            if (piece.copied < 0 && positions_kept(codec) &&
                !put_positions(layer, codec, piece.head, nullptr, static_cast<int>(piece.count),
                               positions + piece.first))
                return bad_positions(layer, codec);
        }
    }
    // Pages that are sources too are written when all is read.
    int64_t waiting = 0;
    std::vector<int64_t> read;
    for (int h = 0; h < heads; ++h) {
        for (int64_t e = source.begin(h); e < source.end(h); ++e)
            read.push_back(request.directory.page[e]);
        for (int64_t i = 0; i * layer.block_size < request.tail_length; ++i)
            read.push_back(layer.tail_page(request.tail_table[i], h));
    }
    std::sort(read.begin(), read.end());
    for (Piece &piece : pieces)
        if (std::binary_search(read.begin(), read.end(), int64_t{target.page[piece.entry]}))
            piece.waiting = waiting++;
    uint8_t *staging = waiting != 0
                           ? staging_memory.get(static_cast<size_t>(waiting * layer.page_bytes))
                           : nullptr;
    if (waiting != 0 && staging == nullptr) return no_memory();
    int64_t longest = 0;
    for (const Piece &piece : pieces)
        if (piece.copied < 0) longest = std::max(longest, piece.count);
    const size_t scratch =
        static_cast<size_t>(longest * (layer.k_size + layer.v_size)) * sizeof(float);
    const size_t page_bytes = static_cast<size_t>(layer.page_bytes);
    bool done = each(n, scratch, alone, [&](int64_t i, uint8_t *memory) {
        const Piece &piece = pieces[static_cast<size_t>(i)];
        uint8_t *page = layer.pool + target.page[piece.entry] * layer.page_bytes;
        if (piece.waiting >= 0) page = staging + piece.waiting * layer.page_bytes;
        if (piece.copied >= 0) {
            std::memcpy(page, layer.page(request.directory.page[piece.copied]), page_bytes);
            return;
        }
        float *key = reinterpret_cast<float *>(memory), *value = key + piece.count * layer.k_size;
        read_slots(source, piece.head, slots + piece.first, 0, piece.count, key, value, nullptr);
        const int codec = target.codec[piece.entry], count = static_cast<int>(piece.count);
        if (piece.waiting >= 0) std::memset(page, 0, page_bytes);
        if (positions_kept(codec))
            put_positions(layer, codec, piece.head, page, count, positions + piece.first);
        kernels()->encode(layer, codec, piece.head, page, count, key, value);
    });
    if (done && waiting != 0)
        done = each(n, 0, alone, [&](int64_t i, uint8_t *) {
            const Piece &piece = pieces[static_cast<size_t>(i)];
            if (piece.waiting >= 0)
                std::memcpy(layer.pool + target.page[piece.entry] * layer.page_bytes,
                            staging + piece.waiting * layer.page_bytes, page_bytes);
        });
    positions_memory.trim();
    staging_memory.trim();
    return done ? 0 : no_memory();
}

// out[i] = mean or maximum of in[i - half ... i + half], cut at the edges.
void pool_row(const float *in, int64_t n, int64_t size, bool maximum, float *out) {
    const int64_t half = size / 2;
    if (!maximum) {
        double sum = 0;
        for (int64_t i = 0; i < (half < n ? half : n); ++i) sum += in[i];
        for (int64_t i = 0; i < n; ++i) {
            if (i + half < n) sum += in[i + half];
            if (i - half > 0) sum -= in[i - half - 1];
            const int64_t first = i - half > 0 ? i - half : 0;
            const int64_t last = i + half < n ? i + half : n - 1;
            out[i] = static_cast<float>(sum / static_cast<double>(last - first + 1));
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
    for (int64_t shift = 1; shift <= half && shift < n; ++shift) {
        for (int64_t i = 0; i + shift < n; ++i)
            out[i] = in[i + shift] > out[i] ? in[i + shift] : out[i];
        for (int64_t i = shift; i < n; ++i)
            out[i] = in[i - shift] > out[i] ? in[i - shift] : out[i];
    }
}

// Query rows go together in such numbers.
constexpr int kRowUnit = 12;

int window_scores(const Layer &layer, const kvc_request &request, const void *query, int32_t dtype,
                  int64_t head_stride, int64_t row_stride, const kvc_scoring &scoring,
                  int64_t candidates, float *out) {
    const Source source{layer, request};
    int64_t longest = 0;
    for (int h = 0; h < layer.num_kv_heads; ++h) {
        const int64_t held = source.tokens(h);
        longest = held > longest ? held : longest;
        if (held < candidates)
            return fail("%lld candidates among the %lld slots of head %d",
                        static_cast<long long>(candidates), static_cast<long long>(held), h);
    }
    // The shapes of a batch of one.
    kvc_batch batch{};
    batch.num_seqs = 1;
    batch.tail_length = &request.tail_length;
    batch.tail_table = request.tail_table;
    batch.directory = request.directory;
    const Kernels &kernel = *kernels();
    const size_t whole = static_cast<size_t>(layer.num_heads) * static_cast<size_t>(longest);
    Scratch weights_memory, pooled_memory;
    float *weights = reinterpret_cast<float *>(weights_memory.get(whole * sizeof(float)));
    float *pooled = out;
    if (scoring.reduce != 0)
        pooled = reinterpret_cast<float *>(
            pooled_memory.get(static_cast<size_t>(layer.num_heads * candidates) * sizeof(float)));
    if (weights == nullptr || pooled == nullptr) return no_memory();
    // A KV head is one item, and more where there are threads for more.
    int parts = max_threads() / layer.num_kv_heads;
    parts = parts < 1 ? 1 : (parts > layer.group ? layer.group : parts);
    const int most = (layer.group + parts - 1) / parts;
    // All weights of the rows that go together lie in memory: fewer heads, or less than a window,
    // go together where these would be too many.
    const int window = scoring.window;
    int64_t together = int64_t{most} * window;
    size_t scratch = kernel.window_scratch(layer, batch, static_cast<int>(together));
    if (scratch > Scratch::kKept) {
        together = together * static_cast<int64_t>(Scratch::kKept) / static_cast<int64_t>(scratch);
        together = std::max<int64_t>(together / kRowUnit * kRowUnit, kRowUnit);
        if (together > window) together = together / window * window;
        scratch = kernel.window_scratch(layer, batch, static_cast<int>(together));
    }
    const int count = static_cast<int>(std::min<int64_t>(together, window));
    const int at_once = static_cast<int>(together / count);
    const WindowQueries queries{query, head_stride, row_stride, dtype, window, 0, 0};
    auto score = [&](int64_t item, uint8_t *memory) {
        const int place = static_cast<int>(item % parts) * most;
        const int heads = layer.group - place < most ? layer.group - place : most;
        if (heads <= 0) return;
        const int64_t first = item / parts * layer.group + place;
        float *own = weights + first * longest;
        for (int head = 0; head < heads; head += at_once)
            for (int row = 0; row < window; row += count) {
                WindowQueries some = queries;
                some.begin = row;
                some.count = std::min(count, window - row);
                kernel.window_weights(layer, batch, some, static_cast<int>(first) + head,
                                      std::min(at_once, heads - head), scoring.factor,
                                      own + head * longest, longest, memory);
            }
        for (int i = 0; i < heads; ++i)
            pool_row(own + i * longest, candidates, scoring.pool, scoring.pool_max != 0,
                     pooled + (first + i) * candidates);
    };
    const bool done = each(int64_t{layer.num_kv_heads} * parts, scratch, longest < 512, score);
    if (!done) return no_memory();
    if (scoring.reduce == 0) return 0;
    const float share = 1.0f / static_cast<float>(layer.group);
    for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
        const float *from = pooled + h * layer.group * candidates;
        float *to = out + h * candidates;
        for (int64_t i = 0; i < candidates; ++i) to[i] = from[i];
        for (int64_t g = 1; g < layer.group; ++g) {
            from += candidates;
            for (int64_t i = 0; i < candidates; ++i)
                to[i] = scoring.reduce == 1 ? to[i] + from[i] : (from[i] > to[i] ? from[i] : to[i]);
        }
        for (int64_t i = 0; scoring.reduce == 1 && i < candidates; ++i) to[i] *= share;
    }
    return 0;
}

}  // namespace
}  // namespace kvc

using namespace kvc;

// Nothing may leave through a C interface as an exception.
template <class F>
static int guarded(F &&work) {
    try {
        return work();
    } catch (const std::exception &) {  // of the library only those that lack memory
        return no_memory();
    }
}

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))

KVC_EXPORT int kvc_version(void) {
    return KVC_VERSION;
}
KVC_EXPORT const char *kvc_error(void) {
    return error_text;
}
KVC_EXPORT const char *kvc_isa(void) {
    return kernels() != nullptr ? kernels()->name : "";
}
KVC_EXPORT int kvc_use_isa(const char *name) {
    const Kernels *wanted = find(name);
    if (wanted == nullptr) return fail("this CPU or build has no kernels named %s", name);
    chosen = wanted;
    return 0;
}
KVC_EXPORT int kvc_threads(void) {
    return max_threads();
}

KVC_EXPORT int64_t kvc_scratch_peak(void) {
    return Scratch::peak();
}

KVC_EXPORT int64_t kvc_capacity(int32_t codec, int64_t page_bytes, int32_t k_size, int32_t v_size,
                                int32_t dtype) {
    if (codec < 0 || codec >= KVC_FIRST_FITTED || !good_heads(k_size) || !good_heads(v_size) ||
        dtype < KVC_F32 || dtype > KVC_F16)
        return -1;
    if (page_bytes <= 0) return 0;
    return page_capacity(codec, page_bytes, k_size, v_size, dtype);
}

KVC_EXPORT int kvc_attention(const kvc_layer *given, const kvc_batch *batch, const void *query,
                             int32_t query_dtype, int64_t query_stride, void *out,
                             int32_t out_dtype, int64_t out_stride, float *lse) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0) return -1;
        if (query_dtype < KVC_F32 || query_dtype > KVC_F16 || out_dtype < KVC_F32 ||
            out_dtype > KVC_F16)
            return fail("dtypes %d and %d of query and output", query_dtype, out_dtype);
        return attention(layer, *batch, query, query_dtype, query_stride, out, out_dtype,
                         out_stride, lse);
    });
}

KVC_EXPORT int kvc_store(const kvc_layer *given, int64_t rows, const void *key, int64_t key_stride,
                         const void *value, int64_t value_stride, const int64_t *slots) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0) return -1;
        return store(layer, rows, key, key_stride, value, value_stride, slots);
    });
}

KVC_EXPORT int kvc_check_layer(const kvc_layer *given) {
    Layer layer;
    if (check_layer(given, layer) != 0) return -1;
    for (int codec = KVC_FIRST_FITTED; codec < KVC_CODECS; ++codec) {
        const kvc_table *table = layer.table(codec);
        if (table != nullptr && check_table(layer, *table) != 0) return -1;
    }
    return 0;
}

KVC_EXPORT int kvc_encode(const kvc_layer *given, int32_t codec, int32_t head, int64_t page,
                          int32_t count, const float *key, const float *value,
                          const int32_t *positions) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_head(layer, head) != 0 ||
            check_page(layer, head, page, codec, count) != 0)
            return -1;
        uint8_t *to = layer.pool + page * layer.page_bytes;
        if (positions_kept(codec)) {
            if (positions == nullptr && count != 0)
                return fail("codec %d keeps positions; none given", codec);
            if (!put_positions(layer, codec, head, to, count, positions))
                return bad_positions(layer, codec);
        }
        kernels()->encode(layer, codec, head, to, count, key, value);
        return 0;
    });
}

KVC_EXPORT int kvc_decode(const kvc_layer *given, int32_t codec, int32_t head, int64_t page,
                          int32_t count, float *key, float *value, int32_t *positions) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_head(layer, head) != 0 ||
            check_page(layer, head, page, codec, count) != 0)
            return -1;
        const uint8_t *from = layer.page(page);
        if (positions != nullptr) {
            if (!positions_kept(codec)) return fail("raw pages have no positions");
            get_positions(layer.layout(codec, head), codec, layer.page_bytes, from, 0, count,
                          positions);
        }
        if (key != nullptr || value != nullptr)
            kernels()->decode(layer, codec, head, from, count, count, nullptr, key, value);
        return 0;
    });
}

KVC_EXPORT int kvc_compact(const kvc_layer *given, const kvc_request *source, const int64_t *slots,
                           const int64_t *slot_start, const kvc_directory *target) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_request(layer, *source) != 0) return -1;
        if (target->begin == nullptr) return fail("a compaction needs target pages");
        if (check_directory(layer, *target, 0) != 0) return -1;
        return compact(layer, *source, slots, slot_start, *target);
    });
}

KVC_EXPORT int kvc_read(const kvc_layer *given, const kvc_request *source, int32_t head,
                        int64_t first, int64_t n, float *key, float *value, int32_t *positions) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_request(layer, *source) != 0) return -1;
        if (check_head(layer, head) != 0) return -1;
        const Source from{layer, *source};
        if (first < 0 || n < 0 || first > from.tokens(head) - n)
            return fail("%lld slots from slot %lld of %lld", static_cast<long long>(n),
                        static_cast<long long>(first), static_cast<long long>(from.tokens(head)));
        if (!read_slots(from, head, nullptr, first, n, key, value, positions))
            return fail("raw compressed pages have no positions");
        return 0;
    });
}

KVC_EXPORT int kvc_window_scores(const kvc_layer *given, const kvc_request *source,
                                 const void *query, int32_t query_dtype, int64_t head_stride,
                                 int64_t row_stride, const kvc_scoring *scoring, int64_t candidates,
                                 float *out) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_request(layer, *source) != 0) return -1;
        if (query_dtype < KVC_F32 || query_dtype > KVC_F16)
            return fail("dtype %d of the queries", query_dtype);
        if (scoring->window < 1 || scoring->window > source->tail_length)
            return fail("a window of %d queries in a tail of %d tokens", scoring->window,
                        source->tail_length);
        if (scoring->pool < 1 || scoring->pool % 2 == 0 || scoring->reduce < 0 ||
            scoring->reduce > 2 || candidates < 0)
            return fail("pool %d, reduce %d, %lld candidates", scoring->pool, scoring->reduce,
                        static_cast<long long>(candidates));
        return window_scores(layer, *source, query, query_dtype, head_stride, row_stride, *scoring,
                             candidates, out);
    });
}

KVC_EXPORT int kvc_top_mask(int64_t rows, int64_t n, const float *scores, int64_t keep,
                            uint8_t *mask) {
    return guarded([&] {
        if (keep < 0 || keep > n)
            return fail("cannot keep %lld of %lld slots", static_cast<long long>(keep),
                        static_cast<long long>(n));
        const bool done = each(rows, 0, rows * n < 65536, [&](int64_t row, uint8_t *) {
            top_row(scores + row * n, n, keep, mask + row * n);
        });
        return done ? 0 : no_memory();
    });
}

KVC_EXPORT int kvc_represent(int64_t bit_heads, int64_t units, int64_t unit, const uint8_t *bits,
                             const uint8_t *anchor, int64_t heads, uint8_t *mask, int64_t count) {
    return guarded([&] {
        if (bit_heads < 0 || units < 0 || unit < 0 || heads < 0)
            return fail("%lld units of %lld tokens in %lld and %lld heads",
                        static_cast<long long>(units), static_cast<long long>(unit),
                        static_cast<long long>(bit_heads), static_cast<long long>(heads));
        if (!represent(bit_heads, units, unit, bits, anchor, heads, mask, count))
            return fail("cannot pick %lld representatives beside the important ones of %lld units",
                        static_cast<long long>(count), static_cast<long long>(units));
        return 0;
    });
}

KVC_EXPORT int kvc_mask_slots(int64_t rows, int64_t n, const uint8_t *mask, int64_t count,
                              int64_t *slots) {
    for (int64_t row = 0; row < rows; ++row, mask += n) {
        int64_t found = 0;
        for (int64_t i = 0; i < n; ++i) found += mask[i] != 0;
        if (found != count)
            return fail("a mask marks %lld slots, not %lld", static_cast<long long>(found),
                        static_cast<long long>(count));
        for (int64_t i = 0; i < n; ++i)
            if (mask[i] != 0) *slots++ = i;
    }
    return 0;
}

KVC_EXPORT void kvc_huge_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last =
        (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
    if (first >= last) return;
    void *whole = reinterpret_cast<void *>(first);
    if (madvise(whole, last - first, MADV_HUGEPAGE) != 0) return;
    // What is there already is moved at once; kernels before 6.1 do it when they find time.
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
    (void)madvise(whole, last - first, kCollapse);
#else
    (void)memory;
    (void)bytes;
#endif
}
