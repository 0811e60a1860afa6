// Torch ops over the kernels, on LibTorch's stable ABI: one binary for every torch from 2.10 on. The ops of training are in
// train.cpp, those of the engine in engine_ops.cpp.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

namespace qat {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* limit = std::getenv("QAT_MAX_ISA");  // for tests: avxvnni, avx2 or portable
    const std::string most = limit ? limit : "avx512";
    __builtin_cpu_init();
    if (most == "avx512" && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return *avx512_kernels();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if ((most == "avx512" || most == "avxvnni") && has_avx2 && __builtin_cpu_supports("avxvnni")) return *avxvnni_kernels();
    if (most != "portable" && has_avx2) return *avx2_kernels();
    return *portable_kernels();
  }();
  return chosen;
}

void quantize_planes(const float* x, const Packed& w, int planes, int8_t* codes, int32_t* sums, float* scales,
                     float* rest) {
  kernels().quantize(x, w.k, w.padded(), w.group, nullptr, codes, sums, scales);
  if (planes == 1) return;
  for (int64_t c = 0; c < w.k; ++c) rest[c] = x[c] - scales[0] * codes[c];
  kernels().quantize(rest, w.k, w.padded(), w.group, nullptr, codes + w.padded(), sums + w.groups, scales + 1);
}

void check(const torch::stable::Tensor& x, torch::headeronly::ScalarType type, int64_t dims, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == dims && x.is_contiguous() && x.is_cpu(), what,
                  ": wrong dtype, number of dimensions or memory layout; call the functions of qat.kernels.cpu");
}

Packed packed_of(const torch::stable::Tensor& blob, const int64_t* grid) {
  check(blob, torch::headeronly::ScalarType::Byte, 1, "blob [bytes] uint8");
  const int64_t n = grid[0], k = grid[1], group = grid[2], bits = grid[3];
  STD_TORCH_CHECK(n > 0 && k > 0 && group > 0 && group % 32 == 0 && ((bits >= 2 && bits <= 8) || bits == 16),
                  "grid out of range");
  Packed w{};
  w.data = static_cast<const uint8_t*>(blob.data_ptr());
  w.n = n, w.k = k, w.group = group, w.groups = (k + group - 1) / group;
  w.container = bits <= 2 ? 2 : bits <= 4 ? 4 : bits <= 8 ? 8 : 16;
  w.offset = 1 << (bits - 1);
  w.has_zeros = grid[4] != 0;
  w.panels = (n + PANEL - 1) / PANEL;
  w.group_bytes = group * w.container * PANEL / 8 + (w.container == 16 ? 0 : 64);
  w.panel_bytes = (w.groups * (w.group_bytes + (w.has_zeros ? 32 : 0)) + 63) / 64 * 64;
  STD_TORCH_CHECK(blob.numel() == w.panels * w.panel_bytes, "blob does not hold a weight of this shape: ", blob.numel(),
                  " bytes, wanted ", w.panels * w.panel_bytes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(w.data) % 64 == 0, "blob must start on a cache line");
  return w;
}

}  // namespace qat
