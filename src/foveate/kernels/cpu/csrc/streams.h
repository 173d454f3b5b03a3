// Blocks of tokens x LANES channels out of tensors of any dtype and strides, and back.
#pragma once
#include <numeric>

#include "pages.h"
#include "rows.h"
#include "scan_abi.h"
#include "threads.h"

namespace foveate {

constexpr int64_t SEGMENT = 64;  // tokens that are packed, and whose states are kept, at a time
constexpr int64_t PART = 128;    // channels of a work item, at most

// Streams that cannot be: a mistake of whoever describes the call, which must not become a read of any memory.
inline bool is_refused(const FoveateStream& x) {
    return x.data && (x.dtype < FOVEATE_FLOAT32 || x.dtype > FOVEATE_FLOAT16);
}
inline bool is_refused(const FoveateScan& call) {
    for (const FoveateStream* x : {&call.x, &call.dt, &call.z, &call.b, &call.c, &call.out})
        if (is_refused(*x)) return true;
    if (call.sequences < 0 || call.length < 0 || call.channels < 0 || call.states < 0 || call.threads < 1) return true;
    if (call.groups_b < 1 || call.groups_c < 1 || call.channels % call.groups_b || call.channels % call.groups_c)
        return true;
    return call.sequences && call.length && call.channels && !call.x.data;
}
inline bool is_refused(const FoveateConv& call) {
    if (is_refused(call.x) || is_refused(call.out)) return true;
    if (call.sequences < 0 || call.length < 0 || call.channels < 0 || call.width < 1 || call.threads < 1) return true;
    return call.sequences && call.length && call.channels && (!call.x.data || !call.weight);
}

// One sequence: where its tokens lie, and the first of its marks.
struct Run {
    int64_t batch, token, length, mark;
};

FOVEATE_INLINE Run run_of(const int64_t* starts, int64_t length, int64_t sequence) {
    if (!starts) return {sequence, 0, length, sequence * length / SEGMENT + sequence};
    const int64_t start = starts[sequence];
    return {0, start, starts[sequence + 1] - start, start / SEGMENT + sequence};
}

// Of a result (batch, tokens, channels) that lies in one piece, before anything is written to it.
template <class Call> static void prefer_large_pages(const Call& call, const FoveateStream& x) {
    if (!x.data) return;
    const int64_t tokens = (call.starts ? 1 : call.sequences) * call.length;
    prefer_large_pages(x.data, tokens * call.channels * bytes_of(x.dtype));
}

// A part of the channels: they share their groups. The same on every processor and for any number of threads.
struct Part {
    int64_t channel, count;
};

class Parts {
  public:
    Parts(int64_t channels, int64_t cell) : cell_(cell) {
        size_ = std::min({PART, cell, round_up((channels + 11) / 12, 16)});
        per_cell_ = (cell + size_ - 1) / size_;
        count_ = channels / cell * per_cell_;
    }
    int64_t count() const { return count_; }
    int64_t per_cell() const { return per_cell_; }
    int64_t blocks() const { return (size_ + LANES - 1) / LANES; }
    Part operator[](int64_t i) const {
        const int64_t within = i % per_cell_ * size_;
        return {i / per_cell_ * cell_ + within, std::min(size_, cell_ - within)};
    }

  private:
    int64_t cell_, size_, per_cell_, count_;
};

FOVEATE_INLINE char* place(const FoveateStream& x, int64_t batch, int64_t token, int64_t column = 0) {
    return (char*)x.data + (batch * x.stride[0] + token * x.stride[1] + column * x.stride[2]) * bytes_of(x.dtype);
}

// Scratch of read_block and write_block.
constexpr int64_t TURNED = LANES * SEGMENT;

// n tokens of `count` columns from `from` on as float32, to[token * pitch + column], zeros up to whole vectors.
// `turned` holds round_up(count, LANES) * SEGMENT numbers. The tokens of the next segment are asked for.
inline void read_block(float* to, int64_t pitch, const char* from, int64_t dtype, int64_t token_stride,
                               int64_t stride, int64_t n, int64_t count, float* turned) {
    const int64_t bytes = bytes_of(dtype), padded = round_up(count, LANES);
    if (token_stride == 1 && stride != 1 && n > 1) {
        for (int64_t c = 0; c < count; ++c) {
            read_row(turned + c * SEGMENT, from + c * stride * bytes, dtype, 1, n, round_up(n, LANES));
            for (int64_t ahead = 0; ahead < SEGMENT * bytes; ahead += 64)
                __builtin_prefetch(from + (c * stride + SEGMENT) * bytes + ahead);
        }
        std::memset(turned + count * SEGMENT, 0, (padded - count) * SEGMENT * sizeof(float));
        transpose_words(to, pitch, turned, SEGMENT, count, n);
        return;
    }
    for (int64_t t = 0; t < n; ++t) {
        const char* row = from + t * token_stride * bytes;
        __builtin_prefetch(row + SEGMENT * token_stride * bytes);
        read_row(to + t * pitch, row, dtype, stride, count, padded);
    }
}

// LANES channels or fewer of n tokens to where they belong, from[token * LANES + lane].
inline void write_block(char* to, int64_t dtype, int64_t token_stride, int64_t stride, const float* from,
                                int64_t n, int64_t count, float* turned) {
    const int64_t bytes = bytes_of(dtype);
    if (token_stride == 1 && stride != 1 && n > 1) {
        transpose_words(turned, SEGMENT, from, LANES, n, count);
        for (int64_t c = 0; c < count; ++c)
            write_row(to + c * stride * bytes, dtype, 1, turned + c * SEGMENT, n);
        return;
    }
    for (int64_t t = 0; t < n; ++t)
        write_row(to + t * token_stride * bytes, dtype, stride, from + t * LANES, count);
}

inline void read_channels(float* to, const FoveateStream& x, int64_t batch, int64_t token, int64_t n, Part part,
                                  float* turned) {
    const char* from = place(x, batch, token, part.channel);
    read_block(to, LANES, from, x.dtype, x.stride[1], x.stride[2], n, part.count, turned);
}

inline void write_channels(const FoveateStream& x, int64_t batch, int64_t token, int64_t n, Part part,
                                   const float* from, float* turned) {
    char* to = place(x, batch, token, part.channel);
    write_block(to, x.dtype, x.stride[1], x.stride[2], from, n, part.count, turned);
}

// (channels, size) of a part's LANES channels or fewer as [number][lane], zeros where there is no channel or no data.
inline void read_lanes(float* to, const float* from, int64_t size, Part part) {
    std::memset(to, 0, size * LANES * sizeof(float));
    if (!from) return;
    for (int64_t lane = 0; lane < part.count; ++lane)
        for (int64_t i = 0; i < size; ++i) to[i * LANES + lane] = from[(part.channel + lane) * size + i];
}
inline void write_lanes(float* to, const float* from, int64_t size, Part part) {
    for (int64_t lane = 0; lane < part.count; ++lane)
        for (int64_t i = 0; i < size; ++i) to[(part.channel + lane) * size + i] = from[i * LANES + lane];
}

// Calls work(block, its channels) for a part's blocks of LANES channels.
template <class Work> FOVEATE_INLINE void for_blocks(Part part, Work work) {
    for (int64_t block = 0; block * LANES < part.count; ++block)
        work(block, Part{part.channel + block * LANES, std::min<int64_t>(LANES, part.count - block * LANES)});
}

}  // namespace foveate
