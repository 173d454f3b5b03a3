// Attention of each token of a grid to the window around it: the C interface, beside abi.h.
#pragma once
#include "abi.h"

constexpr int64_t FOVEATE_MAX_AXES = 4;

// Tokens are numbered row-major. Along each axis a query sees, among the keys of its own coordinate modulo
// `dilation`, `size` keys around it, shifted inward at the borders; where causal the last `size` up to itself.
struct FoveateNeighborhood {
    int64_t axes;  // 1 to 3
    int64_t dims[FOVEATE_MAX_AXES], size[FOVEATE_MAX_AXES], dilation[FOVEATE_MAX_AXES], causal[FOVEATE_MAX_AXES];
};

// Softmax without soft-cap; of `call` the selection is not read. Biases are dense, ALiBi, or tables of relative positions on
// this grid; then the scale may not be 0.
FOVEATE_API int64_t foveate_neighborhood_size(void);  // bytes of FoveateNeighborhood
FOVEATE_API int64_t foveate_neighborhood_forward(const FoveateAttend* call, const FoveateNeighborhood* window);
FOVEATE_API int64_t foveate_neighborhood_backward(const FoveateAttend* call, const FoveateNeighborhood* window);
