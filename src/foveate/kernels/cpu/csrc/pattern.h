// Patterns as trees: what is known of a box of pairs, and which pairs of a tile are visible.
// The counterpart of foveate/patterns/algebra.py, whose `visible` is the definition.
#pragma once
#include <memory>
#include <vector>

#include "words.h"

namespace foveate::selection {

// Closed ranges of the positions of queries and keys.
struct Box {
    int64_t batch, head;
    int64_t q_low, q_high, k_low, k_high;

    int64_t nearest() const { return q_low - k_high; }
    int64_t farthest() const { return q_high - k_low; }
    int64_t num_queries() const { return q_high - q_low + 1; }
    int64_t num_keys() const { return k_high - k_low + 1; }
};

// Of a box: surely none of its pairs is visible, maybe some are, surely every one is.
enum class Bound { NONE, SOME, EVERY };

FOVEATE_INLINE Bound bound(bool some, bool every) {
    return every ? Bound::EVERY : some ? Bound::SOME : Bound::NONE;
}

class Pattern {
  public:
    virtual ~Pattern() = default;
    virtual Bound bounds(const Box& box) const = 0;
    // What the 64 queries from q_low on see of the 64 keys from k_low on; rows and bits beyond the box mean nothing.
    virtual void fill(const Box& tile, Square& square) const = 0;
    // Whether it is known that each of up to 64 queries sees all keys of the box or none; then bit i is query
    // q_low + i, and bits beyond the box mean nothing.
    virtual bool by_query(const Box&, uint64_t&) const { return false; }
};

using Parts = std::vector<std::unique_ptr<Pattern>>;

class All : public Pattern {
  public:
    explicit All(Parts parts) : parts_(std::move(parts)) {}
    Bound bounds(const Box& box) const override {
        Bound least = Bound::EVERY;
        for (const auto& part : parts_) {
            least = std::min(least, part->bounds(box));
            if (least == Bound::NONE) break;
        }
        return least;
    }
    void fill(const Box& tile, Square& square) const override {
        bool first = true;
        Square other;
        for (const auto& part : parts_) {
            const Bound known = part->bounds(tile);
            if (known == Bound::NONE) return set_all(square, 0);
            if (known == Bound::EVERY) continue;
            part->fill(tile, first ? square : other);
            for (int i = 0; !first && i < TILE; ++i) square.rows[i] &= other.rows[i];
            first = false;
        }
        if (first) set_all(square, ~0ull);
    }
    bool by_query(const Box& tile, uint64_t& queries) const override {
        queries = ~0ull;
        for (const auto& part : parts_) {
            uint64_t seen;
            if (part->bounds(tile) == Bound::EVERY) continue;
            if (!part->by_query(tile, seen)) return false;
            queries &= seen;
        }
        return true;
    }

  private:
    Parts parts_;
};

class Any : public Pattern {
  public:
    explicit Any(Parts parts) : parts_(std::move(parts)) {}
    Bound bounds(const Box& box) const override {
        Bound greatest = Bound::NONE;
        for (const auto& part : parts_) {
            greatest = std::max(greatest, part->bounds(box));
            if (greatest == Bound::EVERY) break;
        }
        return greatest;
    }
    void fill(const Box& tile, Square& square) const override {
        bool first = true;
        Square other;
        for (const auto& part : parts_) {
            const Bound known = part->bounds(tile);
            if (known == Bound::EVERY) return set_all(square, ~0ull);
            if (known == Bound::NONE) continue;
            part->fill(tile, first ? square : other);
            for (int i = 0; !first && i < TILE; ++i) square.rows[i] |= other.rows[i];
            first = false;
        }
        if (first) set_all(square, 0);
    }
    bool by_query(const Box& tile, uint64_t& queries) const override {
        queries = 0;
        for (const auto& part : parts_) {
            uint64_t seen;
            if (part->bounds(tile) == Bound::NONE) continue;
            if (!part->by_query(tile, seen)) return false;
            queries |= seen;
        }
        return true;
    }

  private:
    Parts parts_;
};

class Not : public Pattern {
  public:
    explicit Not(std::unique_ptr<Pattern> part) : part_(std::move(part)) {}
    Bound bounds(const Box& box) const override {
        const Bound known = part_->bounds(box);
        return known == Bound::NONE ? Bound::EVERY : known == Bound::EVERY ? Bound::NONE : Bound::SOME;
    }
    void fill(const Box& tile, Square& square) const override {
        part_->fill(tile, square);
        for (uint64_t& row : square.rows) row = ~row;
    }
    bool by_query(const Box& tile, uint64_t& queries) const override {
        const bool known = part_->by_query(tile, queries);
        queries = ~queries;
        return known;
    }

  private:
    std::unique_ptr<Pattern> part_;
};

// A pattern per head.
class PerHead : public Pattern {
  public:
    explicit PerHead(Parts parts) : parts_(std::move(parts)) {}
    Bound bounds(const Box& box) const override { return parts_[box.head]->bounds(box); }
    void fill(const Box& tile, Square& square) const override { parts_[tile.head]->fill(tile, square); }
    bool by_query(const Box& tile, uint64_t& queries) const override {
        return parts_[tile.head]->by_query(tile, queries);
    }

  private:
    Parts parts_;
};

}  // namespace foveate::selection
