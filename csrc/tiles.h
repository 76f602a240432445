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
    int codec, strips;
    bool bias;
    Strip strip[kTileStrips];
    const uint8_t *k[kTileStrips], *v[kTileStrips];
};

// Walks strips [first, last) of a (sequence, head).
class Tiles {
  public:
    Tiles(const Layer &layer, const kvc_batch &batch, int seq, int head, int tail_tokens,
          int64_t first, int64_t last)
        : layer_(layer), directory_(batch.directory), head_(head), tail_tokens_(tail_tokens),
          table_(batch.tail_table + seq * batch.tail_stride), left_(last - first) {
        if (directory_.begin != nullptr) {
            entry_ = directory_.begin[seq * directory_.stride + head];
            end_ = directory_.end[seq * directory_.stride + head];
        }
        // Skip `first` strips, whole pages at a time.
        while (entry_ < end_) {
            const int strips = (directory_.count[entry_] + kStrip - 1) / kStrip;
            if (first < strips) break;
            first -= strips;
            ++entry_;
        }
        if (entry_ < end_)
            strip_ = static_cast<int>(first);
        else
            tail_ = first * kStrip;
    }

    // False when there are no more tokens.
    bool next(Tile &tile) {
        tile.strips = 0;
        tile.bias = false;
        while (tile.strips < kTileStrips && left_ > 0) {
            if (entry_ < end_) {
                if (strip_ * kStrip >= directory_.count[entry_]) {
                    ++entry_;
                    strip_ = 0;
                    continue;
                }
                const int codec = directory_.codec[entry_];
                if (tile.strips == 0)
                    tile.codec = codec;
                else if (tile.codec != codec && (codec > KVC_EXACT || tile.codec > KVC_EXACT))
                    break;
                tile.strip[tile.strips] = compressed(codec);
                ++strip_;
            } else {
                if (tail_ >= tail_tokens_) break;
                if (tile.strips == 0)
                    tile.codec = KVC_RAW;
                else if (tile.codec > KVC_EXACT)
                    break;
                tile.strip[tile.strips] = tail();
                tail_ += kStrip;
            }
            const Strip &strip = tile.strip[tile.strips];
            tile.k[tile.strips] = strip.k;
            tile.v[tile.strips] = strip.v;
            tile.bias |= strip.bias != nullptr;
            ++tile.strips;
            --left_;
        }
        return tile.strips != 0;
    }

  private:
    Strip compressed(int codec) const {
        const uint8_t *page = layer_.page(directory_.page[entry_]);
        const PageLayout &at = layer_.layout[codec];
        const int first = strip_ * kStrip;
        Strip strip{};
        strip.k = page + at.strip_at(strip_);
        strip.v = strip.k + at.v;
        strip.group = page + at.group_at(strip_);
        strip.place = strip_ % at.group_strips;
        strip.count = least(directory_.count[entry_] - first, kStrip);
        strip.tail = -1;
        if (directory_.bias != nullptr && directory_.bias[entry_] >= 0)
            strip.bias = directory_.log_bias + directory_.bias[entry_] + first;
        return strip;
    }

    Strip tail() const {
        const int64_t block = table_[tail_ / layer_.block_size];
        const int64_t place = tail_ % layer_.block_size / kStrip;
        const uint8_t *page = layer_.page(layer_.tail_page(block, head_));
        const PageLayout &at = layer_.layout[KVC_RAW];
        Strip strip{};
        strip.k = page + at.strip_at(place);
        strip.v = strip.k + at.v;
        strip.count = static_cast<int>(least<int64_t>(tail_tokens_ - tail_, kStrip));
        strip.tail = static_cast<int>(tail_);
        return strip;
    }

    const Layer &layer_;
    const kvc_directory &directory_;
    int head_;
    int64_t tail_tokens_;
    const int32_t *table_;
    int64_t left_;
    int32_t entry_ = 0, end_ = 0;
    int strip_ = 0;
    int64_t tail_ = 0;
};

}  // namespace kvc::KVC_NAMESPACE
