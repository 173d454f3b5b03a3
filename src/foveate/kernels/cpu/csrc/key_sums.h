// Where gradients of keys and values are added up.
#pragma once
#include "slab.h"
#include "threads.h"

namespace foveate::grid {

// The gradient of one head for some keys of a lattice: where it belongs, or in rows of float32 for adding up.
struct KeySum {
    Head grad;
    const Lattice& lattice;
    Box keys;
    float* rows;  // [row][x][channel]; null: the gradient itself

    float* at(int64_t z, int64_t y, int64_t x) const {
        if (!rows) return grad.row(lattice.token(z, y, x));
        return rows + (keys.row(z, y) * keys.x.size() + x - keys.x.begin) * grad.padded();
    }
    void write(int64_t z, int64_t y, int64_t x, const float* from) const {
        if (!rows) return grad.write(lattice.token(z, y, x), from);
        std::memcpy(at(z, y, x), from, grad.padded() * sizeof *from);
    }
    void add(int64_t z, int64_t y, int64_t x, const float* from) const {
        float* to = at(z, y, x);
        for (int64_t i = 0; i < grad.padded(); i += LANES) store(to + i, load(to + i) + load(from + i));
    }
    void clear() const {
        for (int64_t z = keys.z.begin; z < keys.z.end; ++z)
            for (int64_t y = keys.y.begin; y < keys.y.end; ++y)
                for (int64_t x = keys.x.begin; x < keys.x.end; ++x)
                    std::fill(at(z, y, x), at(z, y, x) + grad.padded(), 0.0f);
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
        const int64_t z = slab_.z(row), y = slab_.y(row);
        const float* from = at(row);
        for (int64_t x = slab_.keys.x.begin; x < slab_.keys.x.end; ++x, from += step())
            has_numbers_ ? sum_.add(z, y, x, from) : sum_.write(z, y, x, from);
    }

  private:
    const Slab& slab_;
    const KeySum sum_;
    float* ring_;
    const int64_t pitch_;
    const bool has_numbers_;
};

// Gradients for every head of keys (or values), of each lattice in one or several parts: what one box, or all of them,
// add up to. A single part is the gradient itself: it is written where it belongs, unless float32 must add it up first.
class KeySums {
  public:
    KeySums(const FoveateAttend& call, const FoveateTensor& grad, int64_t dim, const Plan& plan, int64_t parts)
        : call_(call), grad_(grad), dim_(dim), padded_(round_up(dim, LANES)), group_(call.q.heads / grad.heads),
          plan_(plan), parts_(parts),
          in_place_(parts == 1 && (head(0).direct() || (group_ == 1 && plan.boxes() == 1))), most_(most_tokens()),
          rows_(in_place_ ? 0 : call.batch * grad.heads * plan.lattices() * parts * most_ * padded_) {}

    // Whether query head h, counted through the batch, is the first of those that share a head of these keys.
    bool begins(int64_t h) const { return h % group_ == 0; }

    KeySum at(int64_t h, const Lattice& l, int64_t lattice, int64_t part) const {
        const int64_t index = (h / group_ * plan_.lattices() + lattice) * parts_ + part;
        return {head(h), l, keys_of(l, part), in_place_ ? nullptr : rows_.get() + index * most_ * padded_};
    }

    // Adds up the parts, and writes them in the dtype of the gradient; false where memory ran out.
    bool finish() const {
        if (in_place_) return true;
        const Lattice longest = plan_.lattice(0);
        const int64_t lines = longest.y.length, rows = longest.z.length * lines;
        Queue queue(call_.batch * grad_.heads * plan_.lattices() * rows, 16);
        return on_threads(call_.threads, [&](int64_t) {
            Buffer<float> space(AT_ONCE * padded_);
            queue.run([&](int64_t item) {
                const int64_t row = item % rows, lattice = item / rows % plan_.lattices();
                write_row(item / rows / plan_.lattices() * group_, lattice, row / lines, row % lines, space.get());
            });
        });
    }

  private:
    static constexpr int64_t AT_ONCE = 256;  // tokens of a row

    Box keys_of(const Lattice& l, int64_t part) const { return l.keys(parts_ == 1 ? l.whole() : plan_.box(l, part)); }
    Head head(int64_t h) const { return Head(call_, grad_, h / call_.q.heads, h % call_.q.heads, dim_); }
    int64_t most_tokens() const {
        int64_t most = 0;
        for (int64_t i = 0; i < plan_.lattices(); ++i) {
            const Lattice l = plan_.lattice(i);
            for (int64_t part = 0; part < parts_; ++part) most = std::max(most, keys_of(l, part).tokens());
        }
        return most;
    }

    void write_row(int64_t h, int64_t lattice, int64_t z, int64_t y, float* space) const {
        const Lattice l = plan_.lattice(lattice);
        if (z >= l.z.length || y >= l.y.length) return;  // of the longest only
        for (int64_t x = 0; x < l.x.length; x += AT_ONCE) {
            const Range columns{x, std::min(x + AT_ONCE, l.x.length)};
            const KeySum total{head(h), l, {{z, z + 1}, {y, y + 1}, columns}, space};
            total.clear();
            for (int64_t part = 0; part < parts_; ++part) add(at(h, l, lattice, part), total);
            for (int64_t i = columns.begin; i < columns.end; ++i)
                total.grad.write(l.token(z, y, i), total.at(z, y, i));
        }
    }
    void add(const KeySum& part, const KeySum& total) const {
        const int64_t z = total.keys.z.begin, y = total.keys.y.begin;
        if (!part.keys.z.has(z) || !part.keys.y.has(y)) return;
        const int64_t end = std::min(part.keys.x.end, total.keys.x.end);
        for (int64_t x = std::max(part.keys.x.begin, total.keys.x.begin); x < end; ++x)
            total.add(z, y, x, part.at(z, y, x));
    }

    const FoveateAttend& call_;
    const FoveateTensor& grad_;
    const int64_t dim_, padded_, group_;
    const Plan& plan_;
    const int64_t parts_;
    const bool in_place_;
    const int64_t most_;  // tokens of a part
    const Buffer<float> rows_;
};

}  // namespace foveate::grid
