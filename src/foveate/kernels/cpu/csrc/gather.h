// Queries that see the same run of whole key tiles, gathered from many tiles: where neighbours choose differently, the
// tiles of a row are those of the union of what its queries see, and most of their pairs hidden.
#pragma once
#include <vector>

#include "lanes.h"
#include "pages.h"
#include "rows.h"
#include "threads.h"

namespace foveate {

// Every so-many-th tile of the queries of a head.
struct QueryTiles {
    int64_t b, h, first, step, tiles;

    template <class Visit> void each(Visit visit) const {
        for (int64_t tile = first; tile < tiles; tile += step) visit(tile);
    }
    int64_t count() const { return first < tiles ? (tiles - first + step - 1) / step : 0; }
    // Where a query stands among all of them.
    int64_t row(int64_t token) const { return token / TILE / step * TILE + token % TILE; }
};

class Gathered {
  public:
    // The runs of these tiles, in the order of keys.
    void sort(const FoveateAttend& call, const QueryTiles& of) {
        const FoveateSelection& lists = call.selection;
        const int64_t k_tiles = (call.num_keys + TILE - 1) / TILE;
        runs_.clear();
        of.each([&](int64_t tile) {
            const int64_t list = list_of(call, of.b, of.h, tile);
            for (int64_t i = lists.run_starts[list]; i < lists.run_starts[list + 1]; ++i)
                runs_.push_back({lists.runs[2 * i], lists.runs[2 * i + 1], (int32_t)(tile * TILE), lists.run_queries[i]});
        });
        sort_by(k_tiles, [](const Run& run) { return run.tiles; });
        sort_by(k_tiles, [](const Run& run) { return run.first; });
    }

    // Calls visit(first tile, number of tiles, tokens, how many) for every run and up to `most` queries that see it.
    template <class Visit> void each(int64_t most, Visit visit) const {
        int32_t tokens[TILE];
        int64_t count = 0;
        for (size_t i = 0; i < runs_.size(); ++i) {
            const Run& run = runs_[i];
            for (uint64_t left = run.queries; left; left &= left - 1) {
                tokens[count++] = run.token + __builtin_ctzll(left);
                if (count < most) continue;
                visit(run.first, run.tiles, tokens, count);
                count = 0;
            }
            const bool last = i + 1 == runs_.size() || runs_[i + 1].first != run.first || runs_[i + 1].tiles != run.tiles;
            if (!last || !count) continue;
            visit(run.first, run.tiles, tokens, count);
            count = 0;
        }
    }

  private:
    struct Run {
        int32_t first, tiles, token;  // token: the first of the tile of queries
        uint64_t queries;
    };
    // Stable, by whole numbers from 0 to `most`.
    template <class Key> void sort_by(int64_t most, Key key) {
        ends_.assign(most + 2, 0);
        for (const Run& run : runs_) ++ends_[key(run) + 1];
        for (int64_t i = 0; i <= most; ++i) ends_[i + 1] += ends_[i];
        sorted_.resize(runs_.size());
        for (const Run& run : runs_) sorted_[ends_[key(run)]++] = run;
        runs_.swap(sorted_);
    }

    std::vector<Run> runs_, sorted_;
    std::vector<int64_t> ends_;
};

// Calls visit(chunk) for the tiles of a run, which hide nothing.
template <class Visit>
static void for_each_chunk_of_run(const FoveateAttend& call, int64_t first, int64_t tiles, Visit visit) {
    Chunk chunk;
    chunk.columns = nullptr;
    chunk.masked = false;
    for (int64_t tile = first; tile < first + tiles; ++tile) {
        chunk.first = tile * TILE;
        chunk.count = std::min<int64_t>(call.num_keys - chunk.first, TILE);
        visit(chunk);
    }
}

// Sums of the queries of a work item, a row of channels each, from one visit of a query to the next; and as many
// numbers beside a row as a vector has.
class RunningRows {
  public:
    RunningRows(int64_t rows, int64_t dim)
        : padded_(round_up(dim, LANES)), pitch_(padded_ + LANES), dim_(dim), rows_(rows * pitch_) {
        prefer_large_pages(rows_.get(), rows * pitch_ * (int64_t)sizeof(float));
    }
    void begin(const QueryTiles& of) {
        of_ = of;
        std::fill_n(rows_.get(), of.count() * TILE * pitch_, 0.0f);
    }
    float* beside(int64_t token) const { return row(token) + padded_; }

    // To and from sums (channels, ld) of the lanes; space for 64 rows.
    void load(const Lanes& lanes, float* transposed, int64_t ld, float* space) const {
        for (int64_t i = 0; i < ld; ++i) {
            const float* from = i < lanes.count ? row(lanes.token[i]) : nullptr;
            if (from) std::memcpy(space + i * padded_, from, padded_ * sizeof *from);
            else std::fill_n(space + i * padded_, padded_, 0.0f);
        }
        transpose_words(transposed, ld, space, padded_, ld, padded_);
    }
    void keep(const Lanes& lanes, const float* transposed, int64_t ld, float* space) const {
        transpose_words(space, padded_, transposed, ld, dim_, lanes.count);
        for (int64_t i = 0; i < lanes.count; ++i)
            std::memcpy(row(lanes.token[i]), space + i * padded_, padded_ * sizeof *space);
    }

  private:
    float* row(int64_t token) const { return rows_.get() + of_.row(token) * pitch_; }

    const int64_t padded_, pitch_, dim_;
    const Buffer<float> rows_;
    QueryTiles of_{};
};

}  // namespace foveate
