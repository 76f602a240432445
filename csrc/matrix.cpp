// Kernels for AVX-512 BF16 and AMX: those of AVX-512 (KVC_BELOW), save that over a bfloat16 cache
// attention of several query tokens and window scores go by products of matrices; with AMX single
// tokens meet the tables of fitted codecs by tiles.
#include "kernels/matrix.h"

#include "internal.h"

#define KVC_TEXT_(x) #x
#define KVC_TEXT(x) KVC_TEXT_(x)

namespace kvc {

extern const Kernels KVC_BELOW;

namespace KVC_NAMESPACE {
namespace {

bool by_matrices(const Layer &layer) {
    return layer.dtype == KVC_BF16;
}
size_t attention_scratch(const Layer &layer) {
    const size_t below = KVC_BELOW.attention_scratch(layer);
    return by_matrices(layer) ? most(below, matrix_scratch(layer)) : below;
}
int attention_rows(const Layer &layer) {
    return by_matrices(layer) ? matrix_items_rows(layer) : KVC_BELOW.attention_rows(layer);
}
void attention(const Attention &call, int64_t item, uint8_t *scratch) {
    const Layer &layer = *call.layer;
    const int seq = sequence_of(call, item);
    if (!by_matrices(layer) || query_tokens(call, seq) == 1) {
        Attention below = call;
#if defined(KVC_TILES)  // vdpbf16ps would do no more at once than the integers below
        static constexpr TableProducts kProducts = {pack_weights, multiply_weights};
        below.products = &kProducts;
#endif
        KVC_BELOW.attention(below, item, scratch);
        return;
    }
    const int64_t first = call.first_item[seq];
    const int64_t blocks = (call.first_item[seq + 1] - first) / layer.num_kv_heads;
    MatrixMemory m;
    MatrixMemory::lay_out(layer, matrix_items_rows(layer) * layer.group, scratch, m);
    matrix_item(call, query_block(call, seq, item - first, blocks), m);
}

size_t window_scratch(const Layer &layer, const kvc_batch &batch, int rows) {
    return by_matrices(layer) ? window_scratch_by<MatrixProducts>(layer, batch, rows)
                              : KVC_BELOW.window_scratch(layer, batch, rows);
}
void window_weights(const Layer &layer, const kvc_batch &batch, const WindowQueries &queries,
                    int first, int heads, float factor, float *out, int64_t out_stride,
                    uint8_t *scratch) {
    const auto weights =
        by_matrices(layer) ? window_weights_by<MatrixProducts> : KVC_BELOW.window_weights;
    weights(layer, batch, queries, first, heads, factor, out, out_stride, scratch);
}

// All else, by calls: tables are constants, and those of another unit are not known here.
int64_t partial_floats(const Layer &layer) {
    return KVC_BELOW.partial_floats(layer);
}
void store_below(const Layer &layer, int64_t first, int64_t last, const void *key,
                 int64_t key_stride, const void *value, int64_t value_stride,
                 const int64_t *slots) {
    KVC_BELOW.store(layer, first, last, key, key_stride, value, value_stride, slots);
}
void encode(const Layer &layer, int codec, int head, uint8_t *page, int count, const float *key,
            const float *value) {
    KVC_BELOW.encode(layer, codec, head, page, count, key, value);
}
void decode(const Layer &layer, int codec, int head, const uint8_t *page, int count, int n,
            const int32_t *places, float *key, float *value) {
    KVC_BELOW.decode(layer, codec, head, page, count, n, places, key, value);
}
int64_t strip_bytes(int size) {
    return KVC_BELOW.strip_bytes(size);
}
size_t alike_scratch(const Alike &alike) {
    return KVC_BELOW.alike_scratch(alike);
}
void pack_strip(const Alike &alike, int64_t strip, uint8_t *packed, float *inverse) {
    KVC_BELOW.pack_strip(alike, strip, packed, inverse);
}
void nearest(const Alike &alike, const int64_t *rows, int count, int64_t *nearest, float *cosine,
             uint8_t *scratch) {
    KVC_BELOW.nearest(alike, rows, count, nearest, cosine, scratch);
}
void latest(const Alike &alike, int64_t first, int count, float threshold, int64_t *latest,
            float *cosine, uint8_t *scratch) {
    KVC_BELOW.latest(alike, first, count, threshold, latest, cosine, scratch);
}
void add_units(const float *keys, int64_t n, int size, double *sum) {
    KVC_BELOW.add_units(keys, n, size, sum);
}
void total_cosines(const float *keys, int64_t n, int size, const float *sum, float *out) {
    KVC_BELOW.total_cosines(keys, n, size, sum, out);
}
}  // namespace
}  // namespace KVC_NAMESPACE

extern const Kernels KVC_TABLE;
const Kernels KVC_TABLE = {
    KVC_TEXT(KVC_NAMESPACE),       KVC_NAMESPACE::attention_scratch,
    KVC_NAMESPACE::attention_rows, KVC_NAMESPACE::partial_floats,
    KVC_NAMESPACE::attention,      KVC_NAMESPACE::store_below,
    KVC_NAMESPACE::encode,         KVC_NAMESPACE::decode,
    KVC_NAMESPACE::window_scratch, KVC_NAMESPACE::window_weights,
    KVC_NAMESPACE::strip_bytes,    KVC_NAMESPACE::alike_scratch,
    KVC_NAMESPACE::pack_strip,     KVC_NAMESPACE::nearest,
    KVC_NAMESPACE::latest,         KVC_NAMESPACE::add_units,
    KVC_NAMESPACE::total_cosines,
};

}  // namespace kvc
