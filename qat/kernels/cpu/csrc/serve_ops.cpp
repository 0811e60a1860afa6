// Torch ops of serving, one for each function of qat/kernels/reference.py of the same name. Rows are float32 [M, ...];
// a weight is `blob` with its grid n, k, group, bits, zeros as `prepack` in qat/kernels/cpu/__init__.py makes it. Five
// integers and not a list: a list takes as long as a small matmul on its way through the dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "linear.h"
#include "ops.h"

namespace {

using qat::check;
using qat::kernels;
using qat::Packed;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

Packed weight_of(const Tensor& blob, std::array<int64_t, 5> grid, bool narrow) {
  const Packed w = qat::packed_of(blob, grid.data());
  STD_TORCH_CHECK(w.container <= 8 && (w.container <= 4) == narrow, "w4 ops take 2 to 4 bits, w8 ops 5 to 8, got ", grid[3]);
  return w;
}

// A new float32 matrix; several times as fast as the dispatcher's new_empty.
Tensor new_floats(int64_t m, int64_t n) {
  const int64_t sizes[2] = {m, n}, strides[2] = {n, 1};
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// fn(begin, end) over [0, count); not through torch when there is only one piece.
template <class Fn>
void each(int64_t count, int64_t grain, const Fn& fn) {
  if (count <= grain)
    fn(0, count);
  else
    torch::stable::parallel_for(0, count, grain, fn);
}

struct Rounded {
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<float> scales;
  Rounded(int64_t rows, const Packed& w) : codes(rows * w.padded()), sums(rows * w.groups), scales(rows) {}
};

// y [M, N] of rounded rows, split over panels.
Tensor multiply(const Packed& w, const Rounded& in, int64_t m, int planes) {
  Tensor y = new_floats(m, w.n);
  float* out = static_cast<float*>(y.data_ptr());
  const qat::Inputs inputs{in.codes.data(), in.sums.data(), in.scales.data(), nullptr, w.padded(), planes};
  const int64_t work = w.panel_bytes * std::max<int64_t>(1, m * planes / 4);
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / work);
  each(w.panels, grain, [&](int64_t begin, int64_t end) {
    kernels().matmul(w, inputs, m, begin, end, out, w.n);
  });
  return y;
}

Tensor matmul(const Tensor& x, const Packed& w, int planes) {
  check(x, ScalarType::Float, 2, "x [M, K] float32");
  STD_TORCH_CHECK(x.size(1) == w.k, "x [M, K] must have K = ", w.k, ", got ", x.size(1));
  const int64_t m = x.size(0);
  Rounded in(m * planes, w);
  each(m, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> rest(planes == 2 ? w.k : 0);
    for (int64_t i = begin; i < end; ++i)
      qat::quantize_planes(floats(x) + i * w.k, w, planes, in.codes.data() + i * planes * w.padded(),
                           in.sums.data() + i * planes * w.groups, &in.scales[i * planes], rest.data());
  });
  return multiply(w, in, m, planes);
}

// Inputs on a stored grid (input_grid [2]: scale, zero point): y = s (sum c w - z sum w), the latter from a row of ones.
Tensor static_matmul(const Tensor& x, const Packed& w, const Tensor& input_grid) {
  check(x, ScalarType::Float, 2, "x [M, K] float32");
  check(input_grid, ScalarType::Float, 1, "input_grid [2] float32");
  STD_TORCH_CHECK(x.size(1) == w.k && input_grid.numel() == 2, "x [M, K] must have K = ", w.k, " and input_grid two values");
  const int64_t m = x.size(0);
  const float* stored = floats(input_grid);
  const float zero = stored[1];
  STD_TORCH_CHECK(stored[0] > 0 && std::isfinite(stored[0]) && std::fabs(zero) <= 128, "input_grid out of range");
  Rounded in(m + 1, w);
  const std::vector<float> row_of_ones(w.k, 1.f);
  const float unit[] = {1.f, 0.f};
  for (int64_t i = 0; i <= m; ++i)
    kernels().quantize(i < m ? floats(x) + i * w.k : row_of_ones.data(), w.k, w.padded(), w.group, i < m ? stored : unit,
                       in.codes.data() + i * w.padded(), in.sums.data() + i * w.groups, &in.scales[i]);
  in.scales[m] = stored[0];
  const Tensor both = multiply(w, in, m + 1, 1);
  Tensor y = new_floats(m, w.n);
  float* out = static_cast<float*>(y.data_ptr());
  const float* ones = floats(both) + m * w.n;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < w.n; ++c) out[i * w.n + c] = floats(both)[i * w.n + c] - zero * ones[c];
  return y;
}

template <bool NARROW>
Tensor a8_matmul(Tensor x, Tensor blob, int64_t n, int64_t k, int64_t group, int64_t bits, int64_t zeros,
                 std::optional<Tensor> input_grid) {
  const Packed w = weight_of(blob, {n, k, group, bits, zeros}, NARROW);
  return input_grid ? static_matmul(x, w, *input_grid) : matmul(x, w, 1);
}

template <bool NARROW>
Tensor a16_matmul(Tensor x, Tensor blob, int64_t n, int64_t k, int64_t group, int64_t bits, int64_t zeros) {
  return matmul(x, weight_of(blob, {n, k, group, bits, zeros}, NARROW), 2);
}

Tensor packed_embedding(Tensor ids, Tensor blob, int64_t n, int64_t k, int64_t group, int64_t bits, int64_t zeros) {
  check(ids, ScalarType::Long, 1, "ids [M] int64");
  const int64_t grid[5] = {n, k, group, bits, zeros};
  const Packed w = qat::packed_of(blob, grid);
  const int64_t* id = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < w.n, "ids must be in [0, ", w.n, "), got ", id[i]);
  Tensor out = new_floats(ids.numel(), w.k);
  float* rows = static_cast<float*>(out.data_ptr());
  torch::stable::parallel_for(0, ids.numel(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().row(w, id[i], rows + i * w.k);
  });
  return out;
}

// The k largest of hidden [M, K] times a head [N, K] and their columns, [M, k] each, as the engine finds them. Inputs are int8
// for int8_inputs, else two int8 planes; for a head in bfloat16 they are floats.
std::tuple<Tensor, Tensor> lm_head_top(Tensor hidden, Tensor blob, std::vector<int64_t> grid, int64_t k, bool int8_inputs) {
  check(hidden, ScalarType::Float, 2, "hidden [M, K] float32");
  STD_TORCH_CHECK(grid.size() == 5, "grid must be [n, k, group, bits, zeros]");
  const Packed w = qat::packed_of(blob, grid.data());
  STD_TORCH_CHECK(hidden.size(1) == w.k, "hidden [M, K] must have K = ", w.k, ", got ", hidden.size(1));
  STD_TORCH_CHECK(k > 0 && k <= qat::TOP_MOST && k <= w.n, "k must be in [1, ", std::min(w.n, qat::TOP_MOST), "], got ", k);
  const int64_t m = hidden.size(0);
  Tensor values = torch::stable::new_empty(hidden, {m, k});
  Tensor columns = torch::stable::new_empty(hidden, {m, k}, ScalarType::Long);
  if (m == 0) return {values, columns};
  qat::Linear head;
  head.add(w, int8_inputs ? 1 : 2, 0.f);
  std::vector<qat::Rounded> rounded;
  qat::fit(rounded, head, m);
  std::vector<float> logits(m * w.n);
  const int most = static_cast<int>(std::max<int64_t>(1, torch::stable::get_num_threads()));
  qat::Top top(most, m, k);
  qat::Team::run(most, [&](qat::Team& team, int member) {
    std::vector<float> rest(w.k);
    const auto row = [&](int64_t i, float*) { return floats(hidden) + i * w.k; };
    qat::multiply(team, member, head, m, false, rounded, nullptr, rest.data(), row, logits.data(),
                  [&](int64_t begin, int64_t end) { top.offer(member, logits.data(), w.n, begin, end); });
    team.barrier();
    if (member == 0)
      top.finish(team.size(), static_cast<float*>(values.data_ptr()), static_cast<int64_t*>(columns.data_ptr()));
  });
  return {values, columns};
}

// codes [M, K] int8 and scale [M, 1] of rows that `make(i, scratch)` yields.
template <class Make>
std::tuple<Tensor, Tensor> rounded_rows(const Tensor& like, int64_t m, int64_t k, const Make& make) {
  Tensor codes = torch::stable::new_empty(like, {m, k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(like, {m, 1});
  auto* bytes = static_cast<int8_t*>(codes.data_ptr());
  auto* scales = static_cast<float*>(scale.data_ptr());
  torch::stable::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(k);
    int32_t unused;
    for (int64_t i = begin; i < end; ++i) {
      make(i, row.data());
      kernels().quantize(row.data(), k, k, k, nullptr, bytes + i * k, &unused, scales + i);
    }
  });
  return {codes, scale};
}

std::tuple<Tensor, Tensor> rmsnorm_quantize(Tensor x, Tensor weight, double eps) {
  check(x, ScalarType::Float, 2, "x [M, K] float32");
  check(weight, ScalarType::Float, 1, "weight [K] float32");
  const int64_t k = x.size(1);
  STD_TORCH_CHECK(weight.numel() == k && k > 0, "weight [K] must have K = ", k);
  return rounded_rows(x, x.size(0), k, [&](int64_t i, float* row) {
    kernels().norm(floats(x) + i * k, floats(weight), k, static_cast<float>(eps), row);
  });
}

std::tuple<Tensor, Tensor> silu_mul_quantize(Tensor gate, Tensor up) {
  check(gate, ScalarType::Float, 2, "gate [M, K] float32");
  check(up, ScalarType::Float, 2, "up [M, K] float32");
  const int64_t k = gate.size(1);
  STD_TORCH_CHECK(up.size(0) == gate.size(0) && up.size(1) == k && k > 0, "gate and up [M, K] must have one shape");
  return rounded_rows(gate, gate.size(0), k, [&](int64_t i, float* row) {
    kernels().gate(floats(gate) + i * k, floats(up) + i * k, k, row);
  });
}

// One token of each of M sequences: rotate query and key, append key and value at `position`, attend over all up to it.
// q [M, H, D], k and v [M, KV, D]; cos and sin [T, D / 2]; caches of M sequences as matmul.h draws them, int8 when
// key_scales [M, KV, T] is not empty, T a multiple of 16.
Tensor decode_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor position, Tensor keys,
                        Tensor key_scales, Tensor values, Tensor value_scales) {
  for (const Tensor* t : {&q, &k, &v}) check(*t, ScalarType::Float, 3, "q, k, v [M, heads, D] float32");
  for (const Tensor* t : {&cos, &sin}) check(*t, ScalarType::Float, 2, "cos, sin [T, D / 2] float32");
  for (const Tensor* t : {&keys, &values}) check(*t, ScalarType::Byte, 4, "keys, values [M, KV, T, bytes] uint8");
  for (const Tensor* t : {&key_scales, &value_scales}) check(*t, ScalarType::Float, 3, "scales [M, KV, T] float32");
  check(position, ScalarType::Long, 1, "position [M] int64");
  const int64_t m = q.size(0), heads = q.size(1), d = q.size(2), kv = k.size(1), length = keys.size(2);
  const bool is_int8 = key_scales.numel() > 0;
  const int64_t bytes = d * (is_int8 ? 1 : 2);
  STD_TORCH_CHECK(d % 16 == 0 && d <= 512 && kv > 0 && heads % kv == 0, "D must be a multiple of 16, H one of KV");
  STD_TORCH_CHECK(k.size(0) == m && v.size(0) == m && v.size(1) == kv && k.size(2) == d && v.size(2) == d &&
                      position.numel() == m && cos.size(1) == d / 2 && sin.size(1) == d / 2 && sin.size(0) == cos.size(0),
                  "q, k, v, position, cos and sin must agree");
  for (const Tensor* t : {&keys, &values})
    STD_TORCH_CHECK(t->size(0) == m && t->size(1) == kv && t->size(2) == length && t->size(3) == bytes && length % 16 == 0,
                    "a cache must be [M, KV, T, ", bytes, "] with T a multiple of 16");
  for (const Tensor* t : {&key_scales, &value_scales})
    STD_TORCH_CHECK(t->numel() == (is_int8 ? m * kv * length : 0), "scales must be [M, KV, T], or both empty");
  const int64_t* at = static_cast<const int64_t*>(position.data_ptr());
  for (int64_t i = 0; i < m; ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < length && at[i] < cos.size(0), "position must be in [0, ", length, "), got ", at[i]);
  Tensor out = torch::stable::new_empty(q, {m, heads, d});
  const int64_t shared = heads / kv;
  torch::stable::parallel_for(0, m * kv, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row((shared + 1) * d), partial;
    const auto turn = [&](const float* from, int64_t p, float* to) {
      const float *c = floats(cos) + p * (d / 2), *s = floats(sin) + p * (d / 2);
      for (int64_t j = 0; j < d / 2; ++j) {
        to[j] = from[j] * c[j] - from[j + d / 2] * s[j];
        to[j + d / 2] = from[j + d / 2] * c[j] + from[j] * s[j];
      }
    };
    for (int64_t job = begin; job < end; ++job) {
      const int64_t i = job / kv, h = job % kv, p = at[i];
      const qat::Cache cache{static_cast<uint8_t*>(keys.data_ptr()) + job * length * bytes,
                             is_int8 ? static_cast<float*>(key_scales.data_ptr()) + job * length : nullptr,
                             static_cast<uint8_t*>(values.data_ptr()) + job * length * bytes,
                             is_int8 ? static_cast<float*>(value_scales.data_ptr()) + job * length : nullptr};
      turn(floats(k) + job * d, p, row.data());
      kernels().append(cache, row.data(), floats(v) + job * d, p, d);
      const float* query = floats(q) + (i * heads + h * shared) * d;
      for (int64_t g = 0; g < shared; ++g) turn(query + g * d, p, row.data() + g * d);
      const int64_t splits = p / qat::SPLIT + 1, stride = shared * (d + 2);
      partial.resize(splits * stride);
      for (int64_t s = 0; s < splits; ++s)
        kernels().attend(row.data(), shared, cache, s * qat::SPLIT, std::min((s + 1) * qat::SPLIT, p + 1), d,
                         1.f / std::sqrt(static_cast<float>(d)), partial.data() + s * stride);
      for (int64_t g = 0; g < shared; ++g)
        kernels().join(partial.data() + g * (d + 2), splits, stride, d,
                       static_cast<float*>(out.data_ptr()) + (i * heads + h * shared + g) * d);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(qat, m) {
  m.def("w4a8_matmul(Tensor x, Tensor blob, int n, int k, int group, int bits, int zeros, Tensor? input_grid=None) -> Tensor");
  m.def("w8a8_matmul(Tensor x, Tensor blob, int n, int k, int group, int bits, int zeros, Tensor? input_grid=None) -> Tensor");
  m.def("w4a16_matmul(Tensor x, Tensor blob, int n, int k, int group, int bits, int zeros) -> Tensor");
  m.def("w8a16_matmul(Tensor x, Tensor blob, int n, int k, int group, int bits, int zeros) -> Tensor");
  m.def("packed_embedding(Tensor ids, Tensor blob, int n, int k, int group, int bits, int zeros) -> Tensor");
  m.def("lm_head_top(Tensor hidden, Tensor blob, int[] grid, int k, bool int8_inputs) -> (Tensor, Tensor)");
  m.def("rmsnorm_quantize(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul_quantize(Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor position, Tensor(a!) keys, "
        "Tensor(b!) key_scales, Tensor(c!) values, Tensor(d!) value_scales) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("w4a8_matmul", TORCH_BOX(&a8_matmul<true>));
  m.impl("w8a8_matmul", TORCH_BOX(&a8_matmul<false>));
  m.impl("w4a16_matmul", TORCH_BOX(&a16_matmul<true>));
  m.impl("w8a16_matmul", TORCH_BOX(&a16_matmul<false>));
  m.impl("packed_embedding", TORCH_BOX(&packed_embedding));
  m.impl("lm_head_top", TORCH_BOX(&lm_head_top));
  m.impl("rmsnorm_quantize", TORCH_BOX(&rmsnorm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
