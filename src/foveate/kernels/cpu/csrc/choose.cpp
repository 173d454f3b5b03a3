// The best blocks of each row of scores, or the fewest whose shares suffice, as bits: foveate/patterns/rules/choose.py has
// the definitions.
#include <limits>
#include <vector>

#include "abi.h"
#include "threads.h"
#include "words.h"

namespace foveate::selection {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();  // the score of what may not be chosen
constexpr float WHOLE = 1 << 30;                                  // what the shares of a row add up to

// Whole numbers in the order of floats, NaN the greatest; no zero is below another.
FOVEATE_INLINE uint32_t rank_of(float x) {
    const float number = x + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rank = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    return x == x ? rank : ~0u;
}
FOVEATE_INLINE uint32_t share_of(float x) { return (uint32_t)(int32_t)__builtin_rintf(x > 0 ? x * WHOLE : 0.0f); }

// What a row takes: every number above one, and the first few that equal it.
struct Cut {
    uint32_t above;
    int64_t equals;
};

FOVEATE_INLINE float float_of(uint32_t rank) {
    const uint32_t bits = rank & 0x80000000u ? rank ^ 0x80000000u : ~rank;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Between two ranks, above the first: by turns halfway between the numbers, which is quick where they are spread
// evenly, and between the ranks, which halves whatever there is.
FOVEATE_INLINE uint32_t middle_of(uint32_t low, uint32_t high, bool by_number) {
    if (!by_number) return low + (high - low) / 2 + 1;
    const uint32_t middle = rank_of(0.5f * float_of(low) + 0.5f * float_of(high));
    return std::min(std::max(middle, low + 1), high);
}

// For the greatest `count` of more numbers than that.
Cut cut_at_count(const uint32_t* ranks, int64_t n, int64_t count) {
    const auto at_least = [&](uint32_t rank) {
        int32_t found = 0;
        for (int64_t i = 0; i < n; ++i) found += ranks[i] >= rank;
        return found;
    };
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < n; ++i) {
        low = std::min(low, ranks[i]);
        high = std::max(high, ranks[i]);
    }
    for (int turn = 1; low < high; ++turn) {  // the last one taken is between them
        const uint32_t middle = middle_of(low, high, turn % 4);
        const int64_t found = at_least(middle);
        if (found == count) return Cut{middle - 1, 0};
        if (found > count)
            low = middle;
        else
            high = middle - 1;
    }
    return Cut{low, low == ~0u ? count : count - at_least(low + 1)};
}

// For the fewest that add up to a sum, or all.
Cut cut_at_sum(const uint32_t* shares, int64_t n, int64_t wanted) {
    const auto sum_above = [&](uint32_t share) {
        uint32_t sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += shares[i] > share ? shares[i] : 0;
        return (int64_t)sum;
    };
    int64_t enough = sum_above(0);
    if (enough < wanted) return Cut{0, n};
    uint32_t low = 0, high = 0;
    for (int64_t i = 0; i < n; ++i) high = std::max(high, shares[i]);
    int64_t before = 0;        // the sum of those above `high`, which do not suffice
    while (high - low > 1) {  // those above `low` do
        const uint32_t middle = low + (high - low) / 2;
        const int64_t sum = sum_above(middle);
        if (sum < wanted) {
            high = middle;
            before = sum;
        } else {
            low = middle;
            enough = sum;
        }
        if (enough - before < 2 * ((int64_t)low + 1)) return Cut{low, 0};  // there is only one between them
    }
    return Cut{high, (wanted - before + high - 1) / high};
}

struct Choosing {
    const float* scores;  // (planes, rows, columns)
    int64_t planes, rows, columns;
    const int64_t* own;                           // of each row the block it always gets, where only those before it
    int64_t rows_per_word, num_blocks, plane_stride;  // compete; null: all compete
    int64_t budget, by_share;                         // how many of the best, or how great a sum
    uint64_t* words;  // (planes, words, num_blocks): bit r of a word is row r of the rows_per_word under it
};

// One thread's working memory, and its way through a word of rows.
class Chooser {
  public:
    explicit Chooser(const Choosing& call)
        : call_(call), groups_((call.columns + TILE - 1) / TILE), numbers_(call.columns), marks_(groups_ * TILE),
          squares_(groups_) {}

    void choose(int64_t plane, int64_t word) {
        const int64_t first = word * call_.rows_per_word, count = std::min(call_.rows_per_word, call_.rows - first);
        uint64_t* to = call_.words + plane * call_.plane_stride + word * call_.num_blocks;
        if (call_.rows_per_word == 1) {
            choose_row(plane, first);
            for (int64_t block = 0; block < call_.columns; ++block) to[block] = marks_[block];
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            choose_row(plane, first + i);
            for (int64_t group = 0; group < groups_; ++group)
                squares_[group].rows[i] = pack_marks(marks_.data() + group * TILE);
        }
        for (int64_t group = 0; group < groups_; ++group) write(group, count, to + group * TILE);
    }

  private:
    // Words of the rows' bits at each of up to 64 blocks.
    void write(int64_t group, int64_t count, uint64_t* to) {
        Square& square = squares_[group];
        std::fill(square.rows + count, square.rows + TILE, 0);
        transpose(square);
        std::memcpy(to, square.rows, std::min<int64_t>(TILE, call_.columns - group * TILE) * sizeof *to);
    }

    // Marks what a row takes.
    void choose_row(int64_t plane, int64_t row) {
        const float* scores = call_.scores + (plane * call_.rows + row) * call_.columns;
        const int64_t own = call_.own ? call_.own[row] : -1;
        const int64_t limit = call_.own ? std::min(std::max<int64_t>(own, 0), call_.columns) : call_.columns;
        mark(scores, limit);
        std::fill(marks_.begin() + limit, marks_.end(), 0);
        if (own >= 0 && own < call_.columns) marks_[own] = 1;
    }

    void mark(const float* scores, int64_t n) {
        const Cut cut = cut_of(scores, n);
        for (int64_t i = 0; i < n; ++i) marks_[i] = (numbers_[i] > cut.above) & (scores[i] > NEVER);
        int64_t equals = cut.equals;
        for (int64_t i = 0; equals > 0 && i < n; ++i) {
            if (numbers_[i] != cut.above) continue;
            marks_[i] = scores[i] > NEVER;
            --equals;
        }
    }
    Cut cut_of(const float* scores, int64_t n) {
        if (call_.by_share) {
            for (int64_t i = 0; i < n; ++i) numbers_[i] = share_of(scores[i]);
            return cut_at_sum(numbers_.data(), n, call_.budget);
        }
        for (int64_t i = 0; i < n; ++i) numbers_[i] = rank_of(scores[i]);
        return n <= call_.budget ? Cut{0, 0} : cut_at_count(numbers_.data(), n, call_.budget);
    }

    const Choosing& call_;
    const int64_t groups_;
    std::vector<uint32_t> numbers_;
    std::vector<uint8_t> marks_;
    std::vector<Square> squares_;
};

}  // namespace
}  // namespace foveate::selection

// Numbers: planes, rows, columns, rows_per_word, num_blocks, plane_stride, budget, by_share, as in Choosing.
FOVEATE_API int64_t foveate_choose(const float* scores, const int64_t* own, uint64_t* words, const int64_t* numbers,
                                   int64_t threads) {
    const foveate::selection::Choosing call{scores,     numbers[0], numbers[1], numbers[2], own,  numbers[3],
                                            numbers[4], numbers[5], numbers[6], numbers[7], words};
    if (call.planes < 0 || call.rows < 0 || call.columns < 0 || call.rows_per_word < 1) return FOVEATE_REFUSED;
    const int64_t per_plane = (call.rows + call.rows_per_word - 1) / call.rows_per_word;
    foveate::Queue queue(call.planes * per_plane, 4);
    constexpr double OF_SCORE = 100;  // multiply-adds that take as long as to rank one
    const double work = OF_SCORE * (double)call.planes * (double)call.rows * (double)call.columns;
    const bool done = foveate::on_threads(foveate::worthwhile_threads(work, 0, threads), [&](int64_t) {
        foveate::selection::Chooser chooser(call);
        queue.run([&](int64_t i) { chooser.choose(i / per_plane, i % per_plane); });
    });
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}
