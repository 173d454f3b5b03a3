// The part of a chunk that any of its pairs lies in, as blocks of keys x vectors of queries: products and exponentials
// of a chunk that the edge of a window cuts are formed in there alone.
#pragma once
#include "chunks.h"
#include "rows.h"

namespace foveate {

// Keys begin .. end of a chunk by vectors first .. last of its queries.
struct Block {
    int64_t begin, end;
    int first, last;

    int64_t keys() const { return end - begin; }
    int vectors() const { return last - first; }
    int64_t lane() const { return first * LANES; }
};

// Blocks in the order of keys, which no two of them share. A pair in none of them is seen by nobody.
class Cut {
  public:
    Cut() = default;
    Cut(int64_t keys, int vectors) { take_all(keys, vectors); }

    const Block* begin() const { return blocks_; }
    const Block* end() const { return blocks_ + count_; }
    // Whether there is one block, of all keys and all vectors.
    bool whole() const { return whole_; }
    bool empty() const { return count_ == 0; }

    // Blocks of multiples of `grain` keys, but for the last of the chunk, and of `together` vectors.
    void look(const Chunk& chunk, int vectors, int64_t grain, int together) {
        take_all(chunk.count, vectors);
        if (!chunk.masked || empty()) return;
        Span spans[MAX_VECTORS];
        int64_t seen = 0;
        for (int j = 0; j < vectors; j += together) {
            const Span span = span_of(chunk, j, together, grain);
            std::fill(spans + j, spans + std::min(j + together, vectors), span);
            seen += std::min(together, vectors - j) * (span.end - span.begin);
        }
        if (seen * 16 > 15 * chunk.count * vectors) return;  // too little to be won
        whole_ = false;
        divide(spans, vectors, chunk.count);
    }

  private:
    struct Span {
        int64_t begin, end;
        bool has(int64_t key) const { return begin <= key && key < end; }
    };

    void take_all(int64_t keys, int vectors) {
        blocks_[0] = {0, keys, 0, vectors};
        count_ = keys > 0;
        whole_ = true;
    }

    // The keys between the first and the last that a query of these vectors sees.
    static Span span_of(const Chunk& chunk, int vector, int together, int64_t grain) {
        const int64_t lanes = (int64_t)together * LANES;
        const uint64_t queries = (lanes >= TILE ? ~0ull : (1ull << lanes) - 1) << (vector * LANES);
        int64_t begin = 0, end = chunk.count;
        while (begin < end && !(chunk.seen[begin] & queries)) ++begin;
        while (end > begin && !(chunk.seen[end - 1] & queries)) --end;
        if (begin == end) return {0, 0};
        return {begin / grain * grain, std::min(round_up(end, grain), chunk.count)};
    }

    void divide(const Span* spans, int vectors, int64_t keys) {
        count_ = 0;
        for (int64_t key = 0, next; key < keys; key = next) {
            Block block{key, keys, vectors, 0};
            for (int j = 0; j < vectors; ++j) {
                if (spans[j].begin > key) block.end = std::min(block.end, spans[j].begin);
                if (!spans[j].has(key)) continue;
                block.end = std::min(block.end, spans[j].end);
                block.first = std::min(block.first, j);
                block.last = j + 1;
            }
            next = block.end;
            if (block.first < block.last) blocks_[count_++] = block;
        }
    }

    Block blocks_[2 * MAX_VECTORS + 1];
    int count_ = 0;
    bool whole_ = true;
};

}  // namespace foveate
