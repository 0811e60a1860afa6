// The kernels for one instruction set; the flags are in CMakeLists.txt.
#include "matmul_impl.h"

#include "gemm_impl.h"
#include "train_impl.h"

namespace qat {
const Kernels* avx2_kernels() {
  static const Kernels table{"avx2", matmul, quantize, attend, norm, gate, gemm, &train_kernels};
  return &table;
}
}  // namespace qat
