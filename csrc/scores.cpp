// Scores of a window of queries: shares the kernels' work out, pools and reduces.
#include <algorithm>

#include "calls.h"

namespace kvc {
namespace {

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

// Query rows go together in such numbers: of vectors; and those that fill tiles of matrices too.
constexpr int kRowUnit = 12, kRowUnits = 48;

}  // namespace

int window_scores(const Layer &layer, const kvc_source &given, const void *query, int32_t dtype,
                  int64_t head_stride, int64_t row_stride, const kvc_scoring &scoring,
                  const int64_t *candidates, float *out) {
    const Source source{layer, given};
    int64_t longest = 0, width = 0;
    for (int h = 0; h < layer.num_kv_heads; ++h) {
        const int64_t held = source.tokens(h);
        longest = held > longest ? held : longest;
        width = std::max(width, candidates[h]);
        if (candidates[h] < 0 || held < candidates[h])
            return fail("%lld candidates among the %lld slots of head %d",
                        static_cast<long long>(candidates[h]), static_cast<long long>(held), h);
    }
    if (width == 0) return 0;
    // The shapes of a batch of one.
    kvc_batch batch{};
    batch.num_seqs = 1;
    batch.tail_length = &given.tail_length;
    batch.tail_table = given.tail_table;
    batch.directory = given.directory;
    const Kernels &kernel = *kernels();
    const size_t whole = static_cast<size_t>(layer.num_heads) * static_cast<size_t>(longest);
    Scratch weights_memory, pooled_memory;
    float *weights = reinterpret_cast<float *>(weights_memory.get(whole * sizeof(float)));
    float *pooled = out;
    const bool greatest = scoring.reduce == 3;
    if (scoring.reduce != 0 && !greatest)
        pooled = reinterpret_cast<float *>(
            pooled_memory.get(static_cast<size_t>(layer.num_heads * width) * sizeof(float)));
    if (weights == nullptr || pooled == nullptr) return no_memory();
    // A KV head is one item, and more where there are threads for more.
    int parts = greatest ? 1 : max_threads() / layer.num_kv_heads;
    parts = parts < 1 ? 1 : (parts > layer.group ? layer.group : parts);
    const int most = (layer.group + parts - 1) / parts;
    // All weights of the rows that go together lie in memory: fewer heads, or less than a window,
    // go together where these would be too many.
    const int window = scoring.window;
    int64_t together = int64_t{most} * window;
    const auto needed = [&](int64_t rows) {
        return static_cast<int64_t>(kernel.window_scratch(layer, batch, static_cast<int>(rows)));
    };
    const int64_t kept = Scratch::kKept;
    int64_t scratch = needed(together);
    if (scratch > kept) {
        // Beside what every row needs there is what a call needs.
        const int64_t least = needed(kRowUnits);
        if (together > kRowUnits && least < kept)
            together = kRowUnits + (kept - least) * (together - kRowUnits) / (scratch - least);
        else
            together = together * kept / scratch;
        const int64_t unit = together < kRowUnits ? kRowUnit : kRowUnits;
        together = std::max<int64_t>(together / unit * unit, kRowUnit);
        if (greatest)
            together = std::max<int64_t>(together / layer.group, 1) * layer.group;
        else if (together > window)
            together = together / window * window;
        scratch = needed(together);
    }
    const int count =
        static_cast<int>(greatest ? together / layer.group : std::min<int64_t>(together, window));
    const int at_once = static_cast<int>(together / count);
    const WindowQueries queries{query, head_stride, row_stride, dtype, window, 0, 0, greatest};
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
        const int64_t n = candidates[item / parts];
        for (int i = 0; i < (greatest ? 1 : heads); ++i) {
            float *to = pooled + (greatest ? item : first + i) * width;
            pool_row(own + i * longest, n, scoring.pool, scoring.pool_max != 0, to);
            std::fill(to + n, to + width, -__builtin_inff());
        }
    };
    const bool done = each(int64_t{layer.num_kv_heads} * parts, static_cast<size_t>(scratch),
                           longest < 512, score);
    if (!done) return no_memory();
    if (scoring.reduce == 0 || greatest) return 0;
    const float share = 1.0f / static_cast<float>(layer.group);
    for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
        const float *from = pooled + h * layer.group * width;
        float *to = out + h * width;
        for (int64_t i = 0; i < width; ++i) to[i] = from[i];
        for (int64_t g = 1; g < layer.group; ++g) {
            from += width;
            for (int64_t i = 0; i < width; ++i)
                to[i] = scoring.reduce == 1 ? to[i] + from[i] : (from[i] > to[i] ? from[i] : to[i]);
        }
        for (int64_t i = 0; scoring.reduce == 1 && i < width; ++i) to[i] *= share;
    }
    return 0;
}

}  // namespace kvc
