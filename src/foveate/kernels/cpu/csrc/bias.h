// Additive biases on the logits of a chunk, (keys, lanes) like the logits themselves.
#pragma once
#include "operands.h"
#include "relative.h"

namespace foveate {

FOVEATE_INLINE int64_t dense_entry(const FoveateBias& bias, const Place& place, int64_t lane, int64_t key) {
    return place.b * bias.stride[0] + place.h * bias.stride[1] + place.query[lane] * bias.stride[2] +
           place.key[key] * bias.stride[3];
}
FOVEATE_INLINE float alibi_factor(const FoveateBias& bias, const Place& place, int64_t lane, int64_t key) {
    return -(float)std::abs(place.query[lane] + bias.offset - place.key[key]);
}

// A number for each query, or for each key.
static void add_broadcast(const FoveateBias& bias, const Place& place, float* to, int64_t ld) {
    const float* data = bias.data + place.b * bias.stride[0] + place.h * bias.stride[1];
    alignas(64) float of_query[TILE] = {};
    for (int64_t i = 0; i < place.lanes && bias.stride[3] == 0; ++i)
        if (place.query[i] >= 0) of_query[i] = data[place.query[i] * bias.stride[2]];
    for (int64_t k = 0; k < place.count; ++k) {
        const float of_key = bias.stride[3] && place.key[k] >= 0 ? data[place.key[k] * bias.stride[3]] : 0.0f;
        for (int64_t i = 0; i < place.lanes; i += LANES) {
            float* sum = to + k * ld + i;
            store(sum, load(sum) + load(of_query + i) + of_key);
        }
    }
}

// Rows of the bias, copied and transposed in registers; scratch is (64, 64).
static void add_dense(const FoveateBias& bias, const Place& place, float* to, int64_t ld, float* scratch) {
    if (bias.stride[2] == 0 || bias.stride[3] == 0) return add_broadcast(bias, place, to, ld);
    if (bias.stride[3] != 1 || !place.keys_in_order()) {
        for (int64_t k = 0; k < place.count; ++k)
            for (int64_t i = 0; i < place.lanes; ++i)
                if (place.exists(k, i)) to[k * ld + i] += bias.data[dense_entry(bias, place, i, k)];
        return;
    }
    const int64_t padded = round_up(place.count, LANES);
    for (int64_t i = 0; i < round_up(place.lanes, LANES); ++i) {
        const bool none = i >= place.lanes || place.query[i] < 0;
        const float* from = none ? scratch : bias.data + dense_entry(bias, place, i, 0);
        read_row(scratch + i * TILE, from, FOVEATE_FLOAT32, 1, none ? 0 : place.count, padded);
    }
    for (int64_t i = 0; i < place.lanes; i += LANES)
        for (int64_t k = 0; k < place.count; k += LANES) {
            Words x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; ++r) x[r] = load_words(scratch + (i + r) * TILE + k);
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; ++r) {
                float* sum = to + (k + r) * ld + i;
                store(sum, load(sum) + as_floats(x[r]));
            }
        }
}

static void add_relative(const FoveateBias& bias, const Place& place, float* to, int64_t ld) {
    const RelativeEntries entries(bias, place);
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; i += LANES) {
            float* sum = to + k * ld + i;
            store(sum, load(sum) + gather(bias.data, entries.of(k, i)));
        }
}

static void add_alibi(const FoveateBias& bias, const Place& place, float* to, int64_t ld) {
    const float slope = bias.data[place.h];
    float position[TILE];
    for (int64_t i = 0; i < TILE; ++i) position[i] = i < place.lanes ? (float)(place.query[i] + bias.offset) : 0.0f;
    for (int64_t k = 0; k < place.count; ++k)
        for (int64_t i = 0; i < place.lanes; i += LANES) {
            const Floats apart = load(position + i) - (float)place.key[k];
            float* sum = to + k * ld + i;
            store(sum, load(sum) - slope * as_floats(as_words(apart) & 0x7fffffffu));
        }
}

// The sum of all biases on a chunk. Short sequences keep that of every head, for the batch entries to come.
class BiasTiles {
  public:
    static int64_t kept(const FoveateAttend& call) {
        if (!call.num_biases) return 0;
        return num_q_tiles(call) == 1 && num_slots(call) <= TILE ? std::min<int64_t>(call.q.heads, 64) : 1;
    }

    template <class Arena> BiasTiles(Arena& arena, const FoveateAttend& call) : call_(&call), kept_(kept(call)) {
        tiles_ = arena.template take<Tile>(kept_);
        rows_ = arena.template take<float>(kept_ ? TILE * TILE : 0);
        for (int64_t i = 0; i < call.num_biases; ++i) shared_ &= !of_batch(call.biases[i]);
    }
    void begin() {
        for (int64_t i = 0; i < kept_; ++i) tiles_[i].h = -1;
    }

    // (keys of the chunk, ld), or null without biases.
    const float* of(int64_t b, int64_t h, const Lanes& lanes, int64_t ld, const Chunk& chunk) {
        if (!kept_) return nullptr;
        Tile& tile = tiles_[h % kept_];
        const bool same = tile.h == h && tile.first == lanes.first && tile.key == chunk.first && tile.count == chunk.count;
        const bool keeps = lanes.first != Lanes::GATHERED && !chunk.columns;
        if (shared_ && same && keeps) return tile.sum;
        const Place place(*call_, b, h, lanes, chunk);
        std::fill(tile.sum, tile.sum + round_up(chunk.count, LANES) * ld, 0.0f);
        for (int64_t i = 0; i < call_->num_biases; ++i) {
            const FoveateBias& bias = call_->biases[i];
            if (bias.kind == FOVEATE_DENSE) add_dense(bias, place, tile.sum, ld, rows_);
            if (bias.kind == FOVEATE_RELATIVE) add_relative(bias, place, tile.sum, ld);
            if (bias.kind == FOVEATE_ALIBI) add_alibi(bias, place, tile.sum, ld);
        }
        tile.h = keeps ? h : -1, tile.first = lanes.first, tile.key = chunk.first, tile.count = chunk.count;
        return tile.sum;
    }

  private:
    struct Tile {
        float sum[TILE * TILE];
        int64_t h, first, key, count;
    };
    static bool of_batch(const FoveateBias& bias) { return bias.kind == FOVEATE_DENSE && bias.stride[0] != 0; }

    const FoveateAttend* call_;
    int64_t kept_;
    Tile* tiles_;
    float* rows_;
    bool shared_ = true;
};

}  // namespace foveate
