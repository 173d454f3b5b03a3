// Products of neighborhood attention whose lanes are channels:
//
//   gather    out [query][channel]  = factor * sum over its keys of weight * values [key][channel]
//   scatter   grad [key][channel]  += weight * rows [query][channel], for all keys of the query
//
// COLUMNS queries next to one another along x go together, in ROWS rows. Away from the borders their windows begin one
// key apart: but for a ramp at either end, every key is seen by all of them, and is loaded once.
#pragma once
#include "shifted.h"

namespace foveate::grid {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int ROWS = 1;  // times COLUMNS times MOST_VECTORS are 8 of 16 registers
#else
constexpr int ROWS = 2;  // 16 of 32
#endif
constexpr int MOST_VECTORS = 2;

template <int NUMBER> using Constant = std::integral_constant<int, NUMBER>;

// A row of keys: the weights [offset][lane] of the first row of queries, and numbers [key][channel] from the first key
// of lane 0 on.
struct Link {
    const float* weights;
    float* tokens;
};

// The rows of keys that up to ROWS rows of queries see: the first only, all of them, the last only.
class Links {
  public:
    static int64_t most(const Lattice& lattice) { return lattice.z.size * (lattice.y.size + ROWS - 1); }

    // For rows r .. r + rows of the queries in sight; tokens_of(row of keys) begins at the first column of the keys.
    template <class TokensOf>
    Links(Link* space, const Sight& sight, int64_t r, int64_t rows, const Strip& strip, const Pairs& pairs,
          const float* weights, int64_t step, TokensOf tokens_of)
        : weight_row(pairs.row()), token(step) {
        const Range first = sight.lines(r), last = sight.lines(r + rows - 1);
        const Range parts[] = {{first.begin, std::min(last.begin, first.end)},
                               {last.begin, first.end},
                               {std::max(first.end, last.begin), last.end}};
        for (int part = 0; part < 3; ++part) {
            parts_[part] = space;
            sight.each_row(parts[part], [&](const KeyRow& key) {
                *space++ = {weights + pairs.at(r, key.slot), tokens_of(key.row) + strip.column * step};
            });
        }
        parts_[3] = space;
    }
    // Calls visit(link, constant begin, constant end) for every row of keys, seen by rows begin .. end of NUM.
    template <int NUM, class Visit> FOVEATE_INLINE_MEMBER void each(Visit visit) const {
        if constexpr (NUM > 1)
            for (const Link* link = parts_[0]; link < parts_[1]; ++link) visit(*link, Constant<0>{}, Constant<1>{});
        for (const Link* link = parts_[1]; link < parts_[2]; ++link) visit(*link, Constant<0>{}, Constant<NUM>{});
        if constexpr (NUM > 1)
            for (const Link* link = parts_[2]; link < parts_[3]; ++link)
                visit(*link, Constant<NUM - 1>{}, Constant<NUM>{});
    }

    const int64_t weight_row;  // numbers from a row of queries to the next
    const int64_t token;       // numbers from a key to the next

  private:
    Link* parts_[4];
};

// Rows of channels of the queries in sight, from lane 0 of a strip on.
struct Rows {
    float* data;
    int64_t row, token;  // numbers from one to the next
};

// Calls visit(key, constant begin, constant end) for every key, counted from the first one of column 0: columns
// begin .. end of NUM see it, where each window is `width` wide and begins STEP keys after that of the column before.
template <int NUM, int STEP, class Visit> FOVEATE_INLINE void each_key(int64_t width, Visit visit) {
    static_assert(COLUMNS == 4 && (NUM == COLUMNS || STEP == 0) && (STEP == 0 || STEP == 1), "see the ramps");
    if constexpr (STEP == 1) {
        visit(0, Constant<0>{}, Constant<1>{});
        visit(1, Constant<0>{}, Constant<2>{});
        visit(2, Constant<0>{}, Constant<3>{});
    }
    for (int64_t key = STEP * (NUM - 1); key < width; ++key) visit(key, Constant<0>{}, Constant<NUM>{});
    if constexpr (STEP == 1) {
        visit(width, Constant<1>{}, Constant<4>{});
        visit(width + 1, Constant<2>{}, Constant<4>{});
        visit(width + 2, Constant<3>{}, Constant<4>{});
    }
}

// Calls work(lane, constant number of columns, constant step) for all lanes of a strip.
template <class Work> FOVEATE_INLINE void each_column(const Strip& strip, Work work) {
    for (int64_t lane = 0; lane < strip.lanes;) {
        const Pace pace = strip.pace[lane];
        if (pace == Pace::CONSECUTIVE)
            work(lane, Constant<COLUMNS>{}, Constant<1>{});
        else if (pace == Pace::EQUAL)
            work(lane, Constant<COLUMNS>{}, Constant<0>{});
        else
            work(lane, Constant<1>{}, Constant<0>{});
        lane += pace == Pace::ANY ? 1 : COLUMNS;
    }
}

template <int NUM_ROWS, int NUM, int STEP, int VECTORS>
static void gather_block(const Links& links, const Strip& strip, int64_t lane, int64_t channel, const float* factor,
                         const Rows& out) {
    Floats sum[NUM_ROWS][NUM][VECTORS] = {};
    links.each<NUM_ROWS>([&](const Link& link, auto first_row, auto end_row) {
        const float* tokens = link.tokens + strip.first[lane] * links.token + channel;
        const float* weights = link.weights + lane;
        each_key<NUM, STEP>(strip.count[lane], [&](int64_t key, auto first, auto end) {
            Floats value[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) value[j] = kept(load(tokens + key * links.token + j * LANES));
#pragma GCC unroll 4
            for (int r = decltype(first_row)::value; r < decltype(end_row)::value; ++r)
#pragma GCC unroll 4
                for (int c = decltype(first)::value; c < decltype(end)::value; ++c) {
                    const Floats weight = kept(all(weights[r * links.weight_row + (key - c * STEP) * LANES + c]));
#pragma GCC unroll 4
                    for (int j = 0; j < VECTORS; ++j) sum[r][c][j] += weight * value[j];
                }
        });
    });
#pragma GCC unroll 4
    for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < NUM; ++c)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                store(out.data + r * out.row + (lane + c) * out.token + channel + j * LANES,
                      sum[r][c][j] * factor[r * LANES + lane + c]);
}

template <int NUM_ROWS, int NUM, int STEP, int VECTORS>
static void scatter_block(const Links& links, const Strip& strip, int64_t lane, int64_t channel, const Rows& rows) {
    Floats row[NUM_ROWS][NUM][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < NUM; ++c)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                row[r][c][j] = kept(load(rows.data + r * rows.row + (lane + c) * rows.token + channel + j * LANES));
    links.each<NUM_ROWS>([&](const Link& link, auto first_row, auto end_row) {
        float* tokens = link.tokens + strip.first[lane] * links.token + channel;
        const float* weights = link.weights + lane;
        each_key<NUM, STEP>(strip.count[lane], [&](int64_t key, auto first, auto end) {
            Floats sum[VECTORS];
            float* to = tokens + key * links.token;
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) sum[j] = load(to + j * LANES);
#pragma GCC unroll 4
            for (int r = decltype(first_row)::value; r < decltype(end_row)::value; ++r)
#pragma GCC unroll 4
                for (int c = decltype(first)::value; c < decltype(end)::value; ++c) {
                    const Floats weight = kept(all(weights[r * links.weight_row + (key - c * STEP) * LANES + c]));
#pragma GCC unroll 4
                    for (int j = 0; j < VECTORS; ++j) sum[j] += weight * row[r][c][j];
                }
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) store(to + j * LANES, sum[j]);
        });
    });
}

// out [row][lane][channel] of `rows` rows; `dim` channels, in whole vectors; a factor for each [row][lane].
inline void gather(const Links& links, int64_t rows, const Strip& strip, int64_t dim, const float* factor,
                   const Rows& out) {
    with_constant<ROWS>(rows, [&](auto num_rows) {
        in_parts<MOST_VECTORS>(dim / LANES, [&](int64_t vector, auto vectors) {
            each_column(strip, [&](int64_t lane, auto columns, auto step) {
                gather_block<decltype(num_rows)::value, decltype(columns)::value, decltype(step)::value,
                             decltype(vectors)::value>(links, strip, lane, vector * LANES, factor, out);
            });
        });
    });
}

// Adds to the links' tokens; from [row][lane][channel].
inline void scatter(const Links& links, int64_t rows, const Strip& strip, int64_t dim, const Rows& from) {
    with_constant<ROWS>(rows, [&](auto num_rows) {
        in_parts<MOST_VECTORS>(dim / LANES, [&](int64_t vector, auto vectors) {
            each_column(strip, [&](int64_t lane, auto columns, auto step) {
                scatter_block<decltype(num_rows)::value, decltype(columns)::value, decltype(step)::value,
                              decltype(vectors)::value>(links, strip, lane, vector * LANES, from);
            });
        });
    });
}

}  // namespace foveate::grid
