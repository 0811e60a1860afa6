// Torch ops over the kernels, on LibTorch's stable ABI: one binary for every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string>
#include <vector>

#include <map>
#include <memory>
#include <mutex>

#include "engine.h"
#include "matmul.h"

namespace qat {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* limit = std::getenv("QAT_MAX_ISA");  // for tests: avx2 or portable
    const std::string most = limit ? limit : "avx512";
    __builtin_cpu_init();
    if (most == "avx512" && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      return *avx512_kernels();
    if (most != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *avx2_kernels();
    return *portable_kernels();
  }();
  return chosen;
}

void quantize_planes(const float* x, const Packed& w, int64_t planes, int8_t* codes, int32_t* sums, float* scales,
                     float* rest) {
  const int64_t padded = w.groups * w.group;
  kernels().quantize(x, w.k, padded, w.group, codes, sums, scales);
  if (planes == 1) return;
  for (int64_t c = 0; c < w.k; ++c) rest[c] = x[c] - scales[0] * codes[c];
  kernels().quantize(rest, w.k, padded, w.group, codes + padded, sums + w.groups, scales + 1);
}

}  // namespace qat

namespace {

using torch::stable::Tensor;

using torch::headeronly::ScalarType;

void check(const Tensor& x, ScalarType type, int64_t dims, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == dims && x.is_contiguous() && x.is_cpu(), what,
                  ": wrong dtype, number of dimensions or memory layout; call the functions of qat.kernels.cpu");
}

qat::Packed packed_of(const Tensor& blob, int64_t n, int64_t k, int64_t group, int64_t bits) {
  check(blob, ScalarType::Byte, 1, "blob [bytes] uint8");
  STD_TORCH_CHECK(n > 0 && k > 0 && group > 0 && group % 32 == 0 && bits >= 2 && bits <= 8, "grid out of range");
  const int64_t bytes = group / (bits <= 4 ? 8 : 4) * 64 + 48, blocks = (n + 15) / 16;
  STD_TORCH_CHECK(blob.numel() % (blocks * bytes) == 0 && blob.numel() / (blocks * bytes) * group >= k,
                  "blob does not hold a weight of this shape");
  qat::Packed w;
  w.data = static_cast<const uint8_t*>(blob.data_ptr());
  w.n = n, w.k = k, w.group = group;
  w.nibble = bits <= 4;
  w.offset = 1 << (bits - 1);
  w.group_bytes = group / (w.nibble ? 8 : 4) * 64 + 48;
  w.block_bytes = blob.numel() / ((n + 15) / 16);
  w.groups = w.block_bytes / w.group_bytes;
  return w;
}

struct Held {
  qat::Engine engine;
  std::vector<Tensor> tensors;  // what the engine's pointers point into
};

std::mutex guard;
std::map<int64_t, std::unique_ptr<Held>> engines;
int64_t next_handle = 1;

// facts: hidden, heads, kv_heads, head_dim, inner, positions, slots, vocabulary, layers, int8 cache, planes of the layers,
//   planes of the head
// floats: cos, sin, final norm, then per layer norm1, norm2, q_norm, k_norm, qkv_bias (empty where there is none)
// blobs: per layer qkv, out, gate_up, down, then the head; grids: n, k, group, bits of each
int64_t engine_new(std::vector<int64_t> facts, double eps, std::vector<Tensor> floats, std::vector<Tensor> blobs,
                   std::vector<int64_t> grids) {
  auto held = std::make_unique<Held>();
  qat::Engine& e = held->engine;
  e.shape = {facts[0], facts[1], facts[2], facts[3], facts[4], facts[5], facts[6], facts[7], static_cast<float>(eps), facts[9] != 0};
  const auto data = [&](size_t i) -> const float* {
    return floats[i].numel() ? static_cast<const float*>(floats[i].data_ptr()) : nullptr;
  };
  const auto packed = [&](size_t i) {
    return packed_of(blobs[i], grids[4 * i], grids[4 * i + 1], grids[4 * i + 2], grids[4 * i + 3]);
  };
  e.cos = data(0), e.sin = data(1), e.final_norm = data(2);
  for (int64_t l = 0; l < facts[8]; ++l) {
    const size_t f = 3 + 5 * l, b = 4 * l;
    e.layers.push_back({packed(b), packed(b + 1), packed(b + 2), packed(b + 3), static_cast<int>(facts[10]), data(f), data(f + 1), data(f + 2),
                        data(f + 3), data(f + 4)});
  }
  e.head = packed(4 * facts[8]);
  e.head_planes = static_cast<int>(facts[11]);
  const int64_t entries = facts[8] * e.shape.slots * e.shape.kv_heads * e.shape.positions;
  const int64_t values = entries * e.shape.head_dim;
  if (e.shape.int8_cache) {
    e.keys.resize(values), e.values.resize(values);
    e.key_scales.resize(entries), e.value_scales.resize(entries);
  } else {
    e.wide_keys.resize(values), e.wide_values.resize(values);
  }
  held->tensors = floats;
  held->tensors.insert(held->tensors.end(), blobs.begin(), blobs.end());
  const std::lock_guard<std::mutex> lock(guard);
  engines[next_handle] = std::move(held);
  return next_handle++;
}

Tensor engine_forward(Tensor x, Tensor slot, Tensor position, Tensor scored, int64_t handle) {
  qat::Engine& e = engines.at(handle)->engine;
  check(x, ScalarType::Float, 2, "x [M, H] float32");
  for (const Tensor* t : {&slot, &position, &scored}) check(*t, ScalarType::Long, 1, "slot, position, scored [M] int64");
  STD_TORCH_CHECK(x.size(1) == e.shape.hidden && slot.numel() == x.size(0) && position.numel() == x.size(0),
                  "x [M, H], slot [M] and position [M] must agree");
  for (int64_t i = 0; i < slot.numel(); ++i) {
    const int64_t s = static_cast<const int64_t*>(slot.data_ptr())[i];
    const int64_t p = static_cast<const int64_t*>(position.data_ptr())[i];
    STD_TORCH_CHECK(s >= 0 && s < e.shape.slots && p >= 0 && p < e.shape.positions, "slot or position out of range");
  }
  for (int64_t i = 0; i < scored.numel(); ++i) {
    const int64_t row = static_cast<const int64_t*>(scored.data_ptr())[i];
    STD_TORCH_CHECK(row >= 0 && row < x.size(0), "scored row out of range");
  }
  Tensor logits = torch::stable::new_empty(x, {scored.numel(), e.shape.vocabulary});
  const auto ints = [](const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); };
  e.forward(static_cast<const float*>(x.data_ptr()), ints(slot), ints(position), slot.numel(), ints(scored),
            scored.numel(), static_cast<float*>(logits.data_ptr()));
  return logits;
}

void engine_free(Tensor unused, int64_t handle) {
  const std::lock_guard<std::mutex> lock(guard);
  engines.erase(handle);
}

// y [M, N] float32 = x [M, K] float32 times a packed weight; planes = 1: int8 inputs, 2: inputs as two int8 planes
// (x = s (q1 + q2 / 254)), for schemes with float inputs.
Tensor packed_matmul(Tensor x, Tensor blob, int64_t n, int64_t k, int64_t group, int64_t bits, int64_t planes) {
  check(x, ScalarType::Float, 2, "x [M, K] float32");
  STD_TORCH_CHECK(x.size(1) == k && (planes == 1 || planes == 2), "x [M, K] must have K = ", k, ", and planes be 1 or 2");
  const int64_t m = x.size(0);
  const qat::Packed w = packed_of(blob, n, k, group, bits);
  const int64_t blocks = (n + 15) / 16;
  const int64_t padded = w.groups * group, rows = m * planes;
  std::vector<int8_t> codes(rows * padded);
  std::vector<int32_t> sums(rows * w.groups);
  std::vector<float> scales(rows);
  const float* in = static_cast<const float*>(x.data_ptr());
  std::vector<float> rest(planes == 2 ? k : 0);
  for (int64_t i = 0; i < m; ++i)
    qat::quantize_planes(in + i * k, w, planes, codes.data() + i * planes * padded, sums.data() + i * planes * w.groups,
                         &scales[i * planes], rest.data());
  Tensor y = torch::stable::new_empty(x, {m, n});
  float* out = static_cast<float*>(y.data_ptr());
  std::vector<float> both(planes == 2 ? rows * n : 0);
  float* target = planes == 2 ? both.data() : out;
  const qat::Inputs inputs{codes.data(), sums.data(), scales.data(), padded};
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / (w.block_bytes * std::max<int64_t>(1, rows / 4)));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    qat::kernels().matmul(w, inputs, rows, begin, end, target, n);
  });
  if (planes == 2)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < n; ++c) out[i * n + c] = both[2 * i * n + c] + both[(2 * i + 1) * n + c];
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(qat, m) {
  m.def("packed_matmul(Tensor x, Tensor blob, int n, int k, int group, int bits, int planes) -> Tensor");
  m.def("engine_new(int[] facts, float eps, Tensor[] floats, Tensor[] blobs, int[] grids) -> int");
  m.def("engine_forward(Tensor x, Tensor slot, Tensor position, Tensor scored, int handle) -> Tensor");
  m.def("engine_free(Tensor unused, int handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("packed_matmul", TORCH_BOX(&packed_matmul));
  m.impl("engine_new", TORCH_BOX(&engine_new));
  m.impl("engine_forward", TORCH_BOX(&engine_forward));
  m.impl("engine_free", TORCH_BOX(&engine_free));
}
