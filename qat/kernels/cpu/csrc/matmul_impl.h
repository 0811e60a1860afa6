// The kernels of matmul.h for one instruction set; included by avx512.cpp, avx2.cpp and portable.cpp, each compiled with
// its own flags. Everything is in an anonymous namespace: no code of one set can be linked into another.
#pragma once
#include <algorithm>
#include <cmath>

#include "matmul.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using qat::Inputs;
using qat::Packed;

#if defined(__AVX512VNNI__)

struct Lanes {  // 16 rows
  __m512i a, b;  // two accumulators: vpdpbusd has a latency of 4-5 cycles
};

inline __m512 load_scales(const uint8_t* at) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512i load_offsets(const uint8_t* at, int offset) {
  const __m128i zero = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm512_add_epi32(_mm512_cvtepi8_epi32(zero), _mm512_set1_epi32(offset));
}

inline __m512i spread(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

template <int MR, bool NIBBLE>
void block(const Packed& w, const Inputs& in, int64_t m, int64_t n_block, float* y, int64_t ldy) {
  const uint8_t* at = w.data + n_block * w.block_bytes;
  const int64_t lines = w.group / (NIBBLE ? 8 : 4);
  const __m512i low = _mm512_set1_epi8(15);
  __m512 total[MR];
  for (int i = 0; i < MR; ++i) total[i] = _mm512_setzero_ps();
  const int8_t* x = in.codes + m * in.stride;
  const int32_t* sums = in.sums + m * w.groups;
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* tail = at + lines * 64;
    const __m512i offsets = load_offsets(tail + 32, w.offset);
    Lanes acc[MR];
    for (int i = 0; i < MR; ++i) {
      const __m512i sum = _mm512_set1_epi32(-sums[i * w.groups + g]);
      acc[i].a = _mm512_mullo_epi32(offsets, sum);
      acc[i].b = _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < lines; ++j, at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at + 4608), _MM_HINT_T0);
      const __m512i line = _mm512_loadu_si512(at);
      if (NIBBLE) {
        const __m512i first = _mm512_and_si512(line, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
        for (int i = 0; i < MR; ++i) {
          acc[i].a = _mm512_dpbusd_epi32(acc[i].a, first, spread(x + i * in.stride + 8 * j));
          acc[i].b = _mm512_dpbusd_epi32(acc[i].b, second, spread(x + i * in.stride + 8 * j + 4));
        }
      } else {
        for (int i = 0; i < MR; ++i) {
          __m512i& sum = (j & 1) ? acc[i].b : acc[i].a;
          sum = _mm512_dpbusd_epi32(sum, line, spread(x + i * in.stride + 4 * j));
        }
      }
    }
    const __m512 scales = load_scales(tail);
    for (int i = 0; i < MR; ++i) {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[i].a, acc[i].b));
      total[i] = _mm512_fmadd_ps(value, scales, total[i]);
    }
    at = tail + 48;
    x += w.group;
  }
  const int64_t rows = std::min<int64_t>(16, w.n - n_block * 16);
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  for (int i = 0; i < MR; ++i) {
    const __m512 out = _mm512_mul_ps(total[i], _mm512_set1_ps(in.scales[m + i]));
    _mm512_mask_storeu_ps(y + (m + i) * ldy + n_block * 16, mask, out);
  }
}

#elif defined(__AVX2__)

inline __m256i dot(__m256i u, __m256i s, __m256i acc) {  // exact while |u s| pairs stay below 2^15: u <= 15
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

inline __m256i spread(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm256_set1_epi32(four);
}

template <int MR, bool NIBBLE>
void block(const Packed& w, const Inputs& in, int64_t m, int64_t n_block, float* y, int64_t ldy) {
  const int64_t lines = w.group / (NIBBLE ? 8 : 4);
  const __m256i low = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; ++half) {  // rows 0-7, then 8-15
    const uint8_t* at = w.data + n_block * w.block_bytes;
    const int8_t* x = in.codes + m * in.stride;
    __m256 total[MR];
    for (int i = 0; i < MR; ++i) total[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* tail = at + lines * 64;
      const __m128i zero = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tail + 32 + 8 * half));
      const __m256i offsets = _mm256_add_epi32(_mm256_cvtepi8_epi32(zero), _mm256_set1_epi32(w.offset));
      __m256i acc[MR];
      for (int i = 0; i < MR; ++i)
        acc[i] = _mm256_mullo_epi32(offsets, _mm256_set1_epi32(-in.sums[(m + i) * w.groups + g]));
      for (int64_t j = 0; j < lines; ++j, at += 64) {
        const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half));
        const __m256i first = _mm256_and_si256(line, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(line, 4), low);
        for (int i = 0; i < MR; ++i) {
          const int8_t* xi = x + i * in.stride;
          if (NIBBLE) {
            acc[i] = dot(first, spread(xi + 8 * j), acc[i]);
            acc[i] = dot(second, spread(xi + 8 * j + 4), acc[i]);
          } else {  // u = 16 second + first, each half exact on its own
            const __m256i s = spread(xi + 4 * j);
            acc[i] = dot(first, s, acc[i]);
            acc[i] = _mm256_add_epi32(acc[i], _mm256_slli_epi32(dot(second, s, _mm256_setzero_si256()), 4));
          }
        }
      }
      const __m128i bf16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tail + 16 * half));
      const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
      for (int i = 0; i < MR; ++i) total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), scales, total[i]);
      at = tail + 48;
      x += w.group;
    }
    for (int i = 0; i < MR; ++i) {
      float out[8];
      _mm256_storeu_ps(out, _mm256_mul_ps(total[i], _mm256_set1_ps(in.scales[m + i])));
      const int64_t row = n_block * 16 + 8 * half;
      for (int64_t r = 0; r < std::min<int64_t>(8, w.n - row); ++r) y[(m + i) * ldy + row + r] = out[r];
    }
  }
}

#else

template <int MR, bool NIBBLE>
void block(const Packed& w, const Inputs& in, int64_t m, int64_t n_block, float* y, int64_t ldy) {
  const int64_t lines = w.group / (NIBBLE ? 8 : 4), rows = std::min<int64_t>(16, w.n - n_block * 16);
  for (int i = 0; i < MR; ++i) {
    const uint8_t* at = w.data + n_block * w.block_bytes;
    const int8_t* x = in.codes + (m + i) * in.stride;
    float total[16] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* tail = at + lines * 64;
      for (int64_t r = 0; r < rows; ++r) {
        int32_t acc = -(w.offset + static_cast<int8_t>(tail[32 + r])) * in.sums[(m + i) * w.groups + g];
        for (int64_t j = 0; j < lines; ++j) {
          for (int t = 0; t < 4; ++t) {
            const int u = at[j * 64 + 4 * r + t];
            if (NIBBLE)
              acc += (u & 15) * x[8 * j + t] + (u >> 4) * x[8 * j + 4 + t];
            else
              acc += u * x[4 * j + t];
          }
        }
        const uint32_t bits = static_cast<uint32_t>(tail[2 * r] | tail[2 * r + 1] << 8) << 16;
        float scale;
        std::memcpy(&scale, &bits, 4);
        total[r] = std::fma(static_cast<float>(acc), scale, total[r]);
      }
      at = tail + 48;
      x += w.group;
    }
    for (int64_t r = 0; r < rows; ++r) y[(m + i) * ldy + n_block * 16 + r] = total[r] * in.scales[m + i];
  }
}

#endif

template <bool NIBBLE>
void matmul_rows(const Packed& w, const Inputs& in, int64_t m_count, int64_t begin, int64_t end, float* y, int64_t ldy) {
  // inputs outside: a block of 16 weight rows stays in L1 while all input rows pass over it
  for (int64_t n = begin; n < end; ++n) {
    int64_t m = 0;
    for (; m + 6 <= m_count; m += 6) block<6, NIBBLE>(w, in, m, n, y, ldy);
    for (; m + 2 <= m_count; m += 2) block<2, NIBBLE>(w, in, m, n, y, ldy);
    for (; m < m_count; ++m) block<1, NIBBLE>(w, in, m, n, y, ldy);
  }
}

void matmul(const Packed& w, const Inputs& in, int64_t m, int64_t begin, int64_t end, float* y, int64_t ldy) {
  if (w.nibble)
    matmul_rows<true>(w, in, m, begin, end, y, ldy);
  else
    matmul_rows<false>(w, in, m, begin, end, y, ldy);
}

// int8 codes of one row as qat/grid.py makes them: scale = absmax / 127, round half to even, clamp to [-128, 127].
void quantize(const float* x, int64_t k, int64_t padded, int64_t group, int8_t* codes, int32_t* sums, float* scale) {
  float largest = 0.f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float s = std::max(largest / 127.f, 0x1p-100f);
  *scale = s;
  for (int64_t i = 0; i < k; ++i) {
    const float v = std::nearbyint(x[i] / s);
    codes[i] = static_cast<int8_t>(std::min(127.f, std::max(-128.f, v)));
  }
  std::memset(codes + k, 0, padded - k);
  for (int64_t g = 0; g < padded / group; ++g) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = g * group; i < (g + 1) * group; ++i) sum += codes[i];
    sums[g] = sum;
  }
}

void norm(const float* x, const float* weight, int64_t h, float eps, float* out) {
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < h; ++i) squares += x[i] * x[i];
  const float factor = 1.f / std::sqrt(squares / h + eps);
  for (int64_t i = 0; i < h; ++i) out[i] = weight[i] * (x[i] * factor);
}

void gate(const float* gates, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = gates[i] / (1.f + std::exp(-gates[i])) * up[i];
}

inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline float widen(int8_t value) { return static_cast<float>(value); }

template <class T>
inline float dot_key(const float* query, const T* key, int64_t d) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += query[i] * widen(key[i]);
  return sum;
}

template <class T>
inline void add_value(float share, const T* value, int64_t d, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] += share * widen(value[i]);
}

void attend(const float* query, const qat::Cached& keys, const qat::Cached& values, int64_t positions, int64_t d,
            float* scores, float* out) {
  const float factor = 1.f / std::sqrt(static_cast<float>(d));
  float largest = -1e30f;
  for (int64_t t = 0; t < positions; ++t) {
    const float dot = keys.codes ? dot_key(query, keys.codes + t * d, d) * keys.scales[t]
                                 : dot_key(query, keys.bf16 + t * d, d);
    scores[t] = dot * factor;
    largest = std::max(largest, scores[t]);
  }
  float total = 0.f;
  for (int64_t t = 0; t < positions; ++t) {
    scores[t] = std::exp(scores[t] - largest);
    total += scores[t];
  }
  std::memset(out, 0, d * sizeof(float));
  for (int64_t t = 0; t < positions; ++t) {
    const float share = scores[t] / total;
    if (values.codes)
      add_value(share * values.scales[t], values.codes + t * d, d, out);
    else
      add_value(share, values.bf16 + t * d, d, out);
  }
}

}  // namespace
