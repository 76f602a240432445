// A (sequence, KV head) as tiles: up to 128 tokens whose strips are alike, gathered from as many
// pages as it takes, since short tiles waste time on the softmax.
#pragma once

#include "internal.h"
#include "kernels/panel.h"

namespace kvc::KVC_NAMESPACE {

// Kinds of strips: the codecs that read them, and exceptions, rows of int8 with scales of their own
// outside any panel.
constexpr int kExceptions = KVC_CODECS;
constexpr int kKinds = KVC_CODECS + 1;

struct Strip {
    const uint8_t *k, *v;   // exceptions: the first's scales, and null
    const uint8_t *scales;  // of its group, or its TokenScales
    int place;              // in the group; exceptions: the first's number
    int count;              // tokens; the other lanes of K are not to be trusted
    int hidden;             // lanes that are exceptions, a bit for each
    int tail;               // tail token of lane 0, -1 in the compressed region
    int64_t slot;           // of lane 0; exceptions: of their page's first token
    const float *bias;      // or null
    const uint8_t *page;    // in the compressed region
    int codec, head;        // of the page
};

struct Tile {
    int kind = KVC_RAW, strips = 0;
    int64_t scale_bytes = 0;  // from each strip's `scales` on
    bool bias = false;
    Strip strip[kTileStrips];
    const uint8_t *k[kTileStrips], *v[kTileStrips];
};

// Bits of the tokens of a strip that are exceptions.
KVC_INLINE int exception_bits(const uint8_t *scales) {
    uint16_t bits;
    std::memcpy(&bits, scales + offsetof(TokenScales, exceptions), sizeof bits);
    return bits;
}

// Calls use(number, token) for the exceptions of a page that holds `count` tokens.
template <class F>
KVC_INLINE void each_exception(const PageLayout &at, const uint8_t *page, int count, int most,
                               F use) {
    int number = 0;
    for (int first = 0; first < count; first += kStrip) {
        int bits = exception_bits(page + at.scales + first / kStrip * int64_t{sizeof(TokenScales)});
        if (count - first < kStrip) bits &= (1 << (count - first)) - 1;
        for (; bits != 0 && number < most; bits &= bits - 1)
            use(number++, first + __builtin_ctz(static_cast<unsigned>(bits)));
    }
}

// The same for the lanes of a strip of exceptions: use(lane, token of the page).
template <class F>
KVC_INLINE void each_lane(const Layer &layer, const Strip &strip, F use) {
    const PageLayout at = layer.layout(strip.codec, strip.head);
    const int capacity = static_cast<int>(layer.capacity(strip.codec, strip.head));
    each_exception(at, strip.page, capacity, strip.place + strip.count, [&](int number, int token) {
        if (number >= strip.place) use(number - strip.place, token);
    });
}

// Walks strips [first, last) of a (sequence, head): the pages of its directory, its tail, and then
// all exceptions, so that they make few tiles.
class Tiles {
   public:
    Tiles(const Layer &layer, const kvc_batch &batch, int seq, int head, int tail_tokens,
          int64_t first, int64_t last)
        : layer_(layer),
          directory_(batch.directory),
          head_(head),
          table_(batch.tail_table + seq * batch.tail_stride),
          tail_tokens_(tail_tokens),
          left_(last - first) {
        if (directory_.begin != nullptr) {
            begin_ = entry_ = directory_.begin[seq * directory_.stride + head];
            end_ = directory_.end[seq * directory_.stride + head];
            for (int e = begin_; e < end_; ++e) held_ += directory_.count[e];
        }
        // Skip `first` strips, whole pages at a time.
        for (; entry_ < end_; ++entry_) {
            const int64_t strips = strips_of(entry_);
            if (first < strips) break;
            first -= strips;
            slot_ += directory_.count[entry_];
        }
        if (entry_ < end_) {
            open_page(static_cast<int>(first));
            return;
        }
        part_ = kTail;
        const int64_t strips = (int64_t{tail_tokens_} + kStrip - 1) / kStrip;
        if (first < strips) {
            open_tail(static_cast<int>(first) * kStrip);
            return;
        }
        first -= strips;
        part_ = kInt8;
        slot_ = 0;
        for (entry_ = begin_; entry_ < end_; ++entry_) {
            const int64_t own = exception_strips(entry_);
            if (first < own) break;
            first -= own;
            slot_ += directory_.count[entry_];
        }
        if (entry_ < end_) open_exceptions(static_cast<int>(first));
    }

    // False when there are no more tokens.
    bool next(Tile &tile) {
        tile.strips = 0;
        tile.bias = false;
        while (tile.strips < kTileStrips && left_ > 0) {
            if (tokens_ <= 0) {  // the page is at its end
                if (!advance()) break;
                continue;
            }
            if (tile.strips == 0) {
                tile.kind = kind_;
                tile.scale_bytes = at_.strip_scales != 0 ? at_.strip_scales : at_.header;
            } else if (tile.kind != kind_) {
                break;
            }
            Strip &strip = tile.strip[tile.strips];
            strip.k = k_;
            strip.v = kind_ == kExceptions ? nullptr : k_ + at_.v;
            strip.scales = scales_;
            strip.place = place_;
            strip.count = tokens_ < kStrip ? tokens_ : kStrip;
            strip.hidden =
                at_.strip_scales != 0 && kind_ != kExceptions ? exception_bits(scales_) : 0;
            strip.tail = tail_;
            strip.slot = slot_;
            strip.bias = bias_;
            strip.page = page_;
            strip.codec = codec_;
            strip.head = head_;
            tile.k[tile.strips] = strip.k;
            tile.v[tile.strips] = strip.v;
            tile.bias |= bias_ != nullptr;
            ++tile.strips;
            --left_;
            step();
        }
        return tile.strips != 0;
    }

   private:
    enum Part { kPages, kTail, kInt8 };

    int64_t strips_of(int entry) const {
        return (directory_.count[entry] + kStrip - 1) / kStrip;
    }
    int64_t exception_strips(int entry) const {
        return (exceptions(entry) + kStrip - 1) / kStrip;
    }
    int exceptions(int entry) const {
        return layer_.exceptions(directory_.codec[entry], head_, directory_.count[entry],
                                 layer_.page(directory_.page[entry]));
    }

    // To the next page, or block of the tail. False: there is none.
    bool advance() {
        if (part_ == kPages) {
            slot_ = page_slot_ + directory_.count[entry_];
            if (++entry_ < end_) {
                open_page(0);
                return true;
            }
            part_ = kTail;
            tail_ = 0;
        }
        if (part_ == kTail) {
            if (tail_ < tail_tokens_) {
                open_tail(tail_);
                return true;
            }
            part_ = kInt8;
            slot_ = 0;
            for (entry_ = begin_; entry_ < end_; ++entry_) {
                if (exception_strips(entry_) != 0) break;
                slot_ += directory_.count[entry_];
            }
        } else if (entry_ < end_) {
            slot_ += directory_.count[entry_++];
        }
        if (entry_ >= end_) return false;
        open_exceptions(0);
        return true;
    }

    const uint8_t *open_entry() {
        codec_ = directory_.codec[entry_];
        kind_ = kFormats[codec_].strips;
        page_ = layer_.page(directory_.page[entry_]);
        at_ = layer_.layout(codec_, head_);
        bias_ = nullptr;
        tail_ = -1;
        return page_;
    }

    // At strip `first` of the entry.
    void open_page(int first) {
        const uint8_t *page = open_entry();
        tokens_ = directory_.count[entry_] - first * kStrip;
        page_slot_ = slot_;
        slot_ += int64_t{first} * kStrip;
        if (directory_.bias != nullptr && directory_.bias[entry_] >= 0)
            bias_ = directory_.log_bias + directory_.bias[entry_] + int64_t{first} * kStrip;
        open_strip(page, first);
    }

    // At token `token` of the tail, the first of a strip.
    void open_tail(int token) {
        codec_ = kind_ = KVC_RAW;
        at_ = layer_.layout(codec_, head_);
        bias_ = nullptr;
        page_ = nullptr;
        slot_ = held_ + token;
        tail_ = token;
        const int block = token / layer_.block_size, place = token % layer_.block_size;
        tokens_ = least(layer_.block_size - place, tail_tokens_ - token);
        open_strip(layer_.page(layer_.tail_page(table_[block], head_)), place / kStrip);
    }

    void open_strip(const uint8_t *page, int strip) {
        k_ = page + at_.strip_at(strip);
        place_ = strip % at_.group_strips;
        scales_ = page + at_.scales_at(strip);
    }

    // At strip `first` of the entry's exceptions; they have no strips to step through.
    void open_exceptions(int first) {
        open_entry();
        if (directory_.bias != nullptr && directory_.bias[entry_] >= 0)
            bias_ = directory_.log_bias + directory_.bias[entry_];
        kind_ = kExceptions;
        k_ = scales_ = page_ + at_.exceptions;
        place_ = first * kStrip;
        tokens_ = exceptions(entry_) - place_;
    }

    void step() {
        tokens_ -= kStrip;
        if (kind_ == kExceptions) {
            place_ += kStrip;
            return;
        }
        slot_ += kStrip;
        if (tail_ >= 0) tail_ += kStrip;
        if (bias_ != nullptr) bias_ += kStrip;
        k_ += at_.strip;
        scales_ += at_.strip_scales;
        if (++place_ != at_.group_strips) return;
        place_ = 0;
        if (at_.strip_scales == 0) scales_ = k_;
        k_ += at_.header;
    }

    const Layer &layer_;
    const kvc_directory &directory_;
    const int head_;
    const int32_t *table_;
    const int tail_tokens_;
    int64_t left_, held_ = 0;  // strips to go; slots of the directory's pages
    int32_t begin_ = 0, entry_ = 0, end_ = 0;
    Part part_ = kPages;
    // The next strip.
    int codec_ = KVC_RAW, kind_ = KVC_RAW, place_ = 0, tokens_ = 0, tail_ = -1;
    int64_t slot_ = 0, page_slot_ = 0;
    PageLayout at_{};
    const uint8_t *page_ = nullptr, *scales_ = nullptr, *k_ = nullptr;
    const float *bias_ = nullptr;
};

}  // namespace kvc::KVC_NAMESPACE
