// Pages and slots outside attention: storing new tokens, positions, and reading a request's slots.
#include "calls.h"

namespace kvc {

// False if they do not ascend, or span too much, or go beyond what the codec's tables know. Without
// a page that is all that is found out.
bool put_positions(const Layer &layer, int codec, int head, uint8_t *page, int count,
                   const int32_t *positions) {
    uint8_t *low = page != nullptr ? page + layer.layout(codec, head).positions : nullptr;
    PageHeader header;
    header.base = count != 0 ? positions[0] : 0;
    for (uint16_t &first : header.first) first = 65535;
    if (kFormats[codec].tables && count != 0 &&
        (positions[0] < 0 || positions[count - 1] >= layer.table(codec)->positions))
        return false;
    const int each = kFormats[codec].position_step;
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
    if (kFormats[codec].tables)
        return fail(
            "positions within a page do not ascend from 0 on below %d, which its tables know",
            layer.table(codec)->positions);
    return fail("positions within a page do not ascend, or span 983040 or more");
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

// Decodes n slots of a head, in any order; slots == null: first, first + 1, ...  False: some pages
// have no positions, which are -1.
bool read_slots(const Source &source, int head, const int64_t *slots, int64_t first, int64_t n,
                float *key, float *value, int32_t *positions) {
    const Layer &layer = source.layer;
    const kvc_directory &directory = source.given.directory;
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
            index = layer.tail_page(source.given.tail_table[block], head);
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
                    positions[done + i] = static_cast<int32_t>(source.given.tail_position +
                                                               (start - page_start) + places[i]);
            } else if (!kFormats[codec].positions) {
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

}  // namespace kvc
