// Torch ops of the decode engine: engines are held here by number. See engine.h.
#include "engine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <tuple>

#include "ops.h"

namespace {

using qat::check;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Held {
  qat::Engine engine;
  std::vector<Tensor> tensors;  // what the engine's pointers point into
  std::mutex busy;              // a call changes cache and scratch
};

std::mutex guard;
std::map<int64_t, std::shared_ptr<Held>> engines;
int64_t next_handle = 1;

std::shared_ptr<Held> held(int64_t handle) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = engines.find(handle);
  STD_TORCH_CHECK(found != engines.end(), "no engine ", handle, "; it was freed");
  return found->second;
}

// facts: hidden, heads, kv_heads, head_dim, inner, positions, slots, vocabulary, layers, int8 cache
// floats: cos, sin, final norm, then per layer norm1, norm2, q_norm, k_norm, qkv_bias (empty where there is none)
// windows: per layer. blobs: every packed part; grids: its n, k, group, bits, zeros, planes; input_scales: of
//   its stored input grid, or 0. parts: how many parts the
//   table has (1), then per layer qkv, out, gate_up, down, then the head.
int64_t engine_new(std::vector<int64_t> facts, double eps, std::vector<Tensor> floats, std::vector<int64_t> windows,
                   std::vector<Tensor> blobs, std::vector<int64_t> grids,
                   std::vector<double> input_scales, std::vector<int64_t> parts) {
  STD_TORCH_CHECK(facts.size() == 10, "engine_new: lists of the wrong length; call qat.serve.engine.Engine");
  for (size_t i = 0; i < 9; ++i) STD_TORCH_CHECK(facts[i] > 0 && facts[i] <= INT32_MAX, "fact ", i, " out of range");
  STD_TORCH_CHECK(floats.size() == 3 + 5 * static_cast<size_t>(facts[8]) &&
                      windows.size() == static_cast<size_t>(facts[8]) && grids.size() == 6 * blobs.size() &&
                      input_scales.size() == blobs.size() &&
                      parts.size() == 2 + 4 * static_cast<size_t>(facts[8]),
                  "engine_new: lists of the wrong length; call qat.serve.engine.Engine");
  auto own = std::make_shared<Held>();
  qat::Engine& e = own->engine;
  e.shape = {facts[0], facts[1], facts[2], facts[3], facts[4], facts[5], facts[6], facts[7], static_cast<float>(eps),
             facts[9] != 0};
  STD_TORCH_CHECK(facts[3] % 16 == 0 && facts[3] <= 512 && facts[1] % facts[2] == 0, "head size or heads out of range");
  const auto data = [&](size_t i, int64_t count, bool optional) -> const float* {
    if (optional && !floats[i].numel()) return nullptr;
    STD_TORCH_CHECK(floats[i].scalar_type() == ScalarType::Float && floats[i].is_contiguous() && floats[i].is_cpu() &&
                        floats[i].numel() == count,
                    "floats ", i, " must be ", count, " values of float32");
    return static_cast<const float*>(floats[i].data_ptr());
  };
  size_t at = 0, which = 0;
  const auto linear = [&](int64_t k, int64_t n) {
    qat::Linear made;
    STD_TORCH_CHECK(parts[which] > 0 && parts[which] <= static_cast<int64_t>(blobs.size() - at), "parts out of range");
    for (int64_t i = 0; i < parts[which]; ++i, ++at) {
      const int64_t planes = grids[6 * at + 5];
      const auto scale = static_cast<float>(input_scales[at]);
      STD_TORCH_CHECK((planes == 1 || planes == 2) && scale >= 0 && std::isfinite(scale) && (scale == 0 || planes == 1),
                      "planes or input scale out of range");
      STD_TORCH_CHECK(grids[6 * at + 1] == k, "weights ", which, " must have K = ", k, ", got ", grids[6 * at + 1]);
      made.add(qat::packed_of(blobs[at], &grids[6 * at]), static_cast<int>(planes), scale);
    }
    STD_TORCH_CHECK(made.n == n, "weights ", which, " must have ", n, " rows, got ", made.n);
    ++which;
    return made;
  };
  const int64_t heads = e.shape.heads * e.shape.head_dim, width = heads + 2 * e.shape.kv_heads * e.shape.head_dim;
  const int64_t hidden = e.shape.hidden, angles = e.shape.positions * (e.shape.head_dim / 2);
  e.cos = data(0, angles, false), e.sin = data(1, angles, false), e.final_norm = data(2, hidden, false);
  STD_TORCH_CHECK(parts[0] == 1, "the table must be one part");
  e.table = linear(hidden, e.shape.vocabulary).parts[0].weight;
  for (int64_t l = 0; l < facts[8]; ++l) {
    const size_t f = 3 + 5 * l;
    qat::Layer layer;
    layer.qkv = linear(hidden, width), layer.out = linear(heads, hidden);
    layer.gate_up = linear(hidden, 2 * e.shape.inner), layer.down = linear(e.shape.inner, hidden);
    layer.norm1 = data(f, hidden, false), layer.norm2 = data(f + 1, hidden, false);
    layer.q_norm = data(f + 2, e.shape.head_dim, true), layer.k_norm = data(f + 3, e.shape.head_dim, true);
    layer.qkv_bias = data(f + 4, width, true), layer.window = windows[l];
    STD_TORCH_CHECK(windows[l] >= 0, "windows must be at least 0");
    e.layers.push_back(std::move(layer));
  }
  e.head = linear(hidden, e.shape.vocabulary);
  e.allocate();
  own->tensors = floats;
  own->tensors.insert(own->tensors.end(), blobs.begin(), blobs.end());
  const std::lock_guard<std::mutex> lock(guard);
  engines[next_handle] = std::move(own);
  return next_handle++;
}

// Logits [S, V] of the scored rows and an empty tensor, or, with k > 0, their k best values and tokens [S, k].
std::tuple<Tensor, Tensor> engine_forward(Tensor ids, Tensor slot, Tensor position, Tensor scored, int64_t k,
                                          int64_t handle) {
  const std::shared_ptr<Held> own = held(handle);
  const std::lock_guard<std::mutex> lock(own->busy);
  qat::Engine& e = own->engine;
  for (const Tensor* t : {&ids, &slot, &position, &scored}) check(*t, ScalarType::Long, 1, "ids, slot, position, scored [M] int64");
  const auto ints = [](const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); };
  STD_TORCH_CHECK(slot.numel() == ids.numel() && position.numel() == ids.numel(), "ids, slot and position [M] must agree");
  for (int64_t i = 0; i < slot.numel(); ++i) {
    const int64_t s = ints(slot)[i], p = ints(position)[i], id = ints(ids)[i];
    STD_TORCH_CHECK(s >= 0 && s < e.shape.slots && p >= 0 && p < e.shape.positions, "slot or position out of range");
    STD_TORCH_CHECK(id >= 0 && id < e.shape.vocabulary, "token out of range");
  }
  for (int64_t i = 0; i < scored.numel(); ++i)
    STD_TORCH_CHECK(ints(scored)[i] >= 0 && ints(scored)[i] < ids.numel(), "scored row out of range");
  STD_TORCH_CHECK(k >= 0 && k <= qat::TOP_MOST && k <= e.shape.vocabulary, "k must be in [0, ",
                  std::min(e.shape.vocabulary, qat::TOP_MOST), "], got ", k);
  Tensor values = torch::stable::new_empty(ids, {scored.numel(), k ? k : e.shape.vocabulary}, ScalarType::Float);
  Tensor tokens = torch::stable::new_empty(ids, {k ? scored.numel() : 0, k});
  e.forward(ints(ids), ints(slot), ints(position), ids.numel(), ints(scored), scored.numel(), k,
            static_cast<float*>(values.data_ptr()), static_cast<int64_t*>(tokens.data_ptr()));
  return {values, tokens};
}

int64_t engine_threads(Tensor unused, int64_t handle) { return held(handle)->engine.threads_now(); }

void engine_free(Tensor unused, int64_t handle) {
  const std::lock_guard<std::mutex> lock(guard);
  engines.erase(handle);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qat, m) {
  m.def("engine_new(int[] facts, float eps, Tensor[] floats, int[] windows, Tensor[] blobs, int[] grids, "
        "float[] input_scales, int[] parts) -> int");
  m.def("engine_forward(Tensor ids, Tensor slot, Tensor position, Tensor scored, int k, int handle) -> (Tensor, Tensor)");
  m.def("engine_threads(Tensor unused, int handle) -> int");
  m.def("engine_free(Tensor unused, int handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("engine_new", TORCH_BOX(&engine_new));
  m.impl("engine_forward", TORCH_BOX(&engine_forward));
  m.impl("engine_threads", TORCH_BOX(&engine_threads));
  m.impl("engine_free", TORCH_BOX(&engine_free));
}
