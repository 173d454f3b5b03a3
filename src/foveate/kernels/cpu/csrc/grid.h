// Where the windows of a grid lie, and how a call is split into boxes of queries.
#pragma once
#include <algorithm>
#include <vector>

#include "neighborhood.h"
#include "simd.h"

namespace foveate::grid {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int GROUP = 4;  // rows of queries that are worked on together
#else
constexpr int GROUP = 6;
#endif

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
    bool has(int64_t i) const { return begin <= i && i < end; }
    bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// Coordinates of an axis, numbered 0 .. length - 1, in cosets: those that see only one another, every `dilation`-th. The
// cosets of x follow one another, so that vectors of queries are full however few there are of one.
struct Axis {
    int64_t length, size, token, stride;  // coordinate i is at token + i * stride,
    const int64_t* tokens;                // or, of several cosets, at tokens[i]
    int64_t cosets;
    bool causal;

    bool affine() const { return !tokens; }
    int64_t at(int64_t i) const { return tokens ? tokens[i] : token + i * stride; }

    int64_t first(int64_t query) const {
        const Range own = coset_of(query);
        if (causal) return std::max(query - size + 1, own.begin);
        return std::min(std::max(query - size / 2, own.begin), own.end - size);
    }
    int64_t end(int64_t query) const { return causal ? query + 1 : first(query) + size; }
    Range keys(int64_t query) const { return {first(query), end(query)}; }
    Range keys(Range queries) const { return {first(queries.begin), end(queries.end - 1)}; }

    // The numbers of a coset; the first ones have a coordinate more where they do not all have as many.
    Range coset(int64_t i) const {
        const int64_t least = length / cosets, longer = length % cosets, begin = i * least + std::min(i, longer);
        return {begin, begin + least + (i < longer)};
    }

  private:
    Range coset_of(int64_t query) const {
        if (cosets == 1) return {0, length};
        const int64_t least = length / cosets, longer = length % cosets, of_longer = longer * (least + 1);
        return coset(query < of_longer ? query / (least + 1) : longer + (query - of_longer) / least);
    }
};

// A box of a grid of three axes z, y, x; a grid of fewer has leading axes of length 1.
struct Box {
    Range z, y, x;
    int64_t rows() const { return z.size() * y.size(); }
    int64_t tokens() const { return rows() * x.size(); }
    int64_t row(int64_t at_z, int64_t at_y) const { return (at_z - z.begin) * y.size() + at_y - y.begin; }
};

struct Lattice {
    Axis z, y, x;
    int64_t token(int64_t at_z, int64_t at_y, int64_t at_x) const {
        return z.at(at_z) + y.at(at_y) + x.at(at_x);
    }
    Box whole() const { return {{0, z.length}, {0, y.length}, {0, x.length}}; }
    Box keys(const Box& queries) const { return {z.keys(queries.z), y.keys(queries.y), x.keys(queries.x)}; }
};

// All lattices of a grid, one for each residue of the dilations of z and y, and the boxes that each is split into.
class Plan {
  public:
    // About `pieces` boxes of each lattice, but none so small that its border outweighs it; more where the keys in
    // sight would else leave the cache.
    Plan(const FoveateNeighborhood& window, int64_t pieces, int64_t token_bytes) : window_(window) {
        const Axis x = axis(2, 0);
        for (int64_t coset = 0; x.cosets > 1 && coset < x.cosets; ++coset)
            for (int64_t i = 0; i < x.coset(coset).size(); ++i) x_tokens_.push_back(coset + i * x.cosets);
        for (int axis = 0; axis < 3; ++axis) {
            parts_[axis] = std::min(pieces, most_parts(axis));
            pieces = (pieces + parts_[axis] - 1) / parts_[axis];
        }
        for (int axis : {1, 2})
            if (size(0) > 1 || axis == 2)
                while (in_sight() * token_bytes > CACHE && parts_[axis] < most_parts(axis)) ++parts_[axis];
    }
    int64_t lattices() const { return dilation(0) * dilation(1); }
    int64_t boxes() const { return parts_[0] * parts_[1] * parts_[2]; }  // of each lattice

    Lattice lattice(int64_t i) const {
        return {axis(0, i / dilation(1)), axis(1, i % dilation(1)), axis(2, 0)};
    }
    Box box(const Lattice& lattice, int64_t i) const {
        const int64_t x = i % parts_[2], y = i / parts_[2] % parts_[1], z = i / parts_[2] / parts_[1];
        return {part(lattice.z.length, z, parts_[0], 1), part(lattice.y.length, y, parts_[1], GROUP),
                part(lattice.x.length, x, parts_[2], LANES)};
    }

  private:
    int64_t of(const int64_t* setting, int axis, int64_t absent) const {
        const int64_t at = axis + window_.axes - 3;
        return at < 0 ? absent : setting[at];
    }
    int64_t dim(int axis) const { return of(window_.dims, axis, 1); }
    int64_t size(int axis) const { return of(window_.size, axis, 1); }
    int64_t dilation(int axis) const { return of(window_.dilation, axis, 1); }

    static constexpr int64_t CACHE = 1 << 20;  // bytes

    // No part is shorter than this, which is more than the grain of its ends: none is empty.
    int64_t most_parts(int axis) const {
        const int64_t grain = axis == 2 ? 4 * LANES : GROUP, wide = std::max(size(axis), grain);
        const int64_t least = axis == 2 ? wide : 2 * wide;
        return std::max<int64_t>(length(axis) / least, 1);
    }
    // Tokens of the rows of keys that a ring holds.
    int64_t in_sight() const {
        const auto keys = [&](int axis) { return length(axis) / parts_[axis] + size(axis); };
        return size(0) * (size(0) > 1 ? keys(1) : size(1) + GROUP) * keys(2);
    }

    // Of an axis of a lattice, about.
    int64_t length(int axis) const { return axis == 2 ? dim(2) : dim(axis) / dilation(axis); }

    Axis axis(int axis, int64_t residue) const {
        int64_t stride = 1;
        for (int finer = axis + 1; finer < 3; ++finer) stride *= dim(finer);
        const bool causal = of(window_.causal, axis, 0) != 0;
        if (axis == 2) return {dim(2), size(2), 0, 1, x_tokens_.empty() ? nullptr : x_tokens_.data(), dilation(2), causal};
        const int64_t length = (dim(axis) - residue + dilation(axis) - 1) / dilation(axis);
        return {length, size(axis), residue * stride, dilation(axis) * stride, nullptr, 1, causal};
    }
    static Range part(int64_t length, int64_t i, int64_t parts, int64_t grain) {
        const int64_t grains = (length + grain - 1) / grain;
        return {std::min(grains * i / parts * grain, length), std::min(grains * (i + 1) / parts * grain, length)};
    }

    const FoveateNeighborhood& window_;
    int64_t parts_[3];
    std::vector<int64_t> x_tokens_;
};

}  // namespace foveate::grid
