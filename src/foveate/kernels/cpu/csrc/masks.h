// Masks without repeats.
#pragma once
#include <vector>

#include "words.h"

namespace foveate::selection {

FOVEATE_INLINE uint64_t hash_of(const Square& square) {
    static const Square keys = [] {
        Square keys;
        uint64_t key = HASH_START;
        for (uint64_t& row : keys.rows) row = key = mixed(key, 1);
        return keys;
    }();
    uint64_t sum = 0;  // of products of halves, each with a random number added
    for (int i = 0; i < TILE; ++i) {
        const uint64_t row = square.rows[i], key = keys.rows[i];
        sum += (uint64_t)((uint32_t)row + (uint32_t)key) * (uint32_t)((row >> 32) + (key >> 32));
    }
    return sum;
}

// Slots by whole numbers, of which two different things may have the same.
class SlotIndex {
  public:
    explicit SlotIndex(int64_t most) : most_(most) {}
    // The slot under this number for which same(slot) holds, or else `slot`, now under it.
    template <class Same> int64_t find_or_add(uint64_t number, int64_t slot, Same same) {
        if (2 * (size_ + 1) > (int64_t)cells_.size()) grow();
        uint64_t at = place(number);
        for (; cells_[at].slot != EMPTY; at = next(at))
            if (cells_[at].number == number && same(cells_[at].slot)) return cells_[at].slot;
        cells_[at] = Cell{number, slot};
        ++size_;
        return slot;
    }
    int64_t size() const { return size_; }

  private:
    static constexpr int64_t EMPTY = -1;
    static constexpr size_t AT_ONCE = 1 << 19;
    struct Cell {
        uint64_t number;
        int64_t slot;
    };

    uint64_t place(uint64_t number) const { return mixed(HASH_START, number) & (cells_.size() - 1); }
    uint64_t next(uint64_t at) const { return (at + 1) & (cells_.size() - 1); }
    // At the first entry to what all may need, if that is not much; it is half empty at least.
    void grow() {
        size_t size = std::max<size_t>(2 * cells_.size(), 64);
        while (size < AT_ONCE && (int64_t)size < 2 * most_) size *= 2;
        std::vector<Cell> old(size, Cell{0, EMPTY});
        old.swap(cells_);
        for (const Cell& cell : old) {
            if (cell.slot == EMPTY) continue;
            uint64_t at = place(cell.number);
            while (cells_[at].slot != EMPTY) at = next(at);
            cells_[at] = cell;
        }
    }

    std::vector<Cell> cells_;
    int64_t most_, size_ = 0;
};

// Finds masks in slots of a table by what they hold.
class MaskIndex {
  public:
    // Of at most so many masks.
    MaskIndex(const Square* table, int64_t most) : table_(table), squares_(most), rows_(most) {}

    // The slot that has this mask already, or else `slot`, which must then be given it.
    int64_t find_or_add(const Square& mask, int64_t slot) {
        uint64_t queries;
        if (whole_rows(mask, queries)) return find_or_add(queries, slot);
        const auto same = [&](int64_t other) { return !std::memcmp(&table_[other], &mask, sizeof mask); };
        return squares_.find_or_add(hash_of(mask), slot, same);
    }
    // The same for the mask of these queries that see every key, and others none.
    int64_t find_or_add(uint64_t queries, int64_t slot) {
        return rows_.find_or_add(queries, slot, [](int64_t) { return true; });
    }
    int64_t size() const { return squares_.size() + rows_.size(); }

  private:
    static bool whole_rows(const Square& mask, uint64_t& queries) {
        uint64_t unequal = 0;
        for (int i = 0; i < TILE; ++i) unequal |= mask.rows[i] ^ (0 - (mask.rows[i] & 1));
        if (unequal) return false;
        queries = 0;
        for (int i = 0; i < TILE; ++i) queries |= (mask.rows[i] & 1) << i;
        return true;
    }

    const Square* table_;
    SlotIndex squares_, rows_;
};

}  // namespace foveate::selection
