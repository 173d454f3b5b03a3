// Where the pairs of a chunk stand in a table of relative positions, a vector of queries at a time.
#pragma once
#include <algorithm>

#include "abi.h"
#include "place.h"

namespace foveate {

class RelativeEntries {
  public:
    RelativeEntries(const FoveateBias& bias, const Place& place) : bias_(bias), head_((int32_t)place.h) {
        int64_t cells = 1;
        for (int64_t axis = 0; axis < bias.axes; ++axis) cells *= std::max<int64_t>(bias.dims[axis], 1);
        for (int64_t axis = 0; axis < bias.axes; ++axis) {
            const int64_t dim = bias.dims[axis];  // 0: a line
            cells /= std::max<int64_t>(dim, 1);
            const auto coordinate = [&](int64_t token) { return (int32_t)(dim ? token / cells % dim : token); };
            for (int64_t i = 0; i < TILE; ++i) {
                const int64_t query = i < place.lanes ? place.query[i] : 0, key = i < place.count ? place.key[i] : 0;
                query_[axis][i] = coordinate(std::max<int64_t>(query, 0) + bias.offset);
                key_[axis][i] = coordinate(std::max<int64_t>(key, 0));
            }
        }
    }

    // Entries of one key for the LANES queries from `lane` on.
    Ints of(int64_t key, int64_t lane) const {
        Ints entry = Ints{} + head_;
        for (int64_t axis = 0; axis < bias_.axes; ++axis) {
            const int32_t reach = (int32_t)bias_.reach[axis];
            Ints apart = (Ints)load_words(query_[axis] + lane) - key_[axis][key];
            apart = apart > reach ? Ints{} + reach : apart;
            apart = apart < -reach ? Ints{} - reach : apart;
            entry = entry * (2 * reach + 1) + apart + reach;
        }
        return entry;
    }

  private:
    const FoveateBias& bias_;
    const int32_t head_;
    int32_t query_[4][TILE], key_[4][TILE];
};

}  // namespace foveate
