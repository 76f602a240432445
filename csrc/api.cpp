// The C interface: checks what it is given, then hands the work on.

#include <algorithm>
#include <exception>

#include "calls.h"

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
KVC_EXPORT const char *kvc_structs(void) {
    return structs();
}
KVC_EXPORT const char *kvc_error(void) {
    return last_error();
}
KVC_EXPORT const char *kvc_isa(void) {
    return kernels() != nullptr ? kernels()->name : "";
}
KVC_EXPORT int kvc_use_isa(const char *name) {
    const Kernels *wanted = find(name);
    if (wanted == nullptr) return fail("this CPU or build has no kernels named %s", name);
    use(wanted);
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
    if (codec < 0 || codec >= KVC_CODECS || kFormats[codec].tables || !good_heads(k_size) ||
        !good_heads(v_size) || dtype < KVC_F32 || dtype > KVC_F16)
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
    for (const Format &format : kFormats) {
        const kvc_table *table = format.tables ? layer.table(format.codec) : nullptr;
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
        if (kFormats[codec].positions) {
            if (positions == nullptr && count != 0)
                return fail("codec %s keeps positions; none given", kFormats[codec].name);
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
            if (!kFormats[codec].positions) return fail("raw pages have no positions");
            get_positions(layer.layout(codec, head), codec, layer.page_bytes, from, 0, count,
                          positions);
        }
        if (key != nullptr || value != nullptr)
            kernels()->decode(layer, codec, head, from, count, count, nullptr, key, value);
        return 0;
    });
}

KVC_EXPORT int kvc_compact(const kvc_layer *given, const kvc_source *source, const int64_t *slots,
                           const int64_t *slot_start, const kvc_directory *target) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_source(layer, *source) != 0) return -1;
        if (target->begin == nullptr) return fail("a compaction needs target pages");
        if (check_directory(layer, *target, 0) != 0) return -1;
        return compact(layer, *source, slots, slot_start, *target);
    });
}

KVC_EXPORT int kvc_gather(const kvc_layer *given, const kvc_source *source, const int64_t *slots,
                          const int64_t *slot_start, int64_t rows, float *key, float *value,
                          int32_t *positions) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_source(layer, *source) != 0) return -1;
        return gather(layer, *source, slots, slot_start, rows, key, value, positions);
    });
}

KVC_EXPORT int kvc_fill(const kvc_layer *given, int64_t rows, const int64_t *counts,
                        const float *key, const float *value, const int32_t *positions,
                        const kvc_directory *target) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0) return -1;
        if (target->begin == nullptr) return fail("tokens need target pages");
        if (check_directory(layer, *target, 0) != 0) return -1;
        return fill(layer, rows, counts, key, value, positions, *target);
    });
}

KVC_EXPORT int kvc_read(const kvc_layer *given, const kvc_source *source, int32_t head,
                        int64_t first, int64_t n, float *key, float *value, int32_t *positions) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_source(layer, *source) != 0) return -1;
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

KVC_EXPORT int kvc_window_scores(const kvc_layer *given, const kvc_source *source,
                                 const void *query, int32_t query_dtype, int64_t head_stride,
                                 int64_t row_stride, const kvc_scoring *scoring,
                                 const int64_t *candidates, float *out) {
    return guarded([&] {
        Layer layer;
        if (check_layer(given, layer) != 0 || check_source(layer, *source) != 0) return -1;
        if (query_dtype < KVC_F32 || query_dtype > KVC_F16)
            return fail("dtype %d of the queries", query_dtype);
        if (scoring->window < 1 || scoring->window > source->tail_length)
            return fail("a window of %d queries in a tail of %d tokens", scoring->window,
                        source->tail_length);
        if (scoring->pool < 1 || scoring->pool % 2 == 0 || scoring->reduce < 0 ||
            scoring->reduce > 3)
            return fail("pool %d, reduce %d", scoring->pool, scoring->reduce);
        return window_scores(layer, *source, query, query_dtype, head_stride, row_stride, *scoring,
                             candidates, out);
    });
}

KVC_EXPORT int kvc_top_mask(int64_t rows, int64_t n, const float *scores, const int64_t *keep,
                            uint8_t *mask) {
    return guarded([&] {
        for (int64_t row = 0; row < rows; ++row)
            if (keep[row] < 0 || keep[row] > n)
                return fail("cannot keep %lld of %lld slots", static_cast<long long>(keep[row]),
                            static_cast<long long>(n));
        const bool done = each(rows, 0, rows * n < 65536, [&](int64_t row, uint8_t *) {
            top_row(scores + row * n, n, keep[row], mask + row * n);
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

static int check_keys(const kvc_keys &keys) {
    if (kernels() == nullptr) return fail("KVCRUSH_ISA names no kernels that this CPU has");
    if (!good_heads(keys.size) || keys.heads < 0 || keys.slots < 0 ||
        keys.slots > INT64_MAX / (4 * int64_t{kMaxHead}) || keys.stride < keys.slots * keys.size)
        return fail("%lld keys of %d channels in %d heads, %lld floats apart",
                    static_cast<long long>(keys.slots), keys.size, keys.heads,
                    static_cast<long long>(keys.stride));
    return 0;
}

KVC_EXPORT int kvc_nearest_kept(const kvc_keys *keys, const uint8_t *gone, const uint8_t *kept,
                                int64_t *target, float *cosine) {
    return guarded([&] {
        if (check_keys(*keys) != 0) return -1;
        for (int64_t h = 0, n = keys->slots; h < keys->heads; ++h)
            if (!nearest_kept(n, keys->size, keys->data + h * keys->stride, gone + h * n,
                              kept + h * n, target + h * n, cosine + h * n))
                return no_memory();
        return 0;
    });
}

KVC_EXPORT int kvc_redundancy(const kvc_keys *keys, const int64_t *counts, float threshold,
                              float *out) {
    return guarded([&] {
        if (check_keys(*keys) != 0) return -1;
        if (!(threshold >= 0))
            return fail("a threshold of %g is not 0 or more", static_cast<double>(threshold));
        for (int64_t h = 0, n = keys->slots; h < keys->heads; ++h) {
            if (counts[h] < 0 || counts[h] > n)
                return fail("%lld keys of a head among %lld slots",
                            static_cast<long long>(counts[h]), static_cast<long long>(n));
            float *own = out + h * n;
            if (!redundancy(counts[h], keys->size, keys->data + h * keys->stride, threshold, own))
                return no_memory();
            std::fill(own + counts[h], own + n, 0.0f);
        }
        return 0;
    });
}

KVC_EXPORT int kvc_merge(const kvc_keys *x, const int64_t *target, const float *weight,
                         float *out) {
    return guarded([&] {
        if (check_keys(*x) != 0) return -1;
        const int64_t n = x->slots;
        for (int64_t i = 0; i < x->heads * n; ++i)
            if (target[i] < 0 || target[i] >= n)
                return fail("slot %lld is not among %lld", static_cast<long long>(target[i]),
                            static_cast<long long>(n));
        const bool done = each(x->heads, 0, x->heads * n < 1024, [&](int64_t h, uint8_t *) {
            merge(n, x->size, x->data + h * x->stride, target + h * n, weight + h * n,
                  out + h * n * x->size);
        });
        return done ? 0 : no_memory();
    });
}

KVC_EXPORT int kvc_spread(int32_t heads, int64_t slots, int32_t size, const uint8_t *kept,
                          const float *part, int64_t width, float *values) {
    return guarded([&] {
        if (heads < 0 || slots < 0 || !good_heads(size) || width < 1)
            return fail("values of %d channels of %lld slots in %d heads over %lld slots", size,
                        static_cast<long long>(slots), heads, static_cast<long long>(width));
        for (int64_t h = 0; h < heads; ++h)
            spread(slots, size, kept + h * slots, part + h * slots, width,
                   values + h * slots * size);
        return 0;
    });
}

KVC_EXPORT int kvc_mask_slots(int64_t rows, int64_t n, const uint8_t *mask, const int64_t *count,
                              int64_t *slots) {
    int64_t width = 0;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t found = 0;
        for (int64_t i = 0; i < n; ++i) found += mask[row * n + i] != 0;
        if (found != count[row])
            return fail("a mask marks %lld slots, not %lld", static_cast<long long>(found),
                        static_cast<long long>(count[row]));
        width = found > width ? found : width;
    }
    for (int64_t row = 0; row < rows; ++row, mask += n, slots += width) {
        int64_t at = 0;
        for (int64_t i = 0; i < n; ++i)
            if (mask[i] != 0) slots[at++] = i;
        while (at < width) slots[at++] = -1;
    }
    return 0;
}
