// Rows fetched into the cache while others are worked on.
#pragma once
#include "rows.h"

namespace foveate {

// Asks for rows of keys and of values by turns, a few after each piece of the work done meanwhile. By turns, since
// memory serves two streams at once better than one after the other.
class Ahead {
  public:
    struct Stream {
        const char* row;
        int64_t stride, bytes;
    };

    // Spreads so many rows of both over so much work.
    Ahead(Stream keys, Stream values, int64_t rows, int64_t work)
        : keys_(keys), values_(values), rows_(rows), work_(work) {}

    void advance(int64_t work) {
        for (due_ += work * rows_; due_ >= work_ && left_ > 0; due_ -= work_, --left_) {
            fetch(keys_);
            fetch(values_);
        }
    }

  private:
    FOVEATE_INLINE void fetch(Stream& stream) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < stream.bytes; i += 64) __builtin_prefetch(stream.row + i, 0, 2);  // not into the first
        stream.row += stream.stride;
    }

    Stream keys_, values_;
    const int64_t rows_, work_;
    int64_t left_ = rows_, due_ = 0;
};

}  // namespace foveate
