// Patterns of distance and position, as in foveate/patterns/rules/sequence.py and listed.py.
#pragma once
#include <limits>

#include "pattern.h"

namespace foveate::selection {

constexpr int64_t FAR = std::numeric_limits<int64_t>::max() / 4;

// Distances low .. high; `full` and `causal` are bands too.
class Band : public Pattern {
  public:
    Band(int64_t low, int64_t high) : low_(low), high_(high) {}
    Bound bounds(const Box& box) const override {
        const bool some = box.farthest() >= low_ && box.nearest() <= high_;
        return bound(some, box.nearest() >= low_ && box.farthest() <= high_);
    }
    void fill(const Box& tile, Square& square) const override {
        const int64_t corner = tile.q_low - tile.k_low + TILE - 1, first = corner - high_, last = corner - low_;
        along_diagonals(span(first, last), span(first - TILE, last - TILE), square);
    }

  private:
    const int64_t low_, high_;
};

// Distances that are multiples of a step, up to a reach.
class Strided : public Pattern {
  public:
    Strided(int64_t step, int64_t reach) : step_(step), reach_(reach) {}
    Bound bounds(const Box& box) const override {
        const int64_t nearest = std::max(box.nearest(), -reach_), farthest = std::min(box.farthest(), reach_);
        const bool some = floor_div(farthest, step_) * step_ >= nearest;
        const bool inside = nearest == box.nearest() && farthest == box.farthest();
        return bound(some, some && inside && (nearest == farthest || step_ == 1));
    }
    void fill(const Box& tile, Square& square) const override {
        const int64_t corner = tile.q_low - tile.k_low + TILE - 1;
        uint64_t bits[2] = {0, 0};
        for (int64_t t = floor_mod(corner, step_); t < 2 * TILE; t += step_) bits[t / TILE] |= 1ull << t % TILE;
        const int64_t first = corner - reach_, last = corner + reach_;
        along_diagonals(bits[0] & span(first, last), bits[1] & span(first - TILE, last - TILE), square);
    }

  private:
    const int64_t step_, reach_;
};

// The first keys; with `causal` none after the query.
class Prefix : public Pattern {
  public:
    Prefix(int64_t count, bool causal) : count_(count), causal_(causal) {}
    Bound bounds(const Box& box) const override {
        const bool some = box.k_low < count_, every = box.k_high < count_;
        if (!causal_) return bound(some, every);
        return bound(some && box.farthest() >= 0, every && box.nearest() >= 0);
    }
    void fill(const Box& tile, Square& square) const override {
        const int64_t last = count_ - 1 - tile.k_low, corner = tile.q_low - tile.k_low;
        for (int i = 0; i < TILE; ++i) square.rows[i] = span(0, causal_ ? std::min(last, corner + i) : last);
    }

  private:
    const int64_t count_;
    const bool causal_;
};

// Pairs in one group, where groups are consecutive stretches; Groups says which and how far they reach.
template <class Groups> class SameGroup : public Pattern {
  public:
    explicit SameGroup(Groups groups) : groups_(groups) {}
    Bound bounds(const Box& box) const override {
        const int64_t q_low = groups_.of(box.q_low), q_high = groups_.of(box.q_high);
        const int64_t k_low = groups_.of(box.k_low), k_high = groups_.of(box.k_high);
        return bound(q_low <= k_high && k_low <= q_high, q_low == k_high && k_low == q_high);
    }
    void fill(const Box& tile, Square& square) const override {
        int64_t end = tile.q_low;
        uint64_t seen = 0;
        for (int i = 0; i < TILE; ++i) {
            if (tile.q_low + i >= end) {
                const int64_t group = groups_.of(tile.q_low + i);
                end = groups_.start(group + 1);
                seen = span(groups_.start(group) - tile.k_low, end - 1 - tile.k_low);
            }
            square.rows[i] = seen;
        }
    }

  private:
    const Groups groups_;
};

struct EqualBlocks {
    int64_t size;

    int64_t of(int64_t position) const { return floor_div(position, size); }
    int64_t start(int64_t block) const { return block * size; }
};

// Documents laid end to end, and one more behind them that never ends.
struct Documents {
    const int64_t* ends;
    int64_t count;

    int64_t of(int64_t position) const { return std::upper_bound(ends, ends + count, position) - ends; }
    int64_t start(int64_t document) const {
        return document <= 0 ? -FAR : document > count ? FAR : ends[document - 1];
    }
};

// Blocks at distances 1, 2, 4, 8, ... before the query's.
class PowerOfTwo : public Pattern {
  public:
    explicit PowerOfTwo(int64_t block) : block_(block) {}
    Bound bounds(const Box& box) const override {
        const int64_t nearest = floor_div(box.q_low, block_) - floor_div(box.k_high, block_);
        const int64_t farthest = floor_div(box.q_high, block_) - floor_div(box.k_low, block_);
        if (farthest <= 0) return Bound::NONE;
        const int64_t greatest = 1ll << (63 - __builtin_clzll((uint64_t)farthest));
        const bool some = greatest >= std::max<int64_t>(nearest, 1);
        return bound(some, some && nearest == farthest);
    }
    void fill(const Box& tile, Square& square) const override {
        for (int i = 0; i < TILE; ++i) {
            const int64_t own = floor_div(tile.q_low + i, block_);
            square.rows[i] = 0;
            for (int64_t distance = 1; distance <= own; distance *= 2) {
                const int64_t first = (own - distance) * block_ - tile.k_low;
                square.rows[i] |= span(first, first + block_ - 1);
            }
        }
    }

  private:
    const int64_t block_;
};

// Blocks of a size at distances 0 .. count - 1 before the query's own.
class LocalBlocks : public Pattern {
  public:
    LocalBlocks(int64_t block, int64_t count) : block_(block), count_(count) {}
    Bound bounds(const Box& box) const override {
        const int64_t nearest = floor_div(box.q_low, block_) - floor_div(box.k_high, block_);
        const int64_t farthest = floor_div(box.q_high, block_) - floor_div(box.k_low, block_);
        return bound(farthest >= 0 && nearest < count_, nearest >= 0 && farthest < count_);
    }
    void fill(const Box& tile, Square& square) const override {
        for (int i = 0; i < TILE; ++i) {
            const int64_t own = floor_div(tile.q_low + i, block_), end = (own + 1) * block_ - tile.k_low;
            square.rows[i] = span(end - std::min(count_, own + 1) * block_, end - 1);
        }
    }

  private:
    const int64_t block_, count_;
};

// Every step-th block of keys, none after the query.
class EveryBlock : public Pattern {
  public:
    EveryBlock(int64_t block, int64_t step, int64_t first) : block_(block), step_(step), first_(first) {}
    Bound bounds(const Box& box) const override {
        const int64_t low = box.k_low / block_, last = box.k_high / block_;
        if (box.k_low > box.q_high) return Bound::NONE;
        const int64_t next = low + floor_mod(first_ - low, step_);
        const bool some = next <= std::min(box.k_high, box.q_high) / block_;
        return bound(some, some && (low == last || step_ == 1) && box.k_high <= box.q_low);
    }
    void fill(const Box& tile, Square& square) const override {
        uint64_t keys = 0;
        for (int j = 0; j < TILE; ++j) keys |= (uint64_t)((tile.k_low + j) / block_ % step_ == first_) << j;
        for (int i = 0; i < TILE; ++i) square.rows[i] = keys & span(0, tile.q_low + i - tile.k_low);
    }

  private:
    const int64_t block_, step_, first_;
};

// Sorted positions that see all and are seen by all.
class GlobalTokens : public Pattern {
  public:
    GlobalTokens(const int64_t* positions, int64_t count) : begin_(positions), end_(positions + count) {}
    Bound bounds(const Box& box) const override {
        const int64_t in_q = between(box.q_low, box.q_high), in_k = between(box.k_low, box.k_high);
        return bound(in_q > 0 || in_k > 0, in_q == box.num_queries() || in_k == box.num_keys());
    }
    void fill(const Box& tile, Square& square) const override {
        set_all(square, bits(tile.k_low));
        const uint64_t queries = bits(tile.q_low);
        for (int i = 0; i < TILE; ++i)
            if (queries >> i & 1) square.rows[i] = ~0ull;
    }

  private:
    int64_t between(int64_t low, int64_t high) const {
        return std::upper_bound(begin_, end_, high) - std::lower_bound(begin_, end_, low);
    }
    uint64_t bits(int64_t first) const {
        uint64_t word = 0;
        for (const int64_t* at = std::lower_bound(begin_, end_, first); at < end_ && *at < first + TILE; ++at)
            word |= 1ull << (*at - first);
        return word;
    }
    const int64_t *const begin_, *const end_;
};

// A coin for each pair of blocks.
class RandomBlocks : public Pattern {
  public:
    RandomBlocks(int64_t block, int64_t threshold, int64_t seed) : block_(block), threshold_(threshold), seed_(seed) {}
    Bound bounds(const Box& box) const override {
        const int64_t q = floor_div(box.q_low, block_), k = floor_div(box.k_low, block_);
        if (q != floor_div(box.q_high, block_) || k != floor_div(box.k_high, block_)) return Bound::SOME;
        return drawn(q, k) ? Bound::EVERY : Bound::NONE;
    }
    void fill(const Box& tile, Square& square) const override {
        for (int i = 0; i < TILE; ++i) {
            const int64_t q = tile.q_low + i, own = floor_div(q, block_);
            square.rows[i] = i && own * block_ != q ? square.rows[i - 1] : of_block(own, tile.k_low);
        }
    }

  private:
    uint64_t of_block(int64_t own, int64_t first_key) const {
        uint64_t seen = 0;
        for (int64_t k = floor_div(first_key, block_); k * block_ < first_key + TILE; ++k)
            if (drawn(own, k)) seen |= span(k * block_ - first_key, (k + 1) * block_ - 1 - first_key);
        return seen;
    }
    bool drawn(int64_t q_block, int64_t k_block) const {
        const uint64_t code = mixed(mixed(mixed(HASH_START, q_block), seed_), k_block);
        return (int64_t)(code >> 11 & 0xffffffff) < threshold_;
    }
    const int64_t block_, threshold_, seed_;
};

}  // namespace foveate::selection
