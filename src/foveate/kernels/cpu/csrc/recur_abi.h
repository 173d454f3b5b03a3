// The C interface of the recurrence (foveate/recurrence/linear/impl/abi.py fills it in). Every field is 8 bytes wide.
#pragma once
#include "abi.h"

// (sequences, heads, tokens, channels) of any strides and dtype; null data: not given.
struct FoveateRows {
    void* data;
    int64_t dtype, heads;
    int64_t stride[4];
};

// State S (dim, value_dim) of each sequence and head: S = exp(decay) S + write, out = scale q^T S.
struct FoveateRecur {
    FoveateRows q, k, v, out;
    FoveateRows decay;  // with one channel: the same for all
    FoveateRows beta;   // the delta rule
    FoveateRows a, b;   // or a low-rank transition
    const int64_t* starts;  // sequences packed one after another: sequences + 1 numbers; null: one per batch entry
    int64_t sequences, states, tokens, dim, value_dim, decay_channels;
    int64_t reads_before;  // queries read the state before their own token
    int64_t threads;
    double scale;
    const float* initial;  // (sequences, states, dim, value_dim); null: zeros
    float* final;
    float* checkpoints;  // the state before every SEGMENT tokens, for the backward pass; null: not wanted
    // The backward pass only. Gradients are float32, those of keys, values and gates one per state.
    FoveateRows grad_out, dq, dk, dv, ddecay, dbeta, da, db;
    const float* grad_final;  // null: zero
    float* dinitial;
};

FOVEATE_API int64_t foveate_recur_size(void);     // bytes of FoveateRecur
FOVEATE_API int64_t foveate_recur_segment(void);  // tokens from one checkpoint to the next
// FOVEATE_OUT_OF_RANGE where a decay is above 0 or a beta outside of [0, 2], or NaN.
FOVEATE_API int64_t foveate_recur_forward(const FoveateRecur* call);
FOVEATE_API int64_t foveate_recur_backward(const FoveateRecur* call);
