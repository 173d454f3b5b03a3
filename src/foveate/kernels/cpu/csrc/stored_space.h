// What a thread needs to attend to stored tokens.
#pragma once
#include "decode_softmax.h"
#include "stored_pairs.h"

namespace foveate {

struct StoredSpace {
    StoredPairs pairs;
    float *buffer, *q, *spread, *scaled, *scores, *raw, *added, *step, *least, *row, *natural, *beside;
    float *token_step, *token_least;
    RowStep softmax;

    StoredSpace(Arena& arena, int64_t rows, int64_t dtype, int64_t keys, int64_t values, int64_t widest)
        : pairs(arena, rows, dtype, keys, values) {
        buffer = arena.take<float>(TILE * std::max(keys, values));
        q = arena.take<float>(rows * widest), spread = arena.take<float>(rows * keys);
        scaled = arena.take<float>(rows * keys);
        scores = arena.take<float>(rows * TILE), raw = arena.take<float>(rows * TILE);
        added = arena.take<float>(rows * values);
        step = arena.take<float>(std::max(keys, values)), least = arena.take<float>(std::max(keys, values));
        beside = arena.take<float>(rows), row = arena.take<float>(widest), natural = arena.take<float>(widest);
        // A vector more than there are tokens, since pieces begin anywhere.
        for (float** each : {&token_step, &token_least}) *each = arena.take<float>(TILE + LANES);
        for (float** each : {&softmax.highest, &softmax.kept, &softmax.base})
            *each = arena.take<float>(round_up(rows, LANES));
    }
};

inline const char* number_at(const void* data, int64_t dtype, const int64_t* stride, int64_t page, int64_t head, int64_t at) {
    return (const char*)data + (page * stride[0] + head * stride[1] + at * stride[2]) * bytes_of(dtype);
}

inline float dot(const float* x, const float* y, int64_t count) {
    Floats sum{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(y + i);
    float total = sum_lanes(sum);
    for (; i < count; ++i) total += x[i] * y[i];
    return total;
}
inline float sum_of(const float* x, int64_t count) {
    Floats sum{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i);
    float total = sum_lanes(sum);
    for (; i < count; ++i) total += x[i];
    return total;
}

}  // namespace foveate
