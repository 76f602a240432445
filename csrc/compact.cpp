// Compaction: moves chosen tokens of a request into pages of any codec, at once or in two halves.
#include <algorithm>
#include <atomic>
#include <vector>

#include "calls.h"

namespace kvc {
namespace {

// Kept from call to call.
thread_local Scratch positions_memory, staging_memory;

// The source entry whose tokens are slots [first, first + count) of a head, all of them and in the
// page's own codec; -1 if there is none.
int64_t whole_page(const Source &source, int head, const int64_t *slots, int64_t count, int codec) {
    if (!kFormats[codec].positions || count == 0) return -1;
    for (int64_t i = 1; i < count; ++i)
        if (slots[i] != slots[0] + i) return -1;
    const kvc_directory &directory = source.given.directory;
    int64_t start = 0;
    for (int64_t e = source.begin(head); e < source.end(head); ++e) {
        if (start == slots[0] && directory.count[e] == count && directory.codec[e] == codec)
            return e;
        if (start > slots[0]) break;
        start += directory.count[e];
    }
    return -1;
}

// A target page and what it takes: slots [first, first + count) of all that the call names.
struct Piece {
    int head;
    int64_t entry, first, count;
    int64_t copied;   // source entry that is copied as it is, or -1
    int64_t waiting;  // page of the staging memory that it is written to first, or -1
    int32_t last;     // position of its last token as it was read
};

// Why slots cannot fill pages in the order that they are given in.
struct Disorder {
    enum Kind { kNone, kUnknown, kDecrease, kTie, kTwice, kBeyond } kind = kNone;
    int64_t slot = 0;
    int32_t before = 0, position = 0;
};

// Positions as read from pages become those that are stored. What fitted pages give back is at or
// before the true position, so tokens of several pages may tie although they are in order: of these
// the later ones are moved on, never beyond their true order. A page may begin before the last one
// ended, where another part of a region begins; within a page nothing may go back.
// positions, slots (null: they come from elsewhere): of the head's first piece.
Disorder order_positions(const Layer &layer, const kvc_directory &target, Piece *piece,
                         const Piece *end, const int64_t *slots, int32_t *positions) {
    int64_t before = -1, stored = -1, i = 0;
    for (; piece != end; ++piece) {
        const bool kept = kFormats[target.codec[piece->entry]].positions;
        for (int64_t t = 0; t < piece->count; ++t, ++i) {
            const int32_t position = positions[i];
            Disorder found{Disorder::kNone, slots != nullptr ? slots[i] : i,
                           static_cast<int32_t>(before), position};
            if (position < 0) {
                found.kind = Disorder::kUnknown;
            } else if (position < before && t != 0) {
                found.kind = Disorder::kDecrease;
            } else if (position == before) {
                if (slots != nullptr && slots[i] == slots[i - 1])
                    found.kind = Disorder::kTwice;
                else if (!layer.has_tables())
                    found.kind = Disorder::kTie;
            }
            stored = position < before ? position : std::max<int64_t>(position, stored + 1);
            if (position < 0) stored = -1;
            if (stored > INT32_MAX) found.kind = Disorder::kBeyond;
            if (kept && found.kind != Disorder::kNone) return found;
            if (stored != position) piece->copied = -1;
            before = piece->last = position;
            positions[i] = static_cast<int32_t>(std::min<int64_t>(stored, INT32_MAX));
        }
    }
    return {};
}

int bad_order(int head, const Disorder &found, bool slots) {
    const long long slot = found.slot;
    switch (found.kind) {
        case Disorder::kUnknown:
            if (!slots)
                return fail("position %d of token %lld of head %d is negative", found.position,
                            slot, head);
            return fail(
                "slot %lld of head %d has no position (raw compressed pages keep none), "
                "which its target keeps",
                slot, head);
        case Disorder::kDecrease:
            return fail(
                "slots of head %d are not in position order: position %d comes after %d "
                "in one page",
                head, found.position, found.before);
        case Disorder::kTie:
            return fail("slots of head %d are not distinct: position %d comes twice", head,
                        found.position);
        case Disorder::kTwice:
            return fail("slot %lld of head %d is given twice", slot, head);
        default:
            return fail("position %d of head %d leaves no room for those that follow",
                        found.position, head);
    }
}

// What a call fills: the pages of its target, head after head.
struct Pieces {
    const kvc_directory &target;
    std::vector<Piece> all;
    std::vector<size_t> first;  // [heads + 1]
    bool positions = false;     // some pages keep them

    int codec(const Piece &piece) const {
        return target.codec[piece.entry];
    }
    // False after one sentence: a head's pages take more or less than the `tokens` that it gives,
    // its first at `start`.
    bool add(int head, int64_t start, int64_t tokens) {
        int64_t used = 0;
        first.push_back(all.size());
        for (int64_t e = target.begin[head]; e < target.end[head]; ++e) {
            all.push_back({head, e, start + used, target.count[e], -1, -1, 0});
            used += target.count[e];
            positions |= target.count[e] != 0 && kFormats[target.codec[e]].positions;
        }
        if (used == tokens) return true;
        fail("head %d keeps %lld slots, its pages take %lld", head, static_cast<long long>(tokens),
             static_cast<long long>(used));
        return false;
    }
};

// Turns positions as they were read into those that pages keep, or says why they cannot; before it,
// `read(head)` is called for each. positions, slots (may be null): indexed as Piece::first.
template <class F>
int settle_positions(const Layer &layer, Pieces &pieces, const int64_t *slots, int32_t *positions,
                     bool alone, F &&read) {
    const int heads = layer.num_kv_heads;
    std::vector<Disorder> found(static_cast<size_t>(heads));
    const bool done = each(heads, 0, alone, [&](int64_t h, uint8_t *) {
        const size_t at = static_cast<size_t>(h);
        if (pieces.first[at] == pieces.first[at + 1]) return;
        Piece *piece = pieces.all.data() + pieces.first[at];
        read(static_cast<int>(h));
        found[at] = order_positions(
            layer, pieces.target, piece, pieces.all.data() + pieces.first[at + 1],
            slots != nullptr ? slots + piece->first : nullptr, positions + piece->first);
    });
    if (!done) return no_memory();
    for (int h = 0; h < heads; ++h)
        if (found[static_cast<size_t>(h)].kind != Disorder::kNone)
            return bad_order(h, found[static_cast<size_t>(h)], slots != nullptr);
    for (const Piece &piece : pieces.all) {
        const int codec = pieces.codec(piece);
        // Tokens that tied may have been moved on past the end, which none of them was beyond.
        if (kFormats[codec].tables && piece.copied < 0 &&
            piece.last < layer.table(codec)->positions) {
            const int64_t end = layer.table(codec)->positions - piece.count;
            int32_t *own = positions + piece.first;
            for (int64_t t = piece.count - 1; t >= 0 && own[t] > end + t; --t)
                own[t] = static_cast<int32_t>(end + t);
        }
        if (piece.copied < 0 && kFormats[codec].positions &&
            !put_positions(layer, codec, piece.head, nullptr, static_cast<int>(piece.count),
                           positions + piece.first))
            return bad_positions(layer, codec);
    }
    return 0;
}

int check_slots(const Source &source, const int64_t *slots, const int64_t *slot_start) {
    for (int h = 0; h < source.layer.num_kv_heads; ++h) {
        const int64_t held = source.tokens(h);
        for (int64_t i = slot_start[h]; i < slot_start[h + 1]; ++i)
            if (slots[i] < 0 || slots[i] >= held)
                return fail("slot %lld of head %d, which holds %lld tokens",
                            static_cast<long long>(slots[i]), h, static_cast<long long>(held));
    }
    return 0;
}

// Tokens that one thread moves: more than these are shared out.
constexpr int64_t kAlone = 256;

}  // namespace

int compact(const Layer &layer, const kvc_source &given, const int64_t *slots,
            const int64_t *slot_start, const kvc_directory &target) {
    const Source source{layer, given};
    const int heads = layer.num_kv_heads;
    Pieces pieces{target, {}, {}};
    for (int h = 0; h < heads; ++h)
        if (!pieces.add(h, slot_start[h], slot_start[h + 1] - slot_start[h])) return -1;
    if (check_slots(source, slots, slot_start) != 0) return -1;
    pieces.first.push_back(pieces.all.size());
    const int64_t n = static_cast<int64_t>(pieces.all.size());
    const int64_t total = slot_start[heads] - slot_start[0];
    const bool alone = total < kAlone;
    // All is looked at before anything is written.
    for (Piece &piece : pieces.all)
        piece.copied =
            whole_page(source, piece.head, slots + piece.first, piece.count, pieces.codec(piece));
    int32_t *positions = nullptr;
    if (pieces.positions) {
        uint8_t *memory = positions_memory.get(static_cast<size_t>(total) * sizeof(int32_t));
        if (memory == nullptr) return no_memory();
        positions = reinterpret_cast<int32_t *>(memory) - slot_start[0];
        const auto read = [&](int head) {
            const int64_t first = slot_start[head];
            read_slots(source, head, slots + first, 0, slot_start[head + 1] - first, nullptr,
                       nullptr, positions + first);
        };
        if (settle_positions(layer, pieces, slots, positions, alone, read) != 0) return -1;
    }
    // Pages that are sources too are written when all is read.
    int64_t waiting = 0;
    std::vector<int64_t> read;
    for (int h = 0; h < heads; ++h) {
        for (int64_t e = source.begin(h); e < source.end(h); ++e)
            read.push_back(given.directory.page[e]);
        for (int64_t i = 0; i * layer.block_size < given.tail_length; ++i)
            read.push_back(layer.tail_page(given.tail_table[i], h));
    }
    std::sort(read.begin(), read.end());
    for (Piece &piece : pieces.all)
        if (std::binary_search(read.begin(), read.end(), int64_t{target.page[piece.entry]}))
            piece.waiting = waiting++;
    uint8_t *staging = waiting != 0
                           ? staging_memory.get(static_cast<size_t>(waiting * layer.page_bytes))
                           : nullptr;
    if (waiting != 0 && staging == nullptr) return no_memory();
    int64_t longest = 0;
    for (const Piece &piece : pieces.all)
        if (piece.copied < 0) longest = std::max(longest, piece.count);
    const size_t scratch =
        static_cast<size_t>(longest * (layer.k_size + layer.v_size)) * sizeof(float);
    const size_t page_bytes = static_cast<size_t>(layer.page_bytes);
    bool done = each(n, scratch, alone, [&](int64_t i, uint8_t *memory) {
        const Piece &piece = pieces.all[static_cast<size_t>(i)];
        uint8_t *page = layer.pool + target.page[piece.entry] * layer.page_bytes;
        if (piece.waiting >= 0) page = staging + piece.waiting * layer.page_bytes;
        if (piece.copied >= 0) {
            std::memcpy(page, layer.page(given.directory.page[piece.copied]), page_bytes);
            return;
        }
        float *key = reinterpret_cast<float *>(memory), *value = key + piece.count * layer.k_size;
        read_slots(source, piece.head, slots + piece.first, 0, piece.count, key, value, nullptr);
        const int codec = pieces.codec(piece), count = static_cast<int>(piece.count);
        if (piece.waiting >= 0) std::memset(page, 0, page_bytes);
        if (kFormats[codec].positions)
            put_positions(layer, codec, piece.head, page, count, positions + piece.first);
        kernels()->encode(layer, codec, piece.head, page, count, key, value);
    });
    if (done && waiting != 0)
        done = each(n, 0, alone, [&](int64_t i, uint8_t *) {
            const Piece &piece = pieces.all[static_cast<size_t>(i)];
            if (piece.waiting >= 0)
                std::memcpy(layer.pool + target.page[piece.entry] * layer.page_bytes,
                            staging + piece.waiting * layer.page_bytes, page_bytes);
        });
    positions_memory.trim();
    staging_memory.trim();
    return done ? 0 : no_memory();
}

int gather(const Layer &layer, const kvc_source &given, const int64_t *slots,
           const int64_t *slot_start, int64_t rows, float *key, float *value, int32_t *positions) {
    const Source source{layer, given};
    const int heads = layer.num_kv_heads;
    if (check_slots(source, slots, slot_start) != 0) return -1;
    for (int h = 0; h < heads; ++h)
        if (slot_start[h + 1] - slot_start[h] > rows)
            return fail("%lld slots of head %d for %lld rows",
                        static_cast<long long>(slot_start[h + 1] - slot_start[h]), h,
                        static_cast<long long>(rows));
    constexpr int64_t kRows = 512;
    const int64_t parts = (rows + kRows - 1) / kRows;
    std::atomic<bool> known{true};
    const bool done = each(heads * parts, 0, heads * rows < kAlone, [&](int64_t item, uint8_t *) {
        const int head = static_cast<int>(item / parts);
        const int64_t first = item % parts * kRows, last = std::min(first + kRows, rows);
        const int64_t held = std::max<int64_t>(slot_start[head + 1] - slot_start[head], 0);
        const int64_t end = std::clamp(held, first, last), at = head * rows + first;
        float *k = key != nullptr ? key + at * layer.k_size : nullptr;
        float *v = value != nullptr ? value + at * layer.v_size : nullptr;
        int32_t *p = positions != nullptr ? positions + at : nullptr;
        if (!read_slots(source, head, slots + slot_start[head] + first, 0, end - first, k, v, p))
            known = false;
        const auto clear = [&](auto *from, int64_t size) {
            if (from != nullptr)
                std::fill(from + (end - first) * size, from + (last - first) * size, 0);
        };
        clear(k, layer.k_size);
        clear(v, layer.v_size);
        clear(p, 1);
    });
    if (!done) return no_memory();
    return known ? 0 : fail("raw compressed pages have no positions");
}

int fill(const Layer &layer, int64_t rows, const int64_t *counts, const float *key,
         const float *value, const int32_t *positions, const kvc_directory &target) {
    const int heads = layer.num_kv_heads;
    Pieces pieces{target, {}, {}};
    int64_t total = 0;
    for (int h = 0; h < heads; ++h) {
        if (counts[h] < 0 || counts[h] > rows)
            return fail("%lld tokens of head %d in %lld rows", static_cast<long long>(counts[h]), h,
                        static_cast<long long>(rows));
        if (!pieces.add(h, total, counts[h])) return -1;
        total += counts[h];
    }
    pieces.first.push_back(pieces.all.size());
    const bool alone = total < kAlone;
    int32_t *stored = nullptr;
    if (pieces.positions) {
        if (positions == nullptr) return fail("some target pages keep positions; none given");
        uint8_t *memory = positions_memory.get(static_cast<size_t>(total) * sizeof(int32_t));
        if (memory == nullptr) return no_memory();
        stored = reinterpret_cast<int32_t *>(memory);
        const auto copy = [&](int head) {
            const Piece &piece = pieces.all[pieces.first[static_cast<size_t>(head)]];
            std::copy_n(positions + head * rows, counts[head], stored + piece.first);
        };
        if (settle_positions(layer, pieces, nullptr, stored, alone, copy) != 0) return -1;
    }
    const int64_t n = static_cast<int64_t>(pieces.all.size());
    const bool done = each(n, 0, alone, [&](int64_t i, uint8_t *) {
        const Piece &piece = pieces.all[static_cast<size_t>(i)];
        const size_t head = static_cast<size_t>(piece.head);
        const int64_t at = piece.head * rows + piece.first - pieces.all[pieces.first[head]].first;
        const int codec = pieces.codec(piece), count = static_cast<int>(piece.count);
        uint8_t *page = layer.pool + target.page[piece.entry] * layer.page_bytes;
        if (kFormats[codec].positions)
            put_positions(layer, codec, piece.head, page, count, stored + piece.first);
        kernels()->encode(layer, codec, piece.head, page, count, key + at * layer.k_size,
                          value + at * layer.v_size);
    });
    positions_memory.trim();
    return done ? 0 : no_memory();
}

}  // namespace kvc
