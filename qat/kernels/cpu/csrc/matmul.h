// The kernels behind every op: weight layout, arguments, and the table of functions that each instruction set fills.
//
// Weight layout (private to these kernels, made by `prepack` in qat/kernels/cpu/__init__.py; canonical bytes are in
// qat/packing.py). A panel is 32 weight rows: two blocks of 16. u = code + 2^(bits-1), unsigned.
//
//   panel:  groups x [lines of 64 bytes, alternately of block 0 and 1][32 bf16 scales], then, for asymmetric weights,
//           groups x [32 int8 zero points]. A panel is one sequential stream of whole cache lines.
//   container 2, S / 16 line pairs:  line j, byte 4 r + t = sum over i < 4 of u(r, 16 j + 4 i + t) << 2 i
//   container 4, S / 8 line pairs:   line j, byte 4 r + t = u(r, 8 j + t) | u(r, 8 j + 4 + t) << 4
//   container 8, S / 4 line pairs:   line j, byte 4 r + t = u(r, 4 j + t)
//   container 16 (bfloat16, one group, no scales), S / 2 line pairs:  line j, element 2 r + t = w(r, 2 j + t)
//
// One line feeds vpdpbusd: unsigned weights against the four int8 inputs of each lane. Offset and zero point are folded
// into the start value of the accumulator: -(2^(bits-1) + z) * sum(inputs). Sums of int32 are exact, so every
// instruction set gives the same ones, and float totals are made in the same order with the same fused operations.
//
// Letters: M input rows, N weight rows, K inputs, S group size, D head size, T positions.
#pragma once
#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace qat {

constexpr int64_t PANEL = PANEL_ROWS;

struct Packed {
  const uint8_t* data;
  int64_t n, k;          // logical shape
  int64_t group;         // S, a multiple of 32 after padding
  int64_t groups;        // per row
  int container;         // 2, 4, 8 or 16
  int offset;            // 2^(bits-1)
  bool has_zeros;
  int64_t panels, group_bytes, panel_bytes;
  int64_t padded() const { return group * groups; }
};

// int8 rows: x = scale * codes, or for two planes x = s1 q1 + s2 q2 in consecutive rows. Container 16 reads `floats`.
struct Inputs {
  const int8_t* codes;   // [M planes, padded K]
  const int32_t* sums;   // [M planes, groups]: sum of the codes of each group
  const float* scales;   // [M planes]
  const float* floats;   // [M, padded K]
  int64_t stride;        // padded K
  int planes;
};

// y[m][32 p ..] for panels p in [begin, end) and all m rows
using MatmulFn = void (*)(const Packed&, const Inputs&, int64_t m, int64_t begin, int64_t end, float* y, int64_t ldy);
// int8 codes of one row: scale = absmax / 127, or `stored` (scale and zero point) where it is not null; rounded half to even;
// sums per group. A row that is not finite gets the scale NaN, so that all it touches is NaN. Codes behind k are zero.
using QuantizeFn = void (*)(const float* x, int64_t k, int64_t padded, int64_t group, const float* stored, int8_t* codes,
                            int32_t* sums, float* scale);

// Keys and values of one sequence and kv head, from position 0. Keys stand in blocks of 16 positions:
//   int8:  byte [block][d / 4][16][4] = code + 128, scales [T];    bfloat16: [block][d / 2][16][2]
// values position by position: int8 codes [T, D] and scales [T], or bfloat16 [T, D].
struct Cache {
  uint8_t* keys;
  float* key_scales;     // null: bfloat16
  uint8_t* values;
  float* value_scales;
};
// Partial attention of `heads` query heads [heads, D] that share a kv head over positions [begin, end): per head
// [max, total, sum of shares times values (D)], to be joined by `join`. end - begin <= SPLIT, both in one split.
using AttendFn = void (*)(const float* query, int64_t heads, const Cache&, int64_t begin, int64_t end, int64_t d,
                          float factor, float* partial);
using AppendFn = void (*)(const Cache&, const float* key, const float* value, int64_t position, int64_t d);
// The softmax average [D] of `count` partial results, `stride` floats apart.
using JoinFn = void (*)(const float* partial, int64_t count, int64_t stride, int64_t d, float* out);
// out = x / rms(x) * weight over h values.
using NormFn = void (*)(const float* x, const float* weight, int64_t h, float eps, float* out);
// out[i] = silu(gate[i]) * up[i]
using GateFn = void (*)(const float* gate, const float* up, int64_t count, float* out);
// The row `row` of a packed matrix as floats [k].
using RowFn = void (*)(const Packed&, int64_t row, float* out);

struct Kernels {
  const char* name;
  MatmulFn matmul;
  QuantizeFn quantize;
  AttendFn attend;
  AppendFn append;
  JoinFn join;
  NormFn norm;
  GateFn gate;
  RowFn row;
  GemmFn gemm;
  const TrainKernels* train;
};

const Kernels* avx512_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
const Kernels& kernels();

// One row [k] as `planes` int8 rows: x = s1 q1 (+ s2 q2, the rest quantized again; `rest` is scratch [k]).
void quantize_planes(const float* x, const Packed& w, int planes, int8_t* codes, int32_t* sums, float* scales,
                     float* rest);

constexpr int64_t SPLIT = 256;  // positions of one partial attention

}  // namespace qat
