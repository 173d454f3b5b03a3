// One vector of the widest registers that the compiler was told of, and what the kernels do with it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FOVEATE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FOVEATE_VECTOR_BYTES 32
#else
#define FOVEATE_VECTOR_BYTES 16
#endif

namespace foveate {

typedef float Floats __attribute__((vector_size(FOVEATE_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(FOVEATE_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FOVEATE_VECTOR_BYTES)));

constexpr int LANES = FOVEATE_VECTOR_BYTES / 4;
constexpr int TILE = 64;  // queries of a work item, and keys of a chunk
constexpr int MAX_VECTORS = TILE / LANES;
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;
constexpr double LOG2E_EXACT = 1.44269504088896340736, LN2_EXACT = 0.693147180559945309417;

#define FOVEATE_INLINE static inline __attribute__((always_inline))
#define FOVEATE_INLINE_MEMBER inline __attribute__((always_inline))

FOVEATE_INLINE Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
FOVEATE_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
FOVEATE_INLINE Floats all(float x) { return x - Floats{}; }
FOVEATE_INLINE Words as_words(Floats x) { return (Words)x; }
FOVEATE_INLINE Floats as_floats(Words x) { return (Floats)x; }
FOVEATE_INLINE Words load_words(const void* p) {
    Words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
FOVEATE_INLINE void store_words(void* p, Words x) { std::memcpy(p, &x, sizeof x); }

// The greater of a and b; b where one of them is NaN.
FOVEATE_INLINE Floats greater(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
FOVEATE_INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// 2^x for x <= 127; 0 where that underflows (-inf too), NaN for NaN. The polynomials are minimax: relative error 1e-7
// (degree 5, exactly 1 at 0: what is kept over and over must not shrink), or 7.5e-5 (degree 3, for weights that are
// rounded to bfloat16).
#if defined(__AVX512F__)
template <int DEGREE = 5> FOVEATE_INLINE Floats exp2_of(Floats x) {
    constexpr int DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, DOWN);  // x - floor(x)
    Floats p;
    if constexpr (DEGREE == 3) {
        p = f * 0x1.3f96a4p-4f + 0x1.cefc4cp-3f;
        p = p * f + 0x1.64444cp-1f;
        p = p * f + 0x1.fff632p-1f;
    } else {
        p = f * 0x1.e974fcp-10f + 0x1.277854p-7f;
        p = p * f + 0x1.c91ce6p-5f;
        p = p * f + 0x1.ebdb56p-3f;
        p = p * f + 0x1.62e4bap-1f;
        p = p * f + 1.0f;
    }
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
}
#else
template <int DEGREE = 5> FOVEATE_INLINE Floats exp2_of(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    const Ints tiny = x < -126.0f;
    x = greater(all(-126.0f), x);
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    const Words scaled = as_words(p) + (as_words(shifted) << 23);
    return tiny ? Floats{} : as_floats(scaled);
}
#endif

// log2 of positive normal numbers, to about 1e-7: exponent, and the series of atanh for the mantissa.
FOVEATE_INLINE Floats log2_of(Floats x) {
    const Ints bits = (Ints)x, exponent = (bits - 0x3f3504f3) >> 23;  // mantissas from sqrt(1/2) to sqrt(2)
    const Floats m = (Floats)(bits - (exponent << 23));
    const Floats t = (m - 1.0f) / (m + 1.0f), y = t * t;
    Floats p = y * (1 / 9.0f) + 1 / 7.0f;
    p = p * y + 1 / 5.0f;
    p = p * y + 1 / 3.0f;
    p = p * y + 1.0f;
    return p * t * (2 * LOG2E) + __builtin_convertvector(exponent, Floats);
}

FOVEATE_INLINE float sum_lanes(Floats x) {
    float lanes[LANES], total = 0;
    store(lanes, x);
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
}

FOVEATE_INLINE Floats gather(const float* from, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)index, from, 4);
#elif defined(__AVX2__)
    return (Floats)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
    Floats x;
    for (int i = 0; i < LANES; ++i) x[i] = from[index[i]];
    return x;
#endif
}

// The lanes of `yes` whose bit is set, else of `no`.
FOVEATE_INLINE Floats choose(uint32_t bits, Floats yes, Floats no) {
#if defined(__AVX512F__)
    return (Floats)_mm512_mask_blend_ps((__mmask16)bits, (__m512)no, (__m512)yes);
#else
    Words lane{};
    for (int i = 0; i < LANES; ++i) lane[i] = 1u << i;
    return ((lane & bits) != 0) ? yes : no;
#endif
}

#if defined(__AVX512BF16__)
// Two bfloat16 in each word, rounded to nearest even: the first in the low half.
FOVEATE_INLINE Words pair_bfloat16(Floats first, Floats second) {
    alignas(64) static constexpr uint16_t LOW_HIGH[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (Words)_mm512_permutexvar_epi16(_mm512_load_si512(LOW_HIGH), halves);
}
#endif

FOVEATE_INLINE float from_bfloat16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
FOVEATE_INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#if defined(__F16C__)
FOVEATE_INLINE float from_float16(uint16_t x) { return _cvtsh_ss(x); }
FOVEATE_INLINE uint16_t to_float16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__ARM_NEON)
FOVEATE_INLINE float from_float16(uint16_t x) {
    __fp16 half;
    std::memcpy(&half, &x, 2);
    return half;
}
FOVEATE_INLINE uint16_t to_float16(float x) {
    const __fp16 half = x;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
#else
#error "Foveate's kernels need AVX2 with F16C, or NEON"
#endif

}  // namespace foveate
