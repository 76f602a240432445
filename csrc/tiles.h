// A (sequence, KV head) as tiles: up to 128 tokens of one codec, gathered from as many pages as it
// takes, since short tiles waste time on the softmax.
#pragma once

#include "internal.h"
#include "panel.h"

namespace kvc::KVC_NAMESPACE {

struct Strip {
    const uint8_t *k, *v;
    const uint8_t *group;  // header of its group
    int place;             // in the group
    int count;             // tokens; the other lanes of K are not to be trusted
    int tail;              // tail token of lane 0, -1 in the compressed region
    const float *bias;     // or null
};

struct Tile {
    int codec = KVC_RAW, strips = 0;
    bool bias = false;
    Strip strip[kTileStrips];
    const uint8_t *k[kTileStrips], *v[kTileStrips];
};

// Walks strips [first, last) of a (sequence, head).
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
            entry_ = directory_.begin[seq * directory_.stride + head];
            end_ = directory_.end[seq * directory_.stride + head];
        }
        // Skip `first` strips, whole pages at a time.
        for (; entry_ < end_; ++entry_) {
            const int strips = (directory_.count[entry_] + kStrip - 1) / kStrip;
            if (first < strips) break;
            first -= strips;
        }
        open(first);
    }

    // False when there are no more tokens.
    bool next(Tile &tile) {
        tile.strips = 0;
        tile.bias = false;
        while (tile.strips < kTileStrips && left_ > 0) {
            if (tokens_ <= 0) {  // the page is at its end
                if (entry_ < end_) {
                    ++entry_;
                    open(0);
                    continue;
                }
                if (tail_ >= tail_tokens_) break;
                open(tail_ / kStrip);
            }
            if (tile.strips == 0)
                tile.codec = codec_;
            else if (tile.codec != codec_ && (codec_ > KVC_EXACT || tile.codec > KVC_EXACT))
                break;
            Strip &strip = tile.strip[tile.strips];
            strip.k = k_;
            strip.v = k_ + at_->v;
            strip.group = group_;
            strip.place = place_;
            strip.count = tokens_ < kStrip ? tokens_ : kStrip;
            strip.tail = tail_;
            strip.bias = bias_;
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
    // At strip `first` of the entry, or of the tail after the last one.
    void open(int64_t first) {
        const uint8_t *page;
        bias_ = nullptr;
        tail_ = -1;
        if (entry_ < end_) {
            codec_ = directory_.codec[entry_];
            page = layer_.page(directory_.page[entry_]);
            tokens_ = directory_.count[entry_] - static_cast<int>(first) * kStrip;
            if (directory_.bias != nullptr && directory_.bias[entry_] >= 0)
                bias_ = directory_.log_bias + directory_.bias[entry_] + first * kStrip;
        } else {
            codec_ = KVC_RAW;
            tail_ = static_cast<int>(first) * kStrip;
            tokens_ = 0;
            if (tail_ >= tail_tokens_) return;
            const int block = tail_ / layer_.block_size, place = tail_ % layer_.block_size;
            page = layer_.page(layer_.tail_page(table_[block], head_));
            tokens_ = least(layer_.block_size - place, tail_tokens_ - tail_);
            first = place / kStrip;
        }
        at_ = &layer_.layout[codec_];
        group_ = page + at_->group_at(first);
        k_ = page + at_->strip_at(first);
        place_ = static_cast<int>(first % at_->group_strips);
    }

    void step() {
        tokens_ -= kStrip;
        if (tail_ >= 0) tail_ += kStrip;
        if (bias_ != nullptr) bias_ += kStrip;
        k_ += at_->strip;
        if (++place_ == at_->group_strips) {
            place_ = 0;
            group_ = k_;
            k_ += at_->header;
        }
    }

    const Layer &layer_;
    const kvc_directory &directory_;
    const int head_;
    const int32_t *table_;
    const int tail_tokens_;
    int64_t left_;
    int32_t entry_ = 0, end_ = 0;
    // The next strip.
    int codec_ = KVC_RAW, place_ = 0, tokens_ = 0, tail_ = -1;
    const PageLayout *at_ = nullptr;
    const uint8_t *group_ = nullptr, *k_ = nullptr;
    const float *bias_ = nullptr;
};

}  // namespace kvc::KVC_NAMESPACE
