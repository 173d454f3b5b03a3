// The recurrence, forward: token by token, for up to 64 value channels of a state at a time. The state stays in the
// first cache, or in registers where nothing has to be recalled first; whatever the decay, no chunk's products are
// formed, and the operations are no more than a chunk's.
#include "pages.h"
#include "recur.h"

namespace foveate::recurrence {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int MOST_VECTORS = 2;
#else
constexpr int MOST_VECTORS = 4;
#endif
constexpr int TILE_ROWS = 4;                // rows of the state in registers
constexpr int64_t CACHE_BYTES = 32 << 10;  // for the state

enum Fading { NOT, TOKEN, CHANNEL };
enum Recalling { NOTHING, DELTA, LOW_RANK };

// Tokens of a segment, ready to be read.
struct Tokens {
    int64_t count, queries;
    const Rows* q;  // one for each query head of the state
    Rows k, a, b;
    const float *factors, *beta;
    int64_t factor_row;
    const float* v;  // (count, ld)
    float* out;      // (queries, count, ld)
    int64_t ld;
};

FOVEATE_INLINE Floats broadcast(float x) {
    Floats y = all(x);
#if defined(__x86_64__)
    asm("" : "+v"(y));  // once, not again from memory in each multiply-add
#endif
    return y;
}

template <int W> FOVEATE_INLINE void read_state(const Tokens& x, int64_t t, int64_t d, const Floats (*s)[W], int rows) {
    for (int64_t r = 0; r < x.queries; ++r) {
        float* to = x.out + (r * x.count + t) * x.ld;
        const float* q = x.q[r].at(t) + d;
        Floats sum[W];
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) sum[j] = load(to + j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const Floats by = broadcast(q[i]);
#pragma GCC unroll 4
            for (int j = 0; j < W; ++j) sum[j] += by * s[i][j];
        }
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) store(to + j * LANES, sum[j]);
    }
}

// ROWS rows of the state, from row d on, through all tokens: nothing is recalled, so that rows need not wait.
template <int W, int ROWS, Fading FADING, bool BEFORE> static void add_up(float* state, const Tokens& x, int64_t d) {
    Floats s[ROWS][W];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) s[i][j] = load(state + (d + i) * x.ld + j * LANES);
    for (int64_t t = 0; t < x.count; ++t) {
        if (BEFORE) read_state<W>(x, t, d, s, ROWS);
        const float *k = x.k.at(t) + d, *factor = x.factors + t * x.factor_row;
        Floats v[W];
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) v[j] = load(x.v + t * x.ld + j * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const Floats by = broadcast(k[i]);
            const Floats fade = FADING == NOT ? Floats{} : broadcast(factor[FADING == CHANNEL ? d + i : 0]);
#pragma GCC unroll 4
            for (int j = 0; j < W; ++j) {
                if (FADING != NOT) s[i][j] *= fade;
                s[i][j] += by * v[j];
            }
        }
        if (!BEFORE) read_state<W>(x, t, d, s, ROWS);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) store(state + (d + i) * x.ld + j * LANES, s[i][j]);
}

// sum_d x_d S_d in two halves, so that additions need not wait for one another.
template <int W> FOVEATE_INLINE void recall(const float* x, const float* state, int64_t dim, int64_t ld, Floats* sum) {
    Floats odd[W] = {};
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) sum[j] = Floats{};
    int64_t d = 0;
    for (; d + 2 <= dim; d += 2) {
        const Floats even_by = broadcast(x[d]), odd_by = broadcast(x[d + 1]);
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
            sum[j] += even_by * load(state + d * ld + j * LANES);
            odd[j] += odd_by * load(state + (d + 1) * ld + j * LANES);
        }
    }
    if (d < dim)
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) sum[j] += x[d] * load(state + d * ld + j * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) sum[j] += odd[j];
}

template <int W> FOVEATE_INLINE void read_all(const float* state, const Tokens& x, int64_t t, int64_t first, int64_t dim) {
    for (int64_t r = first; r < x.queries; ++r) {
        Floats sum[W];
        recall<W>(x.q[r].at(t), state, dim, x.ld, sum);
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) store(x.out + (r * x.count + t) * x.ld + j * LANES, sum[j]);
    }
}

// Row d of the state takes its token: S_d = factor_d S_d + k_d u (+ b_d r); returns q_d S_d added to sum.
template <int W, Fading FADING, Recalling RECALLING>
FOVEATE_INLINE void write_row_of(float* row, Floats fade, float k, const Floats* u, float b, const Floats* r, float q,
                                 Floats* sum) {
    const Floats by_k = broadcast(k), by_b = RECALLING == LOW_RANK ? broadcast(b) : Floats{}, by_q = broadcast(q);
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) {
        Floats s = load(row + j * LANES);
        if (FADING != NOT) s *= fade;
        s += by_k * u[j];
        if (RECALLING == LOW_RANK) s += by_b * r[j];
        store(row + j * LANES, s);
        sum[j] += by_q * s;
    }
}

// All rows of the state through all tokens: each token first recalls what the state holds.
template <int W, Fading FADING, Recalling RECALLING, bool BEFORE>
static void turn(float* state, const Tokens& x, int64_t dim) {
    for (int64_t t = 0; t < x.count; ++t) {
        if (BEFORE) read_all<W>(state, x, t, 0, dim);
        const float *k = x.k.at(t), *a = RECALLING == LOW_RANK || FADING == CHANNEL ? x.a.at(t) : k;
        const float *b = RECALLING == LOW_RANK ? x.b.at(t) : k, *q = x.q[0].at(t), *factor = x.factors + t * x.factor_row;
        Floats u[W], r[W], even[W] = {}, odd[W] = {};
        recall<W>(a, state, dim, x.ld, r);
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) {
            u[j] = load(x.v + t * x.ld + j * LANES);
            if (RECALLING == DELTA) u[j] = x.beta[t] * (u[j] - (FADING == TOKEN ? r[j] * factor[0] : r[j]));
        }
        const Floats fade = FADING == TOKEN ? broadcast(factor[0]) : Floats{};
        const auto fade_of = [&](int64_t d) { return FADING == CHANNEL ? broadcast(factor[d]) : fade; };
        int64_t d = 0;
        for (; d + 2 <= dim; d += 2) {
            write_row_of<W, FADING, RECALLING>(state + d * x.ld, fade_of(d), k[d], u, b[d], r, q[d], even);
            const int64_t e = d + 1;
            write_row_of<W, FADING, RECALLING>(state + e * x.ld, fade_of(e), k[e], u, b[e], r, q[e], odd);
        }
        if (d < dim) write_row_of<W, FADING, RECALLING>(state + d * x.ld, fade_of(d), k[d], u, b[d], r, q[d], even);
        if (BEFORE) continue;
#pragma GCC unroll 4
        for (int j = 0; j < W; ++j) store(x.out + t * x.ld + j * LANES, even[j] + odd[j]);
        read_all<W>(state, x, t, 1, dim);
    }
}

template <int W, Fading FADING, bool BEFORE>
static void advance(float* state, const Tokens& x, int64_t dim, Recalling recalling) {
    if (recalling == DELTA) return turn<W, FADING, DELTA, BEFORE>(state, x, dim);
    if (recalling == LOW_RANK) return turn<W, FADING, LOW_RANK, BEFORE>(state, x, dim);
    std::fill(x.out, x.out + x.queries * x.count * x.ld, 0.0f);
    int64_t d = 0;
    for (; d + TILE_ROWS <= dim; d += TILE_ROWS) add_up<W, TILE_ROWS, FADING, BEFORE>(state, x, d);
    for (; d < dim; ++d) add_up<W, 1, FADING, BEFORE>(state, x, d);
}

template <int W> static void advance(float* state, const Tokens& x, int64_t dim, Fading fading, Recalling recalling, bool before) {
    if (fading == NOT) return before ? advance<W, NOT, true>(state, x, dim, recalling) : advance<W, NOT, false>(state, x, dim, recalling);
    if (fading == TOKEN)
        return before ? advance<W, TOKEN, true>(state, x, dim, recalling) : advance<W, TOKEN, false>(state, x, dim, recalling);
    return before ? advance<W, CHANNEL, true>(state, x, dim, recalling) : advance<W, CHANNEL, false>(state, x, dim, recalling);
}

struct Workspace {
    float *state, *q, *k, *a, *b, *v, *factors, *beta, *out;
    Rows* q_rows;

    Workspace(Arena& arena, const FoveateRecur& call, int64_t ld) {
        const int64_t queries = call.q.heads / call.states, rows = SEGMENT * round_up(call.dim, LANES);
        state = arena.take<float>(call.dim * ld);
        q = arena.take<float>(rows * queries);
        k = arena.take<float>(rows);
        a = arena.take<float>(rows);
        b = arena.take<float>(rows);
        v = arena.take<float>(SEGMENT * ld);
        factors = arena.take<float>(rows);
        beta = arena.take<float>(SEGMENT);
        out = arena.take<float>(SEGMENT * queries * ld);
        q_rows = arena.take<Rows>(queries);
    }
};

// Some value channels of one state, from its first token to its last.
class Forward {
  public:
    Forward(const Head& head, int64_t column, int64_t ld, const Workspace& space)
        : head_(head), call_(head.call), space_(space), column_(column), ld_(ld),
          columns_(std::min(ld, call_.value_dim - column)),
          recalling_(call_.beta.data ? DELTA : call_.a.data ? LOW_RANK : NOTHING),
          fading_(!call_.decay.data ? NOT : call_.decay_channels == 1 ? TOKEN : CHANNEL) {}

    // Whether decays and betas were what they may be.
    bool run() {
        begin();
        const int64_t length = head_.sequence.length;
        for (int64_t first = 0; first < length; first += SEGMENT) {
            if (call_.checkpoints) save(head_.checkpoint(first / SEGMENT));
            step(first, std::min(length - first, SEGMENT));
        }
        save(call_.final + head_.index * head_.state_size());
        return fine_;
    }

  private:
    void begin() {
        const float* from = call_.initial ? call_.initial + head_.index * head_.state_size() + column_ : nullptr;
        for (int64_t d = 0; d < call_.dim; ++d) {
            float* row = space_.state + d * ld_;
            if (from) std::copy(from + d * call_.value_dim, from + d * call_.value_dim + columns_, row);
            std::fill(row + (from ? columns_ : 0), row + ld_, 0.0f);
        }
    }

    void save(float* to) const {
        for (int64_t d = 0; d < call_.dim; ++d)
            std::copy(space_.state + d * ld_, space_.state + d * ld_ + columns_, to + d * call_.value_dim + column_);
    }

    void step(int64_t first, int64_t count) {
        const Tokens tokens = read(first, count);
        const bool before = call_.reads_before;
        switch (ld_ / LANES) {
            case 1: advance<1>(space_.state, tokens, call_.dim, fading_, recalling_, before); break;
            case 2: advance<2>(space_.state, tokens, call_.dim, fading_, recalling_, before); break;
#if !defined(__AVX2__) || defined(__AVX512F__)
            case 3: advance<3>(space_.state, tokens, call_.dim, fading_, recalling_, before); break;
            case 4: advance<4>(space_.state, tokens, call_.dim, fading_, recalling_, before); break;
#endif
        }
        write(first, count);
    }

    Tokens read(int64_t first, int64_t count) {
        const int64_t dim = call_.dim, padded = round_up(dim, LANES);
        const auto rows = [&](const FoveateRows& x, float* space) {
            return x.data ? rows_of(head_.line(x), first, count, dim, dim, space) : Rows{nullptr, 0};
        };
        Tokens x{count, head_.queries(), space_.q_rows, rows(call_.k, space_.k), {}, {}, space_.factors, space_.beta,
                 call_.decay_channels == 1 ? 1 : padded, space_.v, space_.out, ld_};
        for (int64_t r = 0; r < x.queries; ++r)
            space_.q_rows[r] = rows_of(head_.line(call_.q, head_.query_head(r)), first, count, dim, dim,
                                       space_.q + r * SEGMENT * dim);
        x.a = rows(call_.a, space_.a);
        x.b = rows(call_.b, space_.b);
        if (fading_ != NOT) fine_ &= read_factors(head_, first, count, padded, space_.factors);
        if (recalling_ == DELTA) read_beta(first, count);
        if (recalling_ == DELTA && fading_ == CHANNEL) x.a = faded_keys(x);
        read_values(first, count);
        return x;
    }

    void read_beta(int64_t first, int64_t count) {
        const Line line = head_.line(call_.beta);
        for (int64_t t = 0; t < count; ++t) {
            space_.beta[t] = line.one(first + t);
            fine_ &= space_.beta[t] >= 0 && space_.beta[t] <= 2;
        }
    }

    // What a key recalls of a state that has faded by channels, the faded key recalls of the state before.
    Rows faded_keys(const Tokens& x) const {
        for (int64_t t = 0; t < x.count; ++t)
            for (int64_t d = 0; d < call_.dim; ++d)
                space_.a[t * call_.dim + d] = x.k.at(t)[d] * x.factors[t * x.factor_row + d];
        return {space_.a, call_.dim};
    }

    void read_values(int64_t first, int64_t count) {
        FoveateRows columns = call_.v;
        columns.data = (char*)columns.data + column_ * columns.stride[3] * bytes_of(columns.dtype);
        const Line line = head_.line(columns);
        for (int64_t t = 0; t < count; ++t) line.read(space_.v + t * ld_, first + t, columns_, ld_);
    }

    void write(int64_t first, int64_t count) {
        FoveateRows columns = call_.out;
        columns.data = (char*)columns.data + column_ * columns.stride[3] * bytes_of(columns.dtype);
        const float scale = (float)call_.scale;
        for (int64_t r = 0; r < head_.queries(); ++r) {
            const Line line = head_.line(columns, head_.query_head(r));
            for (int64_t t = 0; t < count; ++t) {
                float* row = space_.out + (r * count + t) * ld_;
                for (int64_t j = 0; j < ld_; j += LANES) store(row + j, load(row + j) * scale);
                line.write(first + t, row, columns_);
            }
        }
    }

    const Head& head_;
    const FoveateRecur& call_;
    const Workspace& space_;
    const int64_t column_, ld_, columns_;
    const Recalling recalling_;
    const Fading fading_;
    bool fine_ = true;
};

// Vectors of value channels at a time: as many as the cache holds, fewer where threads would have nothing to do.
int64_t vectors_at_a_time(const FoveateRecur& call, int64_t threads) {
    const int64_t needed = (call.value_dim + LANES - 1) / LANES, heads = call.sequences * call.states;
    int64_t vectors = std::min<int64_t>(MOST_VECTORS, needed);
    while (vectors > 1 && call.dim * vectors * LANES * 4 > CACHE_BYTES) --vectors;
    while (vectors > 1 && heads * ((needed + vectors - 1) / vectors) < threads) --vectors;
    return vectors;
}

}  // namespace
}  // namespace foveate::recurrence

FOVEATE_API int64_t foveate_recur_size(void) { return sizeof(FoveateRecur); }
FOVEATE_API int64_t foveate_recur_segment(void) { return foveate::recurrence::SEGMENT; }

FOVEATE_API int64_t foveate_recur_forward(const FoveateRecur* call) {
    using namespace foveate;
    using namespace foveate::recurrence;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    const int64_t threads = worthwhile_threads(2 * numbers_updated(*call), 0, call->threads);
    const int64_t numbers = call->q.heads * call->tokens * call->value_dim * (call->starts ? 1 : call->sequences);
    prefer_large_pages(call->out.data, numbers * bytes_of(call->out.dtype));
    const int64_t ld = vectors_at_a_time(*call, threads) * LANES, blocks = (call->value_dim + ld - 1) / ld;
    const int64_t all = call->sequences * call->states * blocks;
    Queue queue(all);
    std::atomic<bool> fine{true};
    const bool done = on_threads(std::min(threads, all), [&](int64_t) {
        const auto space = scratch<Workspace>(*call, ld);
        queue.run([&](int64_t item) {
            const int64_t index = item / blocks;
            const Head head(*call, index / call->states, index % call->states);
            if (!Forward(head, item % blocks * ld, ld, space).run()) fine = false;
        });
    });
    return !done ? FOVEATE_NO_MEMORY : fine ? FOVEATE_OK : FOVEATE_OUT_OF_RANGE;
}
