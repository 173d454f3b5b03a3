// The C interface of attention to stored tokens, filled in by foveate/attention/stored/native.py.
#pragma once
#include "abi.h"

// Floats as FoveateDtype has them, or codes: FLOAT8 is e4m3 without infinities.
enum FoveateFormat : int64_t {
    FOVEATE_AS_FLOAT8 = 3,
    FOVEATE_AS_INT8 = 4,
    FOVEATE_AS_INT4 = 5,
    FOVEATE_AS_INT2 = 6
};
enum FoveateStoredError : int64_t { FOVEATE_NOT_FINITE = 4 };  // it may have spread too far: run the definition

// x = code * step + least, of any float dtype. Strides in elements: page, head, and token or group of tokens.
struct FoveateScale {
    const void *step, *least;  // null: 1, 0
    int64_t dtype;
    int64_t step_stride[3], least_stride[3];
};

// Rows (pages, heads, tokens): channels lie side by side, codes of 4 and 2 bits as Python's `pack` puts them.
struct FoveateCodes {
    const void* data;
    int64_t format;
    int64_t stride[3];            // in bytes
    int64_t group;                // tokens of a page that share a channel scale
    FoveateScale channel, token;  // x = channel of (token of code)
};

struct FoveateSegment {
    FoveateCodes k, v;
    int64_t num_pages, page_heads, page_size;
    const int64_t* pages;    // (batch, heads, most), null: page b of entry b
    int64_t page_stride[3];  // batch, head, number
    const int64_t* lengths;  // (batch, key heads)
    const int64_t* behind;   // (batch, key heads) tokens that follow; null: no query is too early for any token
    const float* bias;       // null: none
    int64_t bias_stride[4];  // batch, head, query, slot
    int64_t most;            // pages of a head
};

// attend: q, out, lse and numbers; without k, v and a selection.
struct FoveateStored {
    FoveateAttend attend;
    int64_t key_heads, num_segments;
    const FoveateSegment* segments;
};

FOVEATE_API int64_t foveate_stored_size(void);
FOVEATE_API int64_t foveate_stored_segment_size(void);
FOVEATE_API int64_t foveate_attend_stored(const FoveateStored* call);
