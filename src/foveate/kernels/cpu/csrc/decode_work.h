// How a call is cut into items of work.
#pragma once
#include <algorithm>
#include <numeric>

#include "rows.h"
#include "threads.h"

namespace foveate {

// Heads that share keys or values form a set. An item is a part of the keys for one set, or for all sets where their
// keys alternate in memory: pages are then read from end to end.
struct DecodeWork {
    int64_t sets, heads, key_heads, value_heads;  // sets of a batch entry; heads of a set
    int64_t rows;                                 // of a set: (heads, queries)
    int64_t together;                             // sets of an item
    int64_t first, end, split, splits;            // keys that anybody sees, and in a part of them; parts
    int64_t threads, items;

    explicit DecodeWork(const FoveateAttend& call) {
        sets = std::gcd(call.k.heads, call.v.heads);
        heads = call.q.heads / sets, key_heads = call.k.heads / sets, value_heads = call.v.heads / sets;
        rows = heads * call.num_queries;
        together = call.k.stride[1] < call.k.stride[2] ? sets : 1;
        first = std::clamp<int64_t>(call.num_keys - call.num_queries - call.selection.band_high, 0, call.num_keys);
        end = std::clamp(call.num_keys - call.selection.band_low, first, call.num_keys);
        const double keys = (double)(call.batch * sets) * (double)(end - first);
        threads = worthwhile_threads(keys * rows * (call.dim + call.value_dim), keys * bytes_of_key(call), call.threads);
        split = keys_of_part(call);
        splits = std::max<int64_t>((end - first + split - 1) / split, 1);
        items = call.batch * (sets / together) * splits;
        threads = std::min(threads, items);
    }

  private:
    static constexpr int64_t ITEMS_OF_THREAD = 8, BYTES_OF_ITEM = 128 << 10;  // at least, where there are enough keys

    int64_t bytes_of_key(const FoveateAttend& call) const {
        return (key_heads * call.dim + value_heads * call.value_dim) * bytes_of(call.dtype);
    }
    int64_t keys_of_part(const FoveateAttend& call) const {
        const int64_t keys = end - first, apart = call.batch * (sets / together);
        const int64_t wanted = (ITEMS_OF_THREAD * threads + apart - 1) / apart;
        const int64_t most = keys * together * bytes_of_key(call) / BYTES_OF_ITEM;
        const int64_t parts = threads > 1 ? std::max<int64_t>(std::min(wanted, most), 1) : 1;
        return std::max<int64_t>(round_up((keys + parts - 1) / parts, TILE), TILE);
    }
};

}  // namespace foveate
