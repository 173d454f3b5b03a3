// Attention of a few queries to stored tokens at the speed of memory: codes are read where they lie, their scales are
// applied to queries and to sums, and no float of a key or a value is ever written to memory beyond the first cache.
#include "call.h"
#include "careful.h"
#include "decode_lanes.h"
#include "decode_softmax.h"
#include "stored_work.h"

namespace foveate {
namespace {

using Products = LaneProducts<Float32Reads>;

struct StoredSpace {
    float *buffer, *q, *spread, *scaled, *scores, *raw, *added, *step, *least, *row, *natural;
    float *token_step, *token_least;
    RowStep softmax;

    StoredSpace(Arena& arena, int64_t rows, int64_t keys, int64_t values, int64_t widest) {
        buffer = arena.take<float>(TILE * std::max(keys, values));
        q = arena.take<float>(rows * widest), spread = arena.take<float>(rows * keys);
        scaled = arena.take<float>(rows * keys);
        scores = arena.take<float>(rows * TILE), raw = arena.take<float>(rows * TILE);
        added = arena.take<float>(rows * values);
        step = arena.take<float>(std::max(keys, values)), least = arena.take<float>(std::max(keys, values));
        row = arena.take<float>(widest), natural = arena.take<float>(widest);
        // A vector more than there are tokens, since pieces begin anywhere.
        for (float** each : {&token_step, &token_least}) *each = arena.take<float>(TILE + LANES);
        for (float** each : {&softmax.highest, &softmax.kept, &softmax.base})
            *each = arena.take<float>(round_up(rows, LANES));
    }
};

const char* number_at(const void* data, int64_t dtype, const int64_t* stride, int64_t page, int64_t head, int64_t at) {
    return (const char*)data + (page * stride[0] + head * stride[1] + at * stride[2]) * bytes_of(dtype);
}

float dot(const float* x, const float* y, int64_t count) {
    Floats sum{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(y + i);
    float total = sum_lanes(sum);
    for (; i < count; ++i) total += x[i] * y[i];
    return total;
}
float sum_of(const float* x, int64_t count) {
    Floats sum{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i);
    float total = sum_lanes(sum);
    for (; i < count; ++i) total += x[i];
    return total;
}

// Items of work, on one thread.
class Stored {
  public:
    Stored(const FoveateStored& call, const StoredWork& work, int64_t keys, int64_t values)
        : call_(call.attend), stored_(call), rows_(work.rows), channels_(values),
          space_(scratch<StoredSpace>(work.rows, keys, values,
                                      std::max(round_up(call_.dim, LANES), std::max(keys, values)))) {}

    // Sums over an item's tokens, channels in their own order.
    void add_up(const StoredItem& item, float* memory) {
        const RowSums sums(memory, rows_, channels_);
        segment_ = &stored_.segments[item.segment], item_ = &item;
        head_ = segment_->page_heads > 1 ? item.g : 0;
        sums.clear();
        key_.set(segment_->k.format, call_.dim), value_.set(segment_->v.format, call_.value_dim);
        for (int64_t r = 0; r < rows_; ++r) {
            read_row(space_.row, at(call_.q, call_.dtype, item.b, head(r), r % call_.num_queries), call_.dtype,
                     call_.q.stride[3], call_.dim, call_.dim);
            key_.spread(space_.row, space_.spread + r * key_.count());
        }
        StoredChunk one, two, *here = &one, *after = &two;
        here->find(*segment_, item, item.first);
        for (; here->count; std::swap(here, after)) {
            after->find(*segment_, item, here->first + here->count);
            chunk(*here, after->count ? after : nullptr, sums);
        }
        for (int64_t r = 0; r < rows_; ++r) {
            float* row = sums.out + r * channels_;
            std::fill(space_.natural, space_.natural + channels_, 0.0f);
            value_.gather_back(row, space_.natural);
            std::copy(space_.natural, space_.natural + channels_, row);
        }
    }

    void add(float* sums, float* others) const {
        merge(RowSums(sums, rows_, channels_), RowSums(others, rows_, channels_), true, space_.softmax);
    }

    // Writes what was summed up; false where it is not finite.
    bool finish(int64_t b, int64_t g, float* memory) const {
        const RowSums sums(memory, rows_, channels_);
        bool finite = true;
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t h = g * (rows_ / call_.num_queries) + r / call_.num_queries, i = r % call_.num_queries;
            const float total = sum_lanes(load(sums.sum + r * LANES));
            float* row = sums.out + r * channels_;
            scale_row(row, channels_, total == 0 ? 0.0f : 1.0f / total);
            write_row((void*)at(call_.out, call_.dtype, b, h, i), call_.dtype, call_.out.stride[3], row, call_.value_dim);
            call_.lse[(b * call_.q.heads + h) * call_.num_queries + i] =
                total == 0 ? -INFINITY : sums.top[r] * LN2_EXACT + std::log((double)total);
            finite &= all_finite(row, channels_);
        }
        return finite;
    }

  private:
    int64_t head(int64_t r) const { return item_->g * (rows_ / call_.num_queries) + r / call_.num_queries; }

    void chunk(const StoredChunk& here, const StoredChunk* after, const RowSums& sums) {
        Unpacker(key_, call_.dim)(here.k, here.count, space_.buffer, after ? after->k : nullptr);
        form_scores(here);
        weigh(here, sums);
        Unpacker(value_, call_.value_dim)(here.v, here.count, space_.buffer, after ? after->v : nullptr);
        add_values(here, sums);
    }

    // Calls visit(page, offset, start, count) for all of a chunk that one scale by channel covers.
    template <class Visit> static void for_scales(const FoveateCodes& x, const StoredChunk& chunk, Visit visit) {
        if (!x.channel.step) return visit(0, 0, 0, chunk.count);
        for (int64_t i = 0; i < chunk.pieces;) {  // pieces are cut where either scale changes: join what this one covers
            const StoredPiece first = chunk.piece[i];
            int64_t count = first.count;
            for (++i; i < chunk.pieces && same(x, first, chunk.piece[i]); ++i) count += chunk.piece[i].count;
            visit(first.page, first.offset, first.start, count);
        }
    }
    static bool same(const FoveateCodes& x, const StoredPiece& a, const StoredPiece& b) {
        return a.page == b.page && a.offset / x.group == b.offset / x.group && a.offset < b.offset;
    }

    // The numbers of a channel scale in the order of positions.
    void read_channels(const FoveateCodes& x, const Positions& positions, int64_t channels, int64_t page, int64_t offset) {
        const FoveateScale& scale = x.channel;
        const auto read = [&](const void* data, const int64_t* stride, float* to) {
            read_row(space_.row, number_at(data, scale.dtype, stride, page, head_, offset / x.group), scale.dtype, 1,
                     channels, channels);
            positions.spread(space_.row, to);
        };
        read(scale.step, scale.step_stride, space_.step);
        if (scale.least) read(scale.least, scale.least_stride, space_.least);
    }

    // Those of the tokens of a chunk.
    void read_tokens(const FoveateCodes& x, const StoredChunk& chunk) {
        const FoveateScale& scale = x.token;
        for (int64_t i = 0; i < chunk.pieces; ++i) {
            const StoredPiece& piece = chunk.piece[i];
            const auto read = [&](const void* data, const int64_t* stride, float* to) {
                read_row(to + piece.start, number_at(data, scale.dtype, stride, piece.page, head_, piece.offset),
                         scale.dtype, stride[2], piece.count, piece.count);
            };
            read(scale.step, scale.step_stride, space_.token_step);
            if (scale.least) read(scale.least, scale.least_stride, space_.token_least);
        }
    }

    // scores (rows, 64) = q k of the rows in the buffer: of x = (code t + u) c + d, t (q c) code + u (q c) 1 + q d.
    void form_scores(const StoredChunk& chunk) {
        const FoveateCodes& x = segment_->k;
        const int64_t count = key_.count();
        if (x.token.step) read_tokens(x, chunk);
        for_scales(x, chunk, [&](int64_t page, int64_t offset, int64_t start, int64_t tokens) {
            const float* q = space_.spread;
            if (x.channel.step) {
                read_channels(x, key_, call_.dim, page, offset);
                for (int64_t r = 0; r < rows_; ++r)
                    for (int64_t p = 0; p < count; p += LANES)
                        store(space_.scaled + r * count + p, load(q + r * count + p) * load(space_.step + p));
                q = space_.scaled;
            }
            const Rows<Float32Reads> keys{space_.buffer + start * count, count, tokens};
            Ahead nothing({}, {}, 0, 1);
            Products::scores(keys, count, q, rows_, space_.raw, nullptr, nothing);
            for (int64_t r = 0; r < rows_; ++r) {
                float beside = 0, sum = 0;
                if (x.channel.step && x.channel.least) beside = dot(space_.spread + r * count, space_.least, count);
                if (x.token.step && x.token.least) sum = sum_of(q + r * count, count);
                put_scores(r, start, tokens, sum, beside);
            }
        });
    }

    // The scores of some tokens, for which there is room up to a whole vector; what lies there is not theirs.
    void put_scores(int64_t r, int64_t start, int64_t tokens, float sum, float beside) {
        const FoveateScale& token = segment_->k.token;
        float *raw = space_.raw + r * TILE, *to = space_.scores + r * TILE + start;
        for (int64_t t = 0; t < tokens; t += LANES) {
            Floats score = load(raw + t);
            if (token.step) score *= load(space_.token_step + start + t);
            if (token.least) score += load(space_.token_least + start + t) * sum;
            store(raw + t, score + beside);
        }
        std::memcpy(to, raw, tokens * sizeof(float));
    }

    // Scores to weights, in their place; 0 behind the last token, and where a query comes before a token.
    void weigh(const StoredChunk& chunk, const RowSums& sums) {
        const Cut all_of_them(rows_, MAX_VECTORS);
        for (int64_t r = 0; r < rows_; ++r)
            std::fill(space_.scores + r * TILE + chunk.count, space_.scores + (r + 1) * TILE, 0.0f);
        Scores logits{space_.scores, rows_, TILE, 0, 0, all_of_them};
        const float* bias = segment_->bias ? read_bias(chunk) : nullptr;
        bend(call_, logits, bias, nullptr);
        const int64_t whole = item_->b * stored_.key_heads + item_->g;
        for (int64_t r = 0; r < rows_; ++r) {
            int64_t seen = chunk.count;
            if (segment_->behind) {
                const int64_t later = call_.num_queries - 1 - r % call_.num_queries - segment_->behind[whole];
                const int64_t end = segment_->lengths[whole] - std::max<int64_t>(later, 0);
                seen = std::clamp<int64_t>(end - chunk.first, 0, seen);
            }
            std::fill(space_.scores + r * TILE + seen, space_.scores + (r + 1) * TILE, -INFINITY);
        }
        softmax_rows<5>(space_.scores, logits.factor * LOG2E, sums, space_.softmax);
    }

    // (rows, 64)
    const float* read_bias(const StoredChunk& chunk) {
        const int64_t* stride = segment_->bias_stride;
        for (int64_t r = 0; r < rows_; ++r) {
            const float* from = segment_->bias + item_->b * stride[0] + head(r) * stride[1] +
                                r % call_.num_queries * stride[2] + chunk.first * stride[3];
            read_row(space_.raw + r * TILE, from, FOVEATE_FLOAT32, stride[3], chunk.count, TILE);
        }
        return space_.raw;
    }

    // sums += w v of the rows in the buffer: of x = (code t + u) c + d, c ((w t) code + w u) + d w.
    void add_values(const StoredChunk& chunk, const RowSums& sums) {
        const FoveateCodes& x = segment_->v;
        const int64_t count = value_.count();
        const float* weights = space_.scores;
        if (x.token.step) {
            read_tokens(x, chunk);
            std::fill(space_.token_step + chunk.count, space_.token_step + TILE, 0.0f);
            for (int64_t r = 0; r < rows_; ++r)
                for (int64_t t = 0; t < TILE; t += LANES)
                    store(space_.raw + r * TILE + t, load(weights + r * TILE + t) * load(space_.token_step + t));
            weights = space_.raw;
        }
        for_scales(x, chunk, [&](int64_t page, int64_t offset, int64_t start, int64_t tokens) {
            if (x.channel.step) read_channels(x, value_, call_.value_dim, page, offset);
            const Rows<Float32Reads> values{space_.buffer + start * count, count, tokens};
            std::fill(space_.added, space_.added + rows_ * count, 0.0f);
            Ahead nothing({}, {}, 0, 1);
            Products::add_values(values, count, weights + start, rows_, space_.added, nullptr, nothing);
            for (int64_t r = 0; r < rows_; ++r) put_values(r, start, tokens, count, sums.out + r * channels_);
        });
    }

    void put_values(int64_t r, int64_t start, int64_t tokens, int64_t count, float* to) {
        const FoveateCodes& x = segment_->v;
        const float *weight = space_.scores + r * TILE + start, *added = space_.added + r * count;
        const bool by_channel = x.channel.step && x.channel.least;
        const float least = x.token.least ? dot(weight, space_.token_least + start, tokens) : 0.0f;
        const Floats total = all(by_channel ? sum_of(weight, tokens) : 0.0f);
        for (int64_t p = 0; p < count; p += LANES) {
            Floats sum = load(added + p) + least;
            if (x.channel.step) sum *= load(space_.step + p);
            if (by_channel) sum += load(space_.least + p) * total;
            store(to + p, load(to + p) + sum);
        }
    }

    const FoveateAttend& call_;
    const FoveateStored& stored_;
    const int64_t rows_, channels_;
    const StoredSpace space_;
    const FoveateSegment* segment_ = nullptr;
    const StoredItem* item_ = nullptr;
    int64_t head_ = 0;  // of a page
    Positions key_, value_;
};

bool codes_are_refused(const FoveateCodes& x) {
    if (!x.data || x.format < FOVEATE_FLOAT32 || x.format > FOVEATE_AS_INT2) return true;
    for (const FoveateScale* scale : {&x.channel, &x.token}) {
        if (scale->least && !scale->step) return true;
        if (scale->step && (scale->dtype < FOVEATE_FLOAT32 || scale->dtype > FOVEATE_FLOAT16)) return true;
    }
    return x.channel.step && x.group < 1;
}

bool stored_is_refused(const FoveateStored& call) {
    FoveateAttend plain = call.attend;
    plain.num_keys = 0, plain.k.heads = plain.v.heads = call.key_heads;
    if (is_refused(plain) || call.key_heads < 1 || plain.selection.tile_starts || plain.num_biases) return true;
    if (!plain.lse || plain.dim < 1 || plain.value_dim < 1 || call.num_segments < 0) return true;
    if (call.num_segments && !call.segments) return true;
    for (int64_t i = 0; i < call.num_segments; ++i) {
        const FoveateSegment& one = call.segments[i];
        if (one.num_pages < 0 || one.page_size < 1 || one.most < 0 || !one.lengths) return true;
        if (one.page_heads != 1 && one.page_heads != call.key_heads) return true;
        if (one.num_pages && (codes_are_refused(one.k) || codes_are_refused(one.v))) return true;
    }
    return false;
}

// Sets `finite` to whether the result is.
int64_t attend(const FoveateStored& call, const StoredWork& work, bool& all_finite) {
    int64_t keys = LANES, values = round_up(call.attend.value_dim, LANES);
    for (int64_t i = 0; i < call.num_segments; ++i) {
        Positions positions;
        positions.set(call.segments[i].k.format, call.attend.dim);
        keys = std::max(keys, positions.count());
        positions.set(call.segments[i].v.format, call.attend.value_dim);
        values = std::max(values, positions.count());
    }
    const int64_t size = round_up(RowSums::size(work.rows, values), LANES), wholes = (int64_t)work.starts.size() - 1;
    const Buffer<float> sums(std::max<int64_t>((int64_t)work.items.size(), 1) * size);
    const Buffer<std::atomic<int64_t>> missing(wholes);
    std::atomic<bool> finite{true};
    for (int64_t whole = 0; whole < wholes; ++whole)
        new (missing.get() + whole) std::atomic<int64_t>(work.starts[whole + 1] - work.starts[whole]);
    Queue queue((int64_t)work.items.size());
    const bool done = on_threads(work.threads, [&](int64_t thread) {
        Stored stored(call, work, keys, values);
        for (int64_t whole = 0; thread == 0 && whole < wholes; ++whole) {
            if (work.starts[whole] < work.starts[whole + 1]) continue;
            const Buffer<float> none(size);
            RowSums(none.get(), work.rows, values).clear();
            stored.finish(whole / call.key_heads, whole % call.key_heads, none.get());
        }
        queue.run([&](int64_t i) {
            const StoredItem& item = work.items[i];
            stored.add_up(item, sums.get() + i * size);
            if (missing.get()[item.whole].fetch_sub(1) > 1) return;
            const int64_t first = work.starts[item.whole], end = work.starts[item.whole + 1];
            for (int64_t j = first + 1; j < end; ++j) stored.add(sums.get() + first * size, sums.get() + j * size);
            if (!stored.finish(item.b, item.g, sums.get() + first * size)) finite = false;
        });
    });
    all_finite = finite;
    return done ? FOVEATE_OK : FOVEATE_NO_MEMORY;
}

}  // namespace
}  // namespace foveate

FOVEATE_API int64_t foveate_stored_size(void) { return sizeof(FoveateStored); }
FOVEATE_API int64_t foveate_stored_segment_size(void) { return sizeof(FoveateSegment); }

FOVEATE_API int64_t foveate_attend_stored(const FoveateStored* call) {
    using namespace foveate;
    if (stored_is_refused(*call)) return FOVEATE_REFUSED;
    if (call->attend.batch * call->attend.q.heads * call->attend.num_queries == 0) return FOVEATE_OK;
    try {
        const StoredWork work(*call);
        if (work.out_of_range) return FOVEATE_OUT_OF_RANGE;
        bool finite = true;
        const int64_t status = attend(*call, work, finite);
        const bool spread = !finite && call->attend.num_queries > 1;  // what a query does not see may have got into it
        return status == FOVEATE_OK && spread ? (int64_t)FOVEATE_NOT_FINITE : status;
    } catch (const std::bad_alloc&) {
        return FOVEATE_NO_MEMORY;
    }
}
