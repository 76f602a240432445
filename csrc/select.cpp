// Choosing tokens: the same choices as vllm_kvcrush/ops/reference.py, ties to the lower slot.
#include <cstring>
#include <vector>

#include "internal.h"

namespace kvc {
namespace {

// Floats as integers of the same order; NaN is the least, and both zeros are equal.
uint32_t ordered(float x) {
    if (x != x) x = -__builtin_inff();
    uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, 4);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace

// Finds the least score that stays, digit by digit, then takes from the left among its equals.
void top_row(const float *scores, int64_t n, int64_t keep, uint8_t *mask) {
    if (n == 0) return;
    if (keep == 0 || keep == n) {
        std::memset(mask, keep != 0 ? 1 : 0, static_cast<size_t>(n));
        return;
    }
    constexpr int kShifts[] = {21, 10, 0};
    constexpr int kWidths[] = {11, 11, 10};
    static thread_local std::vector<uint32_t> memory;
    memory.resize(2 * static_cast<size_t>(n));
    uint32_t *all = memory.data(), *rest = all + n;
    for (int64_t i = 0; i < n; ++i) all[i] = ordered(scores[i]);
    const uint32_t *among = all;  // those that share the digits found
    int64_t count = n, room = keep;
    uint32_t least = 0;
    for (int digit = 0; digit < 3; ++digit) {
        const int shift = kShifts[digit];
        const uint32_t last = (1u << kWidths[digit]) - 1;
        uint32_t histogram[1 << 11] = {};
        for (int64_t i = 0; i < count; ++i) ++histogram[among[i] >> shift & last];
        uint32_t value = last;
        while (int64_t{histogram[value]} < room) room -= histogram[value--];
        least |= value << shift;
        int64_t same = 0;
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t x = among[i];
            rest[same] = x;  // to be overwritten unless it counts
            same += (x >> shift & last) == value;
        }
        among = rest;
        count = same;
    }
    if (count == room) {  // all equals stay
        for (int64_t i = 0; i < n; ++i) mask[i] = all[i] >= least;
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        mask[i] = all[i] > least || (all[i] == least && room > 0);
        room -= all[i] == least && room > 0;
    }
}

bool represent(int64_t bit_heads, int64_t units, int64_t unit, const uint8_t *bits,
               const uint8_t *anchor, int64_t heads, uint8_t *mask, int64_t count) {
    const int64_t width = bit_heads * unit, tokens = units * unit;
    std::vector<int32_t> distance(static_cast<size_t>(units));
    std::vector<int64_t> start(static_cast<size_t>(width) + 2);
    std::vector<uint8_t> majority(static_cast<size_t>(width));
    std::vector<uint8_t> wanted(static_cast<size_t>(units));  // by rank in the order of distances
    for (int64_t h = 0; h < heads; ++h, mask += units) {
        int64_t others = 0;
        for (int64_t u = 0; u < units; ++u) others += mask[u] == 0;
        if (count < 0 || count > others) return false;
        if (count == 0) continue;
        if (anchor == nullptr)
            for (int64_t b = 0; b < width; ++b) {
                const uint8_t *row = bits + b / unit * tokens + b % unit;
                int64_t ones = 0;
                for (int64_t u = 0; u < units; ++u) ones += mask[u] == 0 && row[u * unit] != 0;
                majority[static_cast<size_t>(b)] = 2 * ones > others;
            }
        if (anchor == nullptr || h == 0) {  // a given anchor gives every head the same distances
            const uint8_t *from = anchor != nullptr ? anchor : majority.data();
            distance.assign(static_cast<size_t>(units), 0);
            for (int64_t b = 0; b < width; ++b) {
                const uint8_t *row = bits + b / unit * tokens + b % unit;
                const bool one = from[b] != 0;
                for (int64_t u = 0; u < units; ++u)
                    distance[static_cast<size_t>(u)] += (row[u * unit] != 0) != one;
            }
        }
        wanted.assign(static_cast<size_t>(units), 0);
        for (int64_t i = 0; i < count; ++i) wanted[static_cast<size_t>(i * others / count)] = 1;
        start.assign(static_cast<size_t>(width) + 2, 0);
        for (int64_t u = 0; u < units; ++u)
            if (mask[u] == 0) ++start[static_cast<size_t>(distance[static_cast<size_t>(u)]) + 1];
        for (size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
        for (int64_t u = 0; u < units; ++u) {
            if (mask[u] != 0) continue;
            const int64_t rank = start[static_cast<size_t>(distance[static_cast<size_t>(u)])]++;
            mask[u] = wanted[static_cast<size_t>(rank)];
        }
    }
    return true;
}

}  // namespace kvc
