// Products of neighborhood attention whose lanes are channels:
//
//   gather    out [query][channel]  = factor * sum over its keys of weight * values [key][channel]
//   scatter   grad [key][channel]  += weight * rows [query][channel], for all keys of the query
//
// COLUMNS queries next to one another along x go together. Away from the borders their windows begin one key apart:
// but for a ramp at either end, every key is seen by all of them, and is loaded once.
#pragma once
#include "shifted.h"

namespace foveate::grid {

// A row of keys: its weights [offset][lane], and numbers [key][channel] from the first key of lane 0 on.
struct Link {
    const float* weights;
    float* tokens;
};

// The rows of keys that a row of queries sees.
struct Links {
    Link* data;
    int64_t count, token;  // token: numbers from one key to the next
    const Link* begin() const { return data; }
    const Link* end() const { return data + count; }

    // For row r of the queries in sight; tokens_of(row of keys) begins at the first column of the box of keys.
    template <class TokensOf>
    Links(Link* space, const Sight& sight, int64_t r, const Strip& strip, const Pairs& pairs, const float* weights,
          int64_t step, TokensOf tokens_of)
        : data(space), count(0), token(step) {
        sight.each_row(r, [&](const KeyRow& key) {
            data[count++] = {weights + pairs.at(r, key.slot), tokens_of(key.row) + strip.column * step};
        });
    }
};

template <int NUMBER> using Constant = std::integral_constant<int, NUMBER>;

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

template <int NUM, int STEP, int VECTORS>
static void gather_block(const Links& links, const Strip& strip, int64_t lane, int64_t channel, const float* factor,
                         float* out, int64_t out_token) {
    Floats sum[NUM][VECTORS] = {};
    for (const Link& link : links) {
        const float* tokens = link.tokens + strip.first[lane] * links.token + channel;
        const float* weights = link.weights + lane;
        each_key<NUM, STEP>(strip.count[lane], [&](int64_t key, auto begin, auto end) {
            Floats value[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) value[j] = kept(load(tokens + key * links.token + j * LANES));
#pragma GCC unroll 4
            for (int c = decltype(begin)::value; c < decltype(end)::value; ++c) {
                const Floats weight = kept(all(weights[(key - c * STEP) * LANES + c]));
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) sum[c][j] += weight * value[j];
            }
        });
    }
    out += lane * out_token + channel;
#pragma GCC unroll 4
    for (int c = 0; c < NUM; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(out + c * out_token + j * LANES, sum[c][j] * factor[lane + c]);
}

template <int NUM, int STEP, int VECTORS>
static void scatter_block(const Links& links, const Strip& strip, int64_t lane, int64_t channel, const float* rows,
                          int64_t row_token) {
    Floats row[NUM][VECTORS];
    rows += lane * row_token + channel;
#pragma GCC unroll 4
    for (int c = 0; c < NUM; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) row[c][j] = kept(load(rows + c * row_token + j * LANES));
    for (const Link& link : links) {
        float* tokens = link.tokens + strip.first[lane] * links.token + channel;
        const float* weights = link.weights + lane;
        each_key<NUM, STEP>(strip.count[lane], [&](int64_t key, auto begin, auto end) {
            Floats sum[VECTORS];
            float* to = tokens + key * links.token;
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) sum[j] = load(to + j * LANES);
#pragma GCC unroll 4
            for (int c = decltype(begin)::value; c < decltype(end)::value; ++c) {
                const Floats weight = kept(all(weights[(key - c * STEP) * LANES + c]));
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; ++j) sum[j] += weight * row[c][j];
            }
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) store(to + j * LANES, sum[j]);
        });
    }
}

// out [lane][channel]; `dim` channels, in whole vectors; a factor for each lane.
inline void gather(const Links& links, const Strip& strip, int64_t dim, const float* factor, float* out,
                   int64_t out_token) {
    in_parts<MOST_VECTORS>(dim / LANES, [&](int64_t vector, auto vectors) {
        each_column(strip, [&](int64_t lane, auto columns, auto step) {
            gather_block<decltype(columns)::value, decltype(step)::value, decltype(vectors)::value>(
                links, strip, lane, vector * LANES, factor, out, out_token);
        });
    });
}

// Adds to the links' tokens; rows [lane][channel].
inline void scatter(const Links& links, const Strip& strip, int64_t dim, const float* rows, int64_t row_token) {
    in_parts<MOST_VECTORS>(dim / LANES, [&](int64_t vector, auto vectors) {
        each_column(strip, [&](int64_t lane, auto columns, auto step) {
            scatter_block<decltype(columns)::value, decltype(step)::value, decltype(vectors)::value>(
                links, strip, lane, vector * LANES, rows, row_token);
        });
    });
}

}  // namespace foveate::grid
