// Native decoding of the Llama family: one call runs every layer for M rows, each row a token of some sequence slot.
//
// The cache is [layer][slot][kv head][T][D]: bfloat16, or int8 with one scale per position and head, the grid that
// `kv=kv8` trains (qat/nn/kv.py).
// Letters: M rows of this call, H hidden size, D head size, T positions of a slot, I inner size.
#pragma once
#include <cstdint>
#include <vector>

#include "matmul.h"

namespace qat {

struct Layer {
  Packed qkv, out, gate_up, down;
  int planes;                      // 1: int8 inputs; 2: float inputs as two int8 planes, error about 2^-15
  const float *norm1, *norm2;      // [H]
  const float *q_norm, *k_norm;    // [D], null without (Qwen3 has them)
  const float* qkv_bias;           // null without (Qwen2 has one)
};

struct Shape {
  int64_t hidden, heads, kv_heads, head_dim, inner, positions, slots, vocabulary;
  float eps;
  bool int8_cache;
};

struct Engine {
  Shape shape;
  std::vector<Layer> layers;
  const float* final_norm;
  const float *cos, *sin;          // [T, D / 2]
  Packed head;
  int head_planes;
  std::vector<int8_t> keys, values;
  std::vector<float> key_scales, value_scales;
  std::vector<uint16_t> wide_keys, wide_values;
  // scratch, grown when a call has more rows than any before
  std::vector<float> x, y, qkv, mixed, inner, rest, both;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<float> scales;

  // x [M, H] embeddings in, logits of the rows `scored` out [scored, vocabulary]
  void forward(const float* input, const int64_t* slot, const int64_t* position, int64_t m, const int64_t* scored,
               int64_t scored_count, float* logits);

 private:
  void attention(int64_t layer, const int64_t* slot, const int64_t* position, int64_t m);
  void multiply(const Packed& w, int planes, const float* in, int64_t m, float* out);
  void store(const float* value, int64_t at, std::vector<int8_t>& codes, std::vector<float>& own_scales,
             std::vector<uint16_t>& wide);
};

}  // namespace qat
