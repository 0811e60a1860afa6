// Packed matmuls for one instruction set; included by avx512.cpp, avxvnni.cpp, avx2.cpp and portable.cpp, each compiled
// with its own flags. Everything is in an anonymous namespace: no code of one set can be linked into another.
// After gemm_impl.h. Layout and arithmetic are told in matmul.h; the C parameter is the container.
#pragma once
#include <algorithm>
#include <vector>

#include "matmul.h"
#include "vec.h"

namespace {

using qat::Inputs;
using qat::Packed;
using qat::PANEL;

constexpr int64_t MANY = 24;  // int8 rows from which unpacking first is faster
constexpr int step_inputs(int container) { return 32 / container; }  // int8 inputs that one pair of lines takes

inline int32_t four(const int8_t* at) {
  int32_t bytes;
  std::memcpy(&bytes, at, 4);
  return bytes;
}

// Row totals of MR int8 rows over one panel: total[row][block] = sum over groups of scale * int32 sum.
#if defined(__AVX512VNNI__)

inline __m512i crumbs(__m512i line, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(line, 2 * i), _mm512_set1_epi8(3));
}

template <int MR, int C>
inline void step(const uint8_t* at, const int8_t* x, int64_t stride, __m512i (&acc)[MR][2], __m512i (&more)[MR][2]) {
  constexpr int parts = 8 / C;  // 4, 2 or 1 vectors of unsigned weights in a line
  const __m512i line[2] = {_mm512_load_si512(at), _mm512_load_si512(at + 64)};
  const __m512i low = _mm512_set1_epi8(15);
  for (int part = 0; part < parts; ++part) {
    for (int b = 0; b < 2; ++b) {
      __m512i u = line[b];
      if (C == 2) u = crumbs(u, part);
      if (C == 4) u = _mm512_and_si512(part ? _mm512_srli_epi16(u, 4) : u, low);
      for (int i = 0; i < MR; ++i) {
        __m512i& sum = MR <= 2 && (part & 1) ? more[i][b] : acc[i][b];
        sum = _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(four(x + i * stride + 4 * part)));
      }
    }
  }
}

template <int MR, int C, bool ZEROS>
inline void panel(const Packed& w, const Inputs& in, int64_t m, int64_t p, v16 (&out)[MR][2]) {
  const uint8_t* at = w.data + p * w.panel_bytes;
  const uint8_t* zeros = at + w.groups * w.group_bytes;
  const int64_t steps = w.group / step_inputs(C);
  const int8_t* x = in.codes + m * in.stride;
  const int32_t* sums = in.sums + m * w.groups;
  __m512 total[MR][2];
  for (int i = 0; i < MR; ++i) total[i][0] = total[i][1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i acc[MR][2], more[MR][2];
    for (int b = 0; b < 2; ++b) {
      __m512i offsets = _mm512_set1_epi32(w.offset);
      if (ZEROS) {
        const __m128i z = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + 32 * g + 16 * b));
        offsets = _mm512_add_epi32(offsets, _mm512_cvtepi8_epi32(z));
      }
      for (int i = 0; i < MR; ++i) {
        const int32_t sum = -sums[i * w.groups + g];
        acc[i][b] = ZEROS ? _mm512_mullo_epi32(offsets, _mm512_set1_epi32(sum)) : _mm512_set1_epi32(sum * w.offset);
        more[i][b] = _mm512_setzero_si512();
      }
    }
    for (int64_t j = 0; j < steps; ++j, at += 128, x += step_inputs(C)) {
      _mm_prefetch(reinterpret_cast<const char*>(at + 4096), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at + 4160), _MM_HINT_T0);
      step<MR, C>(at, x, in.stride, acc, more);
    }
    for (int b = 0; b < 2; ++b) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(at + 32 * b));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      for (int i = 0; i < MR; ++i) {
        const __m512i sum = MR <= 2 && C != 8 ? _mm512_add_epi32(acc[i][b], more[i][b]) : acc[i][b];
        total[i][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[i][b]);
      }
    }
    at += 64;
  }
  for (int i = 0; i < MR; ++i)
    for (int b = 0; b < 2; ++b) out[i][b] = reinterpret_cast<v16>(total[i][b]);
}

#elif defined(__AVX2__)

#if defined(__AVXVNNI__)
template <int C>
inline __m256i dot(__m256i u, __m256i s, __m256i acc) {
  return _mm256_dpbusd_avx_epi32(acc, u, s);
}
#else
inline __m256i pairs(__m256i u, __m256i s) {  // exact while u <= 15: two products stay below 2^15
  return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}

template <int C>
inline __m256i dot(__m256i u, __m256i s, __m256i acc) {
  if (C < 8) return _mm256_add_epi32(acc, pairs(u, s));
  const __m256i low = _mm256_set1_epi8(15);  // u = 16 high + low, each half exact on its own
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
  acc = _mm256_add_epi32(acc, pairs(_mm256_and_si256(u, low), s));
  return _mm256_add_epi32(acc, _mm256_slli_epi32(pairs(high, s), 4));
}
#endif

template <int MR, int C, bool ZEROS>
inline void panel(const Packed& w, const Inputs& in, int64_t m, int64_t p, v16 (&out)[MR][2]) {
  constexpr int parts = 8 / C;
  const int64_t steps = w.group / step_inputs(C);
  const __m256i mask = _mm256_set1_epi8(C == 2 ? 3 : 15);
  for (int quarter = 0; quarter < 4; ++quarter) {  // 8 rows at a time
    const uint8_t* at = w.data + p * w.panel_bytes;
    const uint8_t* zeros = at + w.groups * w.group_bytes;
    const int8_t* x = in.codes + m * in.stride;
    __m256 total[MR];
    for (int i = 0; i < MR; ++i) total[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256i offsets = _mm256_set1_epi32(w.offset);
      if (ZEROS) {
        const __m128i z = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 32 * g + 8 * quarter));
        offsets = _mm256_add_epi32(offsets, _mm256_cvtepi8_epi32(z));
      }
      __m256i acc[MR];
      for (int i = 0; i < MR; ++i)
        acc[i] = _mm256_mullo_epi32(offsets, _mm256_set1_epi32(-in.sums[(m + i) * w.groups + g]));
      for (int64_t j = 0; j < steps; ++j, at += 128, x += step_inputs(C)) {
        const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * quarter));
        for (int part = 0; part < parts; ++part) {
          const __m256i u = C == 8 ? line : _mm256_and_si256(_mm256_srli_epi16(line, C * part), mask);
          for (int i = 0; i < MR; ++i)
            acc[i] = dot<C>(u, _mm256_set1_epi32(four(x + i * in.stride + 4 * part)), acc[i]);
        }
      }
      const __m128i bf16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * quarter));
      const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
      for (int i = 0; i < MR; ++i) total[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), scale, total[i]);
      at += 64;
    }
    for (int i = 0; i < MR; ++i)
      _mm256_storeu_ps(reinterpret_cast<float*>(&out[i][quarter / 2]) + 8 * (quarter & 1), total[i]);
  }
}

#else

template <int MR, int C, bool ZEROS>
inline void panel(const Packed& w, const Inputs& in, int64_t m, int64_t p, v16 (&out)[MR][2]) {
  constexpr int parts = 8 / C, mask = (1 << C) - 1;
  const int64_t steps = w.group / step_inputs(C);
  for (int i = 0; i < MR; ++i) {
    const uint8_t* at = w.data + p * w.panel_bytes;
    const uint8_t* zeros = at + w.groups * w.group_bytes;
    const int8_t* x = in.codes + (m + i) * in.stride;
    out[i][0] = out[i][1] = v16{};
    for (int64_t g = 0; g < w.groups; ++g) {
      int32_t acc[PANEL];
      for (int r = 0; r < PANEL; ++r) {
        const int zero = ZEROS ? static_cast<int8_t>(zeros[32 * g + r]) : 0;
        acc[r] = -(w.offset + zero) * in.sums[(m + i) * w.groups + g];
      }
      for (int64_t j = 0; j < steps; ++j, at += 128, x += step_inputs(C))
        for (int r = 0; r < PANEL; ++r)
          for (int part = 0; part < parts; ++part)
            for (int t = 0; t < 4; ++t) acc[r] += (at[4 * r + t] >> (C * part) & mask) * x[4 * part + t];
      for (int b = 0; b < 2; ++b) {
        v16 sums;
        for (int r = 0; r < 16; ++r) sums[r] = static_cast<float>(acc[16 * b + r]);
        out[i][b] = fma16(sums, widen(load<h16>(at + 32 * b)), out[i][b]);
      }
      at += 64;
    }
  }
}

#endif

inline void put(float* y, int64_t rows, const v16 (&value)[2]) {
  if (rows >= PANEL) {
    store(y, value[0]);
    store(y + 16, value[1]);
  } else {
    std::memcpy(y, value, rows * sizeof(float));
  }
}

// MR int8 rows from row m on, and their outputs: one per row, or one per two planes.
template <int MR, int C, bool ZEROS>
inline void rows_of(const Packed& w, const Inputs& in, int64_t m, int64_t p, float* y, int64_t ldy) {
  v16 total[MR][2];
  panel<MR, C, ZEROS>(w, in, m, p, total);
  const int64_t rows = std::min<int64_t>(PANEL, w.n - p * PANEL);
  for (int i = 0; i < MR; i += in.planes) {
    v16 value[2];
    for (int b = 0; b < 2; ++b) value[b] = total[i][b] * all(in.scales[m + i]);
    if (in.planes == 2)
      for (int b = 0; b < 2; ++b) value[b] = value[b] + total[i + 1 < MR ? i + 1 : i][b] * all(in.scales[m + i + 1]);
    put(y + (m + i) / in.planes * ldy + p * PANEL, rows, value);
  }
}

// One panel as the bytes that `gemm` reads: lines of four inputs, an unsigned weight in each byte.
template <int C>
void unpack(const Packed& w, int64_t p, uint8_t* out, uint16_t* scales) {
  const uint8_t* at = w.data + p * w.panel_bytes;
  constexpr int parts = 8 / C;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t j = 0; j < w.group / step_inputs(C); ++j, at += 128) {
      for (int part = 0; part < parts; ++part, out += 128)
        for (int i = 0; i < 128; ++i) out[i] = at[i] >> (C * part) & ((1 << C) - 1);
    }
    std::memcpy(scales + PANEL * g, at, 64);
    at += 64;
  }
}

// Many rows: each weight is unpacked once for all of them.
template <int C>
void many_rows(const Packed& w, const Inputs& in, int64_t count, int64_t begin, int64_t end, float* y, int64_t ldy) {
  std::vector<uint8_t> lines(w.padded() * PANEL);
  std::vector<uint16_t> scales(w.groups * PANEL);
  std::vector<float> both(in.planes == 2 ? count * PANEL : 0);
  for (int64_t p = begin; p < end; ++p) {
    unpack<C>(w, p, lines.data(), scales.data());
    const uint8_t* zeros = w.data + p * w.panel_bytes + w.groups * w.group_bytes;
    const int8_t* own = w.has_zeros ? reinterpret_cast<const int8_t*>(zeros) : nullptr;
    const qat::Panel panel{lines.data(), scales.data(), own, w.groups, w.group, w.offset};
    const int64_t rows = std::min<int64_t>(PANEL, w.n - p * PANEL);
    if (in.planes == 1) {
      gemm(panel, in, 0, count, y + p * PANEL, ldy, rows);
      continue;
    }
    gemm(panel, in, 0, count, both.data(), PANEL, rows);
    for (int64_t i = 0; i < count / 2; ++i)
      for (int64_t r = 0; r < rows; ++r)
        y[i * ldy + p * PANEL + r] = both[2 * i * PANEL + r] + both[(2 * i + 1) * PANEL + r];
  }
}

template <int C, bool ZEROS>
void integer_panels(const Packed& w, const Inputs& in, int64_t m_count, int64_t begin, int64_t end, float* y,
                    int64_t ldy) {
  // inputs inside: a panel stays in cache while all input rows pass over it
  const int64_t count = m_count * in.planes;
  if (count >= MANY) return many_rows<C>(w, in, count, begin, end, y, ldy);
  for (int64_t p = begin; p < end; ++p) {
    int64_t m = 0;
    for (; m + 6 <= count; m += 6) rows_of<6, C, ZEROS>(w, in, m, p, y, ldy);
    if (m + 4 <= count) rows_of<4, C, ZEROS>(w, in, m, p, y, ldy), m += 4;
    if (m + 2 <= count) rows_of<2, C, ZEROS>(w, in, m, p, y, ldy), m += 2;
    if (m < count) rows_of<1, C, ZEROS>(w, in, m, p, y, ldy);
  }
}

template <int MR>
inline void float_rows(const Packed& w, const Inputs& in, int64_t m, int64_t p, float* y, int64_t ldy) {
  const uint8_t* at = w.data + p * w.panel_bytes;
  const float* x = in.floats + m * in.stride;
  v16 even[MR][2], odd[MR][2];
  for (int i = 0; i < MR; ++i)
    for (int b = 0; b < 2; ++b) even[i][b] = odd[i][b] = v16{};
  for (int64_t j = 0; j < w.group / 2; ++j, at += 128) {
    __builtin_prefetch(at + 4096);
    __builtin_prefetch(at + 4160);
    for (int b = 0; b < 2; ++b) {
      const i16 line = load<i16>(at + 64 * b);
      const v16 first = reinterpret_cast<v16>(line << 16), second = reinterpret_cast<v16>(line & (i16{} - 65536));
      for (int i = 0; i < MR; ++i) {
        even[i][b] = fma16(first, all(x[i * in.stride + 2 * j]), even[i][b]);
        odd[i][b] = fma16(second, all(x[i * in.stride + 2 * j + 1]), odd[i][b]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    const v16 value[2] = {even[i][0] + odd[i][0], even[i][1] + odd[i][1]};
    put(y + (m + i) * ldy + p * PANEL, std::min<int64_t>(PANEL, w.n - p * PANEL), value);
  }
}

void matmul(const Packed& w, const Inputs& in, int64_t m, int64_t begin, int64_t end, float* y, int64_t ldy) {
  if (w.container == 16) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t i = 0;
      for (; i + 4 <= m; i += 4) float_rows<4>(w, in, i, p, y, ldy);
      for (; i < m; ++i) float_rows<1>(w, in, i, p, y, ldy);
    }
    return;
  }
  const auto run = w.container == 2   ? (w.has_zeros ? integer_panels<2, true> : integer_panels<2, false>)
                   : w.container == 4 ? (w.has_zeros ? integer_panels<4, true> : integer_panels<4, false>)
                                      : (w.has_zeros ? integer_panels<8, true> : integer_panels<8, false>);
  run(w, in, m, begin, end, y, ldy);
}

// Row `row` of a packed matrix: (u - offset - zero) * scale, or the bfloat16 values.
void row(const Packed& w, int64_t index, float* out) {
  const int64_t r = index % PANEL;
  const uint8_t* at = w.data + index / PANEL * w.panel_bytes;
  const uint8_t* zeros = at + w.groups * w.group_bytes;
  if (w.container == 16) {
    for (int64_t c = 0; c < w.k; ++c) {
      uint16_t bits;
      std::memcpy(&bits, at + (c / 2) * 128 + 4 * r + 2 * (c & 1), 2);
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      std::memcpy(out + c, &wide, 4);
    }
    return;
  }
  const int C = w.container, per_step = 32 / C;
  for (int64_t g = 0; g < w.groups; ++g) {
    const uint8_t* tail = at + w.group_bytes - 64;
    const uint32_t wide = static_cast<uint32_t>(tail[2 * r] | tail[2 * r + 1] << 8) << 16;
    float scale;
    std::memcpy(&scale, &wide, 4);
    const int shift = w.offset + (w.has_zeros ? static_cast<int8_t>(zeros[32 * g + r]) : 0);
    const int64_t size = std::min(w.group, w.k - g * w.group);  // less when one group is padded to the unit
    for (int64_t c = 0; c < size; ++c) {
      const uint8_t byte = at[c / per_step * 128 + 4 * r + c % 4];
      const int u = byte >> (C * (c % per_step / 4)) & ((1 << C) - 1);
      out[g * w.group + c] = static_cast<float>(u - shift) * scale;
    }
    at += w.group_bytes;
  }
}

}  // namespace
