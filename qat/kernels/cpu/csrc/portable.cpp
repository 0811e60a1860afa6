// The kernels for one instruction set; the flags are in CMakeLists.txt.
#include "matmul_impl.h"

namespace qat {
const Kernels* portable_kernels() {
  static const Kernels table{"portable", matmul, quantize, attend, norm, gate};
  return &table;
}
}  // namespace qat
