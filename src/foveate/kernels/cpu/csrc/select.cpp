// From a pattern to a selection, as foveate/patterns/select/build.py does it: for each tile of queries a descent over ever
// smaller stretches of keys, then the masks of the tiles that bounds do not settle.
#include <memory>
#include <numeric>

#include "abi.h"
#include "pages.h"
#include "program.h"
#include "select_share.h"
#include "threads.h"

namespace foveate::selection {
namespace {

constexpr int64_t GRAIN = 4;  // neighbouring rows that one thread takes

// Where a selection's lists go.
struct Lists {
    int64_t *tile_starts, *column_starts, *run_starts;
    int32_t *tiles, *numbers, *columns, *runs;
    uint64_t *column_queries, *run_queries;
};

class Selecting {
  public:
    Selecting(std::unique_ptr<Pattern> pattern, const Extent& extent, int64_t threads)
        : pattern_(std::move(pattern)), extent_(extent), candidates_(extent.rows()), tiles_(extent.rows()),
          columns_(extent.rows()), runs_(extent.rows()), shares_(threads, Share(*pattern_, extent_)) {}

    bool descend() {
        return for_each_row([&](Share& share, int64_t row) {
            const size_t runs = share.runs.size();
            candidates_[row] = share.descend(row);
            runs_[row] = (int32_t)(share.runs.size() - runs);
        });
    }
    int64_t undecided() const {
        int64_t sum = 0;
        for (const Share& share : shares_) sum += share.undecided();
        return sum;
    }

    // Evaluates the undecided tiles; the table has room for as many masks.
    bool evaluate(Square* table) {
        int64_t slots = 0;
        for (Share& share : shares_) {
            share.take_slots(table, slots);
            slots += share.undecided();
        }
        prefer_large_pages(table, slots * (int64_t)sizeof *table);
        const bool done = for_each_row([&](Share& share, int64_t row) {
            const size_t tiles = share.tiles.size(), columns = share.columns.size();
            share.evaluate(row, candidates_[row]);
            tiles_[row] = (int32_t)(share.tiles.size() - tiles);
            columns_[row] = (int32_t)(share.columns.size() - columns);
        });
        return done && (shares_.size() == 1 || on_threads(1, [&](int64_t) { unite(table, slots); }));
    }
    int64_t num_masks() const { return shares_[0].index->size(); }
    int64_t num_tiles() const { return std::accumulate(tiles_.begin(), tiles_.end(), (int64_t)0); }
    int64_t num_columns() const { return std::accumulate(columns_.begin(), columns_.end(), (int64_t)0); }
    int64_t num_runs() const { return std::accumulate(runs_.begin(), runs_.end(), (int64_t)0); }

    void write(const Lists& to) {
        to.tile_starts[0] = to.column_starts[0] = to.run_starts[0] = 0;
        for (int64_t row = 0; row < extent_.rows(); ++row) {
            to.tile_starts[row + 1] = to.tile_starts[row] + tiles_[row];
            to.column_starts[row + 1] = to.column_starts[row] + columns_[row];
            to.run_starts[row + 1] = to.run_starts[row] + runs_[row];
        }
        for_each_row([&](Share& share, int64_t row) {
            for (int64_t i = to.tile_starts[row]; i < to.tile_starts[row + 1]; ++i, ++share.next_tile) {
                to.tiles[i] = share.tiles[share.next_tile];
                to.numbers[i] = place_of(share.numbers[share.next_tile]);
            }
            for (int64_t i = to.column_starts[row]; i < to.column_starts[row + 1]; ++i, ++share.next_column) {
                to.columns[i] = share.columns[share.next_column];
                to.column_queries[i] = share.column_queries[share.next_column];
            }
            for (int64_t i = to.run_starts[row]; i < to.run_starts[row + 1]; ++i, ++share.next_run) {
                const Run& run = share.runs[share.next_run];
                to.runs[2 * i] = run.first;
                to.runs[2 * i + 1] = run.tiles;
                to.run_queries[i] = run.queries;
            }
        });
    }

  private:
    // Every row once, those of a share always in the same order; false where memory ran out.
    template <class Visit> bool for_each_row(Visit visit) {
        const int64_t threads = (int64_t)shares_.size(), rows = extent_.rows();
        return on_threads(threads, [&](int64_t thread) {
            for (int64_t first = thread * GRAIN; first < rows; first += threads * GRAIN)
                for (int64_t row = first; row < std::min(first + GRAIN, rows); ++row) visit(shares_[thread], row);
        });
    }

    // Keeps once what several shares found, and fills the gaps in the table from its end.
    void unite(Square* table, int64_t slots) {
        const std::vector<int32_t> same = first_of_equals(table, slots);
        std::vector<int32_t> place = same;
        int32_t gap = 0;
        for (int32_t slot = (int32_t)num_masks(); slot < slots; ++slot) {
            if (same[slot] != slot) continue;
            while (same[gap] == gap) ++gap;
            table[gap] = table[slot];
            place[slot] = gap++;
        }
        place_.resize(slots);
        for (int64_t slot = 0; slot < slots; ++slot) place_[slot] = same[slot] < 0 ? -1 : place[same[slot]];
    }
    std::vector<int32_t> first_of_equals(const Square* table, int64_t slots) {
        std::vector<int32_t> same(slots, -1);
        MaskIndex& index = *shares_[0].index;
        for (Share& share : shares_)
            for (int64_t slot = share.first_slot; slot < share.first_slot + share.num_slots; ++slot)
                same[slot] = (int32_t)index.find_or_add(table[slot], slot);
        return same;
    }
    int32_t place_of(int32_t slot) const { return slot < 0 || place_.empty() ? slot : place_[slot]; }

    const std::unique_ptr<Pattern> pattern_;
    const Extent extent_;
    std::vector<int32_t> candidates_, tiles_, columns_, runs_;  // how many of each a row has
    std::vector<Share> shares_;
    std::vector<int32_t> place_;  // in the table, of the mask once found in a slot; empty where it has not moved
};

}  // namespace
}  // namespace foveate::selection

using namespace foveate::selection;

// What a pattern may show, to be evaluated; null where memory ran out. Sizes: batches, heads, queries, keys;
// and the keys of a visit.
FOVEATE_API void* foveate_select_open(const int64_t* program, const int64_t* sizes, int64_t threads,
                                      int64_t* undecided) {
    try {
        const Extent extent{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
        auto selecting = std::make_unique<Selecting>(Program(program).pattern(), extent, threads);
        if (!selecting->descend()) return nullptr;
        *undecided = selecting->undecided();
        return selecting.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// Fills a table of at least as many masks as there are undecided tiles. Totals: masks, tiles, columns, runs.
FOVEATE_API int64_t foveate_select_evaluate(void* handle, uint64_t* masks, int64_t* totals) {
    Selecting& selecting = *(Selecting*)handle;
    if (!selecting.evaluate((Square*)masks)) return FOVEATE_NO_MEMORY;
    totals[0] = selecting.num_masks();
    totals[1] = selecting.num_tiles();
    totals[2] = selecting.num_columns();
    totals[3] = selecting.num_runs();
    return FOVEATE_OK;
}

// Into lists of their sizes: starts of tiles, columns and runs; tiles, numbers of their masks, columns, runs; the
// queries of columns and of runs.
FOVEATE_API void foveate_select_write(void* handle, void* const* lists) {
    int64_t* const* starts = (int64_t* const*)lists;
    int32_t* const* ids = (int32_t* const*)lists + 3;
    uint64_t* const* queries = (uint64_t* const*)lists + 7;
    ((Selecting*)handle)
        ->write({starts[0], starts[1], starts[2], ids[0], ids[1], ids[2], ids[3], queries[0], queries[1]});
}

FOVEATE_API void foveate_select_close(void* handle) { delete (Selecting*)handle; }
