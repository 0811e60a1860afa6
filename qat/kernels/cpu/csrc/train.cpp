// Torch ops for training: fake quantization and its gradient in one pass, and the integer matmul that serving will run.
// Called through qat/kernels/cpu/train.py. The reference of each is in qat/grid.py, qat/estimators.py and
// qat/kernels/reference.py.
//
// Letters: M input rows, N weight rows, R rows of any tensor, K row length, G groups per row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "matmul.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 1 << 15;  // values one thread is worth waking for

void check_plain(const Tensor& x, int64_t dims, const char* what) {
  STD_TORCH_CHECK(x.dim() == dims && x.is_contiguous() && x.is_cpu(), what,
                  ": wrong number of dimensions or memory layout; call the functions of qat.kernels.cpu.train");
}

void check_type(const Tensor& x, ScalarType type, int64_t dims, const char* what) {
  check_plain(x, dims, what);
  STD_TORCH_CHECK(x.scalar_type() == type, what, ": wrong dtype");
}

bool is_bf16(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Float, what,
                  ": must be float32 or bfloat16");
  return x.scalar_type() == ScalarType::BFloat16;
}

int64_t groups_of(int64_t k, int64_t group) {
  STD_TORCH_CHECK(k > 0 && group > 0 && k % group == 0, "row length ", k, " must be a positive multiple of group ", group);
  return k / group;
}

// Rows a scale [R or 1, G] and zero point (same shape, or empty) stand for: 0 when one row is shared by all.
int64_t check_qparams(const Tensor& scale, const Tensor& zero, int64_t rows, int64_t groups) {
  check_type(scale, ScalarType::Float, 2, "scale [R or 1, G] float32");
  STD_TORCH_CHECK((scale.size(0) == rows || scale.size(0) == 1) && scale.size(1) == groups,
                  "scale must be [R or 1, G] of the tensor");
  if (zero.numel()) {
    check_type(zero, ScalarType::Int, 2, "zero_point [R or 1, G] int32");
    STD_TORCH_CHECK(zero.size(0) == scale.size(0) && zero.size(1) == groups, "zero_point must be shaped like the scale");
  }
  return scale.size(0) == rows ? groups : 0;
}

void check_bits(int64_t bits) { STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits must be from 2 to 8"); }

template <class T>
T* data(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

template <class F>
void over_rows(int64_t rows, int64_t k, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, k)), f);
}

// values: 0 none, 1 float32, 2 bfloat16. An empty `scale` asks for the grid of x itself, min-max. sum_group: 0 for none.
// Returns values, codes, sums, scale, zero_point; empty where not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grid_quantize(Tensor x, Tensor scale, Tensor zero, int64_t bits,
                                                                 bool symmetric, int64_t group, double divisor,
                                                                 bool stored_scale, int64_t values, bool want_codes,
                                                                 int64_t sum_group) {
  check_plain(x, 2, "x [R, K]");
  check_bits(bits);
  qat::GridJob job{};
  const int64_t rows = x.size(0), k = x.size(1), groups = groups_of(k, group);
  STD_TORCH_CHECK(values >= 0 && values <= 2 && (sum_group == 0 || (want_codes && k % sum_group == 0)),
                  "values must be 0, 1 or 2, and sums need codes and a group that divides the row");
  job.dynamic = scale.numel() == 0;
  if (job.dynamic) {
    STD_TORCH_CHECK(divisor > 0, "divisor must be positive");
    scale = torch::stable::new_empty(x, {rows, groups}, ScalarType::Float);
    zero = torch::stable::new_empty(x, {symmetric ? 0 : rows, groups}, ScalarType::Int);
    job.scale_stride = groups;
  } else {
    STD_TORCH_CHECK(symmetric || zero.numel(), "an asymmetric grid needs a zero point");
    job.scale_stride = check_qparams(scale, zero, rows, groups);
  }
  Tensor out = torch::stable::new_empty(x, {values ? rows : 0, k}, values == 2 ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor codes = torch::stable::new_empty(x, {want_codes ? rows : 0, k}, ScalarType::Char);
  Tensor sums = torch::stable::new_empty(x, {sum_group ? rows : 0, sum_group ? k / sum_group : 0}, ScalarType::Int);
  job.x = x.data_ptr(), job.x_bf16 = is_bf16(x, "x [R, K]");
  job.k = k, job.group = group, job.groups = groups;
  job.low = -(1 << (bits - 1)), job.high = (1 << (bits - 1)) - 1;
  job.symmetric = symmetric, job.bf16_scale = stored_scale, job.divisor = static_cast<float>(divisor);
  job.scale = data<float>(scale), job.zero = symmetric ? nullptr : data<int32_t>(zero);
  job.values = data<void>(out), job.values_bf16 = values == 2;
  job.codes = data<int8_t>(codes), job.sums = data<int32_t>(sums), job.sum_group = sum_group;
  over_rows(rows, k, [&](int64_t begin, int64_t end) { qat::kernels().train->quantize(job, begin, end); });
  if (!job.dynamic) {  // an op may not hand an argument back
    scale = torch::stable::new_empty(x, {0, groups}, ScalarType::Float);
    zero = torch::stable::new_empty(x, {0, groups}, ScalarType::Int);
  }
  return {out, codes, sums, scale, zero};
}

// dx in x's dtype, and per row and group the gradients of scale and zero point (empty when not `learns`).
std::tuple<Tensor, Tensor, Tensor> grid_gradient(Tensor grad, Tensor x, Tensor scale, Tensor zero, int64_t bits,
                                                 int64_t group, bool learns_scale, bool learns_zero) {
  check_plain(x, 2, "x [R, K]");
  check_plain(grad, 2, "grad [R, K]");
  check_bits(bits);
  qat::GradientJob job{};
  const int64_t rows = x.size(0), k = x.size(1), groups = groups_of(k, group);
  STD_TORCH_CHECK(grad.size(0) == rows && grad.size(1) == k, "grad must be shaped like x");
  STD_TORCH_CHECK(learns_scale || !learns_zero, "a zero point is learned together with a scale");
  job.scale_stride = check_qparams(scale, zero, rows, groups);
  Tensor dx = torch::stable::new_empty(x, {rows, k});
  Tensor dscale = torch::stable::new_empty(x, {learns_scale ? rows : 0, groups}, ScalarType::Float);
  Tensor dzero = torch::stable::new_empty(x, {learns_zero ? rows : 0, groups}, ScalarType::Float);
  job.grad = grad.data_ptr(), job.grad_bf16 = is_bf16(grad, "grad [R, K]");
  job.x = x.data_ptr(), job.x_bf16 = is_bf16(x, "x [R, K]");
  job.k = k, job.group = group, job.groups = groups;
  job.low = -(1 << (bits - 1)), job.high = (1 << (bits - 1)) - 1;
  job.scale = data<float>(scale), job.zero = data<int32_t>(zero);
  job.dx = dx.data_ptr(), job.dscale = data<float>(dscale), job.dzero = data<float>(dzero);
  over_rows(rows, k, [&](int64_t begin, int64_t end) { qat::kernels().train->gradient(job, begin, end); });
  return {dx, dscale, dzero};
}

// (codes - zero_point) * scale of int8 codes [R, K], as float32 or bfloat16.
Tensor grid_dequantize(Tensor codes, Tensor scale, Tensor zero, int64_t group, bool bf16) {
  check_type(codes, ScalarType::Char, 2, "codes [R, K] int8");
  qat::GridJob job{};
  const int64_t rows = codes.size(0), k = codes.size(1);
  job.k = k, job.group = group, job.groups = groups_of(k, group);
  job.scale_stride = check_qparams(scale, zero, rows, job.groups);
  Tensor out = torch::stable::new_empty(codes, {rows, k}, bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  job.scale = data<float>(scale), job.zero = data<int32_t>(zero), job.codes = data<int8_t>(codes);
  job.values = data<void>(out), job.values_bf16 = bf16;
  over_rows(rows, k, [&](int64_t begin, int64_t end) { qat::kernels().train->dequantize(job, begin, end); });
  return out;
}

struct Weight {
  const int8_t* codes;
  const float* scale;
  const int32_t* zero;
  int64_t n, k, groups, scale_stride;
  int offset;
};

// Rows [first, first + 32) of a weight as a panel; `lines`, `scales` and `zeros` hold it.
qat::Panel panel_of(const Weight& w, int64_t first, uint8_t* lines, uint16_t* scales, int8_t* zeros) {
  const int64_t rows = std::min<int64_t>(qat::PANEL_ROWS, w.n - first);
  const qat::TrainKernels& train = *qat::kernels().train;
  train.panel(w.codes + first * w.k, w.k, rows, w.k, w.offset, lines);
  float wide[qat::PANEL_ROWS];
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t r = 0; r < qat::PANEL_ROWS; ++r) {
      const int64_t at = (first + std::min(r, rows - 1)) * w.scale_stride + g;
      wide[r] = w.scale[at];
      if (w.zero) zeros[g * qat::PANEL_ROWS + r] = static_cast<int8_t>(w.zero[at]);
    }
    train.narrow(wide, 0, 1, qat::PANEL_ROWS, scales + g * qat::PANEL_ROWS, 0);
  }
  return {lines, scales, w.zero ? zeros : nullptr, w.groups, w.k / w.groups, w.offset};
}

// y [M, N] = the integer product of input codes [M, K] (one scale per row, sums per group of the weight) with weight
// codes [N, K] whose scales are exact in bfloat16; float32 or bfloat16.
Tensor integer_linear(Tensor x_codes, Tensor x_sums, Tensor x_scale, Tensor w_codes, Tensor w_scale, Tensor w_zero,
                      int64_t bits, bool bf16) {
  check_type(x_codes, ScalarType::Char, 2, "x_codes [M, K] int8");
  check_type(x_sums, ScalarType::Int, 2, "x_sums [M, G] int32");
  check_type(x_scale, ScalarType::Float, 2, "x_scale [M, 1] float32");
  check_type(w_codes, ScalarType::Char, 2, "w_codes [N, K] int8");
  check_bits(bits);
  const int64_t m = x_codes.size(0), k = x_codes.size(1), n = w_codes.size(0), groups = x_sums.size(1);
  STD_TORCH_CHECK(w_codes.size(1) == k && groups > 0 && k % (4 * groups) == 0 && k / groups <= 65536,
                  "inputs and weight must have the same K, in groups of a multiple of 4 and at most 65536");
  STD_TORCH_CHECK(x_sums.size(0) == m && x_scale.size(0) == m && x_scale.size(1) == 1, "sums and scales must have M rows");
  const int64_t stride = check_qparams(w_scale, w_zero, n, groups);
  const Weight w{data<int8_t>(w_codes), data<float>(w_scale), data<int32_t>(w_zero), n, k, groups, stride,
                 1 << (bits - 1)};
  const qat::Inputs in{data<int8_t>(x_codes), data<int32_t>(x_sums), data<float>(x_scale), nullptr, k, 1};
  Tensor y = torch::stable::new_empty(x_scale, {m, n}, bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  if (m == 0 || n == 0) return y;
  torch::stable::parallel_for(0, (n + qat::PANEL_ROWS - 1) / qat::PANEL_ROWS, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t ROWS = qat::PANEL_ROWS, CHUNK = 48;
    std::vector<uint8_t> lines(ROWS * k);
    std::vector<uint16_t> scales(ROWS * groups);
    std::vector<int8_t> zeros(ROWS * groups);
    float wide[CHUNK * ROWS];
    for (int64_t p = begin; p < end; ++p) {
      const qat::Panel panel = panel_of(w, p * ROWS, lines.data(), scales.data(), zeros.data());
      const int64_t rows = std::min(ROWS, n - p * ROWS);
      if (!bf16) {
        qat::kernels().gemm(panel, in, 0, m, data<float>(y) + p * ROWS, n, rows);
        continue;
      }
      for (int64_t first = 0; first < m; first += CHUNK) {
        const int64_t count = std::min(CHUNK, m - first);
        const qat::Inputs part{in.codes + first * k, in.sums + first * groups, in.scales + first, nullptr, k, 1};
        qat::kernels().gemm(panel, part, 0, count, wide, ROWS, rows);
        qat::kernels().train->narrow(wide, ROWS, count, rows, data<uint16_t>(y) + first * n + p * ROWS, n);
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def(
      "grid_quantize(Tensor x, Tensor scale, Tensor zero_point, int bits, bool symmetric, int group, float divisor, "
      "bool stored_scale, int values, bool want_codes, int sum_group) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grid_gradient(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int bits, int group, bool learns_scale, "
      "bool learns_zero_point) -> (Tensor, Tensor, Tensor)");
  m.def("grid_dequantize(Tensor codes, Tensor scale, Tensor zero_point, int group, bool bfloat16) -> Tensor");
  m.def(
      "integer_linear(Tensor x_codes, Tensor x_sums, Tensor x_scale, Tensor w_codes, Tensor w_scale, "
      "Tensor w_zero_point, int bits, bool bfloat16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("grid_quantize", TORCH_BOX(&grid_quantize));
  m.impl("grid_gradient", TORCH_BOX(&grid_gradient));
  m.impl("grid_dequantize", TORCH_BOX(&grid_dequantize));
  m.impl("integer_linear", TORCH_BOX(&integer_linear));
}
