// Products of rows with a chunk of keys or values by instructions that multiply pairs of bfloat16: keys are read from
// where they lie, values are woven into pairs first.
#pragma once
#include "decode_ahead.h"
#include "decode_rows.h"
#include "gemm.h"

#if FOVEATE_HAS_BFLOAT16
namespace foveate {

struct PairProducts {
    using Reads = Bfloat16Reads;
    using Query = uint32_t;
    static constexpr int64_t GRAIN = Bfloat16::GRAIN_M;
    static constexpr int64_t SPARE_ROWS = LANES - 1;
#if defined(__AMX_BF16__)
    static constexpr int64_t FEWEST_ROWS = 5;  // for which they are faster than products in lanes, measured
#else
    static constexpr int64_t FEWEST_ROWS = LANES;  // those that fill a vector
#endif

    static void begin() { Bfloat16::begin(); }
    static void end() { Bfloat16::end(); }
    static int64_t query_size(int64_t rows, int64_t channels) { return round_up(rows, LANES) * channels / 2; }
    static int64_t scratch_size(int64_t rows) { return std::max(2 * BLOCK, round_up(rows, LANES) * TILE); }
    static int64_t work(int64_t, int64_t channels) { return TILE * channels; }

    // Pairs of channels, (channels / 2, rows).
    static void pack(const uint16_t* from, int64_t rows, int64_t channels, uint32_t* to) {
        transpose_words(to, round_up(rows, LANES), from, channels / 2, rows, channels / 2);
    }

    static void scores(const Rows<Reads>& keys, int64_t channels, const uint32_t* q, int64_t rows, float* scores,
                       float* scratch, Ahead& ahead) {
        const int64_t ld = round_up(rows, LANES);
        for (int64_t k = 0; k < keys.count; k += TILE / 2) {
            ahead.advance(TILE / 2 * channels);
            const int64_t count = round_up(std::min<int64_t>(keys.count - k, TILE / 2), GRAIN);
            const Left<uint16_t> left{keys.data + k * keys.stride, keys.stride, 1};
            Bfloat16::multiply(count, (int)(ld / LANES), channels, left, q, ld, scratch + k * ld, ld, false);
        }
        transpose_words(scores, TILE, scratch, ld, TILE, rows);
    }

    // Weaves a block of channels before it multiplies the one before: what was just stored cannot be read at once.
    static void add_values(const Rows<Reads>& values, int64_t channels, float* weights, int64_t rows, float* out,
                           float* scratch, Ahead& ahead) {
        uint32_t *woven = (uint32_t*)scratch, *next = woven + BLOCK;
        const int64_t count = round_up(values.count, Bfloat16::GRAIN_K);
        const Left<uint16_t> left{narrow(weights, rows), TILE, 1};
        weave(values, 0, count, woven, ahead);
        for (int64_t c = 0; c < channels; c += WIDTH, std::swap(woven, next)) {
            if (c + WIDTH < channels) weave(values, c + WIDTH, count, next, ahead);
            Bfloat16::multiply(round_up(rows, GRAIN), WIDTH / LANES, count, left, woven, WIDTH, out + c, channels,
                               true);
        }
    }

  private:
    static constexpr int64_t WIDTH = CHANNELS<Reads>, BLOCK = TILE / 2 * WIDTH;

    // Pairs of values, (keys / 2, WIDTH) in the order of reads; zeros behind the last.
    static void weave(const Rows<Reads>& values, int64_t channel, int64_t count, uint32_t* to, Ahead& ahead) {
        for (int64_t k = 0; k < count; k += 2, to += WIDTH) {
            ahead.advance(2 * WIDTH);
            Words first = load_words(values.row(k) + channel), second = load_words(values.row(k + 1) + channel);
            if (k >= values.count) first = Words{};
            if (k + 1 >= values.count) second = Words{};
            store_words(to, (first & 0xffffu) | (second << 16));
            store_words(to + LANES, (first >> 16) | (second & 0xffff0000u));
        }
    }

    // Rows of weights (rows, 64) as bfloat16, in their place.
    static const uint16_t* narrow(float* weights, int64_t rows) {
        uint16_t* to = (uint16_t*)weights;
        for (int64_t i = 0; i < rows * TILE; i += 2 * LANES) {
            const __m512 low = (__m512)load(weights + i), high = (__m512)load(weights + i + LANES);
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        return to;
    }
};

}  // namespace foveate
#endif
