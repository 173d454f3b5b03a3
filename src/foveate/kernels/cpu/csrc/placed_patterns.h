// Patterns asked with other numbers than those of slots: see foveate/patterns/part.py and placed.py.
#pragma once
#include "pattern.h"

namespace foveate::selection {

// A pattern whose positions are those of slots plus a constant, one for queries and one for keys.
class Moved : public Pattern {
  public:
    Moved(int64_t query, int64_t key, std::unique_ptr<Pattern> whole)
        : query_(query), key_(key), whole_(std::move(whole)) {}
    Bound bounds(const Box& box) const override { return whole_->bounds(moved(box)); }
    void fill(const Box& tile, Square& square) const override { whole_->fill(moved(tile), square); }
    bool by_query(const Box& tile, uint64_t& queries) const override { return whole_->by_query(moved(tile), queries); }

  private:
    Box moved(const Box& at) const {
        return {at.batch, at.head, at.q_low + query_, at.q_high + query_, at.k_low + key_, at.k_high + key_};
    }
    const int64_t query_, key_;
    std::unique_ptr<Pattern> whole_;
};

// Patterns inside documents, by tables over the key slots; query i is the token of one of them.
class Placed : public Pattern {
  public:
    // A stretch is a run of slots with consecutive positions of one document.
    struct Tables {
        const int64_t *document, *position, *stretch, *part;  // (rows, slots); document -1: no token
        int64_t rows, slots;
    };
    // What the batch entries from `first` on see; it tells as many apart as `batches` says.
    struct Part {
        int64_t first, batches;
        std::unique_ptr<Pattern> pattern;
    };
    Placed(const Tables& tables, std::vector<Part> parts) : tables_(tables), parts_(std::move(parts)) {}

    Bound bounds(const Box& box) const override {
        const int64_t row = row_of(box);
        if (box.q_low < 0 || box.q_high >= tables_.slots) return Bound::SOME;
        if (end_of(row, box.q_low, box.q_high) <= box.q_high || end_of(row, box.k_low, box.k_high) <= box.k_high)
            return Bound::SOME;
        return together(row, box.q_low, box.k_low) ? bounds_of(row, box) : Bound::NONE;
    }

    void fill(const Box& tile, Square& square) const override {
        const int64_t row = row_of(tile);
        const int64_t q_stop = std::min(tile.q_high + 1, tables_.slots), k_stop = std::min(tile.k_high + 1, tables_.slots);
        set_all(square, 0);
        for (int64_t q = std::max<int64_t>(tile.q_low, 0), q_end; q < q_stop; q = q_end) {
            q_end = std::min(end_of(row, q, q_stop - 1), q_stop);
            for (int64_t k = tile.k_low, k_end; k < k_stop; k = k_end) {
                k_end = std::min(end_of(row, k, k_stop - 1), k_stop);
                const Box part{tile.batch, tile.head, q, q_end - 1, k, k_end - 1};
                if (together(row, q, k)) add(row, part, q - tile.q_low, k - tile.k_low, square);
            }
        }
    }

  private:
    int64_t row_of(const Box& box) const { return (tables_.rows > 1 ? box.batch : 0) * tables_.slots; }
    bool together(int64_t row, int64_t q, int64_t k) const {
        const int64_t document = tables_.document[row + q];
        return document >= 0 && document == tables_.document[row + k];
    }
    // The end of the stretch that a slot belongs to; beyond `last` it is not looked for.
    int64_t end_of(int64_t row, int64_t slot, int64_t last) const {
        const int64_t* stretch = tables_.stretch + row;
        if (stretch[last] == stretch[slot]) return last + 1;
        return std::upper_bound(stretch + slot, stretch + last, stretch[slot]) - stretch;
    }
    const Part& part_of(int64_t row, const Box& box) const { return parts_[tables_.part[row + box.q_low]]; }
    Box moved(int64_t row, const Box& box) const {
        const Part& part = part_of(row, box);
        const int64_t entry = std::min(std::max<int64_t>(box.batch - part.first, 0), part.batches - 1);
        const int64_t *position = tables_.position + row, q = position[box.q_low], k = position[box.k_low];
        return {entry, box.head, q, q + box.num_queries() - 1, k, k + box.num_keys() - 1};
    }
    Bound bounds_of(int64_t row, const Box& box) const { return part_of(row, box).pattern->bounds(moved(row, box)); }

    // Joins a box of pairs of one document to the square, at this row and bit.
    void add(int64_t row, const Box& box, int64_t first_row, int64_t first_bit, Square& square) const {
        const Bound known = bounds_of(row, box);
        if (known == Bound::NONE) return;
        Square own;
        if (known == Bound::EVERY) set_all(own, ~0ull);
        else part_of(row, box).pattern->fill(moved(row, box), own);
        const uint64_t keys = low_bits(box.num_keys());
        for (int64_t i = 0; i < box.num_queries(); ++i) square.rows[first_row + i] |= (own.rows[i] & keys) << first_bit;
    }

    const Tables tables_;
    std::vector<Part> parts_;
};

}  // namespace foveate::selection
