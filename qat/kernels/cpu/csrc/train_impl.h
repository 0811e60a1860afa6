// Fake quantization row by row for one instruction set: the arithmetic of qat/grid.py, bit for bit, in one pass over
// memory. Plain loops that the compiler widens; included like gemm_impl.h.
//
// Rounding: |x / scale| is first clamped to 1024, beyond which every code is clamped anyway; adding and taking away
// 1.5 * 2^23 then rounds half to even on every machine. A NaN stays NaN and its code is 0; a group with a NaN whose
// scale is found here gets the scale NaN, as torch has it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"

namespace {

constexpr float MAGIC = 12582912.f;

inline float round_even(float v) {
  v = v < -1024.f ? -1024.f : v;
  v = v > 1024.f ? 1024.f : v;
  return (v + MAGIC) - MAGIC;
}

inline float clamp_code(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// `count` values at element `at` of a float32 or bfloat16 array; float32 is read in place, bfloat16 through `scratch`.
inline const float* floats(const void* data, bool bf16, int64_t at, int64_t count, float* scratch) {
  if (!bf16) return static_cast<const float*>(data) + at;
  const uint16_t* narrow = static_cast<const uint16_t*>(data) + at;
  for (int64_t i = 0; i < count; ++i) scratch[i] = from_bf16(narrow[i]);
  return scratch;
}

inline void narrow(const float* x, int64_t count, uint16_t* bf16) {
  for (int64_t i = 0; i < count; ++i) bf16[i] = to_bf16(x[i]);
}

struct Grid {
  float scale, zero;
};

// qat/grid.py choose_qparams for one group; S != 0 is a group size known to the compiler.
template <int S>
Grid find_grid(const qat::GridJob& job, const float* x) {
  const int64_t count = S ? S : job.group;
  float low = 0.f, high = 0.f;
  int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bad)
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    bad |= x[i] != x[i];
  }
  const float lowest = static_cast<float>(job.low);
  float scale = job.symmetric ? std::max(-low, high) / job.divisor : (high - low) / job.divisor;
  if (bad) return {std::nanf(""), 0.f};
  scale = job.bf16_scale ? from_bf16(to_bf16(std::min(std::max(scale, 0x1p-17f), 65280.f))) : std::max(scale, 0x1p-100f);
  if (job.symmetric) return {scale, 0.f};
  return {scale, clamp_code(round_even(lowest - low / scale), lowest, static_cast<float>(job.high))};
}

template <int S, bool VALUES_BF16>
void write_group(const qat::GridJob& job, const float* x, int64_t at, Grid grid) {
  const int64_t count = S ? S : job.group;
  const float low = static_cast<float>(job.low), high = static_cast<float>(job.high);
  const float scale = grid.scale, zero = grid.zero;
  if (job.codes) {
    int8_t* codes = job.codes + at;
    for (int64_t i = 0; i < count; ++i) {
      const float code = clamp_code(round_even(x[i] / scale) + zero, low, high);
      codes[i] = static_cast<int8_t>(static_cast<int32_t>(code == code ? code : 0.f));
    }
  }
  if (!job.values) return;
  if (VALUES_BF16) {
    uint16_t* values = static_cast<uint16_t*>(job.values) + at;
    for (int64_t i = 0; i < count; ++i)
      values[i] = to_bf16((clamp_code(round_even(x[i] / scale) + zero, low, high) - zero) * scale);
  } else {
    float* values = static_cast<float*>(job.values) + at;
    for (int64_t i = 0; i < count; ++i)
      values[i] = (clamp_code(round_even(x[i] / scale) + zero, low, high) - zero) * scale;
  }
}

void sum_codes(const qat::GridJob& job, int64_t row) {
  const int8_t* codes = job.codes + row * job.k;
  const int64_t groups = job.k / job.sum_group;
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = g * job.sum_group; i < (g + 1) * job.sum_group; ++i) sum += codes[i];
    job.sums[row * groups + g] = sum;
  }
}

template <int S>
void quantize_rows(const qat::GridJob& job, int64_t begin, int64_t end) {
  std::vector<float> scratch(job.x_bf16 ? job.k : 0);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = floats(job.x, job.x_bf16, row * job.k, job.k, scratch.data());
    for (int64_t g = 0; g < job.groups; ++g) {
      const int64_t at = row * job.scale_stride + g, first = g * job.group;
      Grid grid;
      if (job.dynamic) {
        grid = find_grid<S>(job, x + first);
        job.scale[at] = grid.scale;
        if (job.zero) job.zero[at] = static_cast<int32_t>(grid.zero);
      } else {
        grid = {job.scale[at], job.zero ? static_cast<float>(job.zero[at]) : 0.f};
      }
      if (job.values_bf16)
        write_group<S, true>(job, x + first, row * job.k + first, grid);
      else
        write_group<S, false>(job, x + first, row * job.k + first, grid);
    }
    if (job.sums) sum_codes(job, row);
  }
}

void grid_quantize(const qat::GridJob& job, int64_t begin, int64_t end) {
  if (job.group == 32) return quantize_rows<32>(job, begin, end);
  if (job.group == 64) return quantize_rows<64>(job, begin, end);
  if (job.group == 128) return quantize_rows<128>(job, begin, end);
  quantize_rows<0>(job, begin, end);
}

void grid_dequantize(const qat::GridJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t g = 0; g < job.groups; ++g) {
      const int64_t at = row * job.scale_stride + g, first = row * job.k + g * job.group;
      const float scale = job.scale[at], zero = job.zero ? static_cast<float>(job.zero[at]) : 0.f;
      const int8_t* codes = job.codes + first;
      if (job.values_bf16) {
        uint16_t* values = static_cast<uint16_t*>(job.values) + first;
        for (int64_t i = 0; i < job.group; ++i) values[i] = to_bf16((static_cast<float>(codes[i]) - zero) * scale);
      } else {
        float* values = static_cast<float*>(job.values) + first;
        for (int64_t i = 0; i < job.group; ++i) values[i] = (static_cast<float>(codes[i]) - zero) * scale;
      }
    }
}

// The gradients of qat/estimators.py for one group: g * m, and the sums of those of scale and zero point.
template <int S, bool SUMS>
void group_gradient(const qat::GradientJob& job, const float* g, const float* x, Grid grid, float* dx, float* dscale,
                    float* dzero) {
  const int64_t count = S ? S : job.group;
  const float scale = grid.scale, lowest = static_cast<float>(job.low) - grid.zero;
  const float highest = static_cast<float>(job.high) - grid.zero;
  float to_scale = 0.f, to_zero = 0.f;
#pragma omp simd reduction(+ : to_scale, to_zero)
  for (int64_t i = 0; i < count; ++i) {
    const float v = x[i] / scale, rounded = round_even(v);
    const bool inside = (rounded >= lowest) & (rounded <= highest);
    dx[i] = g[i] * (inside ? 1.f : 0.f);
    if (SUMS) {
      to_scale += g[i] * (inside ? rounded - v : clamp_code(rounded, lowest, highest));
      to_zero += inside ? 0.f : g[i];
    }
  }
  if (!SUMS) return;
  *dscale = to_scale;
  if (dzero) *dzero = -(to_zero * scale);
}

template <int S>
void gradient_rows(const qat::GradientJob& job, int64_t begin, int64_t end) {
  std::vector<float> grads(job.grad_bf16 ? job.k : 0), inputs(job.x_bf16 ? job.k : 0), outputs(job.x_bf16 ? job.k : 0);
  for (int64_t row = begin; row < end; ++row) {
    const float* grad = floats(job.grad, job.grad_bf16, row * job.k, job.k, grads.data());
    const float* x = floats(job.x, job.x_bf16, row * job.k, job.k, inputs.data());
    float* dx = job.x_bf16 ? outputs.data() : static_cast<float*>(job.dx) + row * job.k;
    for (int64_t g = 0; g < job.groups; ++g) {
      const int64_t at = row * job.scale_stride + g, first = g * job.group, own = row * job.groups + g;
      const Grid grid{job.scale[at], job.zero ? static_cast<float>(job.zero[at]) : 0.f};
      if (job.dscale)
        group_gradient<S, true>(job, grad + first, x + first, grid, dx + first, job.dscale + own,
                                job.dzero ? job.dzero + own : nullptr);
      else
        group_gradient<S, false>(job, grad + first, x + first, grid, dx + first, nullptr, nullptr);
    }
    if (job.x_bf16) narrow(dx, job.k, static_cast<uint16_t*>(job.dx) + row * job.k);
  }
}

void grid_gradient(const qat::GradientJob& job, int64_t begin, int64_t end) {
  if (job.group == 32) return gradient_rows<32>(job, begin, end);
  if (job.group == 64) return gradient_rows<64>(job, begin, end);
  if (job.group == 128) return gradient_rows<128>(job, begin, end);
  gradient_rows<0>(job, begin, end);
}

// Four inputs of a row are moved as one 32-bit word; adding the offset to a signed byte cannot carry once its top bit
// has been flipped: code + offset = (code ^ 0x80) - (128 - offset), and every byte of the left is at least 128 - offset.
void make_panel(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, int offset, uint8_t* lines) {
  const uint32_t less = static_cast<uint32_t>(128 - offset) * 0x01010101u;
  uint32_t* out = reinterpret_cast<uint32_t*>(lines);
  constexpr int64_t TILE = 16;  // words of a row taken together: one cache line
  for (int64_t from = 0; from < k / 4; from += TILE) {
    const int64_t to = std::min(k / 4, from + TILE);
    for (int64_t r = 0; r < qat::PANEL_ROWS; ++r) {
      const int8_t* row = codes + std::min(r, rows - 1) * stride;
      for (int64_t j = from; j < to; ++j) {
        uint32_t word;
        std::memcpy(&word, row + 4 * j, 4);
        out[j * qat::PANEL_ROWS + r] = (word ^ 0x80808080u) - less;
      }
    }
  }
}

void narrow_rows(const float* x, int64_t ldx, int64_t rows, int64_t count, uint16_t* bf16, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    if (count == qat::PANEL_ROWS)  // a length the compiler knows
      narrow(x + r * ldx, qat::PANEL_ROWS, bf16 + r * ldo);
    else
      narrow(x + r * ldx, count, bf16 + r * ldo);
  }
}

const qat::TrainKernels train_kernels{grid_quantize, grid_gradient, grid_dequantize, make_panel, narrow_rows};

}  // namespace
