// One token of the selective scan, as a decoder calls it. Lanes are states here: rates and states, which are all that
// there is to read, are then taken as they lie.
#include "scan.h"

namespace foveate {
namespace {

struct Workspace {
    Workspace(Arena& arena, int64_t states)
        : pitch(round_up(states, LANES)), b(arena.take<float>(pitch)), c(arena.take<float>(pitch)),
          turned(arena.take<float>(pitch * SEGMENT)) {}
    int64_t pitch;
    float *b, *c, *turned;
};

class Step {
  public:
    explicit Step(const FoveateScan& call) : call_(call), parts_(parts_of(call)) {}

    int64_t items() const { return call_.sequences * parts_.count(); }

    // False where a state would grow.
    bool item(int64_t i) const {
        const int64_t sequence = i / parts_.count(), states = call_.states;
        const Part part = parts_[i % parts_.count()];
        const Workspace at = scratch<Workspace>(states);
        const int64_t group_b = part.channel / (call_.channels / call_.groups_b);
        const int64_t group_c = part.channel / (call_.channels / call_.groups_c);
        read_vectors(at.b, at.pitch, call_.b, sequence, 0, 1, group_b, states, at.turned);
        read_vectors(at.c, at.pitch, call_.c, sequence, 0, 1, group_c, states, at.turned);
        bool fades = true;
        for_blocks(part, [&](int64_t, Part lanes) { fades &= block(at, sequence, lanes); });
        return fades;
    }

  private:
    bool block(const Workspace& at, int64_t sequence, Part lanes) const {
        alignas(64) float x[LANES], dt[LANES], z[LANES], skip[LANES], bias[LANES], read[LANES * LANES] = {};
        read_channels(x, call_.x, sequence, 0, 1, lanes, nullptr);
        read_channels(dt, call_.dt, sequence, 0, 1, lanes, nullptr);
        read_lanes(skip, call_.skip, 1, lanes);
        read_lanes(bias, call_.bias, 1, lanes);
        const Floats raw = load(dt) + load(bias);
        store(dt, call_.softplus ? softplus_of(raw) : raw);
        Floats highest = -load(dt);
        for (int64_t lane = 0; lane < lanes.count; ++lane) {
            const int64_t first = (sequence * call_.channels + lanes.channel + lane) * call_.states;
            const float* rates = call_.rates + (lanes.channel + lane) * call_.states;
            const Floats y = channel(at, rates, first, dt[lane], dt[lane] * x[lane], highest);
            store(read + lane * LANES, y);
        }
        Floats y = sum_each(read) + load(x) * load(skip);
        if (call_.z.data) {
            read_channels(z, call_.z, sequence, 0, 1, lanes, nullptr);
            y *= load(z) * sigmoid_of(load(z));
        }
        store(x, y);
        write_channels(call_.out, sequence, 0, 1, lanes, x, nullptr);
        store(x, highest);
        return *std::max_element(x, x + LANES) <= 0;
    }

    // Products of a channel's states with c, to be summed.
    FOVEATE_INLINE_MEMBER Floats channel(const Workspace& at, const float* rates, int64_t first, float dt, float added,
                                         Floats& highest) const {
        Floats y{};
        int64_t s = 0;
        for (; s + LANES <= call_.states; s += LANES) {
            const Floats rate = load(rates + s);
            highest = greater(highest, rate);
            const Floats h = next(load(call_.first + first + s), rate * dt, load(at.b + s) * added);
            store(call_.last + first + s, h);
            y = h * load(at.c + s) + y;
        }
        if (s == call_.states) return y;
        const size_t rest = (call_.states - s) * sizeof(float);
        Floats rate{}, h{};
        std::memcpy(&rate, rates + s, rest);
        std::memcpy(&h, call_.first + first + s, rest);
        highest = greater(highest, rate);
        h = next(h, rate * dt, load(at.b + s) * added);
        std::memcpy(call_.last + first + s, &h, rest);
        return h * load(at.c + s) + y;
    }

    static FOVEATE_INLINE_MEMBER Floats next(Floats h, Floats log, Floats added) {
        const Factor factor = factor_of(log);
        const Floats scaled = h * factor.scale;
        return scaled * factor.rest + scaled + added;
    }

    const FoveateScan& call_;
    const Parts parts_;
};

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_scan_step(const FoveateScan* call) {
    using namespace foveate;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    const Step step(*call);
    Queue queue(step.items());
    std::atomic<bool> fades{true};
    const auto item = [&](int64_t i) {
        if (!step.item(i)) fades = false;
    };
    if (!on_threads(std::min(threads_for(*call), step.items()), [&](int64_t) { queue.run(item); }))
        return FOVEATE_NO_MEMORY;
    return fades ? FOVEATE_OK : FOVEATE_OUT_OF_RANGE;
}
