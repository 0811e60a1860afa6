// Packed integer matmul kernels: one source, compiled once per instruction set (see CMakeLists.txt), chosen at run time.
//
// Weight layout (private to these kernels, made by `prepack` in qat/kernels/cpu/__init__.py; canonical bytes are in
// qat/packing.py). Rows are taken 16 at a time, the inputs 32 at a time; u = code + 2^(bits-1), unsigned.
//
//   per 16 rows, per group of S inputs:  [lines of 64 bytes][16 bf16 scales][16 int8 zero points]
//   4-bit container (bits <= 4), S / 8 lines:  line j, byte 4 r + t = u(r, 8j + t) | u(r, 8j + 4 + t) << 4
//   8-bit container, S / 4 lines:              line j, byte 4 r + t = u(r, 4j + t)
//
// One line feeds vpdpbusd: unsigned weights against the four int8 inputs of each lane. The offset and the zero point
// are folded into the start value of the accumulator: -(2^(bits-1) + z) * sum(inputs). Sums of int32 are exact, so every
// instruction set gives the same ones.
//
// Letters: M input rows, N weight rows, K inputs, S group size.
#pragma once
#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace qat {

struct Packed {
  const uint8_t* data;   // n_blocks consecutive blocks of 16 rows
  int64_t n, k;          // logical shape
  int64_t group;         // S, a multiple of 32 after padding
  int64_t groups;        // per row
  int nibble;            // 1: 4-bit container, 0: 8-bit
  int offset;            // 2^(bits-1)
  int64_t group_bytes;   // bytes of one group of 16 rows
  int64_t block_bytes;   // groups * group_bytes
};

struct Inputs {
  const int8_t* codes;   // [M, padded K]
  const int32_t* sums;   // [M, groups]: sum of the codes of each group
  const float* scales;   // [M]
  int64_t stride;        // padded K
};

using MatmulFn = void (*)(const Packed&, const Inputs&, int64_t m, int64_t block_begin, int64_t block_end, float* y,
                          int64_t ldy);
using QuantizeFn = void (*)(const float* x, int64_t k, int64_t padded, int64_t group, int8_t* codes, int32_t* sums,
                            float* scale);

// Keys or values of one sequence and head: int8 codes [T, D] with a scale per position, or bfloat16 [T, D].
struct Cached {
  const int8_t* codes;     // null for bfloat16
  const float* scales;
  const uint16_t* bf16;
};
// One query head [D] over the first `positions` entries; `scores` is scratch of that length.
using AttendFn = void (*)(const float* query, const Cached& keys, const Cached& values, int64_t positions, int64_t d,
                          float* scores, float* out);
// out = x / rms(x) * weight over h values.
using NormFn = void (*)(const float* x, const float* weight, int64_t h, float eps, float* out);
// out[i] = silu(gate[i]) * up[i]
using GateFn = void (*)(const float* gate, const float* up, int64_t count, float* out);

struct Kernels {
  const char* name;
  MatmulFn matmul;
  QuantizeFn quantize;
  AttendFn attend;
  NormFn norm;
  GateFn gate;
  GemmFn gemm;
  const TrainKernels* train;
};

const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
const Kernels& kernels();
// One row as `planes` int8 rows: x = s1 q1 (+ s2 q2, the rest quantized again). `rest` is scratch [K] for two planes.
void quantize_planes(const float* x, const Packed& w, int64_t planes, int8_t* codes, int32_t* sums, float* scales,
                     float* rest);

}  // namespace qat
