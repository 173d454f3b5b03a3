// The recurrence, backward: segment by segment from the last to the first, each replayed from its checkpoint.
//
// Lanes run along the key channels here, so that all sums over value channels are sums of vectors. A state is held by
// the vectors of its key channels, each for a few value channels: [block of value channels][vector][channel][lane]. The
// delta rule runs as the low-rank
// transition that it is: a = factor k, b = -beta k, and beta k in the place of k.
#include "pages.h"
#include "recur.h"

namespace foveate::recurrence {
namespace {

constexpr int AT_ONCE = LANES / 2;         // value channels: two sums for each are one vector
// Numbers of as many channels, copied to where the compiler knows that nothing else is written.
struct Channels {
    float x[AT_ONCE];
    explicit Channels(const float* from) { std::memcpy(x, from, sizeof x); }
    float operator[](int i) const { return x[i]; }
};
constexpr int BLOCK = AT_ONCE * LANES;  // numbers of one vector of key channels

// Lane i of the result: the sum of all lanes of x[i].
FOVEATE_INLINE Floats sums_of(Words (&x)[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            Words low = x[i], high = x[i + half];
            interleave(low, high);
            x[i] = as_words(as_floats(low) + as_floats(high));
        }
    return as_floats(x[0]);
}

struct Workspace {
    float *q, *k, *factors, *a, *b, *keys, *beta, *v, *grad_out;      // inputs of a segment
    float *states, *recalled, *grad_state;                             // [token][channel][dim], [token][..], all channels
    float *dq, *dk, *dfactors, *da, *db, *dv, *checkpoint;

    Workspace(Arena& arena, const FoveateRecur& call) {
        const int64_t queries = call.q.heads / call.states, dim = round_up(call.dim, LANES), rows = SEGMENT * dim;
        const int64_t values = round_up(call.value_dim, LANES);
        q = arena.take<float>(rows * queries);
        for (float** each : {&k, &factors, &a, &b, &keys, &dk, &dfactors, &da, &db}) *each = arena.take<float>(rows);
        beta = arena.take<float>(SEGMENT);
        v = arena.take<float>(SEGMENT * values);
        grad_out = arena.take<float>(SEGMENT * queries * values);
        states = arena.take<float>((SEGMENT + 1) * AT_ONCE * dim);
        recalled = arena.take<float>(SEGMENT * AT_ONCE);
        grad_state = arena.take<float>(values * dim);
        dq = arena.take<float>(rows * queries);
        dv = arena.take<float>(SEGMENT * values);
        checkpoint = arena.take<float>(values * dim);
    }
};

class Backward {
  public:
    Backward(const Head& head, const Workspace& space)
        : head_(head), call_(head.call), space_(space), dim_(round_up(call_.dim, LANES)),
          values_(round_up(call_.value_dim, LANES)), queries_(head.queries()), delta_(call_.beta.data),
          turns_(call_.beta.data || call_.a.data) {}

    void run() {
        const float* from = call_.grad_final ? call_.grad_final + head_.index * head_.state_size() : nullptr;
        read_transposed(space_.grad_state, from);
        const int64_t length = head_.sequence.length;
        for (int64_t first = (length - 1) / SEGMENT * SEGMENT; first >= 0 && length > 0; first -= SEGMENT)
            segment(first, std::min(length - first, SEGMENT));
        write_transposed(call_.dinitial + head_.index * head_.state_size());
    }

  private:
    // Visits (row d, column e) of a state of the caller's, and where in our memory it lies.
    template <class Visit> void each_entry(Visit visit) const {
        for (int64_t e = 0; e < call_.value_dim; ++e) {
            int64_t place = e / AT_ONCE * AT_ONCE * dim_ + e % AT_ONCE * LANES;
            for (int64_t j = 0; j < call_.dim; j += LANES, place += BLOCK) {
                const int64_t end = std::min<int64_t>(LANES, call_.dim - j);
                for (int64_t i = 0; i < end; ++i) visit((j + i) * call_.value_dim + e, place + i);
            }
        }
    }
    void read_transposed(float* to, const float* from) const {
        std::fill(to, to + values_ * dim_, 0.0f);
        if (from) each_entry([&](int64_t theirs, int64_t ours) { to[ours] = from[theirs]; });
    }
    void write_transposed(float* to) const {
        const float* from = space_.grad_state;
        each_entry([&](int64_t theirs, int64_t ours) { to[theirs] = from[ours]; });
    }

    void segment(int64_t first, int64_t count) {
        read(first, count);
        read_transposed(space_.checkpoint, head_.checkpoint(first / SEGMENT));
        for (float* each : {space_.dk, space_.dfactors, space_.da, space_.db}) std::fill(each, each + count * dim_, 0.0f);
        std::fill(space_.dq, space_.dq + queries_ * SEGMENT * dim_, 0.0f);
        for (int64_t e = 0; e < call_.value_dim; e += AT_ONCE) {
            replay(e, count);
            for (int64_t t = count - 1; t >= 0; --t) {
                if (call_.reads_before) {
                    step(t, e);
                    reads(t, e, t);
                } else {
                    reads(t, e, t + 1);
                    step(t, e);
                }
            }
        }
        write(first, count);
    }

    // ---- inputs of a segment ----

    void read(int64_t first, int64_t count) {
        read_rows(head_.line(call_.k), first, count, call_.dim, dim_, space_.k);
        read_rows(head_.line(call_.v), first, count, call_.value_dim, values_, space_.v);
        for (int64_t r = 0; r < queries_; ++r) {
            const int64_t h = head_.query_head(r);
            read_rows(head_.line(call_.q, h), first, count, call_.dim, dim_, space_.q + r * SEGMENT * dim_);
            float* grads = space_.grad_out + r * SEGMENT * values_;
            read_rows(head_.line(call_.grad_out, h), first, count, call_.value_dim, values_, grads);
            for (int64_t i = 0; i < count * values_; ++i) grads[i] *= (float)call_.scale;
        }
        read_all_factors(first, count);
        if (call_.a.data) {
            read_rows(head_.line(call_.a), first, count, call_.dim, dim_, space_.a);
            read_rows(head_.line(call_.b), first, count, call_.dim, dim_, space_.b);
        }
        keys_ = delta_ ? space_.keys : space_.k;
        if (delta_) turn_delta(first, count);
    }

    static void read_rows(const Line& line, int64_t first, int64_t count, int64_t n, int64_t padded, float* to) {
        for (int64_t t = 0; t < count; ++t) line.read(to + t * padded, first + t, n, padded);
    }

    void read_all_factors(int64_t first, int64_t count) {
        if (!call_.decay.data) return std::fill(space_.factors, space_.factors + count * dim_, 1.0f);
        read_factors(head_, first, count, dim_, space_.factors);
        if (call_.decay_channels > 1) return;
        for (int64_t t = count - 1; t >= 0; --t) std::fill_n(space_.factors + t * dim_, dim_, space_.factors[t]);
    }

    void turn_delta(int64_t first, int64_t count) {
        const Line line = head_.line(call_.beta);
        for (int64_t t = 0; t < count; ++t) {
            const float beta = space_.beta[t] = line.one(first + t);
            for (int64_t i = t * dim_; i < (t + 1) * dim_; i += LANES) {
                const Floats k = load(space_.k + i);
                store(space_.a + i, k * load(space_.factors + i));
                store(space_.b + i, k * -beta);
                store(space_.keys + i, k * beta);
            }
        }
    }

    // ---- the states of a segment, for AT_ONCE value channels from e on ----

    float* state_at(int64_t t) const { return space_.states + t * AT_ONCE * dim_; }

    void replay(int64_t e, int64_t count) {
        std::copy_n(space_.checkpoint + e * dim_, AT_ONCE * dim_, state_at(0));
        for (int64_t t = 0; t < count; ++t) turns_ ? advance<true>(t, e) : advance<false>(t, e);
    }

    template <bool TURNS> void advance(int64_t t, int64_t e) {
        const int64_t at = t * dim_, dim = dim_;
        const float *before = state_at(t), *b = space_.b + at, *factor = space_.factors + at, *k = keys_ + at;
        float* after = state_at(t + 1);
        if (TURNS) recall(before, space_.a + at, space_.recalled + t * AT_ONCE);
        const Channels v(space_.v + t * values_ + e), r(space_.recalled + t * AT_ONCE);
        for (int64_t j = 0; j < dim; j += LANES, before += BLOCK, after += BLOCK) {
            const Floats fade = load(factor + j), key = load(k + j), turn = TURNS ? load(b + j) : Floats{};
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; ++i) {
                Floats s = fade * load(before + i * LANES) + key * v[i];
                if (TURNS) s += turn * r[i];
                store(after + i * LANES, s);
            }
        }
    }

    void recall(const float* state, const float* a, float* to) const {
        Floats sum[AT_ONCE] = {};
        for (int64_t j = 0; j < dim_; j += LANES, state += BLOCK) {
            const Floats by = load(a + j);
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; ++i) sum[i] += by * load(state + i * LANES);
        }
        put_sums(sum, sum, to, nullptr);
    }

    // The sums of the lanes of each vector.
    void put_sums(const Floats* first, const Floats* second, float* to_first, float* to_second) const {
        Words x[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; ++i) x[i] = as_words(first[i]), x[i + AT_ONCE] = as_words(second[i]);
        const Floats sums = sums_of(x);
        std::memcpy(to_first, &sums, AT_ONCE * 4);
        if (to_second) std::memcpy(to_second, (const char*)&sums + AT_ONCE * 4, AT_ONCE * 4);
    }

    // ---- gradients ----

    // What the queries of token t read, from the states of row `at`.
    void reads(int64_t t, int64_t e, int64_t at) {
        for (int64_t r = 0; r < queries_; ++r) {
            const int64_t row = r * SEGMENT + t, dim = dim_;
            const float *q = space_.q + row * dim, *state = state_at(at);
            const Channels out(space_.grad_out + row * values_ + e);
            float *dq = space_.dq + row * dim, *grad_state = space_.grad_state + e * dim;
            for (int64_t j = 0; j < dim; j += LANES, state += BLOCK, grad_state += BLOCK) {
                const Floats query = load(q + j);
                Floats sum = load(dq + j);
#pragma GCC unroll 8
                for (int i = 0; i < AT_ONCE; ++i) {
                    const Floats grad = all(out[i]);
                    store(grad_state + i * LANES, load(grad_state + i * LANES) + query * grad);
                    sum += load(state + i * LANES) * grad;
                }
                store(dq + j, sum);
            }
        }
    }

    // Through token t's update of the state.
    void step(int64_t t, int64_t e) { turns_ ? through<true>(t, e) : through<false>(t, e); }

    template <bool TURNS> void through(int64_t t, int64_t e) {
        const int64_t at = t * dim_, dim = dim_;
        float sums[AT_ONCE], *grad_state = space_.grad_state + e * dim;
        sum_through<TURNS>(grad_state, keys_ + at, space_.b + at, space_.dv + t * values_ + e, sums);
        const float* state = state_at(t);
        const Channels v(space_.v + t * values_ + e), r(space_.recalled + t * AT_ONCE), turned(sums);
        const float *factors = space_.factors + at, *turn = space_.a + at;
        float *dks = space_.dk + at, *dfactors = space_.dfactors + at, *das = space_.da + at, *dbs = space_.db + at;
        for (int64_t j = 0; j < dim; j += LANES, state += BLOCK, grad_state += BLOCK) {
            const Floats factor = load(factors + j), a = TURNS ? load(turn + j) : Floats{};
            Floats dk = load(dks + j), dfactor = load(dfactors + j), da{}, db{};
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; ++i) {
                Floats grad = load(grad_state + i * LANES);
                const Floats s = load(state + i * LANES);
                dk += grad * v[i];
                dfactor += grad * s;
                if (TURNS) db += grad * r[i];
                if (TURNS) da += s * turned[i];
                grad *= factor;
                if (TURNS) grad += a * turned[i];
                store(grad_state + i * LANES, grad);
            }
            store(dks + j, dk);
            store(dfactors + j, dfactor);
            if (TURNS) store(das + j, load(das + j) + da);
            if (TURNS) store(dbs + j, load(dbs + j) + db);
        }
    }

    // The gradients of a token's values, and of what it recalled: sums over key channels.
    template <bool TURNS>
    void sum_through(const float* grad_state, const float* k, const float* b, float* to_dv, float* to_dr) const {
        Floats dv[AT_ONCE] = {}, dr[AT_ONCE] = {};
        for (int64_t j = 0; j < dim_; j += LANES, grad_state += BLOCK) {
            const Floats key = load(k + j), turn = TURNS ? load(b + j) : Floats{};
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; ++i) {
                const Floats grad = load(grad_state + i * LANES);
                dv[i] += key * grad;
                if (TURNS) dr[i] += turn * grad;
            }
        }
        put_sums(dv, dr, to_dv, to_dr);
    }

    // ---- what a segment's tokens get ----

    void write(int64_t first, int64_t count) {
        if (delta_) turn_back(first, count);
        const auto put = [&](const FoveateRows& x, int64_t head, const float* rows, int64_t n, int64_t row) {
            const Line line = head_.line(x, head);
            for (int64_t t = 0; t < count; ++t) line.write(first + t, rows + t * row, n);
        };
        for (int64_t r = 0; r < queries_; ++r)
            put(call_.dq, head_.query_head(r), space_.dq + r * SEGMENT * dim_, call_.dim, dim_);
        put(call_.dk, head_.state, space_.dk, call_.dim, dim_);
        put(call_.dv, head_.state, space_.dv, call_.value_dim, values_);
        if (call_.a.data) {
            put(call_.da, head_.state, space_.da, call_.dim, dim_);
            put(call_.db, head_.state, space_.db, call_.dim, dim_);
        }
        if (call_.decay.data) write_decay(first, count);
    }

    // Gradients of k, beta and the factors from those of what stands for them.
    void turn_back(int64_t first, int64_t count) {
        const Line line = head_.line(call_.dbeta, head_.state);
        for (int64_t t = 0; t < count; ++t) {
            Floats dbeta{};
            for (int64_t i = t * dim_; i < (t + 1) * dim_; i += LANES) {
                const Floats k = load(space_.k + i), factor = load(space_.factors + i), da = load(space_.da + i);
                const Floats written = load(space_.dk + i) - load(space_.db + i);
                dbeta += k * written;
                store(space_.dfactors + i, load(space_.dfactors + i) + da * k);
                store(space_.dk + i, written * space_.beta[t] + factor * da);
            }
            line.write_one(first + t, sum_lanes(dbeta));
        }
    }

    void write_decay(int64_t first, int64_t count) {
        const Line line = head_.line(call_.ddecay, head_.state);
        for (int64_t t = 0; t < count; ++t) {
            float* row = space_.dfactors + t * dim_;
            Floats sum{};
            for (int64_t j = 0; j < dim_; j += LANES) {
                const Floats grad = load(row + j) * load(space_.factors + t * dim_ + j);
                store(row + j, grad);
                sum += grad;
            }
            if (call_.decay_channels == 1)
                line.write_one(first + t, sum_lanes(sum));
            else
                line.write(first + t, row, call_.dim);
        }
    }

    const Head& head_;
    const FoveateRecur& call_;
    const Workspace& space_;
    const int64_t dim_, values_, queries_;
    const bool delta_, turns_;
    const float* keys_ = nullptr;
};

}  // namespace
}  // namespace foveate::recurrence

FOVEATE_API int64_t foveate_recur_backward(const FoveateRecur* call) {
    using namespace foveate;
    using namespace foveate::recurrence;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    const int64_t tokens = call->tokens * (call->starts ? 1 : call->sequences);
    prefer_large_pages(call->dq.data, 4 * call->q.heads * tokens * call->dim);
    prefer_large_pages(call->dk.data, 4 * call->states * tokens * call->dim);
    prefer_large_pages(call->dv.data, 4 * call->states * tokens * call->value_dim);
    const int64_t threads = worthwhile_threads(6 * numbers_updated(*call), 0, call->threads);
    Queue queue(call->sequences * call->states);
    const bool done = on_threads(std::min(threads, call->sequences * call->states), [&](int64_t) {
        const auto space = scratch<Workspace>(*call);
        queue.run([&](int64_t item) {
            const Head head(*call, item / call->states, item % call->states);
            Backward(head, space).run();
        });
    });
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}
