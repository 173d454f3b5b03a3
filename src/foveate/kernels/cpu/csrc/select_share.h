// What one thread finds of a selection: rows of its own, one after another.
#pragma once
#include <optional>

#include "masks.h"
#include "pattern.h"

namespace foveate::selection {

constexpr int32_t FULL_TILE = -1;  // number of a tile whose every pair is visible
constexpr int64_t FAN = 8;         // stretches of keys that an undecided one is cut into
constexpr int64_t SPARSE = 4;      // a tile that uses at most 1 / SPARSE of its keys becomes single columns

struct Extent {
    int64_t batches, heads, num_queries, num_keys;
    int64_t keys_of_visit;  // that take a query as long as to be gathered, and put back; 0: none are gathered

    int64_t q_tiles() const { return (num_queries + TILE - 1) / TILE; }
    int64_t k_tiles() const { return (num_keys + TILE - 1) / TILE; }
    int64_t rows() const { return batches * heads * q_tiles(); }

    Box queries(int64_t row) const {
        const int64_t plane = row / q_tiles(), first = row % q_tiles() * TILE, offset = num_keys - num_queries;
        const int64_t end = std::min(first + TILE, num_queries);
        return Box{plane / heads, plane % heads, offset + first, offset + end - 1, 0, 0};
    }
    Box with_keys(Box box, int64_t tile, int64_t width) const {
        box.k_low = tile * TILE;
        box.k_high = std::min((tile + width) * TILE, num_keys) - 1;
        return box;
    }
};

// Key tiles that these queries of a row see whole, and its others not at all.
struct Run {
    int32_t first, tiles;
    uint64_t queries;
};

class Share {
  public:
    Share(const Pattern& pattern, const Extent& extent) : pattern_(pattern), extent_(extent) {
        while (widest_ < extent.k_tiles()) widest_ *= FAN;
    }

    // Lists the runs of a row, and its other tiles that bounds do not show to be empty; returns how many of these.
    int32_t descend(int64_t row) {
        const size_t before = candidates_.size();
        first_run_ = runs.size();
        descend(extent_.queries(row), 0, widest_);
        return (int32_t)(candidates_.size() - before);
    }
    int64_t undecided() const { return undecided_; }

    // Before tiles are evaluated: their masks go into the table's slots from this one on.
    void take_slots(Square* table, int64_t first) {
        index.emplace(table, undecided_);
        table_ = table;
        first_slot = first;
        next_ = candidates_.data();
    }

    // Settles the candidates of the next row, appending to the lists.
    void evaluate(int64_t row, int32_t num_candidates) {
        const Box queries = extent_.queries(row);
        full_.clear();
        for (const int32_t* end = next_ + num_candidates; next_ < end; ++next_) {
            if (*next_ & 1)
                full_.push_back(*next_ / 2);
            else
                evaluate(extent_.with_keys(queries, *next_ / 2, 1), *next_ / 2);
        }
        tiles.insert(tiles.end(), full_.begin(), full_.end());
        numbers.resize(tiles.size(), FULL_TILE);
    }

    int64_t first_slot = 0, num_slots = 0;
    std::optional<MaskIndex> index;
    std::vector<int32_t> tiles, numbers;  // in each row those with masks (numbers are slots), then full ones
    std::vector<int32_t> columns;
    std::vector<uint64_t> column_queries;
    std::vector<Run> runs;
    int64_t next_tile = 0, next_column = 0, next_run = 0;  // to be written

  private:
    void descend(const Box& queries, int64_t first, int64_t width) {
        if (first >= extent_.k_tiles()) return;
        const Bound known = pattern_.bounds(extent_.with_keys(queries, first, width));
        if (known == Bound::NONE || (known == Bound::SOME && extent_.keys_of_visit && gather(queries, first, width))) return;
        if (known == Bound::SOME && width > 1) {
            for (int64_t child = first; child < first + width; child += width / FAN)
                descend(queries, child, width / FAN);
            return;
        }
        for (int64_t tile = first; tile < std::min(first + width, extent_.k_tiles()); ++tile) {
            const bool full = known == Bound::EVERY && (tile + 1) * TILE <= extent_.num_keys;
            candidates_.push_back((int32_t)(2 * tile + full));
            undecided_ += !full;
        }
    }

    // Whether each query sees all of these keys or none, and so few do that they are better gathered.
    bool gather(const Box& queries, int64_t first, int64_t width) {
        const Box box = extent_.with_keys(queries, first, width);
        uint64_t seen;
        if (!pattern_.by_query(box, seen)) return false;
        seen &= low_bits(box.num_queries());
        const int64_t keys = box.num_keys(), num_seen = __builtin_popcountll(seen);
        if (num_seen * (keys + extent_.keys_of_visit) > box.num_queries() * keys) return false;
        if (seen && !extend(queries, first, width, seen))
            runs.push_back({(int32_t)first, (int32_t)std::min(width, extent_.k_tiles() - first), seen});
        return true;
    }
    // Whether the row's last run goes on: not if its queries are the same by chance alone.
    bool extend(const Box& queries, int64_t first, int64_t width, uint64_t seen) {
        if (runs.size() == first_run_) return false;
        Run& last = runs.back();
        if (last.first + last.tiles != first || last.queries != seen) return false;
        uint64_t both;
        if (!pattern_.by_query(extent_.with_keys(queries, last.first, last.tiles + width), both)) return false;
        last.tiles += (int32_t)std::min(width, extent_.k_tiles() - first);
        return true;
    }

    void evaluate(const Box& box, int32_t tile) {
        uint64_t queries;
        if (box.num_keys() == TILE && pattern_.by_query(box, queries))
            add_rows(queries & low_bits(box.num_queries()), box, tile);
        else
            add_square(box, tile);
    }

    void add_rows(uint64_t queries, const Box& box, int32_t tile) {
        if (queries == low_bits(box.num_queries())) return full_.push_back(tile);
        if (!queries) return;
        const int64_t slot = index->find_or_add(queries, free_slot());
        if (slot == free_slot()) set_rows(table_[slot], queries);
        add_masked(slot, tile);
    }

    void add_square(const Box& box, int32_t tile) {
        Square mask;
        pattern_.fill(box, mask);
        const uint64_t keys = low_bits(box.num_keys());
        uint64_t used = 0, by_all = ~0ull;
        for (int64_t i = 0; i < box.num_queries(); ++i) {
            mask.rows[i] &= keys;
            used |= mask.rows[i];
            by_all &= mask.rows[i];
        }
        for (int64_t i = box.num_queries(); i < TILE; ++i) mask.rows[i] = 0;
        if (by_all == ~0ull) return full_.push_back(tile);
        if (__builtin_popcountll(used) * SPARSE <= TILE) return add_columns(mask, used, tile);
        const int64_t slot = index->find_or_add(mask, free_slot());
        if (slot == free_slot()) table_[slot] = mask;
        add_masked(slot, tile);
    }

    void add_columns(Square& mask, uint64_t used, int32_t tile) {
        if (!used) return;
        transpose(mask);
        for (; used; used &= used - 1) {
            const int key = __builtin_ctzll(used);
            columns.push_back(tile * TILE + key);
            column_queries.push_back(mask.rows[key]);
        }
    }

    void add_masked(int64_t slot, int32_t tile) {
        num_slots += slot == free_slot();
        tiles.push_back(tile);
        numbers.push_back((int32_t)slot);
    }
    int64_t free_slot() const { return first_slot + num_slots; }

    const Pattern& pattern_;
    const Extent& extent_;
    int64_t widest_ = 1, undecided_ = 0;
    size_t first_run_ = 0;  // of the row
    std::vector<int32_t> candidates_, full_;  // candidates: twice the key tile, and one more if surely full
    const int32_t* next_ = nullptr;
    Square* table_ = nullptr;
};

}  // namespace foveate::selection
