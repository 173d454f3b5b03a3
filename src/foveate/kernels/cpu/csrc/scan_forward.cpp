// The selective scan: lanes are channels, so that what tokens share (b, c) is broadcast and nothing is summed across.
#include "scan.h"

namespace foveate {
namespace {

struct Workspace {
    Workspace(Arena& arena, int64_t blocks, int64_t states)
        : pitch(round_up(states, LANES)), rates(arena.take<float>(blocks * states * LANES)),
          state(arena.take<float>(blocks * states * LANES)), skip(arena.take<float>(blocks * LANES)),
          bias(arena.take<float>(blocks * LANES)), b(arena.take<float>(SEGMENT * pitch)),
          c(arena.take<float>(SEGMENT * pitch)), x(arena.take<float>(TURNED)), dt(arena.take<float>(TURNED)),
          z(arena.take<float>(TURNED)), y(arena.take<float>(TURNED)),
          turned(arena.take<float>(std::max<int64_t>(pitch, LANES) * SEGMENT)) {}
    int64_t pitch;
    float *rates, *state, *skip, *bias, *b, *c, *x, *dt, *z, *y, *turned;
};

// K states through n tokens: h kept in registers, y added to.
template <int K>
FOVEATE_INLINE void scan_states(const Workspace& at, float* state, const float* rates, int64_t s, int64_t n) {
    Floats h[K], rate[K];
    for (int k = 0; k < K; ++k) {
        h[k] = load(state + (s + k) * LANES);
        rate[k] = load(rates + (s + k) * LANES);
    }
    for (int64_t t = 0; t < n; ++t) {
        const Floats dt = load(at.dt + t * LANES), added = load(at.x + t * LANES);
        const float *b = at.b + t * at.pitch + s, *c = at.c + t * at.pitch + s;
        Floats y = load(at.y + t * LANES);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            const Factor factor = factor_of(dt * rate[k]);
            const Floats scaled = h[k] * factor.scale, kept = scaled * factor.rest + scaled;
            h[k] = added * b[k] + kept;
            y = h[k] * c[k] + y;
        }
        store(at.y + t * LANES, y);
    }
    for (int k = 0; k < K; ++k) store(state + (s + k) * LANES, h[k]);
}

class Forward {
  public:
    explicit Forward(const FoveateScan& call) : call_(call), parts_(parts_of(call)) {}

    int64_t items() const { return call_.sequences * parts_.count(); }

    void item(int64_t i) const {
        const int64_t sequence = i / parts_.count();
        const Part part = parts_[i % parts_.count()];
        const Run run = run_of(call_.starts, call_.length, sequence);
        const Workspace at = scratch<Workspace>(parts_.blocks(), call_.states);
        const int64_t size = call_.states * LANES, per_sequence = call_.channels * call_.states;
        for_blocks(part, [&](int64_t block, Part lanes) {
            read_lanes(at.rates + block * size, call_.rates, call_.states, lanes);
            read_lanes(at.state + block * size, call_.first + sequence * per_sequence, call_.states, lanes);
            read_lanes(at.skip + block * LANES, call_.skip, 1, lanes);
            read_lanes(at.bias + block * LANES, call_.bias, 1, lanes);
        });
        for (int64_t t = 0; t < run.length; t += SEGMENT)
            segment(at, run, part, t, std::min(SEGMENT, run.length - t));
        for_blocks(part, [&](int64_t block, Part lanes) {
            write_lanes(call_.last + sequence * per_sequence, at.state + block * size, call_.states, lanes);
        });
    }

  private:
    void segment(const Workspace& at, const Run& run, Part part, int64_t t, int64_t n) const {
        const int64_t token = run.token + t, states = call_.states;
        const int64_t group_b = part.channel / (call_.channels / call_.groups_b);
        const int64_t group_c = part.channel / (call_.channels / call_.groups_c);
        read_vectors(at.b, at.pitch, call_.b, run.batch, token, n, group_b, states, at.turned);
        read_vectors(at.c, at.pitch, call_.c, run.batch, token, n, group_c, states, at.turned);
        for_blocks(part, [&](int64_t block, Part lanes) {
            float* state = at.state + block * states * LANES;
            const float* rates = at.rates + block * states * LANES;
            if (call_.marks) {
                float* mark = mark_of(call_, run.mark + t / SEGMENT, lanes.channel);
                for (int64_t s = 0; s < states; ++s)
                    std::memcpy(mark + s * call_.channels, state + s * LANES, lanes.count * sizeof(float));
            }
            prepare(at, run.batch, token, n, lanes, load(at.skip + block * LANES), load(at.bias + block * LANES));
            int64_t s = 0;
            for (; s + 4 <= states; s += 4) scan_states<4>(at, state, rates, s, n);
            for (; s < states; ++s) scan_states<1>(at, state, rates, s, n);
            finish(at, run.batch, token, n, lanes);
        });
    }

    // Steps in dt, what is added in x, the skip in y.
    void prepare(const Workspace& at, int64_t batch, int64_t token, int64_t n, Part lanes, Floats skip,
                 Floats bias) const {
        read_channels(at.x, call_.x, batch, token, n, lanes, at.turned);
        read_channels(at.dt, call_.dt, batch, token, n, lanes, at.turned);
        const bool linear = !call_.b.data;
        for (float *x = at.x, *dt = at.dt, *y = at.y; x < at.x + n * LANES; x += LANES, dt += LANES, y += LANES) {
            const Floats value = load(x), raw = load(dt) + bias, step = call_.softplus ? softplus_of(raw) : raw;
            store(y, value * skip);
            store(dt, step);
            if (!linear) store(x, value * step);
        }
    }

    void finish(const Workspace& at, int64_t batch, int64_t token, int64_t n, Part lanes) const {
        if (call_.z.data) {
            read_channels(at.z, call_.z, batch, token, n, lanes, at.turned);
            for (float *y = at.y, *z = at.z; y < at.y + n * LANES; y += LANES, z += LANES)
                store(y, load(y) * load(z) * sigmoid_of(load(z)));
        }
        write_channels(call_.out, batch, token, n, lanes, at.y, at.turned);
    }

    const FoveateScan& call_;
    const Parts parts_;
};

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_scan_size(void) { return sizeof(FoveateScan); }

FOVEATE_API int64_t foveate_scan_forward(const FoveateScan* call) {
    using namespace foveate;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    prefer_large_pages(*call, call->out);
    const Forward forward(*call);
    Queue queue(forward.items());
    const auto work = [&](int64_t) { queue.run([&](int64_t i) { forward.item(i); }); };
    return on_threads(std::min(threads_for(*call), forward.items()), work) ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}
