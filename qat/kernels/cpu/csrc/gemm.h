// Matrix-matrix product of int8 inputs with a panel of 32 weight rows, and the row functions of fake quantization: what
// each instruction set offers to prefill (ops.cpp) and to training (train.cpp).
//
// Letters: M input rows, K inputs, G groups per row, S group size.
#pragma once
#include <cstdint>

namespace qat {

struct Inputs;  // matmul.h

constexpr int64_t PANEL_ROWS = 32;

// 32 weight rows, unpacked: lines of 64 bytes, [K / 4][2 blocks][16 rows][4 inputs], unsigned u = code + offset. Rows past
// the last hold anything.
struct Panel {
  const uint8_t* lines;
  const uint16_t* scales;  // bfloat16 [G][32]
  const int8_t* zeros;     // [G][32], null when symmetric
  int64_t groups, group;   // S is a multiple of 4
  int offset;              // at most 8 promises u <= 15, which AVX2 multiplies in half the steps
};

// y[m][0 .. rows) for m in [m_begin, m_end):
//   in.scales[m] * sum over g of scale_g * (sum u x - (offset + zero_g) * in.sums[m][g])
// The sum over groups is one fused multiply-add each, in order, from 0: the same bits as a single row's product.
using GemmFn = void (*)(const Panel&, const Inputs&, int64_t m_begin, int64_t m_end, float* y, int64_t ldy,
                        int64_t rows);

// A tensor [R, K] on its grid, row by row. Null outputs are not written.
struct GridJob {
  const void* x;
  bool x_bf16;
  int64_t k, group, groups;
  int low, high;
  bool symmetric;
  bool dynamic;      // find scale and zero from x and write them; else read them
  bool bf16_scale;   // a stored scale: bfloat16 in [2^-17, 65280]; else float32 of at least 2^-100
  float divisor;
  float* scale;      // [R or 1, G]
  int32_t* zero;     // [R or 1, G], null when symmetric
  int64_t scale_stride;  // G, or 0 where all rows share one
  void* values;
  bool values_bf16;
  int8_t* codes;
  int32_t* sums;     // [R, K / sum_group] of the codes
  int64_t sum_group;
};

struct GradientJob {
  const void *grad, *x;
  bool grad_bf16, x_bf16;
  int64_t k, group, groups;
  int low, high;
  const float* scale;
  const int32_t* zero;  // null when symmetric
  int64_t scale_stride;
  void* dx;             // dtype of x
  float *dscale, *dzero;  // [R, G] or null
};

using GridFn = void (*)(const GridJob&, int64_t row_begin, int64_t row_end);
using GradientFn = void (*)(const GradientJob&, int64_t row_begin, int64_t row_end);
// 32 rows of int8 codes [K], row r at codes + r * stride, as the lines of a Panel; rows past `rows` repeat the last.
using PanelFn = void (*)(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, int offset, uint8_t* lines);
// (codes - zero) * scale as float32 or bfloat16
using DequantizeFn = void (*)(const GridJob&, int64_t row_begin, int64_t row_end);
// x [rows, count] as bfloat16; rows stand ldx and ldo values apart.
using NarrowFn = void (*)(const float* x, int64_t ldx, int64_t rows, int64_t count, uint16_t* bf16, int64_t ldo);

struct TrainKernels {
  GridFn quantize;
  GradientFn gradient;
  DequantizeFn dequantize;
  PanelFn panel;
  NarrowFn narrow;
};

}  // namespace qat
