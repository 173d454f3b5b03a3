// Rows that the next work item will read or write, fetched into the cache while this one computes: a window reads each
// key once or twice before it is gone, and waiting for memory took a quarter of the time.
#pragma once
#include "chunks.h"
#include "rows.h"

namespace foveate {

class Fetch {
  public:
    // Nothing to fetch, until rows are added.
    void begin() { streams_ = 0, left_ = total_ = due_ = 0; }

    void add(const FoveateTensor& x, int64_t dtype, int64_t b, int64_t h, int64_t token, int64_t rows, int64_t dim) {
        if (rows <= 0 || x.stride[3] != 1 || streams_ == MOST) return;
        const int64_t bytes = bytes_of(dtype);
        stream_[streams_++] = {at(x, dtype, b, h, token), x.stride[2] * bytes, dim * bytes, rows};
        left_ = total_ += rows;
    }
    // All of them over so many steps.
    void spread(int64_t steps) { steps_ = std::max<int64_t>(steps, 1); }

    // By turns, since memory serves several streams at once better than one after the other.
    void step() {
        for (due_ += total_; due_ >= steps_ && left_ > 0; due_ -= steps_, --left_) {
            do turn_ = turn_ + 1 < streams_ ? turn_ + 1 : 0;
            while (!stream_[turn_].rows);
            Stream& stream = stream_[turn_];
            for (int64_t i = 0; i < stream.bytes; i += 64) __builtin_prefetch(stream.row + i, 0, 2);  // not into the first
            stream.row += stream.stride;
            --stream.rows;
        }
    }

  private:
    static constexpr int MOST = 6;
    struct Stream {
        const char* row;
        int64_t stride, bytes, rows;
    };

    Stream stream_[MOST];
    int streams_ = 0, turn_ = 0;
    int64_t total_ = 0, left_ = 0, due_ = 0, steps_ = 1;
};

// How many chunks a tile of queries sees, about.
inline int64_t num_chunks(const FoveateAttend& call, int64_t b, int64_t h, int64_t q_tile) {
    const FoveateSelection& lists = call.selection;
    if (lists.tile_starts) {
        const int64_t row = list_of(call, b, h, q_tile);
        return lists.tile_starts[row + 1] - lists.tile_starts[row] + 1;
    }
    const KeyRange seen = keys_of_band(call, q_tile * TILE, TILE);
    return (seen.end - seen.begin) / TILE + 1;
}

// Calls visit(first, count) for keys that a tile of queries sees and another does not; a few, where there are many.
template <class Visit>
static void each_new_stretch(const FoveateAttend& call, int64_t b, int64_t h, int64_t q_tile, int64_t beside, Visit visit) {
    const FoveateSelection& lists = call.selection;
    if (!lists.tile_starts) {
        const KeyRange seen = keys_of_band(call, q_tile * TILE, TILE), known = keys_of_band(call, beside * TILE, TILE);
        visit(seen.begin, std::min(seen.end, known.begin) - seen.begin);
        const int64_t after = std::max(seen.begin, known.end);
        return visit(after, seen.end - after);
    }
    if (lists.k_slots) return;
    const int64_t row = list_of(call, b, h, q_tile), known = list_of(call, b, h, beside);
    int64_t other = lists.tile_starts[known], found = 0;
    for (int64_t t = lists.tile_starts[row]; t < lists.tile_starts[row + 1] && found < 2; ++t) {
        const int64_t tile = lists.tile_ids[t];
        while (other < lists.tile_starts[known + 1] && lists.tile_ids[other] < tile) ++other;
        if (other < lists.tile_starts[known + 1] && lists.tile_ids[other] == tile) continue;
        visit(tile * TILE, std::min<int64_t>(call.num_keys - tile * TILE, TILE));
        ++found;
    }
}

}  // namespace foveate
