// The panel product of gemm.h for one instruction set; included by avx512.cpp, avx2.cpp and portable.cpp after
// matmul_impl.h. Everything is in an anonymous namespace: no code of one set can be linked into another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "matmul.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

inline float wide_scale(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline int32_t four_inputs(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return four;
}

#if defined(__AVX512VNNI__)

inline __m512 panel_scales(const uint16_t* at) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i panel_offsets(const int8_t* zeros, int offset) {
  const __m128i zero = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
  return _mm512_add_epi32(_mm512_cvtepi8_epi32(zero), _mm512_set1_epi32(offset));
}

// MR input rows times 32 weight rows: 2 MR integer and 2 MR float accumulators stay in registers at MR = 6, and 12
// independent vpdpbusd hide its latency. The inputs are broadcast from memory, four at a time.
// S != 0 is a group size known to the compiler.
template <int MR, bool SYMMETRIC, int S>
void tile(const qat::Panel& w, const qat::Inputs& in, int64_t m, float* y, int64_t ldy, int64_t rows) {
  const uint8_t* line = w.lines;
  const int8_t* x = in.codes + m * in.stride;
  const int32_t* sums = in.sums + m * w.groups;
  __m512 total[MR][2];
  for (int i = 0; i < MR; ++i) total[i][0] = total[i][1] = _mm512_setzero_ps();
  const int64_t group = S ? S : w.group;
  for (int64_t g = 0; g < w.groups; ++g, x += group) {
    __m512i acc[MR][2];
    for (int i = 0; i < MR; ++i) {
      if (SYMMETRIC) {
        acc[i][0] = acc[i][1] = _mm512_set1_epi32(-w.offset * sums[i * w.groups + g]);
      } else {
        const __m512i sum = _mm512_set1_epi32(sums[i * w.groups + g]);
        const __m512i zero = _mm512_setzero_si512();
        for (int b = 0; b < 2; ++b) {
          const __m512i offsets = panel_offsets(w.zeros + 32 * g + 16 * b, w.offset);
          acc[i][b] = _mm512_sub_epi32(zero, _mm512_mullo_epi32(offsets, sum));
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < group; j += 4, line += 128) {
      const __m512i first = _mm512_loadu_si512(line), second = _mm512_loadu_si512(line + 64);
      for (int i = 0; i < MR; ++i) {
        const __m512i inputs = _mm512_set1_epi32(four_inputs(x + i * in.stride + j));
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], first, inputs);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], second, inputs);
      }
    }
    for (int b = 0; b < 2; ++b) {
      const __m512 scales = panel_scales(w.scales + 32 * g + 16 * b);
      for (int i = 0; i < MR; ++i) total[i][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][b]), scales, total[i][b]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    const __m512 scale = _mm512_set1_ps(in.scales[m + i]);
    for (int b = 0; b < 2; ++b) {
      const int64_t left = std::min<int64_t>(16, rows - 16 * b);
      const __mmask16 mask = left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
      _mm512_mask_storeu_ps(y + (m + i) * ldy + 16 * b, mask, _mm512_mul_ps(total[i][b], scale));
    }
  }
}

template <bool SYMMETRIC, int S>
void gemm_rows(const qat::Panel& w, const qat::Inputs& in, int64_t m, int64_t m_end, float* y, int64_t ldy,
               int64_t rows) {
  for (; m + 6 <= m_end; m += 6) tile<6, SYMMETRIC, S>(w, in, m, y, ldy, rows);
  switch (m_end - m) {
    case 5: return tile<5, SYMMETRIC, S>(w, in, m, y, ldy, rows);
    case 4: return tile<4, SYMMETRIC, S>(w, in, m, y, ldy, rows);
    case 3: return tile<3, SYMMETRIC, S>(w, in, m, y, ldy, rows);
    case 2: return tile<2, SYMMETRIC, S>(w, in, m, y, ldy, rows);
    case 1: return tile<1, SYMMETRIC, S>(w, in, m, y, ldy, rows);
  }
}

void gemm(const qat::Panel& w, const qat::Inputs& in, int64_t m_begin, int64_t m_end, float* y, int64_t ldy,
          int64_t rows) {
  if (w.zeros) return gemm_rows<false, 0>(w, in, m_begin, m_end, y, ldy, rows);
  if (w.group == 32) return gemm_rows<true, 32>(w, in, m_begin, m_end, y, ldy, rows);
  gemm_rows<true, 0>(w, in, m_begin, m_end, y, ldy, rows);
}

#elif defined(__AVX2__)

inline __m256i dot_exact(__m256i u, __m256i s, __m256i acc) {  // pairs of |u s| stay below 2^15: u <= 15
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

// MR input rows times 8 weight rows, those of quarter `q` of the panel.
template <int MR>
void tile(const qat::Panel& w, const qat::Inputs& in, int64_t m, int q, float* y, int64_t ldy, int64_t rows) {
  const uint8_t* line = w.lines + 32 * q;
  const int8_t* x = in.codes + m * in.stride;
  const __m256i low = _mm256_set1_epi8(15);
  const bool wide = w.offset > 8;
  __m256 total[MR];
  for (int i = 0; i < MR; ++i) total[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g, x += w.group) {
    __m256i offsets = _mm256_set1_epi32(w.offset);
    if (w.zeros) {
      const __m128i zero = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + 32 * g + 8 * q));
      offsets = _mm256_add_epi32(offsets, _mm256_cvtepi8_epi32(zero));
    }
    __m256i acc[MR];
    for (int i = 0; i < MR; ++i)
      acc[i] = _mm256_mullo_epi32(offsets, _mm256_set1_epi32(-in.sums[(m + i) * w.groups + g]));
    for (int64_t j = 0; j < w.group; j += 4, line += 128) {
      const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
      const __m256i first = _mm256_and_si256(u, low);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
      for (int i = 0; i < MR; ++i) {
        const __m256i s = _mm256_set1_epi32(four_inputs(x + i * in.stride + j));
        acc[i] = dot_exact(first, s, acc[i]);
        if (wide)  // u = 16 second + first, each half exact on its own
          acc[i] = _mm256_add_epi32(acc[i], _mm256_slli_epi32(dot_exact(second, s, _mm256_setzero_si256()), 4));
      }
    }
    const __m128i bf16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + 32 * g + 8 * q));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
    for (int i = 0; i < MR; ++i) total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), scales, total[i]);
  }
  for (int i = 0; i < MR; ++i) {
    float out[8];
    _mm256_storeu_ps(out, _mm256_mul_ps(total[i], _mm256_set1_ps(in.scales[m + i])));
    for (int64_t r = 0; r < std::min<int64_t>(8, rows - 8 * q); ++r) y[(m + i) * ldy + 8 * q + r] = out[r];
  }
}

void gemm(const qat::Panel& w, const qat::Inputs& in, int64_t m_begin, int64_t m_end, float* y, int64_t ldy,
          int64_t rows) {
  for (int q = 0; q < 4 && 8 * q < rows; ++q) {
    int64_t m = m_begin;
    for (; m + 4 <= m_end; m += 4) tile<4>(w, in, m, q, y, ldy, rows);
    for (; m < m_end; ++m) tile<1>(w, in, m, q, y, ldy, rows);
  }
}

#else

void gemm(const qat::Panel& w, const qat::Inputs& in, int64_t m_begin, int64_t m_end, float* y, int64_t ldy,
          int64_t rows) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    float total[32] = {};
    const uint8_t* line = w.lines;
    const int8_t* x = in.codes + m * in.stride;
    for (int64_t g = 0; g < w.groups; ++g, x += w.group) {
      int32_t acc[32];
      for (int64_t r = 0; r < 32; ++r)
        acc[r] = -(w.offset + (w.zeros ? w.zeros[32 * g + r] : 0)) * in.sums[m * w.groups + g];
      for (int64_t j = 0; j < w.group; j += 4, line += 128)
        for (int64_t r = 0; r < 32; ++r)
          for (int t = 0; t < 4; ++t) acc[r] += line[4 * r + t] * x[j + t];
      for (int64_t r = 0; r < rows; ++r)
        total[r] = std::fma(static_cast<float>(acc[r]), wide_scale(w.scales[32 * g + r]), total[r]);
    }
    for (int64_t r = 0; r < rows; ++r) y[m * ldy + r] = total[r] * in.scales[m];
  }
}

#endif

}  // namespace
