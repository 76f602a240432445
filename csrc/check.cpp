// Whether a call may be done: what it names must lie inside the cache, and sizes must agree.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "calls.h"

namespace kvc {
namespace {

thread_local char error_text[256];

}  // namespace

const char *last_error() {
    return error_text;
}

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

bool good_heads(int32_t size) {
    return size > 0 && size % 8 == 0 && size <= kMaxHead;
}

int check_layer(const kvc_layer *given, Layer &layer) {
    static_cast<kvc_layer &>(layer) = *given;
    if (kernels() == nullptr)
        return fail(
            "KVCRUSH_ISA=%s is not one of baseline, avx2, avx512, avx512bf16, amx and neon that "
            "this CPU has",
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
    for (const Format &format : kFormats) {
        if (format.tables) continue;
        int64_t &capacity = layer.flat_capacity[format.codec];
        capacity =
            page_capacity(format.codec, layer.page_bytes, layer.k_size, layer.v_size, layer.dtype);
        layer.flat[format.codec] =
            page_layout(format.codec, capacity, layer.k_size, layer.v_size, layer.dtype);
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
            head.step == nullptr || head.middle == nullptr)
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
    if (kFormats[codec].tables && layer.table(codec) == nullptr)
        return fail("codec %s needs tables, which this layer has none of", kFormats[codec].name);
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

int check_source(const Layer &layer, const kvc_source &given) {
    if (check_directory(layer, given.directory, 0) != 0) return -1;
    return check_tail(layer, given.tail_table, INT32_MAX, given.tail_length);
}

}  // namespace kvc
