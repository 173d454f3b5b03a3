// Which tokens the pairs of a chunk belong to.
#pragma once
#include "lanes.h"

namespace foveate {

// Where a chunk's pairs lie: tokens of its keys and of the tile's queries (-1: none).
struct Place {
    int64_t b, h, lanes, count;
    int64_t query[TILE], key[TILE];

    Place(const FoveateAttend& call, int64_t b, int64_t h, const Lanes& queries, const Chunk& chunk)
        : b(b), h(h), lanes(queries.count), count(chunk.count) {
        std::copy(queries.token, queries.token + lanes, query);
        for (int64_t i = 0; i < count; ++i) key[i] = key_at(call, chunk.slot(i));
    }
    bool exists(int64_t key_index, int64_t lane) const { return key[key_index] >= 0 && query[lane] >= 0; }
    bool keys_in_order() const {
        for (int64_t i = 1; i < count; ++i)
            if (key[i] != key[0] + i) return false;
        return count > 0 && key[0] >= 0;
    }
};

}  // namespace foveate
