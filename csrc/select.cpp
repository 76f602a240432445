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
    uint32_t prefix = 0, known = 0;  // the digits found, and their mask
    int64_t room = keep;             // of those that share them
    for (int digit = 0; digit < 3; ++digit) {
        const int shift = kShifts[digit], width = kWidths[digit];
        int64_t histogram[1 << 11] = {};
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t x = ordered(scores[i]);
            if ((x & known) == prefix) ++histogram[x >> shift & ((1u << width) - 1)];
        }
        uint32_t value = (1u << width) - 1;
        while (histogram[value] < room) room -= histogram[value--];
        prefix |= value << shift;
        known |= ((1u << width) - 1) << shift;
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t x = ordered(scores[i]);
        mask[i] = x > prefix || (x == prefix && room > 0);
        room -= x == prefix && room > 0;
    }
}

bool represent(int64_t bit_heads, int64_t units, int64_t unit, const uint8_t *bits,
               const uint8_t *anchor, int64_t heads, uint8_t *mask, int64_t count) {
    const int64_t width = bit_heads * unit, tokens = units * unit;
    std::vector<int32_t> distance(static_cast<size_t>(units));
    std::vector<int64_t> start(static_cast<size_t>(width) + 2);
    std::vector<uint8_t> majority(static_cast<size_t>(width));
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
        start.assign(static_cast<size_t>(width) + 2, 0);
        for (int64_t u = 0; u < units; ++u)
            if (mask[u] == 0) ++start[static_cast<size_t>(distance[static_cast<size_t>(u)]) + 1];
        for (size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
        for (int64_t u = 0; u < units; ++u) {
            if (mask[u] != 0) continue;
            const int64_t rank = start[static_cast<size_t>(distance[static_cast<size_t>(u)])]++;
            // Is there an i below count with floor(i * others / count) == rank?
            const int64_t i = (rank * count + others - 1) / others;
            if (i < count && i * others / count == rank) mask[u] = 1;
        }
    }
    return true;
}

}  // namespace kvc
