// What every call of the kernels for windows on grids goes through.
#pragma once
#include "call.h"
#include "grid_bias.h"

namespace foveate::grid {

inline bool is_refused(const FoveateAttend& call, const FoveateNeighborhood& window) {
    if (window.axes < 1 || window.axes > 3) return true;
    double tokens = 1;
    for (int64_t i = 0; i < window.axes; ++i) {
        if (window.dims[i] < 0 || window.size[i] < 1 || window.dilation[i] < 1) return true;
        if (window.dims[i] && (window.size[i] > window.dims[i] || window.dilation[i] > window.dims[i])) return true;
        tokens *= (double)window.dims[i];
    }
    for (int64_t i = 0; i < call.num_biases; ++i)
        if (call.scale == 0 || is_refused(call.biases[i], window)) return true;
    return tokens != (double)call.num_queries || tokens != (double)call.num_keys;
}

// Scores become logits in base 2 by a factor; one that is not above 0 goes to the queries, since it would turn maxima.
struct Factors {
    float of_queries, of_scores;
    explicit Factors(double scale)
        : of_queries(scale > 0 ? 1.0f : (float)(scale * LOG2E)), of_scores(scale > 0 ? (float)(scale * LOG2E) : 1.0f) {}
};

// The call, on no more threads than are of use; `passes`: products of queries and keys, in those of a forward pass.
inline FoveateAttend with_worthwhile_threads(const FoveateAttend& call, const FoveateNeighborhood& window, double passes) {
    FoveateAttend with = call;
    double pairs = (double)call.batch * call.q.heads * call.num_queries;
    for (int64_t i = 0; i < window.axes; ++i) pairs *= window.size[i];
    with.threads = worthwhile_threads(passes * pairs * (call.dim + call.value_dim), 0, call.threads);
    return with;
}

}  // namespace foveate::grid
