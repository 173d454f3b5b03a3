// Attention of each token of a grid to the window around it, backward: weights are formed again from the log row sums.
//
// A unit is all query heads that share key and value heads; no two units write to the same gradients. Boxes of a unit
// see some of the same keys: each adds to sums of its own, and these are added up at the end, always in the same order.
#include <numeric>

#include "slab.h"
#include "threads.h"

namespace foveate::grid {
namespace {

// Gradients of keys or values as each box has added them up: [batch and head][lattice][box][row][x][channel].
class Sums {
  public:
    Sums(const Plan& plan, int64_t heads, int64_t dim)
        : plan_(plan), padded_(round_up(dim, LANES)), in_box_(most_tokens(plan) * padded_),
          data_(heads * plan.lattices() * plan.boxes() * in_box_) {}

    int64_t padded() const { return padded_; }
    float* at(int64_t head, int64_t lattice, int64_t box) const {
        return data_.get() + ((head * plan_.lattices() + lattice) * plan_.boxes() + box) * in_box_;
    }

  private:
    static int64_t most_tokens(const Plan& plan) {
        int64_t most = 0;
        for (int64_t i = 0; i < plan.lattices(); ++i)
            for (int64_t j = 0; j < plan.boxes(); ++j) {
                const Lattice lattice = plan.lattice(i);
                most = std::max(most, lattice.keys(plan.box(lattice, j)).tokens());
            }
        return most;
    }

    const Plan& plan_;
    const int64_t padded_, in_box_;
    const Buffer<float> data_;
};

struct Workspace {
    float *keys, *values, *key_rows, *rows, *queries, *query_rows, *grads, *grad_rows, *weights, *slopes, *dq, *lse, *delta,
        *ones;
    KeyRow* seen;
    Link* links;
    Strip* strips;

    Workspace(Arena& arena, const FoveateAttend& call, const Slab& slab, const Box& box) {
        const int64_t dim = round_up(call.dim, LANES), value_dim = round_up(call.value_dim, LANES);
        const Lattice& l = slab.lattice;
        keys = arena.take<float>(TransposedRows::size(slab, dim));
        values = arena.take<float>(TransposedRows::size(slab, value_dim));
        key_rows = arena.take<float>(NaturalRows::size(slab, dim));
        rows = arena.take<float>(LANES * std::max(dim, value_dim));
        queries = arena.take<float>(QueryRows::size(dim));
        query_rows = arena.take<float>(QueryRows::size(dim));
        grads = arena.take<float>(QueryRows::size(value_dim));
        grad_rows = arena.take<float>(QueryRows::size(value_dim));
        weights = arena.take<float>(Pairs::size(l));
        slopes = arena.take<float>(Pairs::size(l));
        dq = arena.take<float>(LANES * dim);
        lse = arena.take<float>(LANES);
        delta = arena.take<float>(LANES);
        ones = arena.take<float>(LANES);
        seen = arena.take<KeyRow>(Sight::most_rows(l));
        links = arena.take<Link>(l.z.size * l.y.size);
        strips = arena.take<Strip>(Strip::count_in(box.x));
    }
};

// All queries of a box, for one head; adds to the box's sums.
class Backward {
  public:
    Backward(const FoveateAttend& call, const Box& box, const Slab& slab, const Workspace& space, int64_t b, int64_t h,
             float* dk, float* dv)
        : call_(call), l_(slab.lattice), box_(box), slab_(slab), space_(space), q_(call, call.q, b, h, call.dim),
          k_(call, call.k, b, h, call.dim), v_(call, call.v, b, h, call.value_dim),
          out_(call, call.out, b, h, call.value_dim), grad_out_(call, call.grad_out, b, h, call.value_dim),
          dq_(call, call.dq, b, h, call.dim), queries_(q_, space.queries, space.query_rows),
          grads_(grad_out_, space.grads, space.grad_rows), keys_(slab, k_, space.keys, space.rows),
          values_(slab, v_, space.values, space.rows), key_rows_(slab, k_, space.key_rows), dk_(dk), dv_(dv),
          head_((b * call.q.heads + h) * call.num_queries), sight_(l_, slab.keys, space.seen) {
        Strip::fill(space.strips, l_.x, box.x, slab.keys.x.begin);
        std::fill(space.ones, space.ones + LANES, 1.0f);
    }

    void run() {
        const auto pack = [&](int64_t row) { keys_.pack(row), values_.pack(row), key_rows_.pack(row); };
        each_group(box_, sight_, pack, [&](int64_t next_row) {
            for (int64_t i = 0; i < Strip::count_in(box_.x); ++i) {
                look_ahead(next_row, i * LANES);
                strip(space_.strips[i]);
            }
        });
    }

  private:
    // Ask for what the next group needs, at the same place along x.
    void look_ahead(int64_t next_row, int64_t x) {
        ahead_.clear();
        for (int64_t row = next_row; row < std::min(next_row + GROUP, slab_.keys.rows()); ++row)
            for (const Head* head : {&k_, &v_})
                ahead_.add(*head, slab_.token(row, x), l_.x.stride, std::min<int64_t>(slab_.columns() - x, LANES));
        const int64_t y = sight_.queries().end;
        for (int64_t i = y; i < std::min(y + GROUP, box_.y.end); ++i)
            for (const Head* head : {&q_, &out_, &grad_out_})
                ahead_.add(*head, l_.token(sight_.z(), i, box_.x.begin + x), l_.x.stride, std::min<int64_t>(box_.x.size() - x, LANES));
        ahead_.spread(sight_.slots());
    }

    void strip(const Strip& strip) {
        const Pairs pairs(l_, sight_);
        const int64_t num_rows = sight_.queries().size();
        for (int64_t r = 0; r < num_rows; ++r) {
            queries_.read(r, token(strip, r), l_.x.stride, strip.lanes, (float)(call_.scale * LOG2E));
            grads_.read(r, token(strip, r), l_.x.stride, strip.lanes, (float)call_.scale);
        }
        for (const Run& run : sight_)
            for (const KeyRow& key : run) {
                ahead_.part();
                scores(run, key.slot, strip, l_.x.size, call_.dim, queries_.transposed(), queries_.row(),
                       keys_.at(key.row) + strip.column, keys_.channel(), pairs, space_.weights);
                scores(run, key.slot, strip, l_.x.size, call_.value_dim, grads_.transposed(), grads_.row(),
                       values_.at(key.row) + strip.column, values_.channel(), pairs, space_.slopes);
            }
        for (int64_t r = 0; r < num_rows; ++r) {
            read_sums(strip, r);
            slopes(strip, r, pairs);
            add(strip, r, pairs);
        }
    }
    int64_t token(const Strip& strip, int64_t r) const {
        return l_.token(sight_.z(), sight_.queries().begin + r, strip.x);
    }

    // Log row sums in base 2, and delta = scale * (dO . out - dlse), per lane.
    void read_sums(const Strip& strip, int64_t r) {
        for (int64_t i = 0; i < strip.lanes; ++i) {
            const int64_t token = this->token(strip, r) + i * l_.x.stride;
            const float sum = dot(grads_.rows(r) + i * grads_.step(), token);
            space_.lse[i] = call_.lse[head_ + token] * LOG2E;
            space_.delta[i] = (float)call_.scale * (sum - (call_.grad_lse ? call_.grad_lse[head_ + token] : 0));
        }
    }
    float dot(const float* grad, int64_t token) const {
        if (!out_.direct()) out_.read(space_.rows, token);
        const float* out = out_.direct() ? out_.row(token) : space_.rows;
        Floats sum{};
        for (int64_t j = 0; j < out_.padded(); j += LANES) sum += load(grad + j) * load(out + j);
        return sum_lanes(sum);
    }

    // Scores to weights, and gradients of weights (times scale) to gradients of q k.
    void slopes(const Strip& strip, int64_t r, const Pairs& pairs) {
        const Floats lse = load(space_.lse), delta = load(space_.delta);
        const bool ragged = strip.ragged;
        pairs.each(sight_, r, [&](int64_t at, int64_t offset) {
            Floats weight = exp2_of(load(space_.weights + at) - lse);
            Floats slope = weight * (load(space_.slopes + at) - delta);
            if (ragged) {
                weight = choose(strip.seeing(offset), weight, Floats{});
                slope = choose(strip.seeing(offset), slope, Floats{});
            }
            store(space_.weights + at, weight);
            store(space_.slopes + at, slope);
        });
    }

    // dq of a row of queries, and what it adds to dk and dv.
    void add(const Strip& strip, int64_t r, const Pairs& pairs) {
        const auto links = [&](const float* weights, int64_t step, auto tokens_of) {
            return Links(space_.links, sight_, r, strip, pairs, weights, step, tokens_of);
        };
        const auto sums = [&](float* sums, int64_t padded) {
            return [=](int64_t row) { return sums + row * slab_.columns() * padded; };
        };
        gather_to(dq_, links(space_.slopes, key_rows_.step(), [&](int64_t row) { return key_rows_.at(row); }), strip,
                  space_.ones, token(strip, r), l_.x.stride, space_.dq);
        scatter(links(space_.slopes, k_.padded(), sums(dk_, k_.padded())), strip, k_.padded(), queries_.rows(r),
                queries_.step());
        scatter(links(space_.weights, v_.padded(), sums(dv_, v_.padded())), strip, v_.padded(), grads_.rows(r),
                grads_.step());
    }

    const FoveateAttend& call_;
    const Lattice& l_;
    const Box& box_;
    const Slab& slab_;
    const Workspace& space_;
    const Head q_, k_, v_, out_, grad_out_, dq_;
    QueryRows queries_, grads_;
    const TransposedRows keys_, values_;
    const NaturalRows key_rows_;
    float *dk_, *dv_;
    const int64_t head_;
    Sight sight_;
    Prefetch ahead_;
};

// Gradients of keys or values, from the sums of all boxes.
class Total {
  public:
    Total(const FoveateAttend& call, const FoveateTensor& to, int64_t dim, const Plan& plan, const Sums& sums)
        : call_(call), to_(to), dim_(dim), plan_(plan), sums_(sums) {}

    bool write() const {
        const Lattice longest = plan_.lattice(0);
        const int64_t lines = longest.y.length, rows = longest.z.length * lines;
        Queue queue(call_.batch * to_.heads * plan_.lattices() * rows, 16);
        return on_threads(call_.threads, [&](int64_t) {
            Buffer<float> space(AT_ONCE * sums_.padded());
            queue.run([&](int64_t item) {
                const int64_t row = item % rows, part = item / rows;
                write_row(part / plan_.lattices(), part % plan_.lattices(), row / lines, row % lines, space.get());
            });
        });
    }

  private:
    static constexpr int64_t AT_ONCE = 256;  // tokens

    void write_row(int64_t head, int64_t lattice, int64_t z, int64_t y, float* space) const {
        const Lattice l = plan_.lattice(lattice);
        if (z >= l.z.length || y >= l.y.length) return;
        const int64_t group = call_.q.heads / to_.heads;
        const Head out(call_, to_, head / to_.heads, head % to_.heads * group, dim_);
        for (int64_t x = 0; x < l.x.length; x += AT_ONCE) {
            const Range columns{x, std::min(x + AT_ONCE, l.x.length)};
            std::fill(space, space + columns.size() * sums_.padded(), 0.0f);
            for (int64_t box = 0; box < plan_.boxes(); ++box) {
                const Box keys = l.keys(plan_.box(l, box));
                if (keys.z.has(z) && keys.y.has(y))
                    add(sums_.at(head, lattice, box) + keys.row(z, y) * keys.x.size() * sums_.padded(), keys.x, columns, space);
            }
            for (int64_t i = 0; i < columns.size(); ++i) out.write(l.token(z, y, x + i), space + i * sums_.padded());
        }
    }
    void add(const float* from, Range keys, Range columns, float* to) const {
        const int64_t begin = std::max(keys.begin, columns.begin), end = std::min(keys.end, columns.end);
        from += (begin - keys.begin) * sums_.padded();
        to += (begin - columns.begin) * sums_.padded();
        for (int64_t i = 0; i < (end - begin) * sums_.padded(); i += LANES) store(to + i, load(to + i) + load(from + i));
    }

    const FoveateAttend& call_;
    const FoveateTensor& to_;
    const int64_t dim_;
    const Plan& plan_;
    const Sums& sums_;
};

// The query heads of a unit for one box of a lattice.
void work(const FoveateAttend& call, const Plan& plan, int64_t lattice, int64_t box, int64_t first_head, int64_t heads,
          const Sums& dk, const Sums& dv) {
    const Lattice l = plan.lattice(lattice);
    const Box queries = plan.box(l, box);
    const Slab slab(l, queries);
    const auto space = scratch<Workspace>(call, slab, queries);
    const auto sum = [&](const Sums& sums, int64_t group, int64_t h) {
        float* at = sums.at(h / group, lattice, box);
        if (h % group == 0) std::fill(at, at + slab.keys.tokens() * sums.padded(), 0.0f);
        return at;
    };
    for (int64_t h = first_head; h < first_head + heads; ++h) {
        float* of_keys = sum(dk, call.q.heads / call.k.heads, h);
        float* of_values = sum(dv, call.q.heads / call.v.heads, h);
        Backward(call, queries, slab, space, h / call.q.heads, h % call.q.heads, of_keys, of_values).run();
    }
}

int64_t backward(const FoveateAttend& call, const FoveateNeighborhood& window) {
    const int64_t heads = std::lcm(call.q.heads / call.k.heads, call.q.heads / call.v.heads);  // of a unit
    const int64_t units = call.batch * call.q.heads / heads;
    const Plan plan(window, (8 * call.threads + units - 1) / units);
    const Sums dk(plan, call.batch * call.k.heads, call.dim), dv(plan, call.batch * call.v.heads, call.value_dim);
    const int64_t boxes = plan.lattices() * plan.boxes();
    Queue queue(units * boxes);
    bool done = on_threads(std::min(call.threads, units * boxes), [&](int64_t) {
        queue.run([&](int64_t item) {
            const int64_t box = item % boxes;
            work(call, plan, box / plan.boxes(), box % plan.boxes(), item / boxes * heads, heads, dk, dv);
        });
    });
    done = done && Total(call, call.dk, call.dim, plan, dk).write();
    done = done && Total(call, call.dv, call.value_dim, plan, dv).write();
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

}  // namespace
}  // namespace foveate::grid

FOVEATE_API int64_t foveate_neighborhood_backward(const FoveateAttend* call, const FoveateNeighborhood* window) {
    if (call->batch * call->q.heads * call->num_queries == 0) return FOVEATE_OK;
    try {
        return foveate::grid::backward(*call, *window);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
