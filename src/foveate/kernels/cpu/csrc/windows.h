// What a group of queries sees: rows of queries next to one another along y, a strip of each along x.
#pragma once
#include "grid.h"

namespace foveate::grid {

constexpr int COLUMNS = 4;  // queries along x that products whose lanes are channels take together

// How the windows of the COLUMNS queries from a lane on lie to one another, where one rule holds for all of them.
enum class Pace : uint8_t { ANY, EQUAL, CONSECUTIVE };

// Up to LANES queries along x: the first key of each, counted from that of lane 0, and how many it sees.
struct Strip {
    int64_t x, lanes;
    int64_t column;  // of the first key of lane 0, in the box of keys
    int32_t first[LANES], count[LANES];
    Pace pace[LANES];
    bool bent;    // not every lane's first key is one further than that of the lane before
    bool ragged;  // not every lane sees as many keys as the widest window has

    Strip(const Axis& axis, Range queries, int64_t begin, int64_t first_column)
        : x(begin), lanes(std::min<int64_t>(queries.end - begin, LANES)), column(axis.first(begin) - first_column) {
        while (axis.first(begin + lanes - 1) - axis.first(begin) >= LANES) --lanes;  // beyond a vector of keys
        bent = ragged = false;
        for (int i = 0; i < LANES; ++i) {
            const Range keys = axis.keys(begin + std::min<int64_t>(i, lanes - 1));
            first[i] = (int32_t)(keys.begin - axis.first(begin));
            count[i] = (int32_t)keys.size();
            bent |= i < lanes && first[i] != i;
            ragged |= count[i] != axis.size;
        }
        for (int i = 0; i < LANES; ++i) pace[i] = pace_from(i);
    }
    // At most: strips end where vectors do, and some where a coset does.
    static int64_t most_in(const Axis& axis, Range queries) {
        return (queries.size() + LANES - 1) / LANES + axis.cosets;
    }
    // Returns how many there are.
    static int64_t fill(Strip* strips, const Axis& axis, Range queries, int64_t first_column) {
        int64_t count = 0;
        for (int64_t begin = queries.begin; begin < queries.end; begin += strips[count++].lanes)
            strips[count] = Strip(axis, queries, begin, first_column);
        return count;
    }
    Ints bend() const {
        Ints lane;
        std::memcpy(&lane, first, sizeof lane);
        return lane;
    }
    // A bit for each lane that sees the key at an offset from its first.
    uint32_t seeing(int64_t offset) const {
        uint32_t bits = 0;
        for (int i = 0; i < LANES; ++i) bits |= (uint32_t)(offset < count[i]) << i;
        return bits;
    }

  private:
    Pace pace_from(int lane) const {
        if (lane + COLUMNS > lanes) return Pace::ANY;
        const int step = first[lane + 1] - first[lane];
        for (int i = lane + 1; i < lane + COLUMNS; ++i)
            if (first[i] - first[i - 1] != step || count[i] != count[lane]) return Pace::ANY;
        return step == 0 ? Pace::EQUAL : count[lane] + 1 < COLUMNS ? Pace::ANY : Pace::CONSECUTIVE;
    }
};

// A row of keys, numbered in its box, and its slot among those that the group sees.
struct KeyRow {
    int64_t row, slot;
};

// Rows of keys that are all seen by the same rows of queries: `first` .. `first + count` of the group.
struct Run {
    int64_t first, count;
    const KeyRow *begin_row, *end_row;
    const KeyRow* begin() const { return begin_row; }
    const KeyRow* end() const { return end_row; }
};

// All rows of keys that a group of queries sees: `queries` along y, at one z.
class Sight {
  public:
    static int64_t most_rows(const Lattice& lattice) { return lattice.z.size * (lattice.y.size + GROUP - 1); }

    Sight(const Lattice& lattice, const Box& keys, KeyRow* rows) : lattice_(lattice), keys_(keys), rows_(rows) {}

    void look(int64_t z, Range queries) {
        z_ = z, queries_ = queries, planes_ = lattice_.z.keys(z), lines_ = lattice_.y.keys(queries);
        num_runs_ = 0;
        KeyRow* next = rows_;
        for (int64_t y = lines_.begin, end; y < lines_.end; y = end) {
            const Range seeing = seeing_of(y);
            for (end = y + 1; end < lines_.end && seeing_of(end) == seeing;) ++end;
            KeyRow* begin = next;
            for (int64_t plane = planes_.begin; plane < planes_.end; ++plane)
                for (int64_t line = y; line < end; ++line) *next++ = at(plane, line);
            runs_[num_runs_++] = {seeing.begin - queries.begin, seeing.size(), begin, next};
        }
    }
    // In runs of the same queries.
    const Run* begin() const { return runs_; }
    const Run* end() const { return runs_ + num_runs_; }

    int64_t z() const { return z_; }
    Range queries() const { return queries_; }
    int64_t slots() const { return planes_.size() * lines_.size(); }
    int64_t last_row() const { return keys_.row(planes_.end - 1, lines_.end - 1); }

    // The y of the keys that row r of the queries sees.
    Range lines(int64_t r) const { return lattice_.y.keys(queries_.begin + r); }
    // Calls visit(key row) for all rows of keys at these y.
    template <class Visit> void each_row(Range lines, Visit visit) const {
        for (int64_t plane = planes_.begin; plane < planes_.end; ++plane)
            for (int64_t line = lines.begin; line < lines.end; ++line) visit(at(plane, line));
    }
    // Calls visit(slot, count) for the same, as many slots at a time as follow one another.
    template <class Visit> void each_plane(Range lines, Visit visit) const {
        for (int64_t plane = planes_.begin; plane < planes_.end; ++plane)
            visit(at(plane, lines.begin).slot, lines.size());
    }

  private:
    KeyRow at(int64_t z, int64_t y) const {
        return {keys_.row(z, y), (z - planes_.begin) * lines_.size() + y - lines_.begin};
    }
    Range seeing_of(int64_t key) const {
        Range seeing = queries_;
        while (lattice_.y.end(seeing.begin) <= key) ++seeing.begin;
        while (lattice_.y.first(seeing.end - 1) > key) --seeing.end;
        return seeing;
    }

    const Lattice& lattice_;
    const Box& keys_;
    KeyRow* rows_;
    Run runs_[2 * GROUP];
    int64_t num_runs_ = 0, z_ = 0;
    Range queries_{0, 0}, planes_{0, 0}, lines_{0, 0};
};

}  // namespace foveate::grid
