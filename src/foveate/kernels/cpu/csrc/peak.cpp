// What this machine reaches at best, the limits that benchmarks are held against: multiply-adds and bytes per second.
#include <chrono>

#include "abi.h"
#include "threads.h"
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foveate {

static constexpr int CHAINS = 12;  // independent sums: enough to hide the latency, few enough for 16 registers
static constexpr int ROUNDS = 100000;

static double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Makes the compiler believe that the value is read and changed here.
template <class Value> static void touch(Value& value) { asm volatile("" : "+m"(value) : : "memory"); }

static double multiply_adds() {
    Floats sums[CHAINS] = {};
    touch(sums);  // or the compiler sees that all chains are one
    for (int round = 0; round < ROUNDS; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * 0.999f + 1e-5f;
    touch(sums);
    return 2.0 * ROUNDS * CHAINS * LANES;
}

#if defined(__AVX512BF16__)
static double dot_products() {
    __m512 sums[CHAINS] = {};
    const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00), tiny = (__m512bh)_mm512_set1_epi16(0x3a00);
    touch(sums);
    for (int round = 0; round < ROUNDS; ++round)
#pragma GCC unroll 12
        for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], half, tiny);
    touch(sums);
    return 2.0 * ROUNDS * CHAINS * 2 * LANES;
}
#endif

#if defined(__AMX_BF16__)
struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static bool may_use_tiles() {
    constexpr int ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
}

static double tile_products() {
    TileShapes shapes;
    touch(shapes);  // GCC's _tile_loadconfig claims to read its first 8 bytes only
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int round = 0; round < ROUNDS; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * ROUNDS * 4 * (16 * 16 * 32);
}
#endif

// Operations per second: each thread's best while all of them run, added up.
template <class Work> static double best_rate(int threads, double seconds, Work work) {
    std::atomic<double> total{0};
    on_threads(threads, [&](int64_t) {
        double best = 0;
        const double end = now() + seconds;
        for (double start = now(); start < end; start = now()) {
            const double operations = work();
            best = std::max(best, operations / (now() - start));
        }
        for (double before = total; !total.compare_exchange_weak(before, before + best);) {
        }
    });
    return total;
}

static void read_all(const Words* data, int64_t count) {
    Words sums[8] = {};
    for (int64_t i = 0; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sums[j] += load_words(data + i + j);
    touch(sums);
}

}  // namespace foveate

// Float32 operations per second of fused multiply-adds on all threads at once, tried for so many seconds.
FOVEATE_API double foveate_peak_fma(int threads, double seconds) {
    return foveate::best_rate(threads, seconds, foveate::multiply_adds);
}

// The same for bfloat16 products added up in float32, by the best instruction this library is compiled for.
FOVEATE_API double foveate_peak_bf16(int threads, double seconds) {
    double best = foveate_peak_fma(threads, seconds);
#if defined(__AVX512BF16__)
    best = std::max(best, foveate::best_rate(threads, seconds, foveate::dot_products));
#endif
#if defined(__AMX_BF16__)
    if (foveate::may_use_tiles()) best = std::max(best, foveate::best_rate(threads, seconds, foveate::tile_products));
#endif
    return best;
}

// Bytes per second of reading memory once from end to end, each thread a part of it.
FOVEATE_API double foveate_peak_read(const void* memory, int64_t bytes, int threads) {
    const auto* data = static_cast<const foveate::Words*>(memory);
    const int64_t part = bytes / (int64_t)sizeof(foveate::Words) / threads;
    const double start = foveate::now();
    foveate::on_threads(threads, [&](int64_t thread) { foveate::read_all(data + thread * part, part); });
    return (double)(part * threads * (int64_t)sizeof(foveate::Words)) / (foveate::now() - start);
}
