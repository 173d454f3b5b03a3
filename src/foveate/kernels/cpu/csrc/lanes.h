// The queries that a work item takes together.
#pragma once
#include "chunks.h"

namespace foveate {

// Up to 64 queries, a lane each: of one tile, or gathered from many.
struct Lanes {
    static constexpr int64_t GATHERED = -1;

    int64_t first;        // the slot of lane 0, or GATHERED
    int64_t count;
    int64_t token[TILE];  // -1: none

    // Those in the `most` slots from `first` on, up to the last that exists.
    void take_slots(const FoveateAttend& call, int64_t first_slot, int64_t most) {
        first = first_slot;
        count = std::min(num_q_tiles(call) * TILE - first, most);
        for (int64_t i = 0; i < count; ++i) token[i] = query_at(call, first + i);
        while (count > 0 && token[count - 1] < 0) --count;
    }
    void gather(const int32_t* tokens, int64_t num_tokens) {
        first = GATHERED;
        count = num_tokens;
        std::copy(tokens, tokens + num_tokens, token);
    }
    int64_t vectors() const { return (count + LANES - 1) / LANES; }
};

}  // namespace foveate
