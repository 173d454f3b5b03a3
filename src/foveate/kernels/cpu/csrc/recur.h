// What the two passes of the recurrence share: where tokens lie, and blocks of them as float32 rows.
#pragma once
#include "exp.h"
#include "recur_abi.h"
#include "rows.h"
#include "threads.h"

namespace foveate::recurrence {

constexpr int64_t SEGMENT = 64;  // tokens from one checkpoint to the next, and packed at a time

// Tensors that cannot be: a mistake of whoever describes the call, which must not become a read of any memory.
inline bool is_refused(const FoveateRecur& call) {
    if (call.sequences < 0 || call.states < 0 || call.tokens < 0 || call.dim < 0 || call.value_dim < 0) return true;
    if (call.threads < 1 || (call.decay_channels != 1 && call.decay_channels != call.dim && call.decay.data)) return true;
    const bool some = call.sequences && call.states && call.tokens;
    for (const FoveateRows* x : {&call.q, &call.k, &call.v, &call.out, &call.decay, &call.beta, &call.a, &call.b}) {
        if (!x->data) continue;
        if (x->dtype < FOVEATE_FLOAT32 || x->dtype > FOVEATE_FLOAT16) return true;
        if (some && x->heads < 1) return true;
    }
    return some && (!call.q.data || !call.k.data || (call.value_dim && !call.v.data));
}

// Numbers of the state that all tokens change.
inline double numbers_updated(const FoveateRecur& call) {
    const double tokens = (double)call.tokens * (call.starts ? 1 : call.sequences);
    return tokens * (double)call.states * (double)(call.dim * call.value_dim);
}

// One head of a tensor along one sequence.
class Line {
  public:
    Line(const FoveateRows& x, int64_t batch, int64_t head, int64_t first)
        : bytes_(bytes_of(x.dtype)), dtype_(x.dtype), row_(x.stride[2]), channel_(x.stride[3]),
          data_((char*)x.data + (batch * x.stride[0] + head * x.stride[1] + first * x.stride[2]) * bytes_) {}

    char* at(int64_t token) const { return data_ + token * row_ * bytes_; }
    bool direct() const { return dtype_ == FOVEATE_FLOAT32 && channel_ == 1; }
    int64_t row() const { return row_; }
    float one(int64_t token) const { return load_one(at(token), dtype_); }
    void read(float* to, int64_t token, int64_t n, int64_t padded) const {
        read_row(to, at(token), dtype_, channel_, n, padded);
    }
    void write(int64_t token, const float* from, int64_t n) const {
        write_row(at(token), dtype_, channel_, from, n);
    }
    void write_one(int64_t token, float x) const { store_one(at(token), x, dtype_); }

  private:
    int64_t bytes_, dtype_, row_, channel_;
    char* data_;
};

// Float32 rows: where they lie, or copies.
struct Rows {
    const float* data;
    int64_t row;
    const float* at(int64_t i) const { return data + i * row; }
};

inline Rows rows_of(const Line& line, int64_t first, int64_t count, int64_t n, int64_t padded, float* space) {
    if (line.direct() && n == padded) return {(const float*)line.at(first), line.row()};
    for (int64_t t = 0; t < count; ++t) line.read(space + t * padded, first + t, n, padded);
    return {space, padded};
}

// A sequence of a call: which entry of the batch, where it begins, how long it is, where its checkpoints begin.
struct Sequence {
    int64_t batch, first, length, segment;

    Sequence(const FoveateRecur& call, int64_t i) {
        batch = call.starts ? 0 : i;
        first = call.starts ? call.starts[i] : 0;
        length = call.starts ? call.starts[i + 1] - first : call.tokens;
        segment = call.starts ? first / SEGMENT + i : i * ((call.tokens + SEGMENT - 1) / SEGMENT);
    }
};

// One state of one sequence: the lines of its tokens.
class Head {
  public:
    Head(const FoveateRecur& call, int64_t sequence, int64_t state)
        : call(call), sequence(call, sequence), state(state), index(sequence * call.states + state) {}

    Line line(const FoveateRows& x) const { return line(x, state / (call.states / x.heads)); }
    // Of a tensor with `queries` heads a state.
    Line line(const FoveateRows& x, int64_t head) const { return {x, sequence.batch, head, sequence.first}; }
    int64_t queries() const { return call.q.heads / call.states; }
    int64_t query_head(int64_t r) const { return state * queries() + r; }
    int64_t state_size() const { return call.dim * call.value_dim; }
    float* checkpoint(int64_t segment) const {
        return call.checkpoints + ((sequence.segment + segment) * call.states + state) * state_size();
    }

    const FoveateRecur& call;
    const Sequence sequence;
    const int64_t state, index;
};

inline bool all_of(Ints yes) {
    int32_t lanes[LANES];
    std::memcpy(lanes, &yes, sizeof lanes);
    return std::all_of(lanes, lanes + LANES, [](int32_t x) { return x != 0; });
}

// exp(decay) of `count` tokens: one number each, or rows of them padded by ones. Whether all decays are at most 0.
inline bool read_factors(const Head& head, int64_t first, int64_t count, int64_t padded, float* to) {
    Ints fine = Ints{} - 1;
    const auto exponentiate = [&](float* row, int64_t n) {
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats x = load(row + i);
            fine &= x <= 0.0f;
            store(row + i, exp_of(x));
        }
    };
    const Line line = head.line(head.call.decay);
    const int64_t n = head.call.decay_channels;
    if (n == 1) {
        for (int64_t t = 0; t < count; ++t) to[t] = line.one(first + t);
        std::fill(to + count, to + round_up(count, LANES), 0.0f);
        exponentiate(to, count);
        return all_of(fine);
    }
    for (int64_t t = 0; t < count; ++t) {
        float* row = to + t * padded;
        line.read(row, first + t, n, padded);
        exponentiate(row, padded);
    }
    return all_of(fine);
}

}  // namespace foveate::recurrence
