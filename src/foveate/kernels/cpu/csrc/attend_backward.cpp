// Attention over a selection, backward: units of heads (backward_plan.h) handed out to threads, tile by tile of queries
// (backward_tile.h). The result depends on the number of threads, not on their pace.
#include <vector>

#include "backward_tile.h"
#include "pages.h"
#include "unit_sums.h"

namespace foveate::backward_pass {
namespace {

// One part of a unit: every so-many-th of its tiles.
template <class A>
void run_part(const FoveateAttend& call, const Plan& plan, Backward<A>& work, const UnitSums& unit, int64_t part) {
    const int64_t tiles = num_q_tiles(call), b = unit.batch();
    const bool gathers = call.selection.run_starts;
    Gathered gathered;
    RunningRows running(gathers ? (tiles + plan.parts - 1) / plan.parts * TILE : 0, call.dim);
    std::fill(unit.dk(), unit.dk() + plan.sums(), 0.0f);
    int64_t first = part;  // of the head's tiles: every so-many-th of all heads', counted through
    for (int64_t h = unit.first_head(); h < unit.first_head() + plan.heads; ++h) {
        const QueryTiles of{b, h, first, plan.parts, tiles};
        if (gathers) work.tiles(of, gathered, running, unit.dk(), unit.dv());
        else of.each([&](int64_t tile) { work.tile(b, h, tile, {h, tile + plan.parts}, unit.dk(), unit.dv()); });
        first += of.count() * plan.parts - tiles;
    }
}

// A unit whose sums are a ring: all heads of a tile before the next, so that keys out of sight are done.
template <class A> void run_ring(const FoveateAttend& call, const Plan& plan, Backward<A>& work, UnitSums& unit) {
    const int64_t tiles = num_q_tiles(call), first = unit.first_head(), end = first + plan.heads;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const KeyRange seen = keys_of_band(call, tile * TILE, TILE);
        unit.advance(std::min(seen.begin, call.num_keys), seen.end);
        for (int64_t h = first; h < end; ++h) {
            const Item next = h + 1 < end ? Item{h + 1, tile} : Item{first, tile + 1};
            work.tile(unit.batch(), h, tile, next, unit.dk(), unit.dv());
        }
    }
    unit.advance(round_up(call.num_keys, TILE), 0);
}

// Sets `finite` to whether the gradients of queries, keys and values are.
template <class A> int64_t backward(const FoveateAttend& call, bool careful, std::atomic<bool>& finite) {
    const Plan plan = Plan::of<A>(call);
    Operand<A> keys(call, call.k, call.dim);
    const Operand<A> values(call, call.v, call.value_dim);
    const bool packs = A::PAIR == 2 && !plan.recent_tiles && num_q_tiles(call) * call.q.heads / call.k.heads > 2;
    Buffer<typename A::Element> packed(packs ? Operand<A>::packed_size(call, call.k, call.dim) : 0);
    if (packs && !keys.pack(packed.get())) return FOVEATE_NO_MEMORY;
    const int64_t all = plan.units * plan.parts, threads = std::min(call.threads, all);
    Buffer<float> sums((plan.parts > 1 ? all : threads) * plan.sums());
    const bool bias_grads = BiasGrads::wanted(call);
    const BiasGrads grads(call, bias_grads ? threads : 0);
    Queue queue(all);
    const bool done = on_threads(threads, [&](int64_t thread) {
        std::vector<BiasSums> own(call.num_biases);
        if (bias_grads) grads.of_thread(thread, own.data());
        Backward<A> work(call, plan, keys, values, scratch<Workspace<A>>(call, plan), bias_grads ? own.data() : nullptr,
                         careful);
        A::begin();
        const auto run = [&](int64_t i) {
            UnitSums unit(call, plan, i / plan.parts, sums.get() + (plan.parts > 1 ? i : thread) * plan.sums());
            if (plan.ring) run_ring(call, plan, work, unit);
            else run_part(call, plan, work, unit, i % plan.parts);
            if (plan.parts == 1 && !plan.ring) unit.write(0, num_slots(call));
            if (!unit.finite()) finite = false;
        };
        if (bias_grads)  // who sums what must not depend on the threads' pace
            for (int64_t i = thread; i < all; i += threads) run(i);
        else
            queue.run(run);
        A::end();
        if (!work.finite()) finite = false;
        for (const BiasSums& sums : own)
            if (sums.tiles) sums.tiles->finish();
    });
    if (!done) return FOVEATE_NO_MEMORY;
    if (bias_grads) grads.add_up();
    if (plan.parts == 1) return FOVEATE_OK;
    Queue units(plan.units);
    const auto write = [&](int64_t i) {
        UnitSums unit(call, plan, i, sums.get() + i * plan.parts * plan.sums());
        unit.write(0, num_slots(call));
        if (!unit.finite()) finite = false;
    };
    return on_threads(std::min(call.threads, plan.units), [&](int64_t) { units.run(write); }) ? FOVEATE_OK
                                                                                               : FOVEATE_NO_MEMORY;
}

int64_t numbers_of(const FoveateAttend& call, const FoveateTensor& x, int64_t tokens, int64_t channels) {
    return call.batch * x.heads * tokens * channels;
}

// Log row sums by the arithmetic of the backward pass: those of few queries come from another, whose rounding at great
// logits would make weights that do not add up to one.
void sum_rows_again(FoveateAttend& call, float* out, double* lse) {
    const int64_t dim = call.value_dim, tokens = call.num_queries * dim;
    FoveateAttend forward = call;
    forward.out = {out, call.q.heads, {call.q.heads * tokens, tokens, dim, 1}};
    forward.lse = lse;
    if (attend_tiles(forward) != FOVEATE_OK) throw std::bad_alloc();
    call.lse = lse;
}

template <class A> int64_t run(const FoveateAttend& call) {
    std::atomic<bool> finite{true};
    const int64_t status = backward<A>(call, false, finite);
    if (status != FOVEATE_OK || finite) return status;
    for (int64_t i = 0; i < call.num_biases; ++i)
        if (call.biases[i].grad) std::fill_n(call.biases[i].grad, call.biases[i].size, 0.0f);
    return backward<Float32>(call, true, finite);
}

}  // namespace
}  // namespace foveate::backward_pass

FOVEATE_API int64_t foveate_attend_backward(const FoveateAttend* given) {
    using namespace foveate;
    using namespace foveate::backward_pass;
    if (is_refused(*given)) return FOVEATE_REFUSED;
    if (given->batch * given->q.heads == 0) return FOVEATE_OK;
    FoveateAttend call = with_worthwhile_threads(*given, 5 * (given->dim + given->value_dim) / 2);
    prefer_large_pages(call.dq.data, numbers_of(call, call.q, call.num_queries, call.dim) * bytes_of(call.dtype));
    prefer_large_pages(call.dk.data, numbers_of(call, call.k, call.num_keys, call.dim) * bytes_of(call.dtype));
    prefer_large_pages(call.dv.data, numbers_of(call, call.v, call.num_keys, call.value_dim) * bytes_of(call.dtype));
    try {
        const bool band = !call.selection.tile_starts && !call.num_biases && call.kind == FOVEATE_SOFTMAX;
        const bool few = band && call.num_queries <= foveate_decode_queries(call.num_keys);
        const int64_t rows = few ? call.batch * call.q.heads * call.num_queries : 0;
        Buffer<float> out(rows * call.value_dim);  // float32 has room for either dtype
        Buffer<double> lse(rows);
        if (rows) sum_rows_again(call, out.get(), lse.get());
#if FOVEATE_HAS_BFLOAT16
        if (call.dtype == FOVEATE_BFLOAT16) return run<Bfloat16>(call);
#endif
        return run<Float32>(call);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
