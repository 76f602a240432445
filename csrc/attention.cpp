// Paged attention over a batch: checks it and shares it out.
#include <vector>

#include "calls.h"

namespace kvc {
namespace {

// Kept from call to call.
thread_local std::vector<int64_t> items_memory;
thread_local std::vector<int32_t> arrived_memory;
thread_local Scratch partial_memory;

}  // namespace

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

}  // namespace kvc
