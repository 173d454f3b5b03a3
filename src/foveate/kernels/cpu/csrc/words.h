// Bits, 64 to a word, and squares of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace foveate::selection {

// What a tile of 64 queries and 64 keys sees: bit j of row i is query i and key j.
struct Square {
    uint64_t rows[TILE];
};

// Bits low .. high, as far as a word has them.
FOVEATE_INLINE uint64_t span(int64_t low, int64_t high) {
    low = std::max<int64_t>(low, 0);
    high = std::min<int64_t>(high, TILE - 1);
    return low > high ? 0 : (~0ull >> (TILE - 1 - (high - low))) << low;
}
FOVEATE_INLINE uint64_t low_bits(int64_t count) { return span(0, count - 1); }

// Rounds down, also below zero.
FOVEATE_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
FOVEATE_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// 64 bytes of 0 or 1 as bits: a product's highest byte has the lowest bits of eight bytes, in their order.
FOVEATE_INLINE uint64_t pack_marks(const uint8_t* marks) {
    uint64_t word = 0;
    for (int group = 0; group < TILE / 8; ++group) {
        uint64_t eight;
        std::memcpy(&eight, marks + 8 * group, 8);
        word |= (eight * 0x0102040810204080ull >> 56) << (8 * group);
    }
    return word;
}

FOVEATE_INLINE uint64_t reversed(uint64_t x) {
    x = (x >> 1 & 0x5555555555555555ull) | (x & 0x5555555555555555ull) << 1;
    x = (x >> 2 & 0x3333333333333333ull) | (x & 0x3333333333333333ull) << 2;
    x = (x >> 4 & 0x0f0f0f0f0f0f0f0full) | (x & 0x0f0f0f0f0f0f0f0full) << 4;
    return __builtin_bswap64(x);
}

// A square that depends on i - j alone: bit t of (low, high) is where j - i is t - 63.
FOVEATE_INLINE void along_diagonals(uint64_t low, uint64_t high, Square& square) {
    for (uint64_t i = 0; i < TILE; ++i) square.rows[i] = low >> (63 - i) | high << 1 << i;
}

// Row i all ones or all zeros, as bit i says.
FOVEATE_INLINE void set_rows(Square& square, uint64_t queries) {
    for (uint64_t i = 0; i < TILE; ++i) square.rows[i] = 0 - (queries >> i & 1);
}
FOVEATE_INLINE void set_all(Square& square, uint64_t word) {
    for (uint64_t& row : square.rows) row = word;
}

// Swaps the high bits of each 2 * SHIFT in rows whose number lacks the bit STRIDE with the low bits of the row STRIDE
// further on.
template <int SHIFT, int STRIDE> FOVEATE_INLINE void swap_halves(Square& square) {
    constexpr uint64_t LOW = ~0ull / ((1ull << SHIFT) + 1);
    for (int first = 0; first < TILE; first += 2 * STRIDE) {
        uint64_t *upper = square.rows + first, *lower = upper + STRIDE;
#pragma GCC ivdep
        for (int i = 0; i < STRIDE; ++i) {
            const uint64_t swapped = ((upper[i] >> SHIFT) ^ lower[i]) & LOW;
            upper[i] ^= swapped << SHIFT;
            lower[i] ^= swapped;
        }
    }
}

// to[i] = from[i with its two octal digits exchanged]
FOVEATE_INLINE void exchange_digits(const Square& from, Square& to) {
    for (int high = 0; high < 8; ++high)
        for (int low = 0; low < 8; ++low) to.rows[8 * high + low] = from.rows[8 * low + high];
}

// Bit j of row i becomes bit i of row j. Strides of eight and more make whole vectors, hence the exchange in between.
FOVEATE_INLINE void transpose(Square& square) {
    Square exchanged;
    swap_halves<32, 32>(square);
    swap_halves<16, 16>(square);
    swap_halves<8, 8>(square);
    exchange_digits(square, exchanged);
    swap_halves<4, 32>(exchanged);
    swap_halves<2, 16>(exchanged);
    swap_halves<1, 8>(exchanged);
    exchange_digits(exchanged, square);
}

// splitmix64's finaliser, as patterns.algebra.mix_hash.
FOVEATE_INLINE uint64_t mixed(uint64_t hash, uint64_t value) {
    hash = (hash + value) * 0x9e3779b97f4a7c15ull;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9ull;
    return hash ^ hash >> 27;
}
constexpr uint64_t HASH_START = 0x243f6a8885a308d3ull;

}  // namespace foveate::selection
