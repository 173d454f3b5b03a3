// How a call is cut into items of work.
#pragma once
#include <algorithm>
#include <numeric>

#include "rows.h"
#include "threads.h"

namespace foveate {

// Up to 64 keys that lie one after the other.
struct KeyChunk {
    int64_t first, count;
};

// The keys number `skipped` to `skipped + wanted` of some ranges, chunk by chunk; after the last one come empty ones.
class KeyChunks {
  public:
    KeyChunks(const int64_t* ranges, int64_t count, int64_t skipped, int64_t wanted)
        : range_(ranges), last_(ranges + 2 * count), skipped_(skipped), wanted_(wanted) {}

    KeyChunk next() {
        while (range_ < last_ && skipped_ >= range_[1] - range_[0]) {
            skipped_ -= range_[1] - range_[0];
            range_ += 2;
        }
        if (range_ == last_) return {0, 0};
        const int64_t first = range_[0] + skipped_, count = std::min<int64_t>({range_[1] - first, wanted_, TILE});
        skipped_ += count, wanted_ -= count;
        return {first, count};
    }

  private:
    const int64_t *range_, *last_;
    int64_t skipped_, wanted_;
};

// Heads that share keys or values form a set; heads that see other ranges are sets of their own. An item is a part of
// the keys for one set, or for all sets where their keys alternate in memory: pages are then read from end to end.
struct DecodeWork {
    int64_t sets, heads, key_heads, value_heads;  // sets of a batch entry; heads of a set
    int64_t rows;                                 // of a set: (heads, queries)
    int64_t together;                             // sets of an item
    int64_t keys, split, splits;                  // keys that anybody sees, and in a part of them; parts
    int64_t threads, items;

    explicit DecodeWork(const FoveateAttend& call, const FoveateRanges* ranges = nullptr) : ranges_(ranges) {
        sets = std::gcd(call.k.heads, call.v.heads);
        if (ranges && sets % ranges->heads) sets = call.q.heads;
        heads = call.q.heads / sets;
        key_heads = std::max<int64_t>(call.k.heads / sets, 1), value_heads = std::max<int64_t>(call.v.heads / sets, 1);
        sets_of_key_ = std::max<int64_t>(sets / call.k.heads, 1), sets_of_value_ = std::max<int64_t>(sets / call.v.heads, 1);
        rows = heads * call.num_queries;
        const bool alike = !ranges || ranges->heads == 1;
        together = alike && call.k.stride[1] < call.k.stride[2] ? sets : 1;
        band_[0] = std::clamp<int64_t>(call.num_keys - call.num_queries - call.selection.band_high, 0, call.num_keys);
        band_[1] = std::clamp(call.num_keys - call.selection.band_low, band_[0], call.num_keys);
        keys = ranges ? most_keys() : band_[1] - band_[0];
        cut(call);
    }

    int64_t key_head(int64_t set, int64_t g) const { return set / sets_of_key_ * key_heads + g; }
    int64_t value_head(int64_t set, int64_t g) const { return set / sets_of_value_ * value_heads + g; }

    KeyChunks chunks(int64_t b, int64_t set, int64_t part) const {
        if (!ranges_) return KeyChunks(band_, 1, part * split, split);
        const int64_t row = (ranges_->batches > 1 ? b : 0) * ranges_->heads + set / (sets / ranges_->heads);
        const int64_t from = ranges_->starts[row];
        return KeyChunks(ranges_->ranges + 2 * from, ranges_->starts[row + 1] - from, part * split, split);
    }

    bool is_biased() const { return ranges_ && ranges_->bias; }

    // Where the logits of a query go, one for each key slot; null if nobody wants them.
    float* logits(const FoveateAttend& call, int64_t b, int64_t h, int64_t query) const {
        if (!ranges_ || !ranges_->logits) return nullptr;
        return ranges_->logits + ((b * call.q.heads + h) * call.num_queries + query) * call.num_keys;
    }

    // Of keys that lie one after the other, and zeros behind them: 64 numbers.
    void read_bias(int64_t b, int64_t h, int64_t first, int64_t count, float* to) const {
        const int64_t* stride = ranges_->bias_stride;
        const float* from = ranges_->bias + b * stride[0] + h * stride[1] + first * stride[2];
        for (int64_t k = 0; k < count; ++k) to[k] = from[k * stride[2]];
        std::fill(to + count, to + TILE, 0.0f);
    }

  private:
    static constexpr int64_t ITEMS_OF_THREAD = 8, BYTES_OF_ITEM = 128 << 10;  // at least, where there are enough keys

    int64_t most_keys() const {
        int64_t most = 0;
        for (int64_t row = 0; row < ranges_->batches * ranges_->heads; ++row) {
            int64_t own = 0;
            for (int64_t i = ranges_->starts[row]; i < ranges_->starts[row + 1]; ++i)
                own += ranges_->ranges[2 * i + 1] - ranges_->ranges[2 * i];
            most = std::max(most, own);
        }
        return most;
    }
    void cut(const FoveateAttend& call) {
        const double all = (double)(call.batch * sets) * (double)keys;
        threads = worthwhile_threads(all * rows * (call.dim + call.value_dim), all * bytes_of_key(call), call.threads);
        split = keys_of_part(call);
        splits = std::max<int64_t>((keys + split - 1) / split, 1);
        items = call.batch * (sets / together) * splits;
        threads = std::min(threads, items);
    }
    int64_t bytes_of_key(const FoveateAttend& call) const {
        return (key_heads * call.dim + value_heads * call.value_dim) * bytes_of(call.dtype);
    }
    int64_t keys_of_part(const FoveateAttend& call) const {
        const int64_t apart = call.batch * (sets / together);
        const int64_t wanted = (ITEMS_OF_THREAD * threads + apart - 1) / apart;
        const int64_t most = keys * together * bytes_of_key(call) / BYTES_OF_ITEM;
        const int64_t parts = threads > 1 ? std::max<int64_t>(std::min(wanted, most), 1) : 1;
        return std::max<int64_t>(round_up((keys + parts - 1) / parts, TILE), TILE);
    }

    const FoveateRanges* ranges_;
    int64_t band_[2];
    int64_t sets_of_key_, sets_of_value_;  // sets that share a head of keys, or of values
};

}  // namespace foveate
