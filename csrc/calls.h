// What the units behind the interface share: how a call is checked, shared out and done. Compiled
// once, for the baseline; kernels of an instruction set are reached through `kernels()`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "internal.h"

namespace kvc {

// check.cpp: each leaves one sentence and gives -1, or 0.
const char *last_error();
int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int no_memory();
bool good_heads(int32_t size);
int check_layer(const kvc_layer *given, Layer &layer);
int check_table(const Layer &layer, const kvc_table &table);
int check_head(const Layer &layer, int head);
int check_page(const Layer &layer, int head, int64_t page, int codec, int64_t count);
int check_directory(const Layer &layer, const kvc_directory &directory, int64_t row);
int check_tail(const Layer &layer, const int32_t *table, int64_t columns, int32_t length);
int check_source(const Layer &layer, const kvc_source &given);

// structs.cpp
const char *structs();

// isa.cpp
const Kernels *find(const char *name);
const Kernels *kernels();
void use(const Kernels *wanted);

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

struct Source {
    const Layer &layer;
    const kvc_source &given;

    int64_t begin(int head) const {
        return given.directory.begin != nullptr ? given.directory.begin[head] : 0;
    }
    int64_t end(int head) const {
        return given.directory.begin != nullptr ? given.directory.end[head] : 0;
    }
    int64_t tokens(int head) const {
        int64_t n = given.tail_length;
        for (int64_t e = begin(head); e < end(head); ++e) n += given.directory.count[e];
        return n;
    }
};

// pages.cpp
bool put_positions(const Layer &layer, int codec, int head, uint8_t *page, int count,
                   const int32_t *positions);
int bad_positions(const Layer &layer, int codec);
bool read_slots(const Source &source, int head, const int64_t *slots, int64_t first, int64_t n,
                float *key, float *value, int32_t *positions);
int store(const Layer &layer, int64_t rows, const void *key, int64_t key_stride, const void *value,
          int64_t value_stride, const int64_t *slots);

// attention.cpp, compact.cpp, scores.cpp: calls whose layer and request are checked.
int attention(const Layer &layer, const kvc_batch &batch, const void *query, int32_t query_dtype,
              int64_t query_stride, void *out, int32_t out_dtype, int64_t out_stride, float *lse);
int compact(const Layer &layer, const kvc_source &given, const int64_t *slots,
            const int64_t *slot_start, const kvc_directory &target);
int gather(const Layer &layer, const kvc_source &given, const int64_t *slots,
           const int64_t *slot_start, int64_t rows, float *key, float *value, int32_t *positions);
int fill(const Layer &layer, int64_t rows, const int64_t *counts, const float *key,
         const float *value, const int32_t *positions, const kvc_directory &target);
int window_scores(const Layer &layer, const kvc_source &given, const void *query, int32_t dtype,
                  int64_t head_stride, int64_t row_stride, const kvc_scoring &scoring,
                  const int64_t *candidates, float *out);

}  // namespace kvc
