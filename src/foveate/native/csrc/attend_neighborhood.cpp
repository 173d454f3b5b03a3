// Attention of each token of a grid to the window around it, forward.
#include "slab.h"
#include "threads.h"

namespace foveate::grid {
namespace {

struct Workspace {
    float *keys, *values, *rows, *queries, *query_rows, *scores, *out, *lse, *factor;
    KeyRow* key_rows;
    Link* links;
    Strip* strips;

    Workspace(Arena& arena, const FoveateAttend& call, const Slab& slab, const Box& box) {
        const int64_t dim = round_up(call.dim, LANES), value_dim = round_up(call.value_dim, LANES);
        const Lattice& l = slab.lattice;
        keys = arena.take<float>(TransposedRows::size(slab, dim));
        values = arena.take<float>(NaturalRows::size(slab, value_dim));
        rows = arena.take<float>(LANES * dim);
        queries = arena.take<float>(QueryRows::size(dim));
        query_rows = arena.take<float>(QueryRows::size(dim));
        scores = arena.take<float>(Pairs::size(l));
        out = arena.take<float>(LANES * value_dim);
        lse = arena.take<float>(GROUP * LANES);
        factor = arena.take<float>(GROUP * LANES);
        key_rows = arena.take<KeyRow>(Sight::most_rows(l));
        links = arena.take<Link>(l.z.size * l.y.size);
        strips = arena.take<Strip>(Strip::count_in(box.x));
    }
};

// All queries of a box, for one head.
class Forward {
  public:
    Forward(const FoveateAttend& call, const Box& box, const Slab& slab, const Workspace& space, int64_t b, int64_t h)
        : call_(call), l_(slab.lattice), box_(box), slab_(slab), space_(space), q_(call, call.q, b, h, call.dim),
          k_(call, call.k, b, h, call.dim), v_(call, call.v, b, h, call.value_dim),
          out_(call, call.out, b, h, call.value_dim), queries_(q_, space.queries, space.query_rows),
          keys_(slab, k_, space.keys, space.rows), values_(slab, v_, space.values),
          lse_(call.lse ? call.lse + (b * call.q.heads + h) * call.num_queries : nullptr),
          sight_(l_, slab.keys, space.key_rows) {
        Strip::fill(space.strips, l_.x, box.x, slab.keys.x.begin);
    }

    void run() {
        const auto pack = [&](int64_t row) { keys_.pack(row), values_.pack(row); };
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
            ahead_.add(q_, l_.token(sight_.z(), i, box_.x.begin + x), l_.x.stride, std::min<int64_t>(box_.x.size() - x, LANES));
        ahead_.spread(sight_.slots());
    }

    void strip(const Strip& strip) {
        const Pairs pairs(l_, sight_);
        const int64_t num_rows = sight_.queries().size();
        for (int64_t r = 0; r < num_rows; ++r)
            queries_.read(r, token(strip, r), l_.x.stride, strip.lanes, (float)(call_.scale * LOG2E));
        for (const Run& run : sight_)
            for (const KeyRow& key : run) {
                ahead_.part();
                scores(run, key.slot, strip, l_.x.size, call_.dim, queries_.transposed(), queries_.row(),
                       keys_.at(key.row) + strip.column, keys_.channel(), pairs, space_.scores);
            }
        for (int64_t r = 0; r < num_rows; ++r) {
            softmax(strip, r, pairs);
            write(strip, r, pairs);
        }
    }
    int64_t token(const Strip& strip, int64_t r) const {
        return l_.token(sight_.z(), sight_.queries().begin + r, strip.x);
    }

    // Scores in base 2 to weights, without the factor that makes their sum one.
    void softmax(const Strip& strip, int64_t r, const Pairs& pairs) {
        Floats top = all(-INFINITY), sum{};
        const bool ragged = strip.ragged;
        pairs.each(sight_, r, [&](int64_t at, int64_t offset) {
            Floats score = load(space_.scores + at);
            if (ragged) store(space_.scores + at, score = choose(strip.seeing(offset), score, all(-INFINITY)));
            top = greater(top, score);
        });
        pairs.each(sight_, r, [&](int64_t at, int64_t) {
            const Floats weight = exp2_of(load(space_.scores + at) - top);
            store(space_.scores + at, weight);
            sum += weight;
        });
        store(space_.factor + r * LANES, 1.0f / sum);
        store(space_.lse + r * LANES, (top + log2_of(sum) + (sum - sum)) * LN2);  // NaN stays NaN
    }

    void write(const Strip& strip, int64_t r, const Pairs& pairs) {
        const Links links(space_.links, sight_, r, strip, pairs, space_.scores, values_.step(), [&](int64_t row) { return values_.at(row); });
        gather_to(out_, links, strip, space_.factor + r * LANES, token(strip, r), l_.x.stride, space_.out);
        if (!lse_) return;
        for (int64_t i = 0; i < strip.lanes; ++i) lse_[token(strip, r) + i * l_.x.stride] = space_.lse[r * LANES + i];
    }

    const FoveateAttend& call_;
    const Lattice& l_;
    const Box& box_;
    const Slab& slab_;
    const Workspace& space_;
    const Head q_, k_, v_, out_;
    QueryRows queries_;
    const TransposedRows keys_;
    const NaturalRows values_;
    float* lse_;
    Sight sight_;
    Prefetch ahead_;
};

int64_t forward(const FoveateAttend& call, const FoveateNeighborhood& window) {
    const int64_t heads = call.q.heads;
    const Plan plan(window, (8 * call.threads + call.batch * heads - 1) / (call.batch * heads));
    const int64_t all = call.batch * heads * plan.lattices() * plan.boxes();
    Queue queue(all);
    const bool done = on_threads(std::min(call.threads, all), [&](int64_t) {
        queue.run([&](int64_t item) {
            const Lattice lattice = plan.lattice(item / plan.boxes() % plan.lattices());
            const Box box = plan.box(lattice, item % plan.boxes());
            const Slab slab(lattice, box);
            const int64_t head = item / plan.boxes() / plan.lattices();
            Forward(call, box, slab, scratch<Workspace>(call, slab, box), head / heads, head % heads).run();
        });
    });
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

}  // namespace
}  // namespace foveate::grid

FOVEATE_API int64_t foveate_neighborhood_size(void) { return sizeof(FoveateNeighborhood); }

FOVEATE_API int64_t foveate_neighborhood_forward(const FoveateAttend* call, const FoveateNeighborhood* window) {
    if (call->batch * call->q.heads * call->num_queries == 0) return FOVEATE_OK;
    try {
        return foveate::grid::forward(*call, *window);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
