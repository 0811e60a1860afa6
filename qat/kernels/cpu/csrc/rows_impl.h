// What a decode step does beside matmuls, for one instruction set: rounding rows to int8, norms, gates, attention over a
// cache of keys and values. Included like matmul_impl.h; arguments are told in matmul.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "matmul.h"
#include "vec.h"

namespace {

// As qat/grid.py rounds: x / scale in float32, half to even, clamped to [-128, 127].
void quantize(const float* x, int64_t k, int64_t padded, int64_t group, int8_t* codes, int32_t* sums, float* scale) {
  int32_t top = 0;  // bits of |x| compare like |x|, and those of infinities and NaN are larger than any number's
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < k; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  if (top >= 0x7f800000) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, padded);
    std::memset(sums, 0, padded / group * sizeof(int32_t));
    return;
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  const float s = std::max(largest / 127.f, 0x1p-100f);
  *scale = s;
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) {
    const float v = std::nearbyint(x[i] / s);
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::min(127.f, std::max(-128.f, v))));
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
  v16 squares{};
  int64_t i = 0;
  for (; i + 16 <= h; i += 16) {
    const v16 v = load<v16>(x + i);
    squares = fma16(v, v, squares);
  }
  float sum = sum16(squares);
  for (; i < h; ++i) sum += x[i] * x[i];
  const float factor = 1.f / std::sqrt(sum / static_cast<float>(h) + eps);
  for (i = 0; i < h; ++i) out[i] = weight[i] * (x[i] * factor);
}

void gate(const float* gates, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const v16 g = load<v16>(gates + i);
    store(out + i, g / (all(1.f) + exp16(-g)) * load<v16>(up + i));
  }
  if (i == count) return;
  v16 g{}, u{};
  std::memcpy(&g, gates + i, (count - i) * sizeof(float));
  std::memcpy(&u, up + i, (count - i) * sizeof(float));
  const v16 value = g / (all(1.f) + exp16(-g)) * u;
  std::memcpy(out + i, &value, (count - i) * sizeof(float));
}

inline uint16_t narrow(float value) {  // to nearest even, as torch does; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void append(const qat::Cache& cache, const float* key, const float* value, int64_t position, int64_t d) {
  const int64_t block = position / 16, r = position % 16;
  if (cache.key_scales) {
    int8_t codes[512];
    int32_t unused;
    quantize(key, d, d, d, codes, &unused, cache.key_scales + position);
    uint8_t* at = cache.keys + block * 16 * d + 4 * r;
    for (int64_t c = 0; c < d; ++c) at[c / 4 * 64 + c % 4] = static_cast<uint8_t>(codes[c] + 128);
    quantize(value, d, d, d, codes, &unused, cache.value_scales + position);
    std::memcpy(cache.values + position * d, codes, d);
    return;
  }
  uint8_t* at = cache.keys + block * 32 * d + 4 * r;
  for (int64_t c = 0; c < d; ++c) {
    const uint16_t bits = narrow(key[c]);
    std::memcpy(at + c / 2 * 64 + c % 2 * 2, &bits, 2);
    const uint16_t own = narrow(value[c]);
    std::memcpy(cache.values + 2 * (position * d + c), &own, 2);
  }
}

// Sixteen int8 keys against one query of two int8 planes: sums of unsigned key codes times query codes.
inline void key_sums(const uint8_t* block, const int8_t* first, const int8_t* second, int64_t d, i16& a, i16& b) {
#if defined(__AVX512VNNI__)
  __m512i x = _mm512_setzero_si512(), y = x;
  for (int64_t j = 0; j < d / 4; ++j) {
    const __m512i line = _mm512_loadu_si512(block + 64 * j);
    int32_t p, q;
    std::memcpy(&p, first + 4 * j, 4);
    std::memcpy(&q, second + 4 * j, 4);
    x = _mm512_dpbusd_epi32(x, line, _mm512_set1_epi32(p));
    y = _mm512_dpbusd_epi32(y, line, _mm512_set1_epi32(q));
  }
  a = reinterpret_cast<i16>(x), b = reinterpret_cast<i16>(y);
#else
  int32_t x[16] = {}, y[16] = {};
  for (int64_t j = 0; j < d / 4; ++j)
    for (int t = 0; t < 4; ++t) {
      const int32_t p = first[4 * j + t], q = second[4 * j + t];
#pragma omp simd
      for (int r = 0; r < 16; ++r) {
        const int32_t key = block[64 * j + 4 * r + t];
        x[r] += key * p, y[r] += key * q;
      }
    }
  a = load<i16>(x), b = load<i16>(y);
#endif
}

// Scores of one query over positions [begin, end), written to `scores` from the block of `begin` on; the largest is returned.
float score(const float* query, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d, float factor,
            float* scores) {
  int8_t planes[2][512];
  int32_t sums[2];
  float scales[2], rest[512];
  if (cache.key_scales) {
    quantize(query, d, d, d, planes[0], &sums[0], &scales[0]);
    for (int64_t c = 0; c < d; ++c) rest[c] = query[c] - scales[0] * planes[0][c];
    quantize(rest, d, d, d, planes[1], &sums[1], &scales[1]);
  }
  v16 best = all(-INFINITY);
  const int64_t first_block = begin / 16 * 16;
  for (int64_t t = first_block; t < end; t += 16) {
    v16 value{};
    if (cache.key_scales) {
      i16 a, b;
      key_sums(cache.keys + t * d, planes[0], planes[1], d, a, b);
      const v16 first = __builtin_convertvector(a - 128 * sums[0], v16) * all(scales[0]);
      value = fma16(__builtin_convertvector(b - 128 * sums[1], v16), all(scales[1]), first);
      value = value * load<v16>(cache.key_scales + t);
    } else {
      v16 odd{};
      for (int64_t j = 0; j < d / 2; ++j) {
        const i16 line = load<i16>(cache.keys + t * 2 * d + 64 * j);
        value = fma16(reinterpret_cast<v16>(line << 16), all(query[2 * j]), value);
        odd = fma16(reinterpret_cast<v16>(line & (i16{} - 65536)), all(query[2 * j + 1]), odd);
      }
      value = value + odd;
    }
    value = value * all(factor);
    store(scores + t - first_block, value);
    if (t < begin || t + 16 > end)
      for (int64_t i = 0; i < 16; ++i)
        if (t + i < begin || t + i >= end) value[i] = -INFINITY;
    best = max16(value, best);
  }
  return top16(best);
}

// sum over t of shares[t] (from position 0 on) times values [t, 16 columns x DC], for G heads at once
template <int G, int DC>
inline void mix(const qat::Cache& cache, int64_t begin, int64_t end, int64_t d, int64_t column, const float* shares,
                int64_t row, float* out, int64_t stride) {
  v16 acc[G][DC];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < DC; ++c) acc[g][c] = v16{};
  const bool is_int8 = cache.value_scales != nullptr;
  for (int64_t t = begin; t < end; ++t) {
    for (int c = 0; c < DC; ++c) {
      const int64_t at = t * d + column + 16 * c;
      const v16 value = is_int8 ? widen(load<b16>(cache.values + at)) : widen(load<h16>(cache.values + 2 * at));
      for (int g = 0; g < G; ++g) acc[g][c] = fma16(all(shares[g * row + t]), value, acc[g][c]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < DC; ++c) store(out + g * stride + column + 16 * c, acc[g][c]);
}

template <int G>
void attend_heads(const float* query, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d, float factor,
                  float* partial) {
  constexpr int64_t ROW = qat::SPLIT + 16;
  float shares[G * ROW];
  const int64_t stride = d + 2, first = begin / 16 * 16;
  for (int g = 0; g < G; ++g) {
    float* own = shares + g * ROW;
    const float top = score(query + g * d, cache, begin, end, d, factor, own);
    v16 sums{};
    for (int64_t t = first; t < end; t += 16) {
      v16 share = exp16(load<v16>(own + t - first) - all(top));
      if (t < begin || t + 16 > end)
        for (int64_t i = 0; i < 16; ++i)
          if (t + i < begin || t + i >= end) share[i] = 0.f;
      sums = sums + share;
      if (cache.value_scales) share = share * load<v16>(cache.value_scales + t);
      store(own + t - first, share);
    }
    partial[g * stride] = top;
    partial[g * stride + 1] = sum16(sums);
  }
  int64_t column = 0;
  for (; column + 64 <= d; column += 64)
    mix<G, 4>(cache, begin, end, d, column, shares - first, ROW, partial + 2, stride);
  for (; column < d; column += 16) mix<G, 1>(cache, begin, end, d, column, shares - first, ROW, partial + 2, stride);
}

void attend(const float* query, int64_t heads, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d,
            float factor, float* partial) {
  int64_t h = 0;
  const auto run = [&](auto kernel, int64_t count) {
    kernel(query + h * d, cache, begin, end, d, factor, partial + h * (d + 2));
    h += count;
  };
  while (h + 4 <= heads) run(attend_heads<4>, 4);
  if (h + 3 <= heads) run(attend_heads<3>, 3);
  if (h + 2 <= heads) run(attend_heads<2>, 2);
  if (h < heads) run(attend_heads<1>, 1);
}

void join(const float* partial, int64_t count, int64_t stride, int64_t d, float* out) {
  float top = -INFINITY, total = 0.f;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, partial[i * stride]);
  std::memset(out, 0, d * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const float* own = partial + i * stride;
    const float share = count == 1 ? 1.f : std::exp(own[0] - top);
    total += share * own[1];
    for (int64_t c = 0; c < d; ++c) out[c] += share * own[2 + c];
  }
  const float inverse = 1.f / total;
  for (int64_t c = 0; c < d; ++c) out[c] *= inverse;
}

}  // namespace
