// What the selective scan's two passes share: which channels go together, and a segment's numbers made ready.
#pragma once
#include "exp.h"
#include "streams.h"

namespace foveate {

// Channels that share their groups of b and c, and hence one work item.
FOVEATE_INLINE Parts parts_of(const FoveateScan& call) {
    const int64_t shares_b = call.channels / call.groups_b, shares_c = call.channels / call.groups_c;
    return Parts(call.channels, std::gcd(shares_b, shares_c));
}

FOVEATE_INLINE int64_t threads_for(const FoveateScan& call) {
    const int64_t tokens = call.starts ? call.starts[call.sequences] : call.sequences * call.length;
    constexpr double OF_EXPONENTIAL = 16;  // multiply-adds that take as long as it
    return worthwhile_threads(OF_EXPONENTIAL * tokens * call.channels * call.states, 0, call.threads);
}

// ln(1 + e) for e in [0, 1]: the series of 2 atanh(e / (2 + e)).
FOVEATE_INLINE Floats log1p_of(Floats e) {
    const Floats t = e / (e + 2.0f), y = t * t;
    Floats p = y * (1 / 15.0f) + 1 / 13.0f;
    p = p * y + 1 / 11.0f;
    p = p * y + 1 / 9.0f;
    p = p * y + 1 / 7.0f;
    p = p * y + 1 / 5.0f;
    p = p * y + 1 / 3.0f;
    return (p * y + 1.0f) * t * 2.0f;
}

FOVEATE_INLINE Floats softplus_of(Floats x) {
    const Floats zero{};
    return greater(zero, x) + log1p_of(exp_of(x < zero ? x : -x));
}

FOVEATE_INLINE Floats sigmoid_of(Floats x) { return 1.0f / (exp_of(-x) + 1.0f); }

// The vectors b or c of n tokens as [token][state], ones where there are none.
inline void read_vectors(float* to, int64_t pitch, const FoveateStream& x, int64_t batch, int64_t token,
                                 int64_t n, int64_t group, int64_t states, float* turned) {
    if (!x.data) return (void)std::fill_n(to, n * pitch, 1.0f);
    const char* from = place(x, batch, token, group);
    read_block(to, pitch, from, x.dtype, x.stride[1], x.stride[3], n, states, turned);
}

// The sum over the lanes of each of LANES vectors.
FOVEATE_INLINE Floats sum_each(const float* vectors) {
    Words x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = load_words(vectors + i * LANES);
    transpose(x);
    Floats total{};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) total += as_floats(x[i]);
    return total;
}

// A block's state [state][lane] before a segment, to or from its mark.
FOVEATE_INLINE float* mark_of(const FoveateScan& call, int64_t mark, int64_t channel) {
    return call.marks + mark * call.states * call.channels + channel;
}

}  // namespace foveate
