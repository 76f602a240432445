// What merging and redundancy are made of: which keys of a head are alike, and sums of tokens.
#include <algorithm>
#include <vector>

#include "calls.h"

namespace kvc {
namespace {

// What the kernels take of the columns. False: no memory.
bool pack(Alike &alike, Scratch &memory) {
    const size_t strips = static_cast<size_t>(alike.strips());
    const size_t bytes = strips * static_cast<size_t>(kernels()->strip_bytes(alike.size));
    uint8_t *packed = memory.get(bytes + strips * kStrip * sizeof(float));
    if (packed == nullptr) return false;
    float *inverse = reinterpret_cast<float *>(packed + bytes);
    alike.packed = packed;
    alike.inverse = inverse;
    constexpr int64_t kEach = 16;
    return each((alike.strips() + kEach - 1) / kEach, 0, alike.columns < 512,
                [&](int64_t item, uint8_t *) {
                    const int64_t end = std::min((item + 1) * kEach, alike.strips());
                    for (int64_t strip = item * kEach; strip < end; ++strip)
                        kernels()->pack_strip(alike, strip, packed, inverse);
                });
}

// Calls work(first, count, scratch) for all of `rows` in such numbers as kernels take.
template <class F>
bool each_rows(int64_t rows, const Alike &alike, F &&work) {
    return each((rows + kAlikeRows - 1) / kAlikeRows, kernels()->alike_scratch(alike),
                rows * alike.columns < 65536, [&](int64_t item, uint8_t *scratch) {
                    const int64_t first = item * kAlikeRows;
                    work(first, static_cast<int>(std::min<int64_t>(kAlikeRows, rows - first)),
                         scratch);
                });
}

}  // namespace

bool nearest_kept(int64_t slots, int size, const float *keys, const uint8_t *gone,
                  const uint8_t *kept, int64_t *target, float *cosine) {
    std::vector<int64_t> rows, columns;
    for (int64_t i = 0; i < slots; ++i) {
        target[i] = i;
        cosine[i] = gone[i] != 0 ? -2.0f : 1.0f;
        if (gone[i] != 0) rows.push_back(i);
        if (kept[i] != 0) columns.push_back(i);
    }
    if (columns.empty()) return true;
    Alike alike{keys, size, columns.data(), static_cast<int64_t>(columns.size()), nullptr, nullptr};
    Scratch memory;
    if (!pack(alike, memory)) return false;
    std::vector<int64_t> nearest(rows.size());
    std::vector<float> found(rows.size());
    const bool done = each_rows(
        static_cast<int64_t>(rows.size()), alike, [&](int64_t first, int count, uint8_t *scratch) {
            kernels()->nearest(alike, rows.data() + first, count, nearest.data() + first,
                               found.data() + first, scratch);
        });
    for (size_t i = 0; i < rows.size(); ++i)
        target[rows[i]] = nearest[i], cosine[rows[i]] = found[i];
    return done;
}

bool redundancy(int64_t slots, int size, const float *keys, float threshold, float *out) {
    if (slots == 0) return true;
    Alike alike{keys, size, nullptr, slots, nullptr, nullptr};
    Scratch memory;
    if (!pack(alike, memory)) return false;
    std::vector<double> sum(static_cast<size_t>(size));
    kernels()->add_units(keys, slots, size, sum.data());
    const std::vector<float> total(sum.begin(), sum.end());
    std::vector<int64_t> latest(static_cast<size_t>(slots));
    std::vector<float> found(static_cast<size_t>(slots));
    const bool done = each_rows(slots, alike, [&](int64_t first, int count, uint8_t *scratch) {
        kernels()->total_cosines(keys + first * size, count, size, total.data(), out + first);
        kernels()->latest(alike, first, count, threshold, latest.data() + first,
                          found.data() + first, scratch);
    });
    // In the order of slots, so that sums do not depend on threads.
    for (size_t i = 0; i < latest.size(); ++i)
        if (latest[i] >= 0) out[latest[i]] -= found[i];
    for (int64_t i = 0; i < slots; ++i) out[i] /= static_cast<float>(slots);
    return done;
}

void merge(int64_t slots, int64_t size, const float *x, const int64_t *target, const float *weight,
           float *out) {
    std::fill(out, out + slots * size, 0.0f);
    for (int64_t i = 0; i < slots; ++i, x += size) {
        if (weight[i] == 0) continue;
        float *to = out + target[i] * size;
        for (int64_t c = 0; c < size; ++c) to[c] += weight[i] * x[c];
    }
}

void spread(int64_t slots, int64_t size, const uint8_t *kept, const float *part, int64_t width,
            float *values) {
    // What began at each of the last `width` kept slots, so that it can end.
    int64_t kept_slots = 0;
    for (int64_t i = 0; i < slots; ++i) kept_slots += kept[i] != 0;
    width = std::min(width, std::max<int64_t>(kept_slots, 1));
    std::vector<double> begun(static_cast<size_t>(width * size));
    std::vector<double> sum(static_cast<size_t>(size)), fresh(static_cast<size_t>(size));
    int64_t place = 0;
    bool any = false;
    for (int64_t i = 0; i < slots; ++i, values += size) {
        if (kept[i] == 0) {
            if (part[i] == 0) continue;
            any = true;
            for (int64_t c = 0; c < size; ++c)
                fresh[static_cast<size_t>(c)] += static_cast<double>(part[i] * values[c]);
            continue;
        }
        if (!any) continue;  // until something was dropped nothing can end
        double *ended = begun.data() + place * size;
        place = place + 1 == width ? 0 : place + 1;
        for (int64_t c = 0; c < size; ++c) {
            const size_t at = static_cast<size_t>(c);
            sum[at] += fresh[at] - ended[c];
            ended[c] = fresh[at];
            fresh[at] = 0;
            values[c] += static_cast<float>(sum[at]);
        }
    }
}

}  // namespace kvc
