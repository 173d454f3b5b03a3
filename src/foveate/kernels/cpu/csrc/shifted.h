// Scores of neighborhood attention, without a multiplication that no window asks for: lanes are queries next to one
// another along x. Their keys at one offset lie next to one another too, so that keys^T [d][x] shifted by the offset
// are what all lanes want; only where the border shifts windows do the lanes have to be permuted.
#pragma once
#include <type_traits>

#include "rows.h"
#include "windows.h"

namespace foveate::grid {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int MOST_SUMS = 8, MOST_OFFSETS = 4;  // 16 registers
#else
constexpr int MOST_SUMS = 24, MOST_OFFSETS = 8;  // 32
#endif

// Lane i of the result is lane at[i] of x.
FOVEATE_INLINE Floats permute(Floats x, Ints at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)at, (__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)at);
#else
    Floats y;
    for (int i = 0; i < LANES; ++i) y[i] = x[at[i]];
    return y;
#endif
}

// x in a register: compilers else load it again for each of its uses.
FOVEATE_INLINE Floats kept(Floats x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#else
    asm("" : "+w"(x));
#endif
    return x;
}

// Calls work(constant) for a number of 1 to MOST.
template <int MOST, class Work> FOVEATE_INLINE void with_constant(int64_t number, Work work) {
    if constexpr (MOST > 1) {
        if (number < MOST) return with_constant<MOST - 1>(number, work);
    }
    work(std::integral_constant<int, MOST>{});
}

// Calls work(begin, constant length) for parts of at most MOST and about equal length.
template <int MOST, class Work> FOVEATE_INLINE void in_parts(int64_t count, Work work) {
    for (int64_t parts = (count + MOST - 1) / MOST, begin = 0; parts; --parts) {
        const int64_t length = (count - begin + parts - 1) / parts;
        with_constant<MOST>(length, [&](auto constant) { work(begin, constant); });
        begin += length;
    }
}

// Where the numbers of a group's pairs lie: [row of queries][row of keys][offset][lane].
class Pairs {
  public:
    Pairs(const Lattice& lattice, const Sight& sight)
        : width_(lattice.x.size), row_((sight.slots() * width_ + 1) * LANES) {}

    static int64_t size(const Lattice& lattice) {
        return GROUP * (Sight::most_rows(lattice) * lattice.x.size + 1) * LANES;
    }
    int64_t row() const { return row_; }  // numbers from one row of queries to the next
    int64_t at(int64_t query, int64_t slot, int64_t offset = 0) const {
        return query * row_ + (slot * width_ + offset) * LANES;
    }
    // Calls visit(where, offset + some rows of keys) for all vectors of pairs of row r.
    template <class Visit> FOVEATE_INLINE_MEMBER void each(const Sight& sight, int64_t r, Visit visit) const {
        sight.each_plane(sight.lines(r), [&](int64_t slot, int64_t count) {
            const int64_t begin = at(r, slot);
            for (int64_t i = 0; i < count * width_; ++i) visit(begin + i * LANES, i);
        });
    }
    int64_t width() const { return width_; }

  private:
    int64_t width_, row_;
};

template <int ROWS, int OFFSETS, bool BENT>
static void scores_block(const float* queries, int64_t query_row, const float* keys, int64_t channel, int64_t dim,
                         Ints bend, float* to, int64_t to_row) {
    Floats sum[ROWS][OFFSETS] = {};
    for (int64_t d = 0; d < dim; ++d, queries += LANES, keys += channel) {
        Floats query[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) query[r] = kept(load(queries + r * query_row));
#pragma GCC unroll 8
        for (int i = 0; i < OFFSETS; ++i) {
            const Floats shifted = kept(load(keys + i));
            const Floats key = BENT ? permute(shifted, bend) : shifted;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sum[r][i] += query[r] * key;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < OFFSETS; ++i) store(to + r * to_row + i * LANES, sum[r][i]);
}

// Scores of the rows of queries of a run with one row of keys. Queries are [row][d][lane], keys [d][x] from the first
// key of lane 0 on, with `channel` numbers from one d to the next.
inline void scores(const Run& run, int64_t slot, const Strip& strip, const Pairs& pairs, int64_t dim,
                   const float* queries, int64_t query_row, const float* keys, int64_t channel, float* to) {
    with_constant<GROUP>(run.count, [&](auto rows) {
        constexpr int ROWS = decltype(rows)::value, MOST = std::min(MOST_SUMS / ROWS, MOST_OFFSETS);
        in_parts<MOST>(pairs.width(), [&](int64_t offset, auto offsets) {
            constexpr int OFFSETS = decltype(offsets)::value;
            const auto block = strip.bent ? scores_block<ROWS, OFFSETS, true> : scores_block<ROWS, OFFSETS, false>;
            block(queries + run.first * query_row, query_row, keys + offset, channel, dim, strip.bend(),
                  to + pairs.at(run.first, slot, offset), pairs.row());
        });
    });
}

}  // namespace foveate::grid
