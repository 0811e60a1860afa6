// See engine.h. Work is split over torch's own thread pool, one region per matmul and one per attention.
#include "engine.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qat {

void Engine::multiply(const Packed& w, int planes, const float* in, int64_t m, float* out) {
  const int64_t padded = w.groups * w.group, rows = m * planes;
  codes.resize(std::max<size_t>(codes.size(), rows * padded));
  sums.resize(std::max<size_t>(sums.size(), rows * w.groups));
  scales.resize(std::max<size_t>(scales.size(), rows));
  rest.resize(std::max<size_t>(rest.size(), planes == 2 ? m * w.k : 0));
  both.resize(std::max<size_t>(both.size(), planes == 2 ? rows * w.n : 0));
  const auto quantize_rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      quantize_planes(in + i * w.k, w, planes, codes.data() + i * planes * padded, sums.data() + i * planes * w.groups,
                      scales.data() + i * planes, rest.data() + (planes == 2 ? i * w.k : 0));
  };
  if (m < 8)
    quantize_rows(0, m);
  else
    torch::stable::parallel_for(0, m, 4, quantize_rows);
  const Inputs inputs{codes.data(), sums.data(), scales.data(), padded};
  float* target = planes == 2 ? both.data() : out;
  const int64_t blocks = (w.n + 15) / 16;
  const int64_t grain = std::max<int64_t>(1, (48 << 10) / w.block_bytes);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    kernels().matmul(w, inputs, rows, begin, end, target, w.n);
    if (planes == 2)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = begin * 16; c < std::min(end * 16, w.n); ++c)
          out[i * w.n + c] = target[2 * i * w.n + c] + target[(2 * i + 1) * w.n + c];
  });
}

namespace {

void rotate(float* head, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

void Engine::store(const float* value, int64_t at, std::vector<int8_t>& codes_out, std::vector<float>& own_scales,
                   std::vector<uint16_t>& wide) {
  const int64_t d = shape.head_dim;
  if (shape.int8_cache) {
    int32_t unused;
    kernels().quantize(value, d, d, d, codes_out.data() + at * d, &unused, own_scales.data() + at);
    return;
  }
  for (int64_t i = 0; i < d; ++i) {  // round to nearest even, as torch does
    uint32_t bits;
    std::memcpy(&bits, value + i, 4);
    wide[at * d + i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

void Engine::attention(int64_t l, const int64_t* slot, const int64_t* position, int64_t m) {
  const Shape& s = shape;
  const Layer& layer = layers[l];
  const int64_t d = s.head_dim, width = (s.heads + 2 * s.kv_heads) * d, per_kv = s.heads / s.kv_heads;
  const auto cache = [&](int64_t which_slot, int64_t head) {
    return ((l * s.slots + which_slot) * s.kv_heads + head) * s.positions;
  };
  for (int64_t i = 0; i < m; ++i) {
    float* row = qkv.data() + i * width;
    if (layer.qkv_bias)
      for (int64_t c = 0; c < width; ++c) row[c] += layer.qkv_bias[c];
    const float *cos_row = cos + position[i] * (d / 2), *sin_row = sin + position[i] * (d / 2);
    for (int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
      const float* own = h < s.heads ? layer.q_norm : layer.k_norm;
      if (own) kernels().norm(row + h * d, own, d, s.eps, row + h * d);
      rotate(row + h * d, cos_row, sin_row, d);
    }
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t at = cache(slot[i], h) + position[i];
      store(row + (s.heads + h) * d, at, keys, key_scales, wide_keys);
      store(row + (s.heads + s.kv_heads + h) * d, at, values, value_scales, wide_values);
    }
  }
  const auto heads = [&](int64_t begin, int64_t end) {
    std::vector<float> scores(s.positions);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t i = job / s.heads, h = job % s.heads, at = cache(slot[i], h / per_kv);
      const Cached key = s.int8_cache ? Cached{keys.data() + at * d, key_scales.data() + at, nullptr}
                                      : Cached{nullptr, nullptr, wide_keys.data() + at * d};
      const Cached value = s.int8_cache ? Cached{values.data() + at * d, value_scales.data() + at, nullptr}
                                        : Cached{nullptr, nullptr, wide_values.data() + at * d};
      kernels().attend(qkv.data() + i * width + h * d, key, value, position[i] + 1, d, scores.data(),
                       mixed.data() + (i * s.heads + h) * d);
    }
  };
  int64_t longest = 0;
  for (int64_t i = 0; i < m; ++i) longest = std::max(longest, position[i] + 1);
  if (m * s.heads * longest < 4096)
    heads(0, m * s.heads);
  else
    torch::stable::parallel_for(0, m * s.heads, 1, heads);
}

void Engine::forward(const float* input, const int64_t* slot, const int64_t* position, int64_t m,
                     const int64_t* scored, int64_t scored_count, float* logits) {
  const Shape& s = shape;
  const int64_t width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const auto grow = [](std::vector<float>& v, int64_t size) { v.resize(std::max<size_t>(v.size(), size)); };
  grow(x, m * s.hidden), grow(y, m * s.hidden), grow(qkv, m * width), grow(mixed, m * s.heads * s.head_dim);
  grow(inner, m * 3 * s.inner);
  std::copy(input, input + m * s.hidden, x.begin());
  const auto add = [&] {
    for (int64_t c = 0; c < m * s.hidden; ++c) x[c] += y[c];
  };
  const auto normed = [&](const float* weight) {
    for (int64_t i = 0; i < m; ++i) kernels().norm(x.data() + i * s.hidden, weight, s.hidden, s.eps, y.data() + i * s.hidden);
  };
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    normed(layer.norm1);
    multiply(layer.qkv, layer.planes, y.data(), m, qkv.data());
    attention(static_cast<int64_t>(l), slot, position, m);
    multiply(layer.out, layer.planes, mixed.data(), m, y.data());
    add();
    normed(layer.norm2);
    float* both = inner.data();
    float* product = inner.data() + m * 2 * s.inner;
    multiply(layer.gate_up, layer.planes, y.data(), m, both);
    const auto gated = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels().gate(both + i * 2 * s.inner, both + i * 2 * s.inner + s.inner, s.inner, product + i * s.inner);
    };
    if (m < 8)
      gated(0, m);
    else
      torch::stable::parallel_for(0, m, 4, gated);
    multiply(layer.down, layer.planes, product, m, y.data());
    add();
  }
  for (int64_t i = 0; i < scored_count; ++i)
    kernels().norm(x.data() + scored[i] * s.hidden, final_norm, s.hidden, s.eps, y.data() + i * s.hidden);
  multiply(head, head_planes, y.data(), scored_count, logits);
}

}  // namespace qat
