// Compaction: moves chosen tokens of a request into pages of any codec.
#include <algorithm>
#include <vector>

#include "calls.h"

namespace kvc {
namespace {

// Kept from call to call.
thread_local Scratch positions_memory, staging_memory;

// The source entry whose tokens are slots [first, first + count) of a head, all of them and in the
// page's own codec; -1 if there is none.
int64_t whole_page(const Source &source, int head, const int64_t *slots, int64_t count, int codec) {
    if (!positions_kept(codec) || count == 0) return -1;
    for (int64_t i = 1; i < count; ++i)
        if (slots[i] != slots[0] + i) return -1;
    const kvc_directory &directory = source.request.directory;
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
// positions, slots: of the head's first piece.
Disorder order_positions(const Layer &layer, const kvc_directory &target, Piece *piece,
                         const Piece *end, const int64_t *slots, int32_t *positions) {
    int64_t before = -1, stored = -1, i = 0;
    for (; piece != end; ++piece) {
        const bool kept = positions_kept(target.codec[piece->entry]);
        for (int64_t t = 0; t < piece->count; ++t, ++i) {
            const int32_t position = positions[i];
            Disorder found{Disorder::kNone, slots[i], static_cast<int32_t>(before), position};
            if (position < 0) {
                found.kind = Disorder::kUnknown;
            } else if (position < before && t != 0) {
                found.kind = Disorder::kDecrease;
            } else if (position == before) {
                if (slots[i] == slots[i - 1])
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

int bad_order(int head, const Disorder &found) {
    const long long slot = found.slot;
    switch (found.kind) {
        case Disorder::kUnknown:
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

}  // namespace

int compact(const Layer &layer, const kvc_request &request, const int64_t *slots,
            const int64_t *slot_start, const kvc_directory &target) {
    const Source source{layer, request};
    const int heads = layer.num_kv_heads;
    std::vector<Piece> pieces;
    std::vector<size_t> first_piece;
    bool keeps_positions = false;
    for (int h = 0; h < heads; ++h) {
        const int64_t n = slot_start[h + 1] - slot_start[h], held = source.tokens(h);
        const int64_t *own = slots + slot_start[h];
        for (int64_t i = 0; i < n; ++i)
            if (own[i] < 0 || own[i] >= held)
                return fail("slot %lld of head %d, which holds %lld tokens",
                            static_cast<long long>(own[i]), h, static_cast<long long>(held));
        int64_t used = 0;
        first_piece.push_back(pieces.size());
        for (int64_t e = target.begin[h]; e < target.end[h]; ++e) {
            pieces.push_back({h, e, slot_start[h] + used, target.count[e], -1, -1, 0});
            used += target.count[e];
            keeps_positions |= target.count[e] != 0 && positions_kept(target.codec[e]);
        }
        if (used != n)
            return fail("head %d keeps %lld slots, its pages take %lld", h,
                        static_cast<long long>(n), static_cast<long long>(used));
    }
    first_piece.push_back(pieces.size());
    const int64_t n = static_cast<int64_t>(pieces.size());
    const int64_t total = slot_start[heads] - slot_start[0];
    const bool alone = total < 256;
    // All is looked at before anything is written.
    for (Piece &piece : pieces)
        piece.copied = whole_page(source, piece.head, slots + piece.first, piece.count,
                                  target.codec[piece.entry]);
    int32_t *positions = nullptr;
    if (keeps_positions) {
        uint8_t *memory = positions_memory.get(static_cast<size_t>(total) * sizeof(int32_t));
        if (memory == nullptr) return no_memory();
        positions = reinterpret_cast<int32_t *>(memory) - slot_start[0];
        std::vector<Disorder> found(static_cast<size_t>(heads));
        const bool done = each(heads, 0, alone, [&](int64_t h, uint8_t *) {
            const int64_t first = slot_start[h];
            const int head = static_cast<int>(h);
            const size_t at = static_cast<size_t>(h);
            read_slots(source, head, slots + first, 0, slot_start[h + 1] - first, nullptr, nullptr,
                       positions + first);
            found[at] = order_positions(layer, target, pieces.data() + first_piece[at],
                                        pieces.data() + first_piece[at + 1], slots + first,
                                        positions + first);
        });
        if (!done) return no_memory();
        for (int h = 0; h < heads; ++h)
            if (found[static_cast<size_t>(h)].kind != Disorder::kNone)
                return bad_order(h, found[static_cast<size_t>(h)]);
        for (const Piece &piece : pieces) {
            const int codec = target.codec[piece.entry];
            // Tokens that tied may have been moved on past the end, which none of them was beyond.
            if (fitted(codec) && piece.copied < 0 && piece.last < layer.table(codec)->positions) {
                const int64_t end = layer.table(codec)->positions - piece.count;
                int32_t *own = positions + piece.first;
                for (int64_t t = piece.count - 1; t >= 0 && own[t] > end + t; --t)
                    own[t] = static_cast<int32_t>(end + t);
            }
            if (piece.copied < 0 && positions_kept(codec) &&
                !put_positions(layer, codec, piece.head, nullptr, static_cast<int>(piece.count),
                               positions + piece.first))
                return bad_positions(layer, codec);
        }
    }
    // Pages that are sources too are written when all is read.
    int64_t waiting = 0;
    std::vector<int64_t> read;
    for (int h = 0; h < heads; ++h) {
        for (int64_t e = source.begin(h); e < source.end(h); ++e)
            read.push_back(request.directory.page[e]);
        for (int64_t i = 0; i * layer.block_size < request.tail_length; ++i)
            read.push_back(layer.tail_page(request.tail_table[i], h));
    }
    std::sort(read.begin(), read.end());
    for (Piece &piece : pieces)
        if (std::binary_search(read.begin(), read.end(), int64_t{target.page[piece.entry]}))
            piece.waiting = waiting++;
    uint8_t *staging = waiting != 0
                           ? staging_memory.get(static_cast<size_t>(waiting * layer.page_bytes))
                           : nullptr;
    if (waiting != 0 && staging == nullptr) return no_memory();
    int64_t longest = 0;
    for (const Piece &piece : pieces)
        if (piece.copied < 0) longest = std::max(longest, piece.count);
    const size_t scratch =
        static_cast<size_t>(longest * (layer.k_size + layer.v_size)) * sizeof(float);
    const size_t page_bytes = static_cast<size_t>(layer.page_bytes);
    bool done = each(n, scratch, alone, [&](int64_t i, uint8_t *memory) {
        const Piece &piece = pieces[static_cast<size_t>(i)];
        uint8_t *page = layer.pool + target.page[piece.entry] * layer.page_bytes;
        if (piece.waiting >= 0) page = staging + piece.waiting * layer.page_bytes;
        if (piece.copied >= 0) {
            std::memcpy(page, layer.page(request.directory.page[piece.copied]), page_bytes);
            return;
        }
        float *key = reinterpret_cast<float *>(memory), *value = key + piece.count * layer.k_size;
        read_slots(source, piece.head, slots + piece.first, 0, piece.count, key, value, nullptr);
        const int codec = target.codec[piece.entry], count = static_cast<int>(piece.count);
        if (piece.waiting >= 0) std::memset(page, 0, page_bytes);
        if (positions_kept(codec))
            put_positions(layer, codec, piece.head, page, count, positions + piece.first);
        kernels()->encode(layer, codec, piece.head, page, count, key, value);
    });
    if (done && waiting != 0)
        done = each(n, 0, alone, [&](int64_t i, uint8_t *) {
            const Piece &piece = pieces[static_cast<size_t>(i)];
            if (piece.waiting >= 0)
                std::memcpy(layer.pool + target.page[piece.entry] * layer.page_bytes,
                            staging + piece.waiting * layer.page_bytes, page_bytes);
        });
    positions_memory.trim();
    staging_memory.trim();
    return done ? 0 : no_memory();
}

}  // namespace kvc
