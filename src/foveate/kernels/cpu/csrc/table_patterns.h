// Patterns that hold tables, per batch entry and head or one for all: see foveate/patterns/rules/decided.py.
#pragma once
#include "pattern.h"

namespace foveate::selection {

// Which of a table's (batches, heads) rows is a box's own.
struct Plane {
    int64_t batches, heads;

    int64_t of(const Box& box) const { return (batches > 1 ? box.batch : 0) * heads + (heads > 1 ? box.head : 0); }
};

// Divides whole numbers from 0 on, by a shift where it can.
class Divisor {
  public:
    explicit Divisor(int64_t value)
        : value_(value), shift_(value & (value - 1) ? -1 : __builtin_ctzll((uint64_t)value)) {}
    int64_t operator()(int64_t a) const { return shift_ < 0 ? a / value_ : a >> shift_; }
    int64_t value() const { return value_; }

  private:
    const int64_t value_;
    const int shift_;
};

// A bit for each row of q_block queries and each block of k_block keys.
class BlockTable : public Pattern {
  public:
    struct Shape {
        Plane plane;
        int64_t num_words, num_blocks;
        int64_t q_block, k_block, q_start, rows_per_word;
    };
    // words (planes, num_words, num_blocks): bit r of word w is row w * rows_per_word + r.
    BlockTable(const uint64_t* words, const Shape& shape)
        : words_(words), shape_(shape), row_(shape.q_block), block_(shape.k_block), word_(shape.rows_per_word) {}

    Bound bounds(const Box& box) const override {
        const int64_t first = block(box.k_low), last = block(box.k_high);
        if (box.num_queries() > TILE || last - first >= MOST_BLOCKS) return Bound::SOME;
        const uint64_t wanted = low_bits(box.num_queries());
        uint64_t some = 0, every = wanted;
        for_queries(box, [&](auto seen) {
            for (int64_t k = first; k <= last; ++k) {
                some |= seen(k);
                every &= seen(k);
            }
        });
        return bound((some & wanted) != 0, every == wanted);
    }

    void fill(const Box& tile, Square& square) const override {
        const int64_t first = block(tile.k_low), last = block(tile.k_low + TILE - 1), size = shape_.k_block;
        set_all(square, 0);
        for_queries(tile, [&](auto seen) {
            for (int64_t k = first; k <= last; ++k) {
                const uint64_t queries = seen(k);
                const int64_t start = k * size - tile.k_low, end = k == last ? TILE : start + size;
                const uint64_t keys = span(start, end - 1);
                for (uint64_t i = 0; i < TILE; ++i) square.rows[i] |= (0 - (queries >> i & 1)) & keys;
            }
        });
    }

    bool by_query(const Box& tile, uint64_t& queries) const override {
        const int64_t first = block(tile.k_low);
        for_queries(tile, [&](auto seen) { queries = seen(first); });
        return first == block(tile.k_high);
    }

  private:
    static constexpr int64_t MOST_BLOCKS = 8;  // that a bound looks at one by one

    int64_t block(int64_t key) const { return std::min(block_(key), shape_.num_blocks - 1); }

    // Calls use(seen), where seen(k) says which of the 64 queries from q_low on see block k.
    template <class Use> void for_queries(const Box& box, Use use) const {
        const uint64_t* plane = words_ + shape_.plane.of(box) * shape_.num_words * shape_.num_blocks;
        const int64_t begin = box.q_low - shape_.q_start, row = row_(begin);
        if (shape_.q_block == 1 && begin % TILE == 0) {
            const uint64_t* words = plane + begin / TILE * shape_.num_blocks;
            use([=](int64_t k) { return words[k]; });
        } else if (row == row_(begin + TILE - 1)) {
            const uint64_t* words = plane + word_(row) * shape_.num_blocks;
            const int64_t bit = row - word_(row) * shape_.rows_per_word;
            use([=](int64_t k) { return 0 - (words[k] >> bit & 1); });
        } else {
            use([=](int64_t k) { return run_by_run(plane + k, begin); });
        }
    }
    // Rows that begin and end within the 64 queries, each a run of equal bits.
    uint64_t run_by_run(const uint64_t* column, int64_t begin) const {
        const int64_t last_row = shape_.num_words * shape_.rows_per_word - 1;
        uint64_t seen = 0;
        for (int64_t i = 0, end; i < TILE; i = end) {
            const int64_t row = std::min(row_(begin + i), last_row), word = word_(row);
            end = row == last_row ? TILE : (row + 1) * shape_.q_block - begin;
            const uint64_t bit = column[word * shape_.num_blocks] >> (row - word * shape_.rows_per_word) & 1;
            seen |= (0 - bit) & span(i, end - 1);
        }
        return seen;
    }

    const uint64_t* const words_;
    const Shape shape_;
    const Divisor row_, block_, word_;
};

// Marks along one number of a pair, with their running count.
class Line {
  public:
    // marks (planes, length), before (planes, length + 1)
    Line(const uint8_t* marks, const int64_t* before, Plane plane, int64_t length)
        : marks_(marks), before_(before), plane_(plane), length_(length) {}

    // Whether some and whether every entry from low to high is marked.
    Bound between(const Box& box, int64_t low, int64_t high) const {
        const int64_t* before = before_ + plane_.of(box) * (length_ + 1);
        const int64_t marked = before[inside(high + 1)] - before[inside(low)];
        return bound(marked > 0, marked == high - low + 1);
    }
    // Bits of the 64 entries from first on; there are no marks outside.
    uint64_t word(const Box& box, int64_t first) const {
        alignas(64) uint8_t marks[TILE] = {};
        const int64_t low = inside(first), high = inside(first + TILE);
        if (low < high) std::memcpy(marks + (low - first), marks_ + plane_.of(box) * length_ + low, high - low);
        return pack_marks(marks);
    }

  private:
    int64_t inside(int64_t at) const { return std::min(std::max<int64_t>(at, 0), length_); }
    const uint8_t* const marks_;
    const int64_t* const before_;
    const Plane plane_;
    const int64_t length_;
};

// Keys that every query sees.
class Columns : public Pattern {
  public:
    explicit Columns(Line line) : line_(line) {}
    Bound bounds(const Box& box) const override { return line_.between(box, box.k_low, box.k_high); }
    void fill(const Box& tile, Square& square) const override { set_all(square, line_.word(tile, tile.k_low)); }

  private:
    const Line line_;
};

// Distances back from the query.
class Distances : public Pattern {
  public:
    explicit Distances(Line line) : line_(line) {}
    Bound bounds(const Box& box) const override { return line_.between(box, box.nearest(), box.farthest()); }
    void fill(const Box& tile, Square& square) const override {
        const int64_t corner = tile.q_low - tile.k_low;
        along_diagonals(reversed(line_.word(tile, corner)), reversed(line_.word(tile, corner - TILE)), square);
    }

  private:
    const Line line_;
};

}  // namespace foveate::selection
