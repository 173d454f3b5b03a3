// Rows of keys and values as they lie in memory, read as vectors of float32 along the channels.
#pragma once
#include <algorithm>

#include "rows.h"

namespace foveate {

// One read makes PARTS vectors out of PARTS * LANES channels.
struct Float32Reads {
    using Element = float;
    static constexpr int PARTS = 1;
    static constexpr int64_t DTYPE = FOVEATE_FLOAT32;

    FOVEATE_INLINE void read(const float* p, Floats (&x)[1]) { x[0] = load(p); }
};

struct Float16Reads {
    using Element = uint16_t;
    static constexpr int PARTS = 1;
    static constexpr int64_t DTYPE = FOVEATE_FLOAT16;

    FOVEATE_INLINE void read(const uint16_t* p, Floats (&x)[1]) { x[0] = load_as_floats(p, DTYPE); }
};

// Even channels in one vector, odd ones in the other: two operations, where widening them in order takes four.
struct Bfloat16Reads {
    using Element = uint16_t;
    static constexpr int PARTS = 2;
    static constexpr int64_t DTYPE = FOVEATE_BFLOAT16;

    FOVEATE_INLINE void read(const uint16_t* p, Floats (&x)[2]) {
        const Words pairs = load_words(p);
        x[0] = as_floats(pairs << 16);
        x[1] = as_floats(pairs & 0xffff0000u);
    }
};

template <class R> constexpr int64_t CHANNELS = R::PARTS * LANES;  // of a read

// Channels in the order in which reads lay them out, and back in their own.
template <class R> FOVEATE_INLINE void spread(const typename R::Element* from, int64_t channels, float* to) {
    for (int64_t c = 0; c < channels; c += CHANNELS<R>) {
        Floats x[R::PARTS];
        R::read(from + c, x);
        for (int part = 0; part < R::PARTS; ++part) store(to + c + part * LANES, x[part]);
    }
}
template <class R> FOVEATE_INLINE void gather(float* row, int64_t channels) {
    if constexpr (R::PARTS == 2)
        for (int64_t c = 0; c < channels; c += CHANNELS<R>) {
            Words even = load_words(row + c), odd = load_words(row + c + LANES);
            interleave(even, odd);
            store_words(row + c, even);
            store_words(row + c + LANES, odd);
        }
}

// Some rows of whole reads and unit stride.
template <class R> struct Rows {
    const typename R::Element* data;
    int64_t stride, count;

    // The last row again where there are no more: nobody uses what is computed from it.
    const typename R::Element* row(int64_t i) const { return data + std::min(i, count - 1) * stride; }
};

// A tensor's rows, copied into a buffer where they are not whole reads of unit stride.
template <class R> class RowReader {
  public:
    using Element = typename R::Element;

    RowReader(const FoveateTensor& x, int64_t dim)
        : x_(x), dim_(dim), padded_(round_up(dim, CHANNELS<R>)), direct_(x.stride[3] == 1 && padded_ == dim) {}

    int64_t channels() const { return padded_; }

    // The buffer holds `count` rows, or as many more as a whole number of grains takes.
    Rows<R> rows(int64_t b, int64_t h, int64_t first, int64_t count, Element* buffer, int64_t grain = 1) const {
        const auto* from = (const Element*)at(x_, R::DTYPE, b, h, first);
        if (direct_ && count % grain == 0) return {from, x_.stride[2], count};
        for (int64_t i = 0; i < count; ++i)
            read_row(buffer + i * padded_, from + i * x_.stride[2], R::DTYPE, x_.stride[3], dim_, padded_);
        return {buffer, padded_, count};
    }

  private:
    const FoveateTensor& x_;
    const int64_t dim_, padded_;
    const bool direct_;
};

}  // namespace foveate
