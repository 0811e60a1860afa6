// Native decoding of the Llama family: one call runs every layer for M rows, each row a token of some sequence slot.
//
// The cache is [layer][slot][kv head] of qat::Cache (matmul.h): bfloat16, or int8 with one scale per position and head, the
// grid that `kv=kv8` trains (qat/nn/kv.py).
// Letters: M rows of this call, H hidden size, D head size, T positions of a slot, I inner size.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "linear.h"

namespace qat {

struct Layer {
  Linear qkv, out, gate_up, down;
  const float *norm1, *norm2;      // [H]
  const float *q_norm, *k_norm;    // [D], null without (Qwen3 has them)
  const float* qkv_bias;           // null without (Qwen2 has one)
  int64_t window;                  // positions attended to, 0: all
};

struct Shape {
  int64_t hidden, heads, kv_heads, head_dim, inner, positions, slots, vocabulary;
  float eps;
  bool int8_cache;
};

struct Scratch {
  std::vector<float> x, row, rest, query, key;
  std::vector<Rounded> rounded;
};

struct Engine {
  Shape shape;
  std::vector<Layer> layers;
  const float* final_norm;
  const float *cos, *sin;          // [T, D / 2]
  Packed table;
  Linear head;

  void allocate();                 // the cache, when shape and layers are known
  // The rows of ids [M] at (slot, position); the `scored` rows' logits [scored, vocabulary], or, with k > 0, their k best
  // as `values` and `tokens` [scored, k], best first, lower token first among equals (-1 where a row is NaN).
  void forward(const int64_t* ids, const int64_t* slot, const int64_t* position, int64_t m, const int64_t* scored,
               int64_t scored_count, int64_t k, float* values, int64_t* tokens);
  int threads_now() const { return threads_; }

 private:
  struct Call;
  void run(Call& call, Team& team, int member);
  template <class Row, class After>
  void multiply(Call& call, Team& team, int member, const Linear& w, int64_t rows, const Row& make, float* y,
                const After& after);
  void attention(Call& call, Team& team, int member, int64_t layer);
  void fetch_cache(const Call& call, const Team& team, int member, int64_t layer);
  void rotate(float* head, int64_t position, const float* own_norm) const;
  void append(const Call& call, Scratch& mine, int64_t layer, int64_t row, int64_t kv_head);
  Cache cache(int64_t layer, int64_t slot, int64_t kv_head);

  std::vector<uint8_t> keys_, values_;
  std::vector<float> key_scales_, value_scales_;
  int64_t width_ = 0;              // T rounded up to blocks of 16
  std::vector<Scratch> mine_;      // one for each thread
  Scratch shared_;
  std::vector<float> y_, qkv_, inner_, partial_, logits_;
  std::map<int64_t, Pace> pace_;   // by number of rows
  int64_t bytes_ = 0;              // of all weights that a step reads
  int threads_ = 1;
};

}  // namespace qat
