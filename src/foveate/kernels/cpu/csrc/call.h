// What every call of the attention kernels goes through.
#pragma once
#include "chunks.h"
#include "rows.h"
#include "threads.h"

namespace foveate {

// Tensors that cannot be: a mistake of whoever describes the call, which must not become a read of any memory.
inline bool is_refused(const FoveateAttend& call) {
    constexpr int64_t MOST_CHANNELS = 4096;
    const auto none = [](int64_t n) { return n < 0; };
    if (call.dtype < FOVEATE_FLOAT32 || call.dtype > FOVEATE_FLOAT16) return true;
    if (call.kind < FOVEATE_SOFTMAX || call.kind > FOVEATE_RELU || call.threads < 1) return true;
    if (none(call.batch) || none(call.num_queries) || none(call.num_keys) || none(call.num_biases)) return true;
    if (none(call.dim) || call.dim > MOST_CHANNELS || none(call.value_dim) || call.value_dim > MOST_CHANNELS) return true;
    const bool some = call.batch && call.q.heads;
    if (none(call.q.heads) || (some && (call.k.heads < 1 || call.v.heads < 1))) return true;
    if (some && (call.q.heads % call.k.heads || call.q.heads % call.v.heads)) return true;
    if (some && call.num_queries && (!call.q.data || (call.value_dim && !call.out.data))) return true;
    if (some && call.num_keys && (!call.k.data || (call.value_dim && !call.v.data))) return true;
    if (call.num_biases && !call.biases) return true;
    const FoveateSelection& seen = call.selection;
    if (seen.run_starts && (!seen.tile_starts || seen.q_slots || seen.k_slots)) return true;
    if (!seen.tile_starts) return false;
    if (seen.batches < 1 || seen.heads < 1 || none(seen.num_q_tiles) || none(seen.num_k_slots)) return true;
    return (some && call.q.heads % seen.heads) || (seen.batches > 1 && seen.batches != call.batch);
}

// Pairs that the tiles of a call form, about.
inline double pairs_of(const FoveateAttend& call) {
    const FoveateSelection& seen = call.selection;
    const double heads = (double)call.batch * call.q.heads;
    if (!seen.tile_starts) {
        const double keys = std::min<double>(call.num_keys, (double)seen.band_high - (double)seen.band_low + TILE);
        return heads * (double)call.num_queries * std::max(keys, 0.0);
    }
    const int64_t rows = seen.batches * seen.heads * seen.num_q_tiles;
    const double tiles = seen.tile_starts[rows], columns = seen.column_starts ? seen.column_starts[rows] : 0;
    double gathered = 0;
    for (int64_t i = 0; seen.run_starts && i < seen.run_starts[rows]; ++i)
        gathered += (double)__builtin_popcountll(seen.run_queries[i]) * seen.runs[2 * i + 1] * TILE;
    return heads / (double)(seen.batches * seen.heads) * ((tiles * TILE + columns) * TILE + gathered);
}

// The call, on no more threads than are of use for so many multiply-adds a pair.
inline FoveateAttend with_worthwhile_threads(const FoveateAttend& call, int64_t multiply_adds) {
    FoveateAttend with = call;
    const double numbers = (double)call.batch * call.q.heads * call.num_queries * (call.dim + call.value_dim);
    with.threads = worthwhile_threads(pairs_of(call) * multiply_adds, 2 * numbers * bytes_of(call.dtype), call.threads);
    return with;
}

// Forward by tiles, whatever the number of queries.
int64_t attend_tiles(const FoveateAttend& call);

}  // namespace foveate
