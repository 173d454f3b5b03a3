// Products of rows with codes by matrix instructions on pairs of bfloat16, which hold every code exactly. What they are
// multiplied by, queries and weights, is split into digits of 8 bits that add up to it, a row each: the instructions
// multiply 16 rows as fast as one.
#pragma once
#include "decode_pairs.h"
#include "stored_rows.h"

namespace foveate {
#if defined(__AMX_BF16__)

class StoredPairs {
  public:
    static void begin() { PairProducts::begin(); }
    static void end() { PairProducts::end(); }
    // Whether they are faster for so many rows than products in lanes, measured.
    static bool takes(int64_t format, int64_t rows) {
        if (format == FOVEATE_AS_INT4 || format == FOVEATE_AS_INT2) return rows >= 2;
        return rows >= 8 && (format == FOVEATE_BFLOAT16 || format >= FOVEATE_AS_FLOAT8);
    }

    StoredPairs(Arena& arena, int64_t rows, int64_t dtype, int64_t keys, int64_t values)
        : rows_(rows), digits_(dtype == FOVEATE_FLOAT32 ? 3 : 2), all_(rows * digits_), padded_(round_up(all_, LANES)),
          buffer_(arena.take<uint16_t>((TILE + LANES) * std::max(keys, values))),
          split_(arena.take<uint16_t>(padded_ * keys)), q_(arena.take<uint32_t>(padded_ * keys / 2)),
          scores_(arena.take<float>(padded_ * TILE)), scratch_(arena.take<float>(PairProducts::scratch_size(all_))),
          out_(arena.take<float>(padded_ * values)) {}

    // Rows of a chunk into the buffer.
    void unpack(const Positions& positions, const char* const* from, int64_t count, const char* const* next) const {
        const int64_t channels = positions.channels(), bytes = positions.bytes(), size = positions.count();
        const auto rows = [=, buffer = buffer_](auto unpack) {
            uint16_t* to = buffer;
            for (int64_t i = 0; i < count; ++i, to += size) {
                if (next) fetch_row(next[i], bytes);
                unpack(from[i], to);
            }
        };
        switch (positions.format()) {
            case FOVEATE_AS_INT4: return by_copies<4>(positions, rows);
            case FOVEATE_AS_INT2: return by_copies<2>(positions, rows);
            case FOVEATE_AS_INT8:
                return rows([=](const char* row, uint16_t* to) { in_order(row, channels, to, floats_of_bytes); });
            case FOVEATE_AS_FLOAT8:
                return rows([=](const char* row, uint16_t* to) { in_order(row, channels, to, load_float8); });
        }
        rows([=](const char* row, uint16_t* to) { read_row(to, row, FOVEATE_BFLOAT16, 1, channels, size); });
    }

    // Queries (rows, positions) for the products after it.
    void pack_queries(const float* q, int64_t positions) const {
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t p = 0; p < positions; p += LANES)
                each_digit(load(q + r * positions + p), [&](int64_t digit, Floats x) {
                    _mm256_storeu_si256((__m256i*)(split_ + (r * digits_ + digit) * positions + p), to_bfloat16((__m512)x));
                });
        PairProducts::pack(split_, all_, positions, q_);
    }

    // scores (rows, 64) of some rows of the buffer.
    void scores(int64_t start, int64_t tokens, int64_t positions, float* scores) const {
        Ahead nothing({}, {}, 0, 1);
        PairProducts::scores({buffer_ + start * positions, positions, tokens}, positions, q_, all_, scores_, scratch_,
                             nothing);
        add_digits(scores_, TILE, scores);
    }

    // added (rows, positions) = weights (rows, 64) from `start` on times some rows of the buffer.
    void values(int64_t start, int64_t tokens, int64_t positions, const float* weights, float* added) const {
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t t = 0; t < TILE; t += LANES) {
                const int64_t left = std::clamp<int64_t>(tokens - t, 0, LANES);
                const __m512 some = _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), weights + r * TILE + start + t);
                each_digit((Floats)some, [&](int64_t digit, Floats x) {
                    store(scores_ + (r * digits_ + digit) * TILE + t, x);
                });
            }
        std::fill(out_, out_ + all_ * positions, 0.0f);
        Ahead nothing({}, {}, 0, 1);
        PairProducts::add_values({buffer_ + start * positions, positions, tokens}, positions, scores_, all_, out_,
                                 scratch_, nothing);
        add_digits(out_, positions, added);
    }

  private:
    template <class Visit> FOVEATE_INLINE_MEMBER void each_digit(Floats x, Visit visit) const {
        for (int64_t digit = 0; digit + 1 < digits_; ++digit) {
            const Floats high = as_floats(as_words(x) & 0xffff0000u);
            visit(digit, high);
            x -= high;
        }
        visit(digits_ - 1, x);
    }
    void add_digits(const float* from, int64_t size, float* to) const {
        for (int64_t r = 0; r < rows_; ++r)
            for (int64_t i = 0; i < size; i += LANES) {
                Floats sum = load(from + r * digits_ * size + i);
                for (int64_t digit = 1; digit < digits_; ++digit) sum += load(from + (r * digits_ + digit) * size + i);
                store(to + r * size + i, sum);
            }
    }

    // Codes of 4 or 2 bits: shifted to the end of each half of a word, they are looked up in a table of their numbers.
    template <int BITS, int COPIES>
    FOVEATE_INLINE void codes(const char* from, int64_t bytes, __m512i numbers, uint16_t* to) {
        constexpr int PARTS = 16 / BITS / COPIES, WORDS = LANES / COPIES;
        for (int64_t at = 0; at < bytes; at += FOVEATE_VECTOR_BYTES, to += PARTS * 2 * LANES) {
            Words word;
            if constexpr (COPIES == 1) {
                word = load_some(from + at, bytes - at);
            } else {
                Words shift{};
                for (int lane = 0; lane < LANES; ++lane) shift[lane] = lane / WORDS * PARTS * BITS;
                word = load_copies<COPIES>(from, bytes) >> shift;
            }
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part)
                _mm512_storeu_si512(to + part * 2 * LANES, _mm512_permutexvar_epi16((__m512i)(word >> part * BITS), numbers));
        }
    }
    template <int BITS, class Each> static void by_copies(const Positions& positions, Each rows) {
        alignas(64) uint16_t table[32];
        for (int i = 0; i < 32; ++i) table[i] = to_bfloat16((float)(i % (1 << BITS)));
        const __m512i numbers = _mm512_load_si512(table);
        const int64_t bytes = positions.bytes();
        if (positions.copies() == 1)
            return rows([=](const char* row, uint16_t* to) { codes<BITS, 1>(row, bytes, numbers, to); });
        if (positions.copies() == 2)
            return rows([=](const char* row, uint16_t* to) { codes<BITS, 2>(row, bytes, numbers, to); });
        rows([=](const char* row, uint16_t* to) { codes<BITS, 4>(row, bytes, numbers, to); });
    }

    FOVEATE_INLINE Floats floats_of_bytes(const char* p) {
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    // Bytes that become floats of 8 digits, LANES at a time.
    template <class Read> FOVEATE_INLINE void in_order(const char* from, int64_t channels, uint16_t* to, Read read) {
        constexpr int64_t WIDTH = 2 * LANES;
        const auto put = [&](const char* p) {
            _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)read(p + LANES), (__m512)read(p)));
            to += WIDTH;
        };
        for (; channels >= WIDTH; channels -= WIDTH, from += WIDTH) put(from);
        if (!channels) return;
        char rest[WIDTH] = {};
        std::memcpy(rest, from, channels);
        put(rest);
    }

    const int64_t rows_, digits_, all_, padded_;
    uint16_t *const buffer_, *const split_;
    uint32_t* const q_;
    float *const scores_, *const scratch_, *const out_;
};

#else

struct StoredPairs {  // there are none
    StoredPairs(Arena&, int64_t, int64_t, int64_t, int64_t) {}
    static bool takes(int64_t, int64_t) { return false; }
    static void begin() {}
    static void end() {}
    void unpack(const Positions&, const char* const*, int64_t, const char* const*) const {}
    void pack_queries(const float*, int64_t) const {}
    void scores(int64_t, int64_t, int64_t, float*) const {}
    void values(int64_t, int64_t, int64_t, const float*, float*) const {}
};

#endif
}  // namespace foveate
