// Attention of a few queries over many keys, at the speed of memory: the keys are split among threads, and all query
// heads of a group share each read of a key or a value.
#include "call.h"
#include "careful.h"
#include "decode_lanes.h"
#include "decode_pairs.h"
#include "decode_softmax.h"
#include "decode_work.h"
#include "threads.h"

namespace foveate {
namespace {

template <class P> struct DecodeSpace {
    typename P::Reads::Element* buffer;
    typename P::Query* queries;
    float *scores, *scratch, *sums, *bias;
    RowStep step;

    DecodeSpace(Arena& arena, const DecodeWork& work, int64_t query_size, int64_t dim, int64_t value_dim) {
        const int64_t rows = work.rows + P::SPARE_ROWS;
        const int64_t buffer_size = std::max(TILE * std::max(dim, value_dim), rows * dim);
        buffer = arena.take<typename P::Reads::Element>(buffer_size);
        queries = arena.take<typename P::Query>(work.together * work.key_heads * query_size);
        scores = arena.take<float>(rows * TILE);
        scratch = arena.take<float>(P::scratch_size(work.rows));
        sums = arena.take<float>(work.together * RowSums::size(work.rows, value_dim));
        bias = arena.take<float>(work.is_biased() ? work.rows * TILE : 0);
        step.highest = arena.take<float>(round_up(work.rows, LANES));
        step.kept = arena.take<float>(round_up(work.rows, LANES));
        step.base = arena.take<float>(round_up(work.rows, LANES));
    }
};

// Items of work, on one thread.
template <class P> class Decode {
  public:
    Decode(const FoveateAttend& call, const DecodeWork& work)
        : call_(call), work_(work), keys_(call.k, call.dim), values_(call.v, call.value_dim),
          key_rows_(work.rows / work.key_heads), value_rows_(work.rows / work.value_heads),
          query_size_(P::query_size(key_rows_, keys_.channels())),
          space_(scratch<DecodeSpace<P>>(work, query_size_, keys_.channels(), values_.channels())) {}

    // The sums of an item are so many floats; an item that is all of its keys has them here.
    static int64_t sums_size(const FoveateAttend& call, const DecodeWork& work) {
        return work.together * RowSums::size(work.rows, round_up(call.value_dim, CHANNELS<Reads>));
    }
    float* own_sums() const { return space_.sums; }

    void add_up(int64_t b, int64_t set, int64_t part, float* sums) const {
        for (int64_t s = 0; s < work_.together; ++s) {
            pack_queries(b, set + s, queries(s));
            sums_of(sums, s).clear();
        }
        KeyChunks chunks = work_.chunks(b, set, part);
        KeyChunk here = chunks.next();
        for (KeyChunk after = chunks.next(); here.count; here = after, after = chunks.next())
            for (int64_t s = 0; s < work_.together; ++s) {
                const bool last = s + 1 == work_.together;
                Ahead ahead = fetch(b, last ? set : set + s + 1, last ? after : here);
                chunk(b, set + s, here.first, here.count, queries(s), sums_of(sums, s), ahead);
            }
    }

    void add(float* sums, float* others) const {
        for (int64_t s = 0; s < work_.together; ++s)
            merge(sums_of(sums, s), sums_of(others, s), call_.kind == FOVEATE_SOFTMAX, space_.step);
    }

    // Writes what was summed up; false where it is not finite.
    bool finish(int64_t b, int64_t set, float* sums) const {
        bool finite = true;
        for (int64_t s = 0; s < work_.together; ++s)
            for (int64_t r = 0; r < work_.rows; ++r) finite &= write(b, set + s, r, sums_of(sums, s));
        return finite;
    }

  private:
    using Reads = typename P::Reads;

    typename P::Query* queries(int64_t s) const { return space_.queries + s * work_.key_heads * query_size_; }
    RowSums sums_of(float* memory, int64_t s) const {
        const int64_t channels = values_.channels();
        return RowSums(memory + s * RowSums::size(work_.rows, channels), work_.rows, channels);
    }
    int64_t head(int64_t set, int64_t row) const { return set * work_.heads + row / call_.num_queries; }
    int64_t query(int64_t row) const { return row % call_.num_queries; }

    void pack_queries(int64_t b, int64_t set, typename P::Query* to) const {
        const int64_t channels = keys_.channels();
        for (int64_t r = 0; r < work_.rows; ++r)
            read_row(space_.buffer + r * channels, at(call_.q, Reads::DTYPE, b, head(set, r), query(r)), Reads::DTYPE,
                     call_.q.stride[3], call_.dim, channels);
        for (int64_t g = 0; g < work_.key_heads; ++g)
            P::pack(space_.buffer + g * key_rows_ * channels, key_rows_, channels, to + g * query_size_);
    }

    // The keys and values of the chunk at hand's successor; of a set with several heads of them only the first's.
    Ahead fetch(int64_t b, int64_t set, KeyChunk next) const {
        const auto stream = [&](const FoveateTensor& x, int64_t h, int64_t dim) -> Ahead::Stream {
            const int64_t size = bytes_of(Reads::DTYPE);
            return {at(x, Reads::DTYPE, b, h, next.first), x.stride[2] * size, x.stride[3] == 1 ? dim * size : 0};
        };
        const int64_t work = work_.key_heads * P::work(key_rows_, keys_.channels()) +
                             work_.value_heads * P::work(value_rows_, values_.channels());
        return Ahead(stream(call_.k, work_.key_head(set, 0), call_.dim),
                     stream(call_.v, work_.value_head(set, 0), call_.value_dim), next.count, work);
    }

    void chunk(int64_t b, int64_t set, int64_t first, int64_t count, const typename P::Query* queries,
               const RowSums& sums, Ahead& ahead) const {
        for (int64_t g = 0; g < work_.key_heads; ++g) {
            const auto keys = keys_.rows(b, work_.key_head(set, g), first, count, space_.buffer, P::GRAIN);
            P::scores(keys, keys_.channels(), queries + g * query_size_, key_rows_,
                      space_.scores + g * key_rows_ * TILE, space_.scratch, ahead);
        }
        write_logits(b, set, first, count);
        const float* bias = bias_of(b, set, first, count);
        weigh<Reads::DTYPE == FOVEATE_FLOAT32 ? 5 : 4>(call_, space_.scores, bias, first, count, sums, space_.step);
        for (int64_t g = 0; g < work_.value_heads; ++g) {
            const auto values = values_.rows(b, work_.value_head(set, g), first, count, space_.buffer);
            P::add_values(values, values_.channels(), space_.scores + g * value_rows_ * TILE, value_rows_,
                          sums.out + g * value_rows_ * values_.channels(), space_.scratch, ahead);
        }
    }

    void write_logits(int64_t b, int64_t set, int64_t first, int64_t count) const {
        const float scale = call_.scale;
        for (int64_t r = 0; r < work_.rows; ++r) {
            float* to = work_.logits(call_, b, head(set, r), query(r));
            if (!to) return;
            const float* from = space_.scores + r * TILE;
            for (int64_t k = 0; k < count; ++k) to[first + k] = from[k] * scale;
        }
    }

    // (rows, 64), or null without one.
    const float* bias_of(int64_t b, int64_t set, int64_t first, int64_t count) const {
        for (int64_t r = 0; work_.is_biased() && r < work_.rows; ++r)
            work_.read_bias(b, head(set, r), first, count, space_.bias + r * TILE);
        return work_.is_biased() ? space_.bias : nullptr;
    }

    bool write(int64_t b, int64_t set, int64_t r, const RowSums& sums) const {
        const int64_t h = head(set, r), i = query(r);
        const float total = sum_lanes(load(sums.sum + r * LANES));
        float* row = sums.out + r * sums.channels;
        if (call_.kind == FOVEATE_SOFTMAX) scale_row(row, sums.channels, total == 0 ? 0.0f : 1.0f / total);
        gather<Reads>(row, sums.channels);
        void* to = (void*)at(call_.out, Reads::DTYPE, b, h, i);
        write_row(to, Reads::DTYPE, call_.out.stride[3], row, call_.value_dim);
        if (call_.lse)
            call_.lse[(b * call_.q.heads + h) * call_.num_queries + i] =
                total == 0 ? -INFINITY : sums.top[r] * LN2_EXACT + std::log((double)total);
        return all_finite(row, sums.channels);
    }

    const FoveateAttend& call_;
    const DecodeWork& work_;
    const RowReader<Reads> keys_, values_;
    const int64_t key_rows_, value_rows_, query_size_;
    const DecodeSpace<P> space_;
};

// The sums of parts of the keys. Whoever does the last part of a whole merges all of them, in their order.
class Parts {
  public:
    Parts(int64_t wholes, int64_t splits, int64_t size)
        : splits_(splits), size_(size), sums_(wholes * splits * size), missing_(wholes) {
        for (int64_t i = 0; i < wholes; ++i) new (missing_.get() + i) std::atomic<int64_t>(splits);
    }
    float* sums(int64_t whole, int64_t part) const { return sums_.get() + (whole * splits_ + part) * size_; }
    bool is_last(int64_t whole) const { return missing_.get()[whole].fetch_sub(1) == 1; }

  private:
    const int64_t splits_, size_;
    Buffer<float> sums_;
    Buffer<std::atomic<int64_t>> missing_;
};

// Sets `finite` to whether the result is.
template <class P> int64_t decode(const FoveateAttend& call, const DecodeWork& work, bool& all_finite) {
    const int64_t apart = work.sets / work.together, splits = work.splits;
    const Parts parts(splits > 1 ? call.batch * apart : 0, splits, Decode<P>::sums_size(call, work));
    Queue queue(work.items);
    std::atomic<bool> finite{true};
    const bool done = on_threads(work.threads, [&](int64_t) {
        const Decode<P> decode(call, work);
        P::begin();
        queue.run([&](int64_t item) {
            const int64_t whole = item / splits, b = whole / apart, set = whole % apart * work.together;
            float* sums = splits > 1 ? parts.sums(whole, item % splits) : decode.own_sums();
            decode.add_up(b, set, item % splits, sums);
            if (splits > 1) {
                if (!parts.is_last(whole)) return;
                sums = parts.sums(whole, 0);
                for (int64_t i = 1; i < splits; ++i) decode.add(sums, parts.sums(whole, i));
            }
            if (!decode.finish(b, set, sums)) finite = false;
        });
        P::end();
    });
    all_finite = finite;
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

int64_t decode(const FoveateAttend& call, const DecodeWork& work, bool& finite) {
    if (call.dtype == FOVEATE_FLOAT16) return decode<LaneProducts<Float16Reads>>(call, work, finite);
    if (call.dtype == FOVEATE_FLOAT32) return decode<LaneProducts<Float32Reads>>(call, work, finite);
#if FOVEATE_HAS_BFLOAT16
    // Rows behind the last one of a head are written over, so there must be no other head's.
    if (work.value_heads == 1 && work.rows >= PairProducts::FEWEST_ROWS) return decode<PairProducts>(call, work, finite);
#endif
    return decode<LaneProducts<Bfloat16Reads>>(call, work, finite);
}

bool are_refused(const FoveateAttend& call, const FoveateRanges& seen) {
    if (is_refused(call) || call.selection.tile_starts || call.num_biases) return true;
    if (seen.batches < 1 || (seen.batches > 1 && seen.batches != call.batch)) return true;
    if (seen.heads < 1 || call.q.heads % seen.heads || !seen.starts || seen.starts[0] < 0) return true;
    const int64_t rows = seen.batches * seen.heads;
    for (int64_t row = 0; row < rows; ++row)
        if (seen.starts[row + 1] < seen.starts[row]) return true;
    if (seen.starts[rows] && !seen.ranges) return true;
    for (const int64_t* pair = seen.ranges; pair < seen.ranges + 2 * seen.starts[rows]; pair += 2)
        if (pair[0] < 0 || pair[1] < pair[0] || call.num_keys < pair[1]) return true;
    return false;
}

}  // namespace
}  // namespace foveate

// Measured with AMX, AVX-512 and AVX2 for groups of 1 to 16 heads: with 16 queries the general kernel fills its lanes.
FOVEATE_API int64_t foveate_decode_queries(int64_t num_keys) { return num_keys < 1024 ? 12 : 16; }

FOVEATE_API int64_t foveate_attend_decode(const FoveateAttend* call) {
    using namespace foveate;
    if (is_refused(*call)) return FOVEATE_REFUSED;
    if (call->batch * call->q.heads * call->num_queries == 0) return FOVEATE_OK;
    try {
        bool finite = true;
        const int64_t status = decode(*call, DecodeWork(*call), finite);
        return status != FOVEATE_OK || finite ? status : foveate_attend_carefully(call);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}

// No product is formed of a query and a key that it does not see, so that what is not finite needs no second run.
FOVEATE_API int64_t foveate_attend_ranges(const FoveateAttend* given, const FoveateRanges* seen) {
    using namespace foveate;
    if (are_refused(*given, *seen)) return FOVEATE_REFUSED;
    if (given->batch * given->q.heads * given->num_queries == 0) return FOVEATE_OK;
    FoveateAttend call = *given;
    call.selection.band_low = -call.num_keys, call.selection.band_high = call.num_keys + call.num_queries;
    try {
        bool finite = true;
        return decode(call, DecodeWork(call, seen), finite);
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
