// The tokens of a head as products want them: rows of float32, or transposed, for the keys that are in sight.
#pragma once
#include "columns.h"

namespace foveate::grid {

// One head of a tensor, as query head h of entry b of the batch sees it.
class Head {
  public:
    Head(const FoveateAttend& call, const FoveateTensor& x, int64_t b, int64_t h, int64_t dim)
        : x_(x), dtype_(call.dtype), b_(b), h_(h / (call.q.heads / x.heads)), dim_(dim), padded_(round_up(dim, LANES)) {}

    int64_t dim() const { return dim_; }
    int64_t padded() const { return padded_; }  // channels in whole vectors
    int64_t step() const { return x_.stride[2]; }
    // Whether vectors may be read and written where they lie.
    bool direct() const { return dtype_ == FOVEATE_FLOAT32 && x_.stride[3] == 1 && dim_ == padded_; }
    char* at(int64_t token) const { return (char*)foveate::at(x_, dtype_, b_, h_, token); }
    float* row(int64_t token) const { return (float*)at(token); }

    void read(float* to, int64_t token) const { read_row(to, at(token), dtype_, x_.stride[3], dim_, padded_); }
    void write(int64_t token, const float* from) const { write_row(at(token), dtype_, x_.stride[3], from, dim_); }
    void prefetch(int64_t token) const {
        for (int64_t i = 0; i < dim_ * bytes_of(dtype_); i += 64) __builtin_prefetch(at(token) + i);
    }

    // `count` tokens as rows one after the other, and zeros up to LANES of them.
    void read_rows(float* to, int64_t first, int64_t stride, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) read(to + i * padded_, first + i * stride);
        std::fill(to + count * padded_, to + LANES * padded_, 0.0f);
    }
    // Up to LANES tokens as [channel][lane], `channel` numbers from one channel to the next.
    void read_transposed(float* to, int64_t channel, int64_t first, int64_t stride, int64_t count, float* rows) const {
        if (direct() && count == LANES)
            return transpose_words(to, channel, row(first), stride * step(), LANES, dim_);
        read_rows(rows, first, stride, count);
        transpose_words(to, channel, rows, padded_, LANES, padded_);
    }

  private:
    const FoveateTensor& x_;
    const int64_t dtype_, b_, h_, dim_, padded_;
};

// The keys that a box of queries sees: rows along x, few enough of which are in sight at a time to keep them in a ring.
struct Slab {
    const Lattice& lattice;
    Box keys;
    int64_t ring;

    Slab(const Lattice& l, const Box& queries) : lattice(l), keys(l.keys(queries)) {
        const int64_t in_sight = keys.z.size() == 1 ? l.y.size + GROUP - 1 : l.z.size * keys.y.size();
        ring = std::min(keys.rows(), in_sight);
    }
    int64_t columns() const { return keys.x.size(); }
    int64_t place(int64_t row) const { return row % ring; }
    int64_t token(int64_t row, int64_t column) const {
        return lattice.token(keys.z.begin + row / keys.y.size(), keys.y.begin + row % keys.y.size(),
                             keys.x.begin + column);
    }
};

// Calls pack(row) for every row of keys just before it comes into sight, and visit(next row to pack) for every group.
template <class Pack, class Visit>
static void each_group(const Box& queries, Sight& sight, Pack pack, Visit visit) {
    int64_t packed = 0;
    for (int64_t z = queries.z.begin; z < queries.z.end; ++z)
        for (int64_t y = queries.y.begin; y < queries.y.end; y += GROUP) {
            sight.look(z, {y, std::min(y + GROUP, queries.y.end)});
            for (; packed <= sight.last_row(); ++packed) pack(packed);
            visit(packed);
        }
}

// Rows of keys as [channel][x].
class TransposedRows {
  public:
    TransposedRows(const Slab& slab, const Head& head, float* ring, float* rows)
        : slab_(slab), head_(head), ring_(ring), rows_(rows) {}

    // Numbers from one channel to the next: loads may go on for a vector past the last key.
    static int64_t channel(const Slab& slab) { return round_up(slab.columns(), LANES) + LANES; }
    static int64_t size(const Slab& slab, int64_t padded) { return slab.ring * padded * channel(slab) + LANES; }

    int64_t channel() const { return channel(slab_); }
    float* at(int64_t row) const { return ring_ + slab_.place(row) * head_.padded() * channel(); }
    void pack(int64_t row) const {
        for (int64_t x = 0; x < slab_.columns(); x += LANES)
            head_.read_transposed(at(row) + x, channel(), slab_.token(row, x), slab_.lattice.x.stride,
                                  std::min<int64_t>(slab_.columns() - x, LANES), rows_);
    }

  private:
    const Slab& slab_;
    const Head& head_;
    float *ring_, *rows_;
};

// Rows of keys as [x][channel]: where they lie, if vectors can be read there.
class NaturalRows {
  public:
    NaturalRows(const Slab& slab, const Head& head, float* ring) : slab_(slab), head_(head), ring_(ring) {}

    static int64_t size(const Slab& slab, int64_t padded) { return slab.ring * slab.columns() * padded; }

    int64_t step() const { return head_.direct() ? slab_.lattice.x.stride * head_.step() : head_.padded(); }
    float* at(int64_t row) const {
        if (head_.direct()) return head_.row(slab_.token(row, 0));
        return ring_ + slab_.place(row) * slab_.columns() * head_.padded();
    }
    void pack(int64_t row) const {
        if (head_.direct()) return;
        for (int64_t x = 0; x < slab_.columns(); ++x) head_.read(at(row) + x * head_.padded(), slab_.token(row, x));
    }

  private:
    const Slab& slab_;
    const Head& head_;
    float* ring_;
};

// Rows of queries of a group, up to LANES tokens of each: transposed [channel][lane], and as rows of channels.
class QueryRows {
  public:
    QueryRows(const Head& head, float* transposed, float* rows) : head_(head), transposed_(transposed), rows_(rows) {}

    static int64_t size(int64_t padded) { return GROUP * LANES * padded; }

    void read(int64_t r, int64_t first, int64_t stride, int64_t lanes, float factor) {
        first_[r] = head_.direct() ? head_.row(first) : rows_ + r * row();
        step_ = head_.direct() ? stride * head_.step() : head_.padded();
        float* to = transposed_ + r * row();
        head_.read_transposed(to, LANES, first, stride, lanes, rows_ + r * row());
        for (int64_t i = 0; i < row(); i += LANES) store(to + i, load(to + i) * factor);
    }
    int64_t row() const { return LANES * head_.padded(); }  // numbers from one row of queries to the next
    const float* transposed() const { return transposed_; }
    const float* rows(int64_t r) const { return first_[r]; }  // without the factor
    int64_t step() const { return step_; }                    // numbers from one token of rows() to the next

  private:
    const Head& head_;
    float *transposed_, *rows_;
    const float* first_[GROUP];
    int64_t step_ = 0;
};

// A row of a strip's queries gathered, and written to its tokens, `stride` apart from `first` on.
inline void gather_to(const Head& head, const Links& links, const Strip& strip, const float* factor, int64_t first,
                      int64_t stride, float* rows) {
    if (head.direct()) return gather(links, strip, head.padded(), factor, head.row(first), stride * head.step());
    gather(links, strip, head.padded(), factor, rows, head.padded());
    for (int64_t i = 0; i < strip.lanes; ++i) head.write(first + i * stride, rows + i * head.padded());
}

// Tokens that will be read soon, asked for a few at a time: a processor waits when it has asked for too many.
class Prefetch {
  public:
    void clear() { num_pieces_ = piece_ = token_ = 0; }
    void add(const Head& head, int64_t first, int64_t stride, int64_t count) {
        if (count > 0 && num_pieces_ < MOST) pieces_[num_pieces_++] = {&head, first, stride, count};
    }
    // Asks for what was added in so many calls of part().
    void spread(int64_t parts) {
        int64_t all = 0;
        for (int64_t i = 0; i < num_pieces_; ++i) all += pieces_[i].count;
        in_part_ = (all + parts - 1) / parts;
    }
    void part() {
        for (int64_t i = 0; i < in_part_ && piece_ < num_pieces_; ++i) {
            const Piece& p = pieces_[piece_];
            p.head->prefetch(p.first + token_ * p.stride);
            if (++token_ == p.count) token_ = 0, ++piece_;
        }
    }

  private:
    static constexpr int MOST = 8 * GROUP;
    struct Piece {
        const Head* head;
        int64_t first, stride, count;
    };
    Piece pieces_[MOST];
    int64_t num_pieces_ = 0, piece_ = 0, token_ = 0, in_part_ = 0;
};

}  // namespace foveate::grid
