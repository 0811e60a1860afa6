// The kernels for one instruction set; the flags are in CMakeLists.txt.
#include "gemm_impl.h"
#include "matmul_impl.h"
#include "rows_impl.h"
#include "train_impl.h"

namespace qat {
const Kernels* avx2_kernels() {
  static const Kernels table{"avx2", matmul, quantize, attend, append, join, norm, gate, row, gemm, &train_kernels};
  return &table;
}
}  // namespace qat
