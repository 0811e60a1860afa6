// What the files that define torch ops share.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "matmul.h"

namespace qat {

// Refuses a tensor of another dtype, number of dimensions, layout or device.
void check(const torch::stable::Tensor& x, torch::headeronly::ScalarType type, int64_t dims, const char* what);
// A laid-out weight; `grid` is n, k, group, bits, zeros. Refuses a blob that does not hold such a weight.
Packed packed_of(const torch::stable::Tensor& blob, const int64_t* grid);

}  // namespace qat
