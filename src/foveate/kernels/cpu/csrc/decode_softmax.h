// From scores (rows, 64 keys) to weights, in their place: keys lie in the vectors' lanes.
#pragma once
#include "weights.h"

namespace foveate {

// What some rows have summed up so far, with weights 2^(logit - top).
struct RowSums {
    float* out;  // (rows up to a whole vector, channels)
    float* top;  // (rows up to a whole vector)
    float* sum;  // (rows, LANES), to be added up
    int64_t rows, channels;

    RowSums(float* memory, int64_t rows, int64_t channels) : out(memory), rows(rows), channels(channels) {
        top = out + round_up(rows, LANES) * channels;
        sum = top + round_up(rows, LANES);
    }
    static int64_t size(int64_t rows, int64_t channels) {
        return round_up(rows, LANES) * (channels + 1) + rows * LANES;
    }
    void clear() const {
        std::fill(out, out + rows * channels, 0.0f);
        std::fill(top, sum, -INFINITY);
        std::fill(sum, sum + rows * LANES, 0.0f);
    }
};

// Numbers of a step, each (rows up to a whole vector).
struct RowStep {
    float* highest;  // logit
    float* kept;     // what is left of the sums under the old top
    float* base;     // to take off logits
};

FOVEATE_INLINE float highest_lane(Floats x) {
    for (int lanes = LANES; lanes > 1; lanes /= 2) {
        Words low = as_words(x), high = low;
        interleave(low, high);
        x = greater(as_floats(low), as_floats(high));
    }
    return x[0];
}

// Raises tops to the highest logits of a step.
FOVEATE_INLINE void raise_tops(const RowSums& sums, const RowStep& step) {
    for (int64_t r = 0; r < sums.rows; r += LANES) {
        const Floats top = load(sums.top + r), now = greater(top, load(step.highest + r));
        const Floats base = now == -INFINITY ? Floats{} : now;
        store(sums.top + r, now);
        store(step.kept + r, exp2_of(top - base));
        store(step.base + r, base);
    }
}

FOVEATE_INLINE void scale_row(float* row, int64_t channels, float by) {
    if (by == 1.0f) return;
    for (int64_t c = 0; c < channels; c += LANES) store(row + c, load(row + c) * by);
}

template <int DEGREE>
static void softmax_rows(float* scores, float factor, const RowSums& sums, const RowStep& step) {
    for (int64_t r = 0; r < sums.rows; ++r) {
        Floats highest = load(scores + r * TILE);
        for (int j = LANES; j < TILE; j += LANES) highest = greater(highest, load(scores + r * TILE + j));
        step.highest[r] = highest_lane(highest) * factor;
    }
    raise_tops(sums, step);
    for (int64_t r = 0; r < sums.rows; ++r) {
        float* row = scores + r * TILE;
        Floats total = load(sums.sum + r * LANES) * step.kept[r];
        for (int j = 0; j < TILE; j += LANES) {
            const Floats weight = exp2_of<DEGREE>(load(row + j) * factor - step.base[r]);
            store(row + j, weight);
            total += weight;
        }
        store(sums.sum + r * LANES, total);
        scale_row(sums.out + r * sums.channels, sums.channels, step.kept[r]);
    }
}

// Writes over what rows do not see of the keys first .. first + count. Rows are (heads, queries).
FOVEATE_INLINE void hide(const FoveateAttend& call, float* scores, int64_t rows, int64_t first, int64_t count,
                         float hidden) {
    const FoveateSelection& band = call.selection;
    const int64_t last = call.num_keys - 1, position = call.num_keys - call.num_queries;  // of query 0
    if (count == TILE && last - band.band_high <= first && first + TILE - 1 <= position - band.band_low) return;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t here = position + r % call.num_queries - first;
        const int64_t low = std::clamp<int64_t>(here - band.band_high, 0, count);
        const int64_t high = std::clamp<int64_t>(here - band.band_low + 1, low, count);
        float* row = scores + r * TILE;
        std::fill(row, row + low, hidden);
        std::fill(row + high, row + TILE, hidden);
    }
}

// Turns the scores of the keys first .. first + count, plus a bias (null: none), into weights; 0 for the rest of the 64.
template <int DEGREE>
static void weigh(const FoveateAttend& call, float* scores, const float* bias, int64_t first, int64_t count,
                  const RowSums& sums, const RowStep& step) {
    const Cut all_of_them(sums.rows, MAX_VECTORS);
    Scores logits{scores, sums.rows, TILE, 0, 0, all_of_them};
    bend(call, logits, bias, nullptr);
    if (call.kind == FOVEATE_SOFTMAX) {
        hide(call, scores, sums.rows, first, count, -INFINITY);
        softmax_rows<DEGREE>(scores, logits.factor * LOG2E, sums, step);
    } else {
        for (int64_t i = 0; i < sums.rows * TILE; i += LANES)
            store(scores + i, weight_of(call.kind, load(scores + i) * logits.factor));
        hide(call, scores, sums.rows, first, count, 0);
    }
}

// Adds what was summed up over other keys; without tops the weights of both are the same.
static void merge(const RowSums& to, const RowSums& from, bool with_tops, const RowStep& step) {
    raise_tops(to, RowStep{from.top, step.kept, step.base});
    for (int64_t r = 0; r < to.rows; ++r) {
        const float kept = with_tops ? step.kept[r] : 1.0f;
        const float joins = with_tops ? exp2_of(all(from.top[r] - step.base[r]))[0] : 1.0f;
        const auto join = [&](float* p, const float* q) { store(p, load(p) * kept + load(q) * joins); };
        for (int64_t c = r * to.channels; c < (r + 1) * to.channels; c += LANES) join(to.out + c, from.out + c);
        join(to.sum + r * LANES, from.sum + r * LANES);
    }
}

}  // namespace foveate
