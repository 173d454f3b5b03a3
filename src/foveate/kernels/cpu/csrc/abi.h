// The C interface of the kernels: what the Python side fills in, field by field (foveate/kernels/cpu/call.py).
// Sizes and strides are counted in elements; every field is 8 bytes wide, so that no compiler pads.
#pragma once
#include <cstdint>

#define FOVEATE_API extern "C" __attribute__((visibility("default")))

enum FoveateDtype : int64_t { FOVEATE_FLOAT32 = 0, FOVEATE_BFLOAT16 = 1, FOVEATE_FLOAT16 = 2 };
enum FoveateKind : int64_t { FOVEATE_SOFTMAX = 0, FOVEATE_SIGMOID = 1, FOVEATE_RELU = 2 };
enum FoveateBiasKind : int64_t { FOVEATE_DENSE = 0, FOVEATE_ALIBI = 1, FOVEATE_RELATIVE = 2 };
enum FoveateError : int64_t { FOVEATE_OK = 0, FOVEATE_NO_MEMORY = 1, FOVEATE_OUT_OF_RANGE = 2, FOVEATE_REFUSED = 3 };

// (batch, heads, tokens, channels) of any strides.
struct FoveateTensor {
    void* data;
    int64_t heads;
    int64_t stride[4];
};

struct FoveateBias {
    int64_t kind;
    const float* data;
    float* grad;        // same strides as data; null: not wanted
    int64_t size;       // entries of data
    int64_t stride[4];  // dense: batch, head, query, key (0 where it broadcasts)
    int64_t offset;     // key position of query 0
    int64_t axes;       // relative: axes of the table, and of the grid (dims[0] = 0: a line)
    int64_t dims[4];
    int64_t reach[4];
};

// What each query sees. Without lists (tile_starts null) a band: low <= query position - key <= high.
struct FoveateSelection {
    int64_t band_low, band_high;
    int64_t batches, heads;  // that the lists tell apart
    int64_t num_q_tiles;
    const int64_t* tile_starts;
    const int32_t* tile_ids;
    const int32_t* mask_ids;
    const uint8_t* masks;  // (U, 64, 8)
    const int64_t* column_starts;
    const int32_t* column_ids;
    const uint8_t* column_masks;  // (C, 8)
    const int64_t* q_slots;       // null: the natural order
    const int64_t* k_slots;
    int64_t num_k_slots;
    // Runs of whole key tiles that some queries of a row see, all of their keys; in the natural order only. Null: none.
    const int64_t* run_starts;
    const int32_t* runs;          // (R, 2): the first key tile, and how many
    const uint64_t* run_queries;  // (R): bit per query of the tile
};

struct FoveateAttend {
    FoveateTensor q, k, v, out;
    double* lse;  // (batch, heads, queries), in double: float32 of a great sum tells no weight. Null: not wanted
    int64_t dtype, kind, threads;  // threads: at most
    int64_t batch, num_queries, num_keys, dim, value_dim;
    double scale, softcap;  // softcap 0: none
    FoveateSelection selection;
    int64_t num_biases;
    FoveateBias* biases;
    // the backward pass only
    FoveateTensor grad_out, dq, dk, dv;
    const float* grad_lse;  // null: zero
};

// Keys of a few queries as ranges [first, end) of slots, which all queries of a head see. Lists of one head may not overlap.
struct FoveateRanges {
    int64_t batches, heads;  // that the lists tell apart: 1, or the call's batch; 1, or what divides its query heads
    const int64_t* starts;   // (batches * heads + 1): row r owns the ranges starts[r] to starts[r + 1]
    const int64_t* ranges;   // (R, 2)
    const float* bias;       // added to the logit of each key slot; null: none
    int64_t bias_stride[3];  // batch, head, key
    float* logits;           // (batch, heads, queries, keys): written where a key is seen, bias left out; null: not wanted
};

// All entry points return FOVEATE_REFUSED for a description that no tensors have: they check what costs nothing.
FOVEATE_API int64_t foveate_attend_size(void);  // bytes of FoveateAttend, checked when the library is loaded
FOVEATE_API int64_t foveate_attend_forward(const FoveateAttend* call);
FOVEATE_API int64_t foveate_attend_backward(const FoveateAttend* call);
// The same as forward for a band without biases; faster for few queries.
FOVEATE_API int64_t foveate_attend_decode(const FoveateAttend* call);
// Forward over ranges of keys in place of a selection and of biases; as fast as a band of as many keys.
FOVEATE_API int64_t foveate_attend_ranges(const FoveateAttend* call, const FoveateRanges* seen);
// Forward with the products of careful.h, whatever the numbers.
FOVEATE_API int64_t foveate_attend_carefully(const FoveateAttend* call);
FOVEATE_API int64_t foveate_decode_queries(int64_t num_keys);  // up to so many it is the faster, whatever the heads
