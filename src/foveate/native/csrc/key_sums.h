// Where gradients of keys and values are added up.
#pragma once

#include "slab.h"
#include "threads.h"

namespace foveate::grid {

// Rows of float32, one for each token.
struct KeySum {
    float* data;
    int64_t step;
    float* at(int64_t token) const { return data + token * step; }
};

// For every head of keys (or values), in one or several parts. A part holds what some boxes of each lattice add: what a
// single part holds is the gradient, and lies where it belongs if it can be added up there.
class KeySums {
  public:
    KeySums(const FoveateAttend& call, const FoveateTensor& grad, int64_t dim, const Plan& plan, int64_t parts)
        : call_(call), grad_(grad), dim_(dim), padded_(round_up(dim, LANES)), group_(call.q.heads / grad.heads),
          plan_(plan), parts_(parts), in_place_(parts == 1 && head(0).direct()),
          data_(in_place_ ? 0 : call.batch * grad.heads * parts * call.num_keys * padded_) {}

    // Whether query head h, counted through the batch, is the first of those that share a head of these keys.
    bool begins(int64_t h) const { return h % group_ == 0; }

    KeySum at(int64_t h, int64_t part) const {
        if (in_place_) return {head(h).row(0), grad_.stride[2]};
        return {data_.get() + (h / group_ * parts_ + part) * call_.num_keys * padded_, padded_};
    }
    // Zeros for the tokens of a box.
    void clear(int64_t h, int64_t part, const Lattice& l, const Box& keys) const {
        const KeySum sum = at(h, part);
        for (int64_t z = keys.z.begin; z < keys.z.end; ++z)
            for (int64_t y = keys.y.begin; y < keys.y.end; ++y)
                for (int64_t x = keys.x.begin; x < keys.x.end; ++x) {
                    float* to = sum.at(l.token(z, y, x));
                    std::fill(to, to + padded_, 0.0f);
                }
    }
    // The keys that a part of a lattice was cleared for.
    Box keys_of(const Lattice& l, int64_t part) const {
        return l.keys(parts_ == 1 ? l.whole() : plan_.box(l, part));
    }

    // Adds up the parts, and writes them in the dtype of the gradient; false where memory ran out.
    bool finish() const {
        if (in_place_) return true;
        const Lattice longest = plan_.lattice(0);
        const int64_t lines = longest.y.length, rows = longest.z.length * lines;
        Queue queue(call_.batch * grad_.heads * plan_.lattices() * rows, 16);
        return on_threads(call_.threads, [&](int64_t) {
            Buffer<float> space(longest.x.length * padded_);
            queue.run([&](int64_t item) {
                const int64_t row = item % rows, lattice = item / rows % plan_.lattices();
                const int64_t h = item / rows / plan_.lattices() * group_;
                write_row(h, plan_.lattice(lattice), row / lines, row % lines, space.get());
            });
        });
    }

  private:
    Head head(int64_t h) const { return Head(call_, grad_, h / call_.q.heads, h % call_.q.heads, dim_); }

    void write_row(int64_t h, const Lattice& l, int64_t z, int64_t y, float* space) const {
        if (z >= l.z.length || y >= l.y.length) return;
        std::fill(space, space + l.x.length * padded_, 0.0f);
        for (int64_t part = 0; part < parts_; ++part) {
            const Box keys = keys_of(l, part);
            if (!keys.z.has(z) || !keys.y.has(y)) continue;
            for (int64_t x = keys.x.begin; x < keys.x.end; ++x) add(at(h, part).at(l.token(z, y, x)), space + x * padded_);
        }
        for (int64_t x = 0; x < l.x.length; ++x) head(h).write(l.token(z, y, x), space + x * padded_);
    }
    void add(const float* from, float* to) const {
        for (int64_t i = 0; i < padded_; i += LANES) store(to + i, load(to + i) + load(from + i));
    }

    const FoveateAttend& call_;
    const FoveateTensor& grad_;
    const int64_t dim_, padded_, group_;
    const Plan& plan_;
    const int64_t parts_;
    const bool in_place_;
    const Buffer<float> data_;
};

}  // namespace foveate::grid
