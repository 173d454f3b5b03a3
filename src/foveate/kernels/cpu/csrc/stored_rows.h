// Rows of codes, unpacked into rows of float32. A vector of bytes gives vectors of channels by shifts alone, so that
// they come in an order of their own: positions. Queries are brought into it, and sums back out of it.
#pragma once
#include <vector>

#include "rows.h"
#include "stored_abi.h"

namespace foveate {

inline int bits_of(int64_t format) {
    return format == FOVEATE_AS_INT4 ? 4 : format == FOVEATE_AS_INT2 ? 2 : 8;
}
inline int64_t bytes_of_row(int64_t format, int64_t channels) {
    if (format < FOVEATE_AS_FLOAT8) return channels * bytes_of(format);
    return (channels * bits_of(format) + 7) / 8;
}

// What rows are unpacked into: float32, or bfloat16 for products of pairs, whose values are woven (decode_pairs.h).
enum class Unpacked { FLOATS, PAIRS, WOVEN };

// The channel at each position of an unpacked row; -1: none.
class Positions {
  public:
    void set(int64_t format, int64_t channels, Unpacked as) {
        if (format == format_ && channels == channels_ && as == as_) return;
        format_ = format, channels_ = channels, as_ = as, bytes_ = bytes_of_row(format, channels), copies_ = 1;
        const bool floats = as == Unpacked::FLOATS, shifted = format >= (floats ? FOVEATE_AS_INT8 : FOVEATE_AS_INT4);
        if (shifted)
            shift(floats);
        else
            in_order(floats ? LANES : 2 * LANES);
        if (as == Unpacked::WOVEN) weave();
    }
    int64_t count() const { return (int64_t)channel_.size(); }
    int64_t bytes() const { return bytes_; }
    int64_t format() const { return format_; }
    int64_t copies() const { return copies_; }
    int64_t channels() const { return channels_; }
    Unpacked as() const { return as_; }

    // Numbers by channel in the order of positions, zeros where there is none; and back.
    void spread(const float* from, float* to) const {
        for (int64_t p = 0; p < count(); p += LANES) {
            Ints channel;
            std::memcpy(&channel, channel_.data() + p, sizeof channel);
            const Ints none = channel < 0;
            store(to + p, as_floats(as_words(gather(from, channel & ~none)) & ~(Words)none));
        }
    }
    void gather_back(const float* from, float* to) const {
        for (int64_t p = 0; p < count(); ++p)
            if (channel_[p] >= 0) to[channel_[p]] = from[p];
    }

  private:
    void in_order(int64_t multiple) {
        channel_.assign(round_up(channels_, multiple), -1);
        for (int64_t c = 0; c < channels_; ++c) channel_[c] = (int32_t)c;
    }
    // Of a word, all codes one after the other; or in pairs, those of its halves side by side.
    void shift(bool floats) {
        const int64_t bits = bits_of(format_), halves = floats ? 1 : 2, codes = 32 / bits / halves;
        while (copies_ < 4 && 2 * copies_ <= codes && bytes_ * 2 * copies_ <= FOVEATE_VECTOR_BYTES) copies_ *= 2;
        const int64_t parts = codes / copies_, words = LANES / copies_, size = LANES * halves;
        const int64_t vectors = (bytes_ + FOVEATE_VECTOR_BYTES - 1) / FOVEATE_VECTOR_BYTES;
        channel_.assign(vectors * parts * size, -1);
        for (int64_t p = 0; p < count(); ++p) {
            const int64_t vector = p / (parts * size), part = p / size % parts, lane = p % size / halves;
            const int64_t bit = (lane / words * parts + part) * bits + p % halves * 16;
            const int64_t byte = (vector * LANES + lane % words) * 4 + bit / 8, channel = bit % 8 / bits * bytes_ + byte;
            if (byte < bytes_ && channel < channels_) channel_[p] = (int32_t)channel;
        }
    }
    void weave() {
        const std::vector<int32_t> pairs = channel_;
        for (int64_t p = 0; p < count(); ++p) {
            const int64_t block = p / (2 * LANES) * 2 * LANES, at = p % (2 * LANES);
            channel_[p] = pairs[block + (at < LANES ? 2 * at : 2 * (at - LANES) + 1)];
        }
    }

    int64_t format_ = -1, channels_ = 0, bytes_ = 0, copies_ = 1;
    Unpacked as_ = Unpacked::FLOATS;
    std::vector<int32_t> channel_;
};

// The vector that begins at p, of which `bytes` may be read; zeros behind them.
FOVEATE_INLINE Words load_some(const char* p, int64_t bytes) {
    if (bytes >= FOVEATE_VECTOR_BYTES) return load_words(p);
#if defined(__AVX512BW__)
    return (Words)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
#else
    char whole[FOVEATE_VECTOR_BYTES] = {};
    std::memcpy(whole, p, bytes);
    return load_words(whole);
#endif
}

// COPIES times the first part of a row of so many bytes.
template <int COPIES> FOVEATE_INLINE Words load_copies(const char* p, int64_t bytes) {
    static_assert(COPIES == 2 || COPIES == 4, "a whole vector is load_some's");
    constexpr int SIZE = FOVEATE_VECTOR_BYTES / COPIES;
    char whole[SIZE] = {};
    if (bytes < SIZE) {
        std::memcpy(whole, p, bytes);
        p = whole;
    }
#if defined(__AVX512F__)
    if constexpr (COPIES == 2) return (Words)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    if constexpr (COPIES == 2) return (Words)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    int64_t part;
    std::memcpy(&part, p, SIZE < 8 ? SIZE : 8);
    return (Words)_mm256_set1_epi64x(part);
#else
    Words all_of_it;
    for (int i = 0; i < COPIES; ++i) std::memcpy((char*)&all_of_it + i * SIZE, p, SIZE);
    return all_of_it;
#endif
}

// What codes are unpacked to lies between 1 and 2: two operations a vector, where converting them takes three.
// code = unit * number - unit, which scales take in; 0: numbers are what is meant.
inline float unit_of(int64_t format, Unpacked as) {
    return as == Unpacked::FLOATS && format >= FOVEATE_AS_INT8 ? (float)(1 << bits_of(format)) : 0.0f;
}

// The code in the bits from `first` on of each word, as the first digits of a number from 1 on.
template <int BITS> FOVEATE_INLINE Floats number_of(Words word, int first) {
    constexpr int LAST = 23 - BITS;
    constexpr uint32_t DIGITS = ((1u << BITS) - 1) << LAST, ONE = 0x3f800000u;
    const Words moved = first < LAST ? word << (LAST - first) : word >> (first - LAST);
#if defined(__AVX512F__)
    constexpr int A_AND_B_OR_C = 0xea;
    return (Floats)_mm512_ternarylogic_epi32((__m512i)moved, _mm512_set1_epi32((int)DIGITS), _mm512_set1_epi32((int)ONE),
                                             A_AND_B_OR_C);
#else
    return as_floats((moved & DIGITS) | ONE);
#endif
}

// One row of integer codes as floats.
template <int BITS, int COPIES> FOVEATE_INLINE void unpack_row(const char* from, int64_t bytes, float* to) {
    constexpr int PARTS = 32 / BITS / COPIES, WORDS = LANES / COPIES;
    for (int64_t at = 0; at < bytes; at += FOVEATE_VECTOR_BYTES, to += PARTS * LANES) {
        Words codes;
        if constexpr (COPIES == 1) {
            codes = load_some(from + at, bytes - at);
        } else {
            Words shift{};
            for (int lane = 0; lane < LANES; ++lane) shift[lane] = lane / WORDS * PARTS * BITS;
            codes = load_copies<COPIES>(from, bytes) >> shift;
        }
#pragma GCC unroll 16
        for (int part = 0; part < PARTS; ++part) store(to + part * LANES, number_of<BITS>(codes, part * BITS));
    }
}

// The numbers of LANES bytes of e4m3: with sign and digits where float16 has them, they are 256 times too small.
FOVEATE_INLINE Floats load_float8(const char* p) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8);
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16((short)0xbfff));
    return (Floats)_mm512_cvtph_ps(half) * 256.0f;
#elif defined(__AVX2__)
    const __m128i wide = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8);
    const __m128i half = _mm_and_si128(_mm_srai_epi16(wide, 1), _mm_set1_epi16((short)0xbfff));
    return (Floats)_mm256_cvtph_ps(half) * 256.0f;
#else
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; ++i) halves[i] = (uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
    return load_as_floats(halves, FOVEATE_FLOAT16) * 256.0f;
#endif
}

FOVEATE_INLINE void unpack_float8(const char* from, int64_t channels, float* to) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) store(to + c, load_float8(from + c));
    if (c == channels) return;
    char rest[LANES] = {};
    std::memcpy(rest, from + c, channels - c);
    store(to + c, load_float8(rest));
}

FOVEATE_INLINE void fetch_row(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Unpacks rows by a function that is chosen once for many.
class Unpacker {
  public:
    explicit Unpacker(const Positions& positions) : positions_(positions), channels_(positions.channels()) {}

    // Rows `from` into `to`, (count, positions); asks for the rows `next` (null: none) meanwhile.
    void operator()(const char* const* from, int64_t count, float* to, const char* const* next) const {
        if (positions_.format() == FOVEATE_AS_INT8) return codes<8>(from, count, to, next);
        if (positions_.format() == FOVEATE_AS_INT4) return codes<4>(from, count, to, next);
        if (positions_.format() == FOVEATE_AS_INT2) return codes<2>(from, count, to, next);
        if (positions_.format() == FOVEATE_AS_FLOAT8)
            return rows(from, count, to, next, [channels = channels_](const char* row, int64_t, float* made) {
                unpack_float8(row, channels, made);
            });
        const int64_t format = positions_.format(), channels = channels_, size = positions_.count();
        rows(from, count, to, next,
             [=](const char* row, int64_t, float* made) { read_row(made, row, format, 1, channels, size); });
    }

  private:
    template <int BITS>
    void codes(const char* const* from, int64_t count, float* to, const char* const* next) const {
        if (positions_.copies() == 1) return copied<BITS, 1>(from, count, to, next);
        if (positions_.copies() == 2) return copied<BITS, 2>(from, count, to, next);
        copied<BITS, 4>(from, count, to, next);
    }
    template <int BITS, int COPIES>
    void copied(const char* const* from, int64_t count, float* to, const char* const* next) const {
        rows(from, count, to, next,
             [](const char* row, int64_t bytes, float* made) { unpack_row<BITS, COPIES>(row, bytes, made); });
    }
    template <class Unpack>
    FOVEATE_INLINE_MEMBER void rows(const char* const* from, int64_t count, float* to, const char* const* next,
                                    Unpack unpack) const {
        const int64_t bytes = positions_.bytes(), size = positions_.count();
        for (int64_t i = 0; i < count; ++i, to += size) {
            if (next) fetch_row(next[i], bytes);
            unpack(from[i], bytes, to);
        }
    }

    const Positions& positions_;
    const int64_t channels_;
};

}  // namespace foveate
