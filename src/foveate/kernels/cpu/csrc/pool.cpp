// Means of blocks of tokens, in float32.
#include "abi.h"
#include "rows.h"
#include "threads.h"

namespace foveate {
namespace {

constexpr int64_t WIDE = 4;  // vectors summed side by side

struct Pooling {
    const FoveateTensor* x;
    int64_t dtype, tokens, dim, block, lead, blocks;
    float* out;  // (batch, heads, blocks, dim)

    void mean(int64_t plane, int64_t number) const {
        const int64_t first = std::max<int64_t>(number * block - lead, 0);
        const int64_t count = std::min((number + 1) * block - lead, tokens) - first;
        const char* from = at(*x, dtype, plane / x->heads, plane % x->heads, first);
        float* to = out + (plane * blocks + number) * dim;
        int64_t channel = 0;
        if (x->stride[3] == 1) {
            for (; channel + WIDE * LANES <= dim; channel += WIDE * LANES) vectors<WIDE>(from, count, channel, to);
            for (; channel + LANES <= dim; channel += LANES) vectors<1>(from, count, channel, to);
        }
        for (; channel < dim; ++channel) one(from, count, channel, to);
    }

  private:
    template <int NUMBER> void vectors(const char* from, int64_t count, int64_t channel, float* to) const {
        const int64_t bytes = bytes_of(dtype);
        Floats sums[NUMBER] = {};
        for (int64_t token = 0; token < count; ++token)
            for (int i = 0; i < NUMBER; ++i) {
                const char* place = from + (token * x->stride[2] + channel + i * LANES) * bytes;
                sums[i] += load_as_floats(place, dtype);
            }
        for (int i = 0; i < NUMBER; ++i) store(to + channel + i * LANES, sums[i] / (float)count);
    }
    void one(const char* from, int64_t count, int64_t channel, float* to) const {
        float sum = 0;
        for (int64_t token = 0; token < count; ++token)
            sum += load_one(from + (token * x->stride[2] + channel * x->stride[3]) * bytes_of(dtype), dtype);
        to[channel] = sum / (float)count;
    }
};

}  // namespace
}  // namespace foveate

// Numbers: dtype, batch, tokens, dim, tokens of a block, those that the first block lacks, blocks.
FOVEATE_API int64_t foveate_pool(const FoveateTensor* x, const int64_t* numbers, float* out, int64_t threads) {
    for (int i = 0; i < 7; ++i)
        if (numbers[i] < 0 || (i == 0 && numbers[i] > FOVEATE_FLOAT16) || (i == 4 && numbers[i] < 1)) return FOVEATE_REFUSED;
    const foveate::Pooling pooling{x, numbers[0], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], out};
    foveate::Queue queue(numbers[1] * x->heads * pooling.blocks, 8);
    const double read = (double)(numbers[1] * x->heads) * (double)(numbers[2] * numbers[3]) * foveate::bytes_of(numbers[0]);
    const bool done = foveate::on_threads(foveate::worthwhile_threads(0, 2 * read, threads), [&](int64_t) {
        queue.run([&](int64_t i) { pooling.mean(i / pooling.blocks, i % pooling.blocks); });
    });
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}
