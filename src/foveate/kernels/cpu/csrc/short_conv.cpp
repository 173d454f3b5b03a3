// Short causal convolutions, channel by channel, with bias and SiLU; lanes are channels.
#include "exp.h"
#include "streams.h"

namespace foveate {
namespace {

constexpr int64_t MOST_GROUPS = 8;   // of sequences, which sum their gradients of weights and bias apart
constexpr int64_t ROWS = 2 * SEGMENT;  // those of a segment, and of the tokens before or after it that taps reach

struct Workspace {
    Workspace(Arena& arena, int64_t blocks, int64_t width)
        : taps(arena.take<float>(blocks * width * LANES)), bias(arena.take<float>(blocks * LANES)),
          edge(arena.take<float>(blocks * width * LANES)), d_taps(arena.take<float>(blocks * width * LANES)),
          d_bias(arena.take<float>(blocks * LANES)), seen(arena.take<float>(ROWS * LANES)),
          d_sum(arena.take<float>(ROWS * LANES)), out(arena.take<float>(TURNED)), turned(arena.take<float>(TURNED)) {}
    float *taps, *bias;     // [block][tap][lane]
    float* edge;            // [block][token][lane]: forward the inputs before a segment, backward d_sum after it
    float *d_taps, *d_bias;
    float *seen, *d_sum;    // [token][lane]
    float *out, *turned;
};

class Conv {
  public:
    explicit Conv(const FoveateConv& call)
        : call_(call), reach_(call.width - 1), parts_(call.channels, call.channels),
          groups_(std::min(call.sequences, MOST_GROUPS)) {}

    int64_t threads() const {
        const int64_t tokens = call_.starts ? call_.starts[call_.sequences] : call_.sequences * call_.length;
        constexpr double OF_SILU = 24;  // multiply-adds that take as long as it and the rest
        return worthwhile_threads((call_.width + OF_SILU) * tokens * call_.channels, 0, call_.threads);
    }
    int64_t forward_items() const { return call_.sequences * parts_.count(); }
    int64_t backward_items() const { return groups_ * parts_.count(); }

    void forward(int64_t i) const {
        const int64_t sequence = i / parts_.count(), tails = sequence * call_.channels * reach_;
        const Part part = parts_[i % parts_.count()];
        const Run run = run_of(call_.starts, call_.length, sequence);
        const Workspace at = scratch<Workspace>(parts_.blocks(), call_.width);
        read_parameters(at, part);
        for_blocks(part, [&](int64_t block, Part lanes) {
            read_lanes(edge(at, block), call_.first + tails, reach_, lanes);
        });
        for (int64_t t = 0; t < run.length; t += SEGMENT) {
            const int64_t n = std::min(SEGMENT, run.length - t);
            for_blocks(part, [&](int64_t block, Part lanes) {
                std::memcpy(at.seen, edge(at, block), reach_ * LANES * sizeof(float));
                read_channels(at.seen + reach_ * LANES, call_.x, run.batch, run.token + t, n, lanes, at.turned);
                std::memcpy(edge(at, block), at.seen + n * LANES, reach_ * LANES * sizeof(float));
                for (int64_t row = 0; row < n; ++row) {
                    const Floats sum = summed(at, block, row);
                    store(at.out + row * LANES, call_.silu ? sum / (exp_of(-sum) + 1.0f) : sum);
                }
                write_channels(call_.out, run.batch, run.token + t, n, lanes, at.out, at.turned);
            });
        }
        for_blocks(part, [&](int64_t block, Part lanes) {
            write_lanes(call_.last + tails, edge(at, block), reach_, lanes);
        });
    }

    // The sequences of a group, one after another, for a part of the channels.
    void backward(int64_t i, float* d_weight, float* d_bias) const {
        const int64_t group = i / parts_.count(), size = call_.width * LANES;
        const Part part = parts_[i % parts_.count()];
        const Workspace at = scratch<Workspace>(parts_.blocks(), call_.width);
        read_parameters(at, part);
        std::memset(at.d_taps, 0, parts_.blocks() * size * sizeof(float));
        std::memset(at.d_bias, 0, parts_.blocks() * LANES * sizeof(float));
        for (int64_t s = group * call_.sequences / groups_; s < (group + 1) * call_.sequences / groups_; ++s)
            sequence_backward(at, s, part);
        for_blocks(part, [&](int64_t block, Part lanes) {
            write_lanes(d_weight + group * call_.channels * call_.width, at.d_taps + block * size, call_.width, lanes);
            write_lanes(d_bias + group * call_.channels, at.d_bias + block * LANES, 1, lanes);
        });
    }

    int64_t groups() const { return groups_; }

  private:
    float* edge(const Workspace& at, int64_t block) const { return at.edge + block * call_.width * LANES; }

    void read_parameters(const Workspace& at, Part part) const {
        for_blocks(part, [&](int64_t block, Part lanes) {
            read_lanes(at.taps + block * call_.width * LANES, call_.weight, call_.width, lanes);
            read_lanes(at.bias + block * LANES, call_.bias, 1, lanes);
        });
    }

    FOVEATE_INLINE_MEMBER Floats summed(const Workspace& at, int64_t block, int64_t row) const {
        Floats sum = load(at.bias + block * LANES);
        for (int64_t i = 0; i < call_.width; ++i)
            sum = load(at.taps + (block * call_.width + i) * LANES) * load(at.seen + (row + i) * LANES) + sum;
        return sum;
    }

    // From the last segment to the first; what the sums after a segment pass back to it lies in edge.
    void sequence_backward(const Workspace& at, int64_t sequence, Part part) const {
        const Run run = run_of(call_.starts, call_.length, sequence);
        const int64_t tails = sequence * call_.channels * reach_;
        std::memset(at.edge, 0, parts_.blocks() * call_.width * LANES * sizeof(float));
        for (int64_t t = (run.length - 1) / SEGMENT * SEGMENT; run.length && t >= 0; t -= SEGMENT) {
            const int64_t n = std::min(SEGMENT, run.length - t);
            for_blocks(part, [&](int64_t block, Part lanes) {
                read_seen(at, run, t, n, lanes, call_.first + tails);
                read_channels(at.d_sum, call_.grad_out, run.batch, run.token + t, n, lanes, at.turned);
                std::memcpy(at.d_sum + n * LANES, edge(at, block), reach_ * LANES * sizeof(float));
                through_activation(at, block, n);
                for (int64_t row = 0; row < n; ++row) store(at.out + row * LANES, spread(at, block, row));
                for (int64_t row = 0; row < n; ++row)
                    add_last(at.out + row * LANES, t + row + reach_ - run.length, tails, lanes);
                write_channels(call_.dx, run.batch, run.token + t, n, lanes, at.out, at.turned);
                std::memcpy(edge(at, block), at.d_sum, reach_ * LANES * sizeof(float));
            });
        }
        for_blocks(part, [&](int64_t block, Part lanes) {
            std::memset(at.d_sum, 0, reach_ * LANES * sizeof(float));
            std::memcpy(at.d_sum + reach_ * LANES, edge(at, block), reach_ * LANES * sizeof(float));
            for (int64_t row = 0; row < reach_; ++row) {
                store(at.seen + row * LANES, spread(at, block, row));
                add_last(at.seen + row * LANES, row - run.length, tails, lanes);
            }
            write_lanes(call_.d_first + tails, at.seen, reach_, lanes);
        });
    }

    // The inputs of a segment, and those before it that its taps reach.
    void read_seen(const Workspace& at, const Run& run, int64_t t, int64_t n, Part lanes, const float* tail) const {
        if (t)
            read_channels(at.seen, call_.x, run.batch, run.token + t - reach_, reach_, lanes, at.turned);
        else
            read_lanes(at.seen, tail, reach_, lanes);
        read_channels(at.seen + reach_ * LANES, call_.x, run.batch, run.token + t, n, lanes, at.turned);
    }

    // Gradients of the sums out of those of what came out, and with them those of taps and bias.
    void through_activation(const Workspace& at, int64_t block, int64_t n) const {
        float* d_taps = at.d_taps + block * call_.width * LANES;
        Floats d_bias = load(at.d_bias + block * LANES);
        for (int64_t row = 0; row < n; ++row) {
            Floats d_sum = load(at.d_sum + row * LANES);
            if (call_.silu) {
                const Floats sum = summed(at, block, row), gate = 1.0f / (exp_of(-sum) + 1.0f);
                d_sum *= gate * (sum * (1.0f - gate) + 1.0f);
                store(at.d_sum + row * LANES, d_sum);
            }
            d_bias += d_sum;
            for (int64_t i = 0; i < call_.width; ++i)
                store(d_taps + i * LANES, d_sum * load(at.seen + (row + i) * LANES) + load(d_taps + i * LANES));
        }
        store(at.d_bias + block * LANES, d_bias);
    }

    // What the sums from this row on give back to its input.
    FOVEATE_INLINE_MEMBER Floats spread(const Workspace& at, int64_t block, int64_t row) const {
        Floats d_x{};
        for (int64_t i = 0; i < call_.width; ++i) {
            const Floats tap = load(at.taps + (block * call_.width + i) * LANES);
            d_x = tap * load(at.d_sum + (row + reach_ - i) * LANES) + d_x;
        }
        return d_x;
    }

    // The gradient of the tail that is left after a sequence, to the token that is its place-th.
    void add_last(float* d_x, int64_t place, int64_t tails, Part lanes) const {
        if (place < 0 || !call_.grad_last) return;
        for (int64_t lane = 0; lane < lanes.count; ++lane)
            d_x[lane] += call_.grad_last[tails + (lanes.channel + lane) * reach_ + place];
    }

    const FoveateConv& call_;
    const int64_t reach_;
    const Parts parts_;
    const int64_t groups_;
};

void add_groups(float* to, const float* from, int64_t size, int64_t groups) {
    for (int64_t i = 0; to && i < size; ++i) {
        to[i] = 0;
        for (int64_t group = 0; group < groups; ++group) to[i] += from[group * size + i];
    }
}

bool run_backward(const FoveateConv& call) {
    prefer_large_pages(call, call.dx);
    const Conv conv(call);
    const int64_t weights = call.channels * call.width;
    const Buffer<float> d_weight(conv.groups() * weights), d_bias(conv.groups() * call.channels);
    Queue queue(conv.backward_items());
    const auto item = [&](int64_t i) { conv.backward(i, d_weight.get(), d_bias.get()); };
    const bool done = on_threads(std::min(conv.threads(), conv.backward_items()), [&](int64_t) { queue.run(item); });
    add_groups(call.d_weight, d_weight.get(), weights, conv.groups());
    add_groups(call.d_bias, d_bias.get(), call.channels, conv.groups());
    return done;
}

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_conv_size(void) { return sizeof(FoveateConv); }

FOVEATE_API int64_t foveate_conv_forward(const FoveateConv* call) {
    using namespace foveate;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    prefer_large_pages(*call, call->out);
    const Conv conv(*call);
    Queue queue(conv.forward_items());
    const auto work = [&](int64_t) { queue.run([&](int64_t i) { conv.forward(i); }); };
    return on_threads(std::min(conv.threads(), conv.forward_items()), work) ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

FOVEATE_API int64_t foveate_conv_backward(const FoveateConv* call) {
    if (foveate::is_refused(*call)) return FOVEATE_REFUSED;
    try {
        return foveate::run_backward(*call) ? FOVEATE_OK : FOVEATE_NO_MEMORY;
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
