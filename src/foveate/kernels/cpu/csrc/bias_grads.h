// Gradients of biases. Where many pairs share an entry each thread sums into its own, and they are added up in order.
#pragma once
#include <memory>

#include "bias.h"

namespace foveate {

// How many pairs share an entry: one, those of few batch entries and heads, or a number that float32 cannot count.
enum class Sharing { ONE, FEW, MANY };

FOVEATE_INLINE Sharing sharing_of(const FoveateBias& bias) {
    if (bias.kind != FOVEATE_DENSE || !bias.stride[2] || !bias.stride[3]) return Sharing::MANY;
    return bias.stride[0] && bias.stride[1] ? Sharing::ONE : Sharing::FEW;
}

template <class Sum>
static void add_pairs(const FoveateBias& bias, Sum* sums, const Place& place, const float* from, int64_t ld) {
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; ++i) {
            if (!place.exists(k, i)) continue;
            const float g = from[k * ld + i];
            if (bias.kind == FOVEATE_DENSE) sums[dense_entry(bias, place, i, k)] += g;
            if (bias.kind == FOVEATE_ALIBI) sums[place.h] += g * alibi_factor(bias, place, i, k);
        }
}

// A number for each query, or for each key: pairs that share it are added up first.
template <class Sum>
static void add_broadcast_pairs(const FoveateBias& bias, Sum* sums, const Place& place, const float* from, int64_t ld) {
    sums += place.b * bias.stride[0] + place.h * bias.stride[1];
    alignas(64) float of_query[TILE] = {};
    for (int64_t k = 0; k < place.count; ++k) {
        if (place.key[k] < 0) continue;
        float of_key = 0.0f;
        for (int64_t i = 0; i < place.lanes; ++i) {
            const float g = place.query[i] < 0 ? 0.0f : from[k * ld + i];
            of_query[i] += g;
            of_key += g;
        }
        if (bias.stride[3]) sums[place.key[k] * bias.stride[3]] += of_key;
    }
    for (int64_t i = 0; i < place.lanes && bias.stride[3] == 0; ++i)
        if (place.query[i] >= 0) sums[place.query[i] * bias.stride[2]] += of_query[i];
}

template <class Sum>
static void add_relative_pairs(const FoveateBias& bias, Sum* sums, const Place& place, const float* from, int64_t ld) {
    const RelativeEntries entries(bias, place);
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; i += LANES) {
            const Ints entry = entries.of(k, i);
            for (int64_t lane = i; lane < std::min<int64_t>(i + LANES, place.lanes); ++lane)
                if (place.exists(k, lane)) sums[entry[lane - i]] += from[k * ld + lane];
        }
}

// Rows of a dense bias: transposed in registers, then added along the keys.
static inline void add_dense_rows(const FoveateBias& bias, float* sums, const Place& place, const float* from,
                                  int64_t ld) {
    alignas(64) float rows[TILE * TILE];
    transpose_words(rows, TILE, from, ld, place.count, place.lanes);
    for (int64_t i = 0; i < place.lanes; ++i) {
        if (place.query[i] < 0) continue;
        float* to = sums + dense_entry(bias, place, i, 0);
        int64_t k = 0;
        for (; k + LANES <= place.count; k += LANES) store(to + k, load(to + k) + load(rows + i * TILE + k));
        for (; k < place.count; ++k) to[k] += rows[i * TILE + k];
    }
}

// Gradients of the logits of whole short sequences, (keys, queries) for each head: so many batch entries are added up
// as they are, vector by vector, before each pair looks for its entry in the bias.
class ShortSums {
  public:
    static constexpr int64_t AT_MOST = 64, HEADS = 64;  // batch entries that float32 adds up; heads worth the memory

    static bool suit(const FoveateAttend& call, const FoveateBias& bias) {
        const bool natural = !call.selection.q_slots && !call.selection.k_slots && !call.selection.run_starts;
        return natural && bias.kind == FOVEATE_RELATIVE && call.q.heads <= HEADS && call.batch > 1 &&
               std::max(call.num_queries, call.num_keys) <= TILE;
    }
    ShortSums(const FoveateAttend& call, const FoveateBias& bias, double* sums)
        : call_(call), bias_(bias), sums_(sums), tiles_(call.q.heads * TILE * TILE), counts_(call.q.heads) {
        std::fill_n(tiles_.get(), call.q.heads * TILE * TILE, 0.0f);
        std::fill_n(counts_.get(), call.q.heads, 0);
    }
    void add(const Place& place, const float* from, int64_t ld) {
        float* tile = tiles_.get() + place.h * TILE * TILE;
        for (int64_t k = 0; k < place.count; ++k)
            for (int64_t i = 0; i < place.lanes; i += LANES) {
                float* to = tile + place.key[k] * TILE + i;
                store(to, load(to) + load(from + k * ld + i));
            }
        if (++counts_.get()[place.h] == AT_MOST) spread(place.h);
    }
    void finish() {
        for (int64_t h = 0; h < call_.q.heads; ++h)
            if (counts_.get()[h]) spread(h);
    }

  private:
    void spread(int64_t h) {
        float* tile = tiles_.get() + h * TILE * TILE;
        Chunk all;
        all.first = 0;
        all.count = call_.num_keys;
        all.columns = nullptr;
        Lanes lanes;
        lanes.take_slots(call_, 0, TILE);
        add_relative_pairs(bias_, sums_, Place(call_, 0, h, lanes, all), tile, TILE);
        std::fill_n(tile, TILE * TILE, 0.0f);
        counts_.get()[h] = 0;
    }

    const FoveateAttend& call_;
    const FoveateBias& bias_;
    double* sums_;
    Buffer<float> tiles_;
    Buffer<int64_t> counts_;
};

// Where a thread adds up one bias's gradient; nowhere if it is not wanted.
struct BiasSums {
    float* few = nullptr;
    double* many = nullptr;
    std::unique_ptr<ShortSums> tiles;

    // Adds the gradient of the logits of a chunk, (keys, lanes).
    void add(const FoveateBias& bias, const Place& place, const float* from, int64_t ld) const {
        if (tiles) return tiles->add(place, from, ld);
        if (few && bias.stride[3] == 1 && place.keys_in_order()) return add_dense_rows(bias, few, place, from, ld);
        if (few) add_pairs(bias, few, place, from, ld);
        if (many && bias.kind == FOVEATE_RELATIVE) return add_relative_pairs(bias, many, place, from, ld);
        if (many && bias.kind == FOVEATE_DENSE) return add_broadcast_pairs(bias, many, place, from, ld);
        if (many) add_pairs(bias, many, place, from, ld);
    }
};

class BiasGrads {
  public:
    BiasGrads(const FoveateAttend& call, int64_t threads)
        : call_(call), threads_(threads), few_(threads * size(Sharing::FEW)), many_(threads * size(Sharing::MANY)) {
        std::fill(few_.get(), few_.get() + threads * size(Sharing::FEW), 0.0f);
        std::fill(many_.get(), many_.get() + threads * size(Sharing::MANY), 0.0);
    }
    static bool wanted(const FoveateAttend& call) {
        for (int64_t i = 0; i < call.num_biases; ++i)
            if (call.biases[i].grad) return true;
        return false;
    }
    void of_thread(int64_t thread, BiasSums* sums, bool short_sums = true) const {
        float* few = few_.get() + thread * size(Sharing::FEW);
        double* many = many_.get() + thread * size(Sharing::MANY);
        for (int64_t i = 0; i < call_.num_biases; ++i) {
            const FoveateBias& bias = call_.biases[i];
            sums[i] = BiasSums{};
            if (!bias.grad) continue;
            const Sharing sharing = sharing_of(bias);
            if (sharing == Sharing::ONE) sums[i].few = bias.grad;
            if (sharing == Sharing::FEW) sums[i].few = few, few += bias.size;
            if (sharing == Sharing::MANY) sums[i].many = many, many += bias.size;
            if (short_sums && ShortSums::suit(call_, bias)) sums[i].tiles.reset(new ShortSums(call_, bias, sums[i].many));
        }
    }
    void add_up() const {
        add_up(Sharing::FEW, few_.get());
        add_up(Sharing::MANY, many_.get());
    }

  private:
    int64_t size(Sharing sharing) const {
        int64_t total = 0;
        for (int64_t i = 0; i < call_.num_biases; ++i)
            if (call_.biases[i].grad && sharing_of(call_.biases[i]) == sharing) total += call_.biases[i].size;
        return total;
    }
    template <class Sum> void add_up(Sharing sharing, const Sum* first) const {
        const int64_t apart = size(sharing);
        for (int64_t i = 0; i < call_.num_biases; ++i) {
            const FoveateBias& bias = call_.biases[i];
            if (!bias.grad || sharing_of(bias) != sharing) continue;
            for (int64_t entry = 0; entry < bias.size; ++entry, ++first) {
                Sum total = 0;
                for (int64_t thread = 0; thread < threads_; ++thread) total += first[thread * apart];
                bias.grad[entry] = (float)total;
            }
        }
    }

    const FoveateAttend& call_;
    const int64_t threads_;
    Buffer<float> few_;
    Buffer<double> many_;
};

}  // namespace foveate
