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

// As qat/grid.py rounds: x / scale in float32, half to even, plus zero, clamped to [-128, 127]. Sixteen values, as whole
// numbers. Without a stored grid |x / scale| is at most 127 and zero is 0.
template <bool STORED>
inline i16 codes16(v16 x, v16 scale, i16 zero) {
  const v16 shifter = all(0x1.8p23f);  // adding it rounds to a whole number, half to even, and keeps it in the low bits
  v16 scaled = x / scale;
  if (STORED) {  // what the last line clamps anyway, and the low bits hold; |zero| is at most 128
    scaled = scaled < all(-300.f) ? all(-300.f) : scaled;
    scaled = scaled > all(300.f) ? all(300.f) : scaled;
  }
  const i16 codes = reinterpret_cast<i16>(scaled + shifter) - reinterpret_cast<i16>(shifter) + zero;
  const i16 low = i16{} - 128, high = i16{} + 127;
  const i16 above = codes < low ? low : codes;
  return above > high ? high : above;
}

inline int32_t sum16(i16 v) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
}

// Sixteen values from x, zeros behind the last of `left`.
inline v16 load_some(const float* x, int64_t left) {
  if (left >= 16) return load<v16>(x);
  v16 v{};
  std::memcpy(&v, x, std::max<int64_t>(0, left) * sizeof(float));
  return v;
}

// The largest magnitude of x [k]; infinity or NaN when one of them is.
inline float largest_of(const float* x, int64_t k) {
  i16 bits{};  // of |x|: they compare like |x|, and those of infinities and NaN are larger than any number's
  for (int64_t i = 0; i < k; i += 16) {
    const i16 own = reinterpret_cast<i16>(load_some(x + i, k - i)) & 0x7fffffff;
    bits = own > bits ? own : bits;
  }
  int32_t top = 0;
  for (int i = 0; i < 16; ++i) top = std::max(top, bits[i]);
  float largest;
  std::memcpy(&largest, &top, 4);
  return largest;
}

template <bool STORED>
void round_to(const float* x, int64_t k, int64_t padded, int64_t group, float scale, int zero, int8_t* codes, int32_t* sums) {
  const i16 lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const v16 s = all(scale);
  for (int64_t g = 0; g < padded / group; ++g) {
    i16 sum{};
    for (int64_t i = g * group; i < (g + 1) * group; i += 16) {
      i16 own = codes16<STORED>(load_some(x + i, k - i), s, i16{} + zero);
      if (STORED && i + 16 > k) own = lanes < i16{} + static_cast<int32_t>(std::max<int64_t>(0, k - i)) ? own : i16{};
      sum += own;
      const b16 bytes = __builtin_convertvector(own, b16);
      std::memcpy(codes + i, &bytes, std::min<int64_t>(16, padded - i));
    }
    sums[g] = sum16(sum);
  }
}

void quantize(const float* x, int64_t k, int64_t padded, int64_t group, const float* stored, int8_t* codes, int32_t* sums,
              float* scale) {
  const float largest = largest_of(x, k);
  if (!std::isfinite(largest)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(codes, 0, padded);
    std::memset(sums, 0, padded / group * sizeof(int32_t));
    return;
  }
  *scale = stored ? stored[0] : std::max(largest / 127.f, 0x1p-100f);
  if (stored)
    round_to<true>(x, k, padded, group, *scale, static_cast<int>(stored[1]), codes, sums);
  else
    round_to<false>(x, k, padded, group, *scale, 0, codes, sums);
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
    quantize(key, d, d, d, nullptr, codes, &unused, cache.key_scales + position);
    uint8_t* at = cache.keys + block * 16 * d + 4 * r;
    for (int64_t c = 0; c < d; ++c) at[c / 4 * 64 + c % 4] = static_cast<uint8_t>(codes[c] + 128);
    quantize(value, d, d, d, nullptr, codes, &unused, cache.value_scales + position);
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

// A query [D] as two int8 planes.
struct Planes {
  int8_t codes[2][512];
  int32_t sums[2];
  float scales[2];
};

void split_query(const float* query, int64_t d, Planes& out) {
  float rest[512];
  quantize(query, d, d, d, nullptr, out.codes[0], &out.sums[0], &out.scales[0]);
  for (int64_t i = 0; i < d; i += 16) {
    const v16 whole = widen(load<b16>(out.codes[0] + i));
    store(rest + i, load<v16>(query + i) - all(out.scales[0]) * whole);
  }
  quantize(rest, d, d, d, nullptr, out.codes[1], &out.sums[1], &out.scales[1]);
}

// Sixteen int8 keys against G queries of two planes: sums of (key code + 128) times query code.
template <int G>
inline void key_sums(const uint8_t* block, const Planes* queries, int64_t d, i16 (&sums)[G][2]) {
#if defined(__AVX512VNNI__)
  __m512i acc[G][2];
  for (int g = 0; g < G; ++g) acc[g][0] = acc[g][1] = _mm512_setzero_si512();
  for (int64_t j = 0; j < d; j += 4) {
    const __m512i line = _mm512_loadu_si512(block + 16 * j);
    for (int g = 0; g < G; ++g)
      for (int plane = 0; plane < 2; ++plane) {
        int32_t four;
        std::memcpy(&four, queries[g].codes[plane] + j, 4);
        acc[g][plane] = _mm512_dpbusd_epi32(acc[g][plane], line, _mm512_set1_epi32(four));
      }
  }
  for (int g = 0; g < G; ++g)
    for (int plane = 0; plane < 2; ++plane) sums[g][plane] = reinterpret_cast<i16>(acc[g][plane]);
#else
  for (int g = 0; g < G; ++g) {
    int32_t acc[2][16] = {};
    for (int64_t j = 0; j < d; ++j) {
      const int32_t p = queries[g].codes[0][j], q = queries[g].codes[1][j];
#pragma omp simd
      for (int r = 0; r < 16; ++r) {
        const int32_t key = block[16 * (j - j % 4) + 4 * r + j % 4];
        acc[0][r] += key * p, acc[1][r] += key * q;
      }
    }
    sums[g][0] = load<i16>(acc[0]), sums[g][1] = load<i16>(acc[1]);
  }
#endif
}

// Scores of G queries over the block of sixteen positions from t on.
template <int G>
inline void score_int8(const qat::Cache& cache, const Planes* queries, int64_t t, int64_t d, v16 (&value)[G]) {
  i16 sums[G][2];
  key_sums<G>(cache.keys + t * d, queries, d, sums);
  const v16 scale = load<v16>(cache.key_scales + t);
  for (int g = 0; g < G; ++g) {
    const Planes& q = queries[g];
    const v16 first = __builtin_convertvector(sums[g][0] - 128 * q.sums[0], v16) * all(q.scales[0]);
    value[g] = fma16(__builtin_convertvector(sums[g][1] - 128 * q.sums[1], v16), all(q.scales[1]), first) * scale;
  }
}

template <int G>
inline void score_bf16(const qat::Cache& cache, const float* query, int64_t t, int64_t d, v16 (&value)[G]) {
  v16 odd[G];
  for (int g = 0; g < G; ++g) value[g] = odd[g] = v16{};
  for (int64_t j = 0; j < d / 2; ++j) {
    const i16 line = load<i16>(cache.keys + t * 2 * d + 64 * j);
    const v16 first = reinterpret_cast<v16>(line << 16), second = reinterpret_cast<v16>(line & (i16{} - 65536));
    for (int g = 0; g < G; ++g) {
      value[g] = fma16(first, all(query[g * d + 2 * j]), value[g]);
      odd[g] = fma16(second, all(query[g * d + 2 * j + 1]), odd[g]);
    }
  }
  for (int g = 0; g < G; ++g) value[g] = value[g] + odd[g];
}

// sum over t of shares[t] (from position 0 on) times values [t, 16 columns x DC], for G heads at once
template <int G, int DC, bool INT8>
inline void mix(const qat::Cache& cache, int64_t begin, int64_t end, int64_t d, int64_t column, const float* shares,
                int64_t row, float* out, int64_t stride) {
  v16 acc[G][DC];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < DC; ++c) acc[g][c] = v16{};
  for (int64_t t = begin; t < end; ++t) {
    for (int c = 0; c < DC; ++c) {
      const int64_t at = t * d + column + 16 * c;
      const v16 value = INT8 ? widen(load<b16>(cache.values + at)) : widen(load<h16>(cache.values + 2 * at));
      for (int g = 0; g < G; ++g) acc[g][c] = fma16(all(shares[g * row + t]), value, acc[g][c]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < DC; ++c) store(out + g * stride + column + 16 * c, acc[g][c]);
}

template <int G, bool INT8>
void attend_heads(const float* query, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d, float factor,
                  float* partial) {
  constexpr int64_t ROW = qat::SPLIT + 16;
  alignas(64) float shares[G * ROW];
  Planes planes[G];
  const int64_t stride = d + 2, first = begin / 16 * 16;
  if (INT8)
    for (int g = 0; g < G; ++g) split_query(query + g * d, d, planes[g]);
  v16 best[G];
  for (int g = 0; g < G; ++g) best[g] = all(-INFINITY);
  for (int64_t t = first; t < end; t += 16) {
    v16 value[G];
    if (INT8)
      score_int8<G>(cache, planes, t, d, value);
    else
      score_bf16<G>(cache, query, t, d, value);
    for (int g = 0; g < G; ++g) {
      value[g] = value[g] * all(factor);
      if (t < begin || t + 16 > end)
        for (int i = 0; i < 16; ++i)
          if (t + i < begin || t + i >= end) value[g][i] = -INFINITY;
      store(shares + g * ROW + t - first, value[g]);
      best[g] = max16(value[g], best[g]);
    }
  }
  for (int g = 0; g < G; ++g) {
    float* own = shares + g * ROW;
    const v16 top = all(top16(best[g]));
    v16 sums{};
    for (int64_t t = first; t < end; t += 16) {
      v16 share = exp16(load<v16>(own + t - first) - top);
      if (t < begin || t + 16 > end)
        for (int i = 0; i < 16; ++i)
          if (t + i < begin || t + i >= end) share[i] = 0.f;
      sums = sums + share;
      if (INT8) share = share * load<v16>(cache.value_scales + t);
      store(own + t - first, share);
    }
    partial[g * stride] = top[0];
    partial[g * stride + 1] = sum16(sums);
  }
  int64_t column = 0;
  for (; column + 64 <= d; column += 64)
    mix<G, 4, INT8>(cache, begin, end, d, column, shares - first, ROW, partial + 2, stride);
  for (; column < d; column += 16)
    mix<G, 1, INT8>(cache, begin, end, d, column, shares - first, ROW, partial + 2, stride);
}

template <bool INT8>
void attend_all(const float* query, int64_t heads, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d,
                float factor, float* partial) {
  int64_t h = 0;
  const auto run = [&](auto kernel, int64_t count) {
    kernel(query + h * d, cache, begin, end, d, factor, partial + h * (d + 2));
    h += count;
  };
  while (h + 4 <= heads) run(attend_heads<4, INT8>, 4);
  if (h + 3 <= heads) run(attend_heads<3, INT8>, 3);
  if (h + 2 <= heads) run(attend_heads<2, INT8>, 2);
  if (h < heads) run(attend_heads<1, INT8>, 1);
}

void attend(const float* query, int64_t heads, const qat::Cache& cache, int64_t begin, int64_t end, int64_t d,
            float factor, float* partial) {
  if (cache.key_scales)
    attend_all<true>(query, heads, cache, begin, end, d, factor, partial);
  else
    attend_all<false>(query, heads, cache, begin, end, d, factor, partial);
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
