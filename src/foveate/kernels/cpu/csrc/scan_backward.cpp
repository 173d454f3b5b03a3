// Gradients of the selective scan, segment by segment from the last to the first: each is run once more from its mark,
// its fading kept, and then gone back through.
#include "scan.h"

namespace foveate {
namespace {

constexpr int64_t MOST_GROUPS = 8;  // of sequences, which sum their gradients of rates, skip and bias apart

struct Workspace {
    Workspace(Arena& arena, int64_t blocks, int64_t states)
        : pitch(round_up(states, LANES)), rates(arena.take<float>(blocks * states * LANES)),
          carry(arena.take<float>(blocks * states * LANES)), d_rates(arena.take<float>(blocks * states * LANES)),
          skip(arena.take<float>(blocks * LANES)), bias(arena.take<float>(blocks * LANES)),
          d_skip(arena.take<float>(blocks * LANES)), d_bias(arena.take<float>(blocks * LANES)),
          state(arena.take<float>(states * LANES)), b(arena.take<float>(SEGMENT * pitch)),
          c(arena.take<float>(SEGMENT * pitch)), db(arena.take<float>(round_up(SEGMENT * states, LANES) * LANES)),
          dc(arena.take<float>(round_up(SEGMENT * states, LANES) * LANES)),
          sums(arena.take<float>(round_up(SEGMENT * states, LANES))), x(arena.take<float>(TURNED)),
          dt(arena.take<float>(TURNED)), slope(arena.take<float>(TURNED)), z(arena.take<float>(TURNED)),
          out(arena.take<float>(TURNED)), added(arena.take<float>(TURNED)), y(arena.take<float>(TURNED)),
          dy(arena.take<float>(TURNED)), d_added(arena.take<float>(TURNED)), d_dt(arena.take<float>(TURNED)),
          kept(arena.take<float>(2 * TURNED)), factors(arena.take<Factor>(2 * SEGMENT)),
          turned(arena.take<float>(std::max<int64_t>(pitch, LANES) * SEGMENT)) {}
    int64_t pitch;
    float *rates, *carry, *d_rates, *skip, *bias, *d_skip, *d_bias;  // of all blocks
    float *state, *b, *c, *db, *dc, *sums;
    float *x, *dt, *slope, *z, *out, *added, *y, *dy, *d_added, *d_dt;  // [token][lane]
    float* kept;                                                        // [token][state of K][lane]
    Factor* factors;
    float* turned;
};

// K states once more through n tokens, keeping what is left of each before the next is added.
template <int K> FOVEATE_INLINE void replay(const Workspace& at, const float* rates, int64_t s, int64_t n) {
    Floats h[K], rate[K];
    for (int k = 0; k < K; ++k) {
        h[k] = load(at.state + (s + k) * LANES);
        rate[k] = load(rates + (s + k) * LANES);
    }
    for (int64_t t = 0; t < n; ++t) {
        const Floats dt = load(at.dt + t * LANES), added = load(at.added + t * LANES);
        const float *b = at.b + t * at.pitch + s, *c = at.c + t * at.pitch + s;
        Floats y = load(at.y + t * LANES);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
            const Factor factor = factor_of(dt * rate[k]);
            const Floats scaled = h[k] * factor.scale, kept = scaled * factor.rest + scaled;
            at.factors[t * K + k] = factor;
            store(at.kept + (t * K + k) * LANES, kept);
            h[k] = added * b[k] + kept;
            y = h[k] * c[k] + y;
        }
        store(at.y + t * LANES, y);
    }
}

// Back through the same tokens. carry is the gradient of the state after them, then of that before.
template <int K>
FOVEATE_INLINE void go_back(const Workspace& at, const float* rates, float* carry, float* d_rates, int64_t s, int64_t n,
                            int64_t states) {
    Floats dh[K], rate[K], d_rate[K];
    for (int k = 0; k < K; ++k) {
        dh[k] = load(carry + (s + k) * LANES);
        rate[k] = load(rates + (s + k) * LANES);
        d_rate[k] = load(d_rates + (s + k) * LANES);
    }
    for (int64_t t = n - 1; t >= 0; --t) {
        const Floats dt = load(at.dt + t * LANES), added = load(at.added + t * LANES), dy = load(at.dy + t * LANES);
        const float *b = at.b + t * at.pitch + s, *c = at.c + t * at.pitch + s;
        float *db = at.db + (t * states + s) * LANES, *dc = at.dc + (t * states + s) * LANES;
        Floats d_added = load(at.d_added + t * LANES), d_dt = load(at.d_dt + t * LANES);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
            const Factor factor = at.factors[t * K + k];
            const Floats kept = load(at.kept + (t * K + k) * LANES);
            dh[k] = dy * c[k] + dh[k];
            store(dc + k * LANES, dy * (added * b[k] + kept) + load(dc + k * LANES));
            store(db + k * LANES, dh[k] * added + load(db + k * LANES));
            d_added = dh[k] * b[k] + d_added;
            const Floats d_log = dh[k] * kept, scaled = dh[k] * factor.scale;
            d_dt = d_log * rate[k] + d_dt;
            d_rate[k] = d_log * dt + d_rate[k];
            dh[k] = scaled * factor.rest + scaled;
        }
        store(at.d_added + t * LANES, d_added);
        store(at.d_dt + t * LANES, d_dt);
    }
    for (int k = 0; k < K; ++k) {
        store(carry + (s + k) * LANES, dh[k]);
        store(d_rates + (s + k) * LANES, d_rate[k]);
    }
}

// What each item sums by itself, to be added up in the order of items.
struct Partial {
    Partial(const FoveateScan& call, int64_t parts, int64_t groups, int64_t tokens)
        : has_vectors(call.db.data != nullptr), vectors(parts * tokens * call.states),
          db(has_vectors ? vectors : 0), dc(has_vectors ? vectors : 0), rates(groups * call.channels * call.states),
          skip(groups * call.channels), bias(groups * call.channels) {}
    const bool has_vectors;
    const int64_t vectors;
    Buffer<float> db, dc;             // (parts, tokens, states)
    Buffer<float> rates, skip, bias;  // (groups, channels, states), (groups, channels)
};

class Backward {
  public:
    explicit Backward(const FoveateScan& call)
        : call_(call), parts_(parts_of(call)), groups_(std::min(call.sequences, MOST_GROUPS)),
          tokens_(call.starts ? call.starts[call.sequences] : call.sequences * call.length),
          partial_(call, parts_.count(), groups_, tokens_) {}

    int64_t items() const { return groups_ * parts_.count(); }
    int64_t token_items() const { return partial_.has_vectors ? (tokens_ + SEGMENT - 1) / SEGMENT : 0; }

    // The sequences of a group, one after another, for a part of the channels.
    void item(int64_t i) const {
        const int64_t group = i / parts_.count(), p = i % parts_.count(), states = call_.states, size = states * LANES;
        const Part part = parts_[p];
        const Workspace at = scratch<Workspace>(parts_.blocks(), states);
        for_blocks(part, [&](int64_t block, Part lanes) {
            read_lanes(at.rates + block * size, call_.rates, states, lanes);
            read_lanes(at.skip + block * LANES, call_.skip, 1, lanes);
            read_lanes(at.bias + block * LANES, call_.bias, 1, lanes);
            std::memset(at.d_rates + block * size, 0, size * sizeof(float));
            std::memset(at.d_skip + block * LANES, 0, LANES * sizeof(float));
            std::memset(at.d_bias + block * LANES, 0, LANES * sizeof(float));
        });
        for (int64_t s = group * call_.sequences / groups_; s < (group + 1) * call_.sequences / groups_; ++s)
            sequence(at, s, p);
        for_blocks(part, [&](int64_t block, Part lanes) {
            const int64_t first = group * call_.channels;
            write_lanes(partial_.rates.get() + first * states, at.d_rates + block * size, states, lanes);
            write_lanes(partial_.skip.get() + first, at.d_skip + block * LANES, 1, lanes);
            write_lanes(partial_.bias.get() + first, at.d_bias + block * LANES, 1, lanes);
        });
    }

    // Gradients of b and c of a few tokens.
    void add_vectors(int64_t i) const {
        for (int64_t token = i * SEGMENT; token < std::min((i + 1) * SEGMENT, tokens_); ++token) {
            add_vectors(call_.db, call_.groups_b, partial_.db.get(), token);
            add_vectors(call_.dc, call_.groups_c, partial_.dc.get(), token);
        }
    }
    void add_parameters() const {
        add_groups(call_.d_rates, partial_.rates.get(), call_.channels * call_.states);
        add_groups(call_.d_skip, partial_.skip.get(), call_.channels);
        add_groups(call_.d_bias, partial_.bias.get(), call_.channels);
    }

  private:
    void sequence(const Workspace& at, int64_t sequence, int64_t p) const {
        const Run run = run_of(call_.starts, call_.length, sequence);
        const int64_t states = call_.states, size = states * LANES, first = sequence * call_.channels * states;
        for_blocks(parts_[p], [&](int64_t block, Part lanes) {
            read_lanes(at.carry + block * size, call_.grad_last ? call_.grad_last + first : nullptr, states, lanes);
        });
        for (int64_t t = (run.length - 1) / SEGMENT * SEGMENT; run.length && t >= 0; t -= SEGMENT)
            segment(at, run, p, t, std::min(SEGMENT, run.length - t));
        for_blocks(parts_[p], [&](int64_t block, Part lanes) {
            write_lanes(call_.d_first + first, at.carry + block * size, states, lanes);
        });
    }

    void segment(const Workspace& at, const Run& run, int64_t p, int64_t t, int64_t n) const {
        const int64_t token = run.token + t, states = call_.states;
        const Part part = parts_[p];
        const int64_t group_b = part.channel / (call_.channels / call_.groups_b);
        const int64_t group_c = part.channel / (call_.channels / call_.groups_c);
        read_vectors(at.b, at.pitch, call_.b, run.batch, token, n, group_b, states, at.turned);
        read_vectors(at.c, at.pitch, call_.c, run.batch, token, n, group_c, states, at.turned);
        const int64_t vectors = round_up(n * states, LANES);
        std::memset(at.db, 0, vectors * LANES * sizeof(float));
        std::memset(at.dc, 0, vectors * LANES * sizeof(float));
        for_blocks(part, [&](int64_t block, Part lanes) {
            const float* mark = mark_of(call_, run.mark + t / SEGMENT, lanes.channel);
            for (int64_t s = 0; s < states; ++s) {
                std::memset(at.state + s * LANES, 0, LANES * sizeof(float));
                std::memcpy(at.state + s * LANES, mark + s * call_.channels, lanes.count * sizeof(float));
            }
            prepare(at, run.batch, token, n, lanes, block);
            const float* rates = at.rates + block * states * LANES;
            float *carry = at.carry + block * states * LANES, *d_rates = at.d_rates + block * states * LANES;
            int64_t s = 0;
            for (; s + 2 <= states; s += 2) {
                replay<2>(at, rates, s, n);
                go_back<2>(at, rates, carry, d_rates, s, n, states);
            }
            for (; s < states; ++s) {
                replay<1>(at, rates, s, n);
                go_back<1>(at, rates, carry, d_rates, s, n, states);
            }
            finish(at, run.batch, token, n, lanes, block);
        });
        if (partial_.has_vectors) {
            const int64_t place = (p * tokens_ + run.batch * call_.length + token) * states;
            keep_sums(partial_.db.get() + place, at.db, at.sums, n * states);
            keep_sums(partial_.dc.get() + place, at.dc, at.sums, n * states);
        }
    }

    // Everything but the states: steps, what is added, gradients of y; x of the skip in y, gradients at zero.
    void prepare(const Workspace& at, int64_t batch, int64_t token, int64_t n, Part lanes, int64_t block) const {
        read_channels(at.x, call_.x, batch, token, n, lanes, at.turned);
        read_channels(at.dt, call_.dt, batch, token, n, lanes, at.turned);
        read_channels(at.out, call_.grad_out, batch, token, n, lanes, at.turned);
        if (call_.z.data) read_channels(at.z, call_.z, batch, token, n, lanes, at.turned);
        const Floats skip = load(at.skip + block * LANES), bias = load(at.bias + block * LANES);
        const bool linear = !call_.b.data;
        Floats d_skip = load(at.d_skip + block * LANES);
        for (int64_t i = 0; i < n * LANES; i += LANES) {
            const Floats x = load(at.x + i), raw = load(at.dt + i) + bias, out = load(at.out + i);
            const Floats step = call_.softplus ? softplus_of(raw) : raw;
            const Floats z = call_.z.data ? load(at.z + i) : Floats{};
            const Floats dy = call_.z.data ? out * z * sigmoid_of(z) : out;
            if (call_.softplus) store(at.slope + i, sigmoid_of(raw));
            store(at.dt + i, step);
            store(at.added + i, linear ? x : x * step);
            store(at.y + i, x * skip);
            store(at.dy + i, dy);
            store(at.d_added + i, Floats{});
            store(at.d_dt + i, Floats{});
            d_skip = dy * x + d_skip;
        }
        store(at.d_skip + block * LANES, d_skip);
    }

    void finish(const Workspace& at, int64_t batch, int64_t token, int64_t n, Part lanes, int64_t block) const {
        const Floats skip = load(at.skip + block * LANES);
        const bool linear = !call_.b.data;
        Floats d_bias = load(at.d_bias + block * LANES);
        for (int64_t i = 0; i < n * LANES; i += LANES) {
            const Floats d_added = load(at.d_added + i), x = load(at.x + i);
            Floats d_dt = load(at.d_dt + i);
            if (!linear) d_dt = d_added * x + d_dt;
            if (call_.softplus) d_dt *= load(at.slope + i);
            d_bias += d_dt;
            store(at.d_dt + i, d_dt);
            store(at.x + i, load(at.dy + i) * skip + (linear ? d_added : d_added * load(at.dt + i)));
            if (call_.z.data) {
                const Floats z = load(at.z + i), gate = sigmoid_of(z);
                store(at.z + i, load(at.out + i) * load(at.y + i) * gate * (z * (1.0f - gate) + 1.0f));
            }
        }
        store(at.d_bias + block * LANES, d_bias);
        write_channels(call_.dx, batch, token, n, lanes, at.x, at.turned);
        write_channels(call_.ddt, batch, token, n, lanes, at.d_dt, at.turned);
        if (call_.z.data) write_channels(call_.dz, batch, token, n, lanes, at.z, at.turned);
    }

    static void keep_sums(float* to, const float* vectors, float* sums, int64_t count) {
        for (int64_t i = 0; i < count; i += LANES) store(sums + i, sum_each(vectors + i * LANES));
        std::memcpy(to, sums, count * sizeof(float));
    }

    void add_vectors(const FoveateStream& to, int64_t groups, const float* from, int64_t token) const {
        const int64_t batch = call_.starts ? 0 : token / call_.length, t = call_.starts ? token : token % call_.length;
        const int64_t share = parts_.count() / groups, pitch = tokens_ * call_.states;
        for (int64_t group = 0; group < groups; ++group) {
            char* place_of = place(to, batch, t, group);
            for (int64_t s = 0; s < call_.states; ++s) {
                float sum = 0;
                for (int64_t p = group * share; p < (group + 1) * share; ++p)
                    sum += from[p * pitch + token * call_.states + s];
                store_one(place_of + s * to.stride[3] * bytes_of(to.dtype), sum, to.dtype);
            }
        }
    }

    void add_groups(float* to, const float* from, int64_t size) const {
        if (!to) return;
        for (int64_t i = 0; i < size; ++i) {
            to[i] = 0;
            for (int64_t group = 0; group < groups_; ++group) to[i] += from[group * size + i];
        }
    }

    const FoveateScan& call_;
    const Parts parts_;
    const int64_t groups_, tokens_;
    const Partial partial_;
};

int64_t run_backward(const FoveateScan& call) {
    for (const FoveateStream* grad : {&call.dx, &call.ddt, &call.dz}) prefer_large_pages(call, *grad);
    const Backward backward(call);
    Queue items(backward.items()), tokens(backward.token_items());
    const int64_t threads = std::min(threads_for(call), backward.items());
    const bool done =
        on_threads(threads, [&](int64_t) { items.run([&](int64_t i) { backward.item(i); }); }) &&
        on_threads(threads, [&](int64_t) { tokens.run([&](int64_t i) { backward.add_vectors(i); }); });
    backward.add_parameters();
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_scan_backward(const FoveateScan* call) {
    if (foveate::is_refused(*call)) return FOVEATE_REFUSED;
    try {
        return foveate::run_backward(*call);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
