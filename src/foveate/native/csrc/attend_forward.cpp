// Attention over a selection, forward: per tile of 64 queries an online softmax over chunks of up to 64 keys.
#include "weights.h"

namespace foveate {
namespace {

template <class A> struct Workspace {
    typename A::Element *rows, *operand;
    void *queries, *weights;
    float *scores, *out, *out_rows, *bias, *bias_rows;
    float *top, *sum, *kept;

    Workspace(Arena& arena, const FoveateAttend& call) {
        const int64_t dim = round_up(call.dim, A::GRAIN_D);
        const int64_t value_dim = round_up(call.value_dim, A::GRAIN_D);
        rows = arena.take<typename A::Element>(TILE * dim);
        operand = arena.take<typename A::Element>(Operand<A>::buffer_size(std::max(call.dim, call.value_dim)));
        queries = arena.take<float>(TILE * dim);
        scores = arena.take<float>(TILE * TILE);
        weights = A::PAIR == 1 ? scores : arena.take<float>(TILE * TILE / A::PAIR);
        out = arena.take<float>(TILE * value_dim);
        out_rows = arena.take<float>(TILE * value_dim);
        bias = arena.take<float>(call.num_biases ? TILE * TILE : 0);
        bias_rows = arena.take<float>(call.num_biases ? TILE * TILE : 0);
        top = arena.take<float>(TILE);
        sum = arena.take<float>(TILE);
        kept = arena.take<float>(TILE);
    }
};

// out^T times a factor per lane.
void scale_columns(float* out, int64_t rows, int64_t ld, int vectors, const float* factor) {
    for (int j = 0; j < vectors; ++j) {
        const Floats by = load(factor + j * LANES);
        for (int64_t i = 0; i < rows; ++i) {
            float* p = out + i * ld + j * LANES;
            store(p, load(p) * by);
        }
    }
}
bool all_one(const float* x, int vectors) {
    for (int i = 0; i < vectors * LANES; ++i)
        if (x[i] != 1.0f) return false;
    return true;
}

template <class A> class Forward {
  public:
    Forward(const FoveateAttend& call, const Operand<A>& keys, const Operand<A>& values, Workspace<A> space)
        : call_(call), keys_(keys), values_(values), space_(space), biases_(call, space.bias, space.bias_rows) {}

    void tile(int64_t b, int64_t h, int64_t q_tile) {
        const int64_t lanes = lanes_of(call_, q_tile);
        if (lanes <= 0) return;
        const int vectors = (int)((lanes + LANES - 1) / LANES);
        pack_queries(b, h, q_tile, vectors);
        std::fill(space_.top, space_.top + TILE, -INFINITY);
        std::fill(space_.sum, space_.sum + TILE, 0.0f);
        bool empty = true;
        for_each_chunk(call_, b, h, q_tile, lanes, A::GRAIN_K, [&](const Chunk& chunk) {
            join(b, h, q_tile, lanes, vectors, chunk, !empty);
            empty = false;
        });
        if (empty) std::fill(space_.out, space_.out + vectors * LANES * round_up(call_.value_dim, LANES), 0.0f);
        finish(b, h, q_tile, lanes, vectors);
    }

  private:
    void pack_queries(int64_t b, int64_t h, int64_t q_tile, int vectors) {
        const int64_t dim = round_up(call_.dim, A::GRAIN_D), words = dim / A::PAIR;
        read_queries<A>(call_, call_.q, b, h, q_tile, call_.dim, dim, vectors * LANES, space_.rows);
        transpose_words(space_.queries, vectors * LANES, space_.rows, words, vectors * LANES, words);
    }

    void join(int64_t b, int64_t h, int64_t q_tile, int64_t lanes, int vectors, const Chunk& chunk, bool add) {
        const int64_t ld = vectors * LANES;
        const auto k = keys_.natural(b, group_of(call_, call_.k, h), chunk, space_.operand);
        using Right = std::conditional_t<A::PAIR == 1, const float*, const uint32_t*>;
        A::multiply(round_up(chunk.count, A::GRAIN_M), vectors, round_up(call_.dim, A::GRAIN_K), k,
                    (Right)space_.queries, ld, space_.scores, ld, false);
        Scores scores{space_.scores, chunk.count, ld, vectors, 0};
        const float* bias = call_.num_biases ? biases_.of(b, h, q_tile, lanes, ld, chunk) : nullptr;
        bend(call_, scores, bias, nullptr);
        if (call_.kind == FOVEATE_SOFTMAX) {
            if (chunk.masked) hide(scores, chunk, -INFINITY);
            softmax_step<A>(scores, space_.weights, space_.top, space_.sum, space_.kept);
            if (add && !all_one(space_.kept, vectors))
                scale_columns(space_.out, call_.value_dim, ld, vectors, space_.kept);
        } else {
            elementwise_step<A>(scores, call_.kind, chunk, space_.weights);
        }
        const auto v = values_.transposed(b, group_of(call_, call_.v, h), chunk, space_.operand);
        A::multiply(round_up(call_.value_dim, A::GRAIN_M), vectors, round_up(chunk.count, A::GRAIN_K), v,
                    (Right)space_.weights, ld, space_.out, ld, add);
    }

    void finish(int64_t b, int64_t h, int64_t q_tile, int64_t lanes, int vectors) {
        const int64_t ld = vectors * LANES;
        if (call_.kind == FOVEATE_SOFTMAX) {
            for (int64_t i = 0; i < ld; ++i) space_.kept[i] = space_.sum[i] == 0 ? 0.0f : 1.0f / space_.sum[i];
            scale_columns(space_.out, call_.value_dim, ld, vectors, space_.kept);
        }
        write_queries(call_, call_.out, b, h, q_tile, lanes, call_.value_dim, space_.out, ld, space_.out_rows);
        if (!call_.lse) return;
        float* lse = call_.lse + (b * call_.q.heads + h) * call_.num_queries;
        for (int64_t i = 0; i < lanes; ++i) {
            const int64_t token = query_at(call_, q_tile * TILE + i);
            if (token >= 0) lse[token] = space_.sum[i] == 0 ? -INFINITY : space_.top[i] * LN2 + std::log(space_.sum[i]);
        }
    }

    const FoveateAttend& call_;
    const Operand<A>&keys_, &values_;
    const Workspace<A> space_;
    BiasTile biases_;
};

// Batch entries innermost where they share a bias, so that its tile is read once.
bool batch_is_innermost(const FoveateAttend& call) {
    bool shared = call.num_biases > 0;
    for (int64_t i = 0; i < call.num_biases; ++i) shared &= !BiasTile::of_batch(call.biases[i]);
    return shared;
}

template <class A> int64_t forward(const FoveateAttend& call) {
    const int64_t heads = call.q.heads, tiles = num_q_tiles(call), all = call.batch * heads * tiles;
    const Operand<A> keys(call, call.k, call.dim);
    Operand<A> values(call, call.v, call.value_dim);
    const bool packs = A::PAIR == 2 && tiles * heads / call.v.heads > 2;
    Buffer<typename A::Element> packed(packs ? Operand<A>::packed_size(call, call.v, call.value_dim) : 0);
    if (packs && !values.pack(packed.get())) return FOVEATE_NO_MEMORY;
    const bool batch_innermost = batch_is_innermost(call);
    const int64_t threads = std::min(call.threads, all);
    Queue queue(all, std::max<int64_t>(all / (threads * 64 + 1), 1));
    const bool done = on_threads(threads, [&](int64_t) {
        Forward<A> work(call, keys, values, scratch<Workspace<A>>(call));
        A::begin();
        queue.run([&](int64_t item) {
            const int64_t b = batch_innermost ? item % call.batch : item / (heads * tiles);
            const int64_t row = batch_innermost ? item / call.batch : item % (heads * tiles);
            work.tile(b, row / tiles, tiles - 1 - row % tiles);  // the longest rows of a causal call first
        });
        A::end();
    });
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_attend_size(void) { return sizeof(FoveateAttend); }

FOVEATE_API int64_t foveate_attend_forward(const FoveateAttend* call) {
    using namespace foveate;
    if (call->batch * call->q.heads * num_q_tiles(*call) == 0) return FOVEATE_OK;
    try {
#if FOVEATE_HAS_BFLOAT16
        if (call->dtype == FOVEATE_BFLOAT16) return forward<Bfloat16>(*call);
#endif
        return forward<Float32>(*call);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
