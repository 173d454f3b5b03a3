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

// Keys in an order of chunks of them, as many as a budget, the own chunk counted as far as the query sees of it.
class ChunkTable : public Pattern {
  public:
    struct Shape {
        Plane plane;
        int64_t texts, num_chunks, num_slots, budget;
    };
    // ahead (planes, num_chunks, num_chunks): twice the keys of other chunks before this one, plus 1 after the own chunk;
    // number and inside (texts, num_slots): the chunk of each token, and its place there.
    ChunkTable(const int64_t* ahead, const int64_t* number, const int64_t* inside, const Shape& shape)
        : ahead_(ahead), number_(number), inside_(inside), shape_(shape) {}

    Bound bounds(const Box& box) const override {
        const int64_t text = text_of(box);
        const int64_t rows[2] = {number_[text + slot(box.q_low)], number_[text + slot(box.q_high)]};
        const int64_t columns[2] = {number_[text + slot(box.k_low)], number_[text + slot(box.k_high)]};
        if (rows[0] != rows[1] || columns[1] - columns[0] >= MOST_CHUNKS) return in_runs(box);
        return of_row(box, rows[0], slot(box.q_low), slot(box.q_high));
    }

    void fill(const Box& tile, Square& square) const override {
        const int64_t text = text_of(tile), *plane = plane_of(tile);
        set_all(square, 0);
        for (int64_t begin = tile.k_low, end; begin < tile.k_low + TILE; begin = end) {
            const int64_t column = number_[text + slot(begin)];
            for (end = begin + 1; end < tile.k_low + TILE && number_[text + slot(end)] == column;) ++end;
            for (int64_t i = 0; i < TILE; ++i) {
                const int64_t at = text + slot(tile.q_low + i);
                const int64_t entry = plane[number_[at] * shape_.num_chunks + column];
                const int64_t left = shape_.budget - rank(entry, inside_[at], inside_[text + slot(begin)]);
                const int64_t seen = std::min(std::max<int64_t>(left, 0), end - begin);
                if (seen > 0) square.rows[i] |= span(begin - tile.k_low, begin - tile.k_low + seen - 1);
            }
        }
    }

  private:
    static constexpr int64_t MOST_CHUNKS = 16;  // that a bound looks at one by one

    int64_t text_of(const Box& box) const { return (shape_.texts > 1 ? box.batch : 0) * shape_.num_slots; }
    const int64_t* plane_of(const Box& box) const {
        return ahead_ + shape_.plane.of(box) * shape_.num_chunks * shape_.num_chunks;
    }
    int64_t slot(int64_t at) const { return std::min(std::max<int64_t>(at, 0), shape_.num_slots - 1); }
    static int64_t rank(int64_t entry, int64_t q_inside, int64_t k_inside) {
        return (entry >> 1) + k_inside + (entry & 1) * (q_inside + 1);
    }
    // Of queries of one chunk, from the first to the last slot.
    Bound of_row(const Box& box, int64_t row, int64_t q_first, int64_t q_last) const {
        const int64_t text = text_of(box), *entries = plane_of(box) + row * shape_.num_chunks;
        bool some = false, every = true;
        for (int64_t begin = box.k_low, end; begin <= box.k_high; begin = end) {
            const int64_t column = number_[text + slot(begin)];
            for (end = begin + 1; end <= box.k_high && number_[text + slot(end)] == column;) ++end;
            const int64_t first = inside_[text + slot(begin)], last = inside_[text + slot(end - 1)];
            some |= rank(entries[column], inside_[text + q_first], first) < shape_.budget;
            every &= rank(entries[column], inside_[text + q_last], last) < shape_.budget;
        }
        return bound(some, every);
    }
    // Of queries of several chunks: chunk by chunk where the box is small.
    Bound in_runs(const Box& box) const {
        if (box.num_queries() > TILE || box.num_keys() > TILE) return Bound::SOME;
        const int64_t text = text_of(box);
        bool some = false, every = true;
        for (int64_t begin = box.q_low, end; begin <= box.q_high; begin = end) {
            const int64_t row = number_[text + slot(begin)];
            for (end = begin + 1; end <= box.q_high && number_[text + slot(end)] == row;) ++end;
            const Bound known = of_row(box, row, slot(begin), slot(end - 1));
            some |= known != Bound::NONE;
            every &= known == Bound::EVERY;
        }
        return bound(some, every);
    }

    const int64_t* const ahead_;
    const int64_t* const number_;
    const int64_t* const inside_;
    const Shape shape_;
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
