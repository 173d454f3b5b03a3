// Biases of neighborhood attention, for vectors of queries along x. Where a pair stands in a bias is a sum of what its
// rows say (a number for a vector) and what its columns say (a number for a lane, the same in all rows).
#pragma once
#include "bias_grads.h"
#include "slab.h"

namespace foveate::grid {

// Biases that the kernels take: Python asks the same (foveate/attention/impl/neighborhood.py).
inline bool is_refused(const FoveateBias& bias, const FoveateNeighborhood& window) {
    if (bias.size > INT32_MAX) return true;
    if (bias.kind == FOVEATE_ALIBI) return bias.offset != 0;
    if (bias.kind != FOVEATE_RELATIVE) return false;
    bool same = bias.axes == window.axes && bias.offset == 0;
    for (int64_t i = 0; same && i < window.axes; ++i) same = bias.dims[i] == window.dims[i];
    return !same;
}

// Calls visit(z, y, key row) for the rows of keys that row r of the queries sees.
template <class Visit> FOVEATE_INLINE void each_key_row(const Slab& slab, const Sight& sight, int64_t r, Visit visit) {
    sight.each_row(sight.lines(r), [&](const KeyRow& key) { visit(slab.z(key.row), slab.y(key.row), key); });
}

// One bias for one head.
class GridBias {
  public:
    // Room for what the columns of a strip say.
    static int64_t size(const Lattice& l) { return l.x.size * LANES; }

    GridBias(const FoveateBias& bias, const FoveateNeighborhood& window, const Slab& slab, int64_t b, int64_t h,
             int32_t* columns)
        : bias_(bias), window_(window), l_(slab.lattice), slab_(slab), h_(h), columns_(columns) {
        first_ = bias.kind == FOVEATE_DENSE ? b * bias.stride[0] + h * bias.stride[1] : h;
    }

    // Before the pairs of a strip are asked for.
    void begin(const Strip& strip) {
        for (int64_t offset = 0; offset < l_.x.size; ++offset)
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t lane = std::min<int64_t>(i, strip.lanes - 1);  // others may stand nowhere
                const int64_t key = strip.column + strip.first[lane] + std::min<int64_t>(offset, strip.count[lane] - 1);
                columns_[offset * LANES + i] = column(l_.x.at(strip.x + lane), l_.x.at(slab_.keys.x.begin + key));
            }
    }
    // What a row of queries and one of keys say.
    int32_t row(int64_t query_z, int64_t query_y, int64_t key_z, int64_t key_y) const {
        const int64_t query = l_.z.at(query_z) + l_.y.at(query_y), key = l_.z.at(key_z) + l_.y.at(key_y);
        if (bias_.kind == FOVEATE_ALIBI) return (int32_t)(query - key);
        if (bias_.kind == FOVEATE_DENSE)
            return (int32_t)(first_ + query * bias_.stride[2] + key * bias_.stride[3]);
        int64_t entry = first_, unit = 1;
        for (int64_t axis = 0; axis < window_.axes; ++axis) unit *= window_.dims[axis];
        for (int64_t axis = 0; axis + 1 < window_.axes; ++axis) {
            unit /= window_.dims[axis];
            entry = beside(entry, axis, query / unit % window_.dims[axis] - key / unit % window_.dims[axis]);
        }
        return (int32_t)(entry * (2 * bias_.reach[window_.axes - 1] + 1));
    }
    Floats values(int32_t row, int64_t offset) const {
        const Ints at = places(row, offset);
        if (bias_.kind != FOVEATE_ALIBI) return foveate::gather(bias_.data, at);
        return all(-bias_.data[h_]) * distances(at);
    }
    // Adds the gradients of so many lanes.
    template <class Sum> void add(Sum* sums, int32_t row, int64_t offset, Floats gradient, int64_t lanes) const {
        const Ints at = places(row, offset);
        if (bias_.kind == FOVEATE_ALIBI) gradient = -gradient * distances(at);
        for (int64_t i = 0; i < lanes; ++i) sums[bias_.kind == FOVEATE_ALIBI ? h_ : at[i]] += gradient[i];
    }

  private:
    int64_t beside(int64_t entry, int64_t axis, int64_t apart) const {
        const int64_t reach = bias_.reach[axis];
        return entry * (2 * reach + 1) + std::clamp(apart, -reach, reach) + reach;
    }
    int32_t column(int64_t query, int64_t key) const {
        if (bias_.kind == FOVEATE_ALIBI) return (int32_t)(query - key);
        if (bias_.kind == FOVEATE_DENSE) return (int32_t)(query * bias_.stride[2] + key * bias_.stride[3]);
        return (int32_t)beside(0, window_.axes - 1, query - key);
    }
    Ints places(int32_t row, int64_t offset) const { return (Ints)load_words(columns_ + offset * LANES) + row; }
    static Floats distances(Ints apart) { return __builtin_convertvector(apart < 0 ? -apart : apart, Floats); }

    const FoveateBias& bias_;
    const FoveateNeighborhood& window_;
    const Lattice& l_;
    const Slab& slab_;
    const int64_t h_;
    int64_t first_;
    int32_t* columns_;
};

// All biases of a call, for one head.
class GridBiases {
  public:
    static int64_t size(const FoveateAttend& call, const Lattice& l) { return call.num_biases * GridBias::size(l); }

    GridBiases(const FoveateAttend& call, const FoveateNeighborhood& window, const Slab& slab, int64_t b, int64_t h,
               int32_t* columns)
        : slab_(slab) {
        for (int64_t i = 0; i < call.num_biases; ++i)
            biases_.emplace_back(call.biases[i], window, slab, b, h, columns + i * GridBias::size(slab.lattice));
    }
    bool none() const { return biases_.empty(); }
    void begin(const Strip& strip) {
        for (GridBias& bias : biases_) bias.begin(strip);
    }
    // Turns the scores of row r of the queries into logits in base 2: factor * score + log2(e) * biases.
    void bend(const Sight& sight, int64_t r, const Pairs& pairs, float factor, float* scores) const {
        each(sight, r, [&](size_t i, int32_t row, int64_t slot) {
            for (int64_t offset = 0; offset < pairs.width(); ++offset) {
                float* score = scores + pairs.at(r, slot, offset);
                const Floats before = i ? load(score) : load(score) * factor;
                store(score, before + biases_[i].values(row, offset) * LOG2E);
            }
        });
    }
    // Adds gradients, each lane's times `factor`, to what a thread sums up.
    void add(const BiasSums* sums, const Strip& strip, const Sight& sight, int64_t r, const Pairs& pairs, float factor,
             const float* gradients) const {
        each(sight, r, [&](size_t i, int32_t row, int64_t slot) {
            for (int64_t offset = 0; offset < pairs.width(); ++offset) {
                const Floats gradient = load(gradients + pairs.at(r, slot, offset)) * factor;
                if (sums[i].few) biases_[i].add(sums[i].few, row, offset, gradient, strip.lanes);
                if (sums[i].many) biases_[i].add(sums[i].many, row, offset, gradient, strip.lanes);
            }
        });
    }

  private:
    // Calls visit(bias, what the rows say, slot) for all biases and rows of keys.
    template <class Visit> void each(const Sight& sight, int64_t r, Visit visit) const {
        for (size_t i = 0; i < biases_.size(); ++i)
            each_key_row(slab_, sight, r, [&](int64_t z, int64_t y, const KeyRow& key) {
                visit(i, biases_[i].row(sight.z(), sight.queries().begin + r, z, y), key.slot);
            });
    }

    const Slab& slab_;
    std::vector<GridBias> biases_;
};

}  // namespace foveate::grid
