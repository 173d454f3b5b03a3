// The C interface of the scans: what the Python side fills in, field by field (foveate/recurrence/selective/impl/abi.py).
#pragma once
#include "abi.h"

// (batch, tokens, channels) or (batch, tokens, groups, states), of any dtype and strides. No data: absent.
struct FoveateStream {
    void* data;
    int64_t dtype;
    int64_t stride[4];
};

// h_t = exp(dt_t rates) h_{t-1} + dt_t x_t b_t, y_t = c_t . h_t + skip x_t, out = y silu(z).
// Without b and c: h_t = exp(dt_t) h_{t-1} + x_t, out = h.
struct FoveateScan {
    FoveateStream x, dt, z, b, c, out;
    const float *rates, *skip, *bias;  // (channels, states), (channels), (channels); rates of ones without b and c
    const float* first;                // (sequences, channels, states)
    float* last;
    float* marks;           // (tokens / 64 + sequences, states, channels): the state before every 64 tokens. Null: unwanted
    const int64_t* starts;  // (sequences + 1) of packed sequences. Null: one sequence in each batch entry
    int64_t sequences, length, channels, states, groups_b, groups_c, softplus, threads;
    // the backward pass only
    FoveateStream grad_out, dx, ddt, dz, db, dc;
    const float* grad_last;
    float *d_rates, *d_skip, *d_bias, *d_first;
};

// out_t = bias + sum_i weight_i x_{t - (width - 1) + i}, then silu; x before a sequence is its tail.
struct FoveateConv {
    FoveateStream x, out;
    const float *weight, *bias;  // (channels, width), (channels)
    const float* first;           // the tails, (sequences, channels, width - 1)
    float* last;
    const int64_t* starts;
    int64_t sequences, length, channels, width, silu, threads;
    // the backward pass only
    FoveateStream grad_out, dx;
    const float* grad_last;
    float *d_weight, *d_bias, *d_first;
};

FOVEATE_API int64_t foveate_scan_size(void);
FOVEATE_API int64_t foveate_scan_forward(const FoveateScan* call);
FOVEATE_API int64_t foveate_scan_backward(const FoveateScan* call);
// The same as forward for one token each, not packed; faster, and FOVEATE_OUT_OF_RANGE where a rate is above 0 or a
// step below it.
FOVEATE_API int64_t foveate_scan_step(const FoveateScan* call);
FOVEATE_API int64_t foveate_conv_size(void);
FOVEATE_API int64_t foveate_conv_forward(const FoveateConv* call);
FOVEATE_API int64_t foveate_conv_backward(const FoveateConv* call);
