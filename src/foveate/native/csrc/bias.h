// Additive biases on the logits of a chunk, (keys, lanes) like the logits themselves.
#pragma once
#include "operands.h"

namespace foveate {

// Where a chunk's pairs lie: tokens of its keys and of the tile's queries (-1: none).
struct Place {
    int64_t b, h, lanes, count;
    int64_t query[TILE], key[TILE];

    Place(const FoveateAttend& call, int64_t b, int64_t h, int64_t first, int64_t lanes, const Chunk& chunk)
        : b(b), h(h), lanes(lanes), count(chunk.count) {
        for (int64_t i = 0; i < lanes; ++i) query[i] = query_at(call, first + i);
        for (int64_t i = 0; i < count; ++i) key[i] = key_at(call, chunk.slot(i));
    }
    bool exists(int64_t key_index, int64_t lane) const { return key[key_index] >= 0 && query[lane] >= 0; }
    bool keys_in_order() const {
        for (int64_t i = 1; i < count; ++i)
            if (key[i] != key[0] + i) return false;
        return count > 0 && key[0] >= 0;
    }
};

// The entry of a relative table for a pair, from its head's first entry.
FOVEATE_INLINE int64_t relative_entry(const FoveateBias& bias, int64_t h, int64_t query, int64_t key) {
    int64_t entry = h, left_q = query + bias.offset, left_k = key, cells = 1;
    for (int64_t axis = 0; axis < bias.axes; ++axis) cells *= bias.dims[axis] ? bias.dims[axis] : 1;
    for (int64_t axis = 0; axis < bias.axes; ++axis) {
        const int64_t dim = bias.dims[axis], reach = bias.reach[axis];
        cells /= dim ? dim : 1;
        const int64_t apart = dim ? left_q / cells % dim - left_k / cells % dim : left_q - left_k;
        entry = entry * (2 * reach + 1) + std::clamp(apart, -reach, reach) + reach;
    }
    return entry;
}
FOVEATE_INLINE int64_t dense_entry(const FoveateBias& bias, const Place& place, int64_t lane, int64_t key) {
    return place.b * bias.stride[0] + place.h * bias.stride[1] + place.query[lane] * bias.stride[2] +
           place.key[key] * bias.stride[3];
}
FOVEATE_INLINE float alibi_factor(const FoveateBias& bias, const Place& place, int64_t lane, int64_t key) {
    return -(float)std::abs(place.query[lane] + bias.offset - place.key[key]);
}

// Rows of the bias, copied and transposed in registers; scratch is (64, 64).
static void add_dense(const FoveateBias& bias, const Place& place, float* to, int64_t ld, float* scratch) {
    if (bias.stride[2] == 0 || bias.stride[3] != 1 || !place.keys_in_order()) {
        for (int64_t k = 0; k < place.count; ++k)
            for (int64_t i = 0; i < place.lanes; ++i)
                if (place.exists(k, i)) to[k * ld + i] += bias.data[dense_entry(bias, place, i, k)];
        return;
    }
    const int64_t padded = round_up(place.count, LANES);
    for (int64_t i = 0; i < round_up(place.lanes, LANES); ++i) {
        const bool none = i >= place.lanes || place.query[i] < 0;
        const float* from = none ? scratch : bias.data + dense_entry(bias, place, i, 0);
        read_row(scratch + i * TILE, from, FOVEATE_FLOAT32, 1, none ? 0 : place.count, padded);
    }
    for (int64_t i = 0; i < place.lanes; i += LANES)
        for (int64_t k = 0; k < place.count; k += LANES) {
            Words x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; ++r) x[r] = load_words(scratch + (i + r) * TILE + k);
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; ++r) {
                float* sum = to + (k + r) * ld + i;
                store(sum, load(sum) + as_floats(x[r]));
            }
        }
}

static void add_relative(const FoveateBias& bias, const Place& place, float* to, int64_t ld) {
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; ++i)
            if (place.exists(k, i))
                to[k * ld + i] += bias.data[relative_entry(bias, place.h, place.query[i], place.key[k])];
}

static void add_alibi(const FoveateBias& bias, const Place& place, float* to, int64_t ld) {
    const float slope = bias.data[place.h];
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; ++i) to[k * ld + i] += slope * alibi_factor(bias, place, i, k);
}

// The sum of all biases on a chunk; kept while the next chunk's is the same.
class BiasTile {
  public:
    BiasTile(const FoveateAttend& call, float* tile, float* scratch) : call_(call), tile_(tile), scratch_(scratch) {
        for (int64_t i = 0; i < call.num_biases; ++i) shared_ &= !of_batch(call.biases[i]);
    }
    static bool of_batch(const FoveateBias& bias) { return bias.kind == FOVEATE_DENSE && bias.stride[0] != 0; }

    const float* of(int64_t b, int64_t h, int64_t first, int64_t lanes, int64_t ld, const Chunk& chunk) {
        const bool same = h == h_ && first == first_ && chunk.first == key_ && chunk.count == count_;
        if (shared_ && same && !chunk.columns) return tile_;
        const Place place(call_, b, h, first, lanes, chunk);
        std::fill(tile_, tile_ + round_up(chunk.count, LANES) * ld, 0.0f);
        for (int64_t i = 0; i < call_.num_biases; ++i) {
            const FoveateBias& bias = call_.biases[i];
            if (bias.kind == FOVEATE_DENSE) add_dense(bias, place, tile_, ld, scratch_);
            if (bias.kind == FOVEATE_RELATIVE) add_relative(bias, place, tile_, ld);
            if (bias.kind == FOVEATE_ALIBI) add_alibi(bias, place, tile_, ld);
        }
        h_ = chunk.columns ? -1 : h, first_ = first, key_ = chunk.first, count_ = chunk.count;
        return tile_;
    }

  private:
    const FoveateAttend& call_;
    float *tile_, *scratch_;
    bool shared_ = true;
    int64_t h_ = -1, first_ = -1, key_ = -1, count_ = -1;
};

// Adds the gradient of the logits of a chunk, (keys, lanes), to one bias's.
[[maybe_unused]] static void add_bias_grad(const FoveateBias& bias, float* grad, const Place& place, const float* from, int64_t ld) {
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; ++i) {
            if (!place.exists(k, i)) continue;
            const float g = from[k * ld + i];
            if (bias.kind == FOVEATE_DENSE) grad[dense_entry(bias, place, i, k)] += g;
            if (bias.kind == FOVEATE_RELATIVE) grad[relative_entry(bias, place.h, place.query[i], place.key[k])] += g;
            if (bias.kind == FOVEATE_ALIBI) grad[place.h] += g * alibi_factor(bias, place, i, k);
        }
}

}  // namespace foveate
