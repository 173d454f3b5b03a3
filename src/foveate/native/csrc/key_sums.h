// Where gradients of keys and values are added up.
#pragma once

#include "slab.h"
#include "threads.h"

namespace foveate::grid {

// The gradient of one head of keys, or rows of float32 to add it up in.
struct KeySum {
    Head grad;
    float* rows;  // null: the gradient itself

    float* at(int64_t token) const { return rows ? rows + token * grad.padded() : grad.row(token); }
    void write(int64_t token, const float* from) const {
        if (!rows) return grad.write(token, from);
        std::memcpy(at(token), from, grad.padded() * sizeof *from);
    }
    void add(int64_t token, const float* from) const {
        for (int64_t i = 0; i < grad.padded(); i += LANES) store(at(token) + i, load(at(token) + i) + load(from + i));
    }
};

// What the queries in sight add to rows of keys, kept near until nobody sees a row any more.
class SummedRows {
  public:
    // The sum has numbers already, or is yet to be written.
    SummedRows(const Slab& slab, const KeySum& sum, float* ring, bool has_numbers)
        : slab_(slab), sum_(sum), ring_(ring), pitch_(NaturalRows::pitch(slab, sum.grad.padded())),
          has_numbers_(has_numbers) {}

    int64_t step() const { return sum_.grad.padded(); }
    float* at(int64_t row) const { return ring_ + slab_.place(row) * pitch_; }
    void begin(int64_t row) const { std::fill(at(row), at(row) + pitch_, 0.0f); }
    void end(int64_t row) const {
        for (int64_t x = 0; x < slab_.columns(); ++x)
            if (has_numbers_)
                sum_.add(slab_.token(row, x), at(row) + x * step());
            else
                sum_.write(slab_.token(row, x), at(row) + x * step());
    }

  private:
    const Slab& slab_;
    const KeySum sum_;
    float* ring_;
    const int64_t pitch_;
    const bool has_numbers_;
};

// Gradients for every head of keys (or values), in one or several parts: what some boxes of each lattice add up to. One
// part is the gradient itself, which is then written where it belongs, if it need not be added up in another dtype.
class KeySums {
  public:
    KeySums(const FoveateAttend& call, const FoveateTensor& grad, int64_t dim, const Plan& plan, int64_t parts)
        : call_(call), grad_(grad), dim_(dim), padded_(round_up(dim, LANES)), group_(call.q.heads / grad.heads),
          plan_(plan), parts_(parts),
          in_place_(parts == 1 && (head(0).direct() || (group_ == 1 && plan.boxes() == 1))),
          rows_(in_place_ ? 0 : call.batch * grad.heads * parts * call.num_keys * padded_) {}

    // Whether query head h, counted through the batch, is the first of those that share a head of these keys.
    bool begins(int64_t h) const { return h % group_ == 0; }

    KeySum at(int64_t h, int64_t part) const {
        float* rows = in_place_ ? nullptr : rows_.get() + (h / group_ * parts_ + part) * call_.num_keys * padded_;
        return {head(h), rows};
    }
    // Zeros for all keys that a part of a lattice sees.
    void clear(int64_t h, int64_t part, const Lattice& l) const {
        const KeySum sum = at(h, part);
        const Box keys = keys_of(l, part);
        for (int64_t z = keys.z.begin; z < keys.z.end; ++z)
            for (int64_t y = keys.y.begin; y < keys.y.end; ++y)
                for (int64_t x = keys.x.begin; x < keys.x.end; ++x) {
                    float* to = sum.at(l.token(z, y, x));
                    std::fill(to, to + padded_, 0.0f);
                }
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
    Box keys_of(const Lattice& l, int64_t part) const { return l.keys(parts_ == 1 ? l.whole() : plan_.box(l, part)); }
    Head head(int64_t h) const { return Head(call_, grad_, h / call_.q.heads, h % call_.q.heads, dim_); }

    void write_row(int64_t h, const Lattice& l, int64_t z, int64_t y, float* space) const {
        if (z >= l.z.length || y >= l.y.length) return;
        const KeySum sum{head(h), space};
        std::fill(space, space + l.x.length * padded_, 0.0f);
        for (int64_t part = 0; part < parts_; ++part) {
            const Box keys = keys_of(l, part);
            if (!keys.z.has(z) || !keys.y.has(y)) continue;
            for (int64_t x = keys.x.begin; x < keys.x.end; ++x) sum.add(x, at(h, part).at(l.token(z, y, x)));
        }
        for (int64_t x = 0; x < l.x.length; ++x) sum.grad.write(l.token(z, y, x), sum.at(x));
    }

    const FoveateAttend& call_;
    const FoveateTensor& grad_;
    const int64_t dim_, padded_, group_;
    const Plan& plan_;
    const int64_t parts_;
    const bool in_place_;
    const Buffer<float> rows_;
};

}  // namespace foveate::grid
